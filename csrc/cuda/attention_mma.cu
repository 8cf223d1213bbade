// Prepares queries for the tensor core kernel and chooses its instance; attention_mma.cuh has the kernel.
#include <algorithm>
#include <cfloat>

#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace {

// One m16n8k16 row tile: 4 frames x 4 query rows.
constexpr int kFrames = 4, kPrepared = 16;

__device__ __forceinline__ void split(float x, __half& rounded, __half& rest) {
  rounded = __float2half_rn(x), rest = __float2half_rn(x - __half2float(rounded));
}

// Two numbers as fp16, and what the rounding lost.
__device__ __forceinline__ void split(float x, float y, uint32_t& rounded, uint32_t& rest) {
  __half parts[2][2];
  split(x, parts[0][0], parts[1][0]), split(y, parts[0][1], parts[1][1]);
  rounded = *reinterpret_cast<const uint32_t*>(parts[0]), rest = *reinterpret_cast<const uint32_t*>(parts[1]);
}

// Prepares the queries of 4 query rows: q_f = T^-T R(-t_f) q, divided by a power of two so that fp16 neither overflows
// nor loses small queries. A product with T^-1 on tensor cores, both factors as sums of two fp16 numbers; a warp makes
// 16 channels. blockIdx: `frames` frames, (row, KV head), tile of 4 query rows; threads: 2 D.
template <int D>
__global__ void __launch_bounds__(2 * D) prepare_kernel(const __grid_constant__ Attention a, int frames) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  constexpr int kThreads = 2 * D, kSteps = D / 16;
  __shared__ __half
      x[2][kPrepared][D + 8];  // rotated queries, rounded, and what that lost; rows begin on different banks
  __shared__ float raw[4][D];  // q / power of two
  __shared__ float2 turn[kFrames][D / 2];  // cosine and sine
  __shared__ int most[4];                  // bits of the largest |q| of a row
  const Layer& layer = a.layer;
  const RowBlock block(a, blockIdx.y, blockIdx.z * 4, 4);
  const int begin = blockIdx.x * frames, end = min(begin + frames, a.frames);
  if (begin > 0 && int64_t(begin) * layer.frame_tokens >= block.first) return;  // nothing is stored in these frames
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, n = lane >> 2, c = lane & 3;
  const int64_t tile0 = block.head() * a.frames * gridDim.z + blockIdx.z;

  // The warp's 16 output channels of T^-1, as B operands: loads of all of it at once.
  float inverse[kSteps][2][4];
  if (layer.transform) {
    const float* from = layer.transform + (int64_t(block.h) * D + 2 * c) * D + 16 * warp + n;
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          inverse[step][j][i] = __ldg(from + (16 * step + (i & 1) + 8 * (i >> 1)) * D + 8 * j);
  }
  if (thread < 4) most[thread] = 0;
  for (int i = thread; i < 4 * D; i += kThreads)
    raw[i / D][i % D] = i / D < block.rows ? load(block.query_row(i / D), i % D, layer.dtype) : 0.f;
  __syncthreads();
  for (int i = thread; i < 4 * D; i += kThreads) {  // D is a multiple of 32: a warp's channels are of one row
    const float largest = warp_max(fabsf(raw[i / D][i % D]));
    if (lane == 0) atomicMax(&most[i / D], __float_as_int(largest));
  }
  __syncthreads();
  const auto power_of = [&](int row) {
    const float power = __int_as_float(most[row] & 0x7f800000);
    return power > 0.f ? power : 1.f;
  };
  const float sign = a.scale < 0.f ? -1.f : 1.f;  // so that a larger score is a larger product
  for (int i = thread; i < 4 * D; i += kThreads) raw[i / D][i % D] *= sign / power_of(i / D);
  if (blockIdx.x == 0 && thread < 4)
    a.magnitudes[(block.head() * gridDim.z + blockIdx.z) * 4 + thread] =
        fmaxf(power_of(thread) * fabsf(a.scale) * kLog2e, FLT_MIN);
  const int half = layer.inv_freq ? int(layer.half) : 0, d = int(layer.k.d);
  for (int frame0 = begin; frame0 < end; frame0 += kFrames) {
    for (int i = thread; i < kFrames * half; i += kThreads) {
      const float position = static_cast<float>(frame_position(layer, block.b, frame0 + i / half));
      float2& to = turn[i / half][i % half];
      sincosf(-position * layer.inv_freq[i % half], &to.y, &to.x);
    }
    __syncthreads();  // and the previous tile's products are done
#pragma unroll 2
    for (int i = thread; i < kPrepared * D; i += kThreads) {
      const int row = i / D, channel = i % D;
      const float* from = raw[row % 4];
      float value = from[channel];
      if (channel < 2 * half) {
        const bool second = layer.interleaved ? channel & 1 : channel >= half;
        const float2 by = turn[row / 4][layer.interleaved ? channel >> 1 : second ? channel - half : channel];
        const float other = from[layer.interleaved ? channel ^ 1 : second ? channel - half : channel + half];
        value = second ? value * by.x + other * by.y : value * by.x - other * by.y;
      }
      split(value, x[0][row][channel], x[1][row][channel]);
    }
    __syncthreads();
    float y[2][4] = {};
    if (layer.transform) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        uint32_t left[2][4];
#pragma unroll
        for (int part = 0; part < 2; part++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            left[part][i] =
                *reinterpret_cast<const uint32_t*>(&x[part][n + (i & 1) * 8][16 * step + 2 * c + (i >> 1) * 8]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float (&t)[4] = inverse[step][j];
          uint32_t right[2][2];
          split(t[0], t[1], right[0][0], right[1][0]), split(t[2], t[3], right[0][1], right[1][1]);
          mma::mma_dense(y[j], left[1], right[0][0], right[0][1]);
          mma::mma_dense(y[j], left[0], right[1][0], right[1][1]);
          mma::mma_dense(y[j], left[0], right[0][0], right[0][1]);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = n + (i >> 1) * 8, channel = 16 * warp + 8 * j + 2 * c + (i & 1);
          y[j][i] = __half2float(x[0][row][channel]) + __half2float(x[1][row][channel]);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = n + 8 * i, frame = frame0 + row / 4, channel = 16 * warp + 8 * j + 2 * c;
        if (frame >= end) continue;
        __half2* to = static_cast<__half2*>(a.prepared) + (tile0 + int64_t(frame) * gridDim.z) * 2 * D;
        // [subspace][row & 1][pair of channels][row / 2 of the four]
        to[((channel / d * 2 + (row & 1)) * (d / 2) + channel % d / 2) * 2 + (row >> 1 & 1)] =
            __floats2half2_rn(y[j][2 * i], y[j][2 * i + 1]);
      }
  }
}

template <int D>
cudaError_t prepare(const Attention& a, cudaStream_t stream) {
  const int row_tiles = (a.rows + 3) / 4;
  // A block loads T^-1, for as many frames as leave enough blocks to fill the GPU.
  const int64_t tiles = int64_t(a.frames + kFrames - 1) / kFrames * a.layer.B * a.layer.H * row_tiles;
  const int frames = kFrames * int(std::clamp<int64_t>(tiles / 256, 1, 16));
  prepare_kernel<D>
      <<<dim3((a.frames + frames - 1) / frames, a.layer.B * a.layer.H, row_tiles), 2 * D, 0, stream>>>(a, frames);
  return cudaGetLastError();
}

// blockIdx: query row of the launch; a thread a pair of channels.
__global__ void merge_kernel(const __grid_constant__ Attention a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int64_t row = blockIdx.x;
  const RowBlock block(a, int(row / a.rows), int(row % a.rows), 1);
  const int line = threadIdx.x, lines = int(a.layer.D) / 2;
  const float2* ends = mma::ends_of(a) + row * a.splits;
  const float2* from = reinterpret_cast<const float2*>(a.partials) + row * a.splits * lines + line;
  mma::Merged merged;
#pragma unroll 8
  for (int split = 0; split < a.splits; split++) merged.add(__ldcg(ends + split), __ldcg(from + split * lines));
  const int query = block.query(0), head = block.h * a.G + block.row0 % a.G, heads = int(a.layer.H) * a.G;
  merged.store(a, ((int64_t(block.b) * a.layer.n + query) * heads + head) * a.layer.D,
               (int64_t(block.b) * heads + head) * a.layer.n + query, line);
}

cudaError_t merge(const Attention& a, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.layer.B * a.layer.H * a.rows);
  config.blockDim = dim3(a.layer.D / 2);
  config.stream = stream;
  cudaLaunchAttribute early;  // be there when the last split ends
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = a.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, merge_kernel, a);
}

}  // namespace

int attention_mma_tables(int64_t D, int64_t k_dim, int64_t v_dim) {
  const auto of = mma::instance(D, k_dim, v_dim);
  return of ? of->table_bytes : 0;
}

cudaError_t attention_mma_launch(const Attention& a, cudaStream_t stream) {
  const int64_t D = a.layer.D;
  cudaError_t error = D == 64 ? prepare<64>(a, stream) : D == 96 ? prepare<96>(a, stream) : prepare<128>(a, stream);
  if (error == cudaSuccess) error = mma::instance(D, a.layer.k.d, a.layer.v.d)->launch(a, stream);
  if (error == cudaSuccess && a.splits > 1) error = merge(a, stream);
  return error;
}

namespace mma {

const Instance* instance(int64_t D, int64_t k_dim, int64_t v_dim) {
  for (const Instance* list : {instances_64(), instances_96(), instances_128()})
    for (; list->launch; list++)
      if (list->D == D && list->k_dim == k_dim && list->v_dim == v_dim) return list;
  return nullptr;
}

}  // namespace mma
}  // namespace million
