// pq_encode, pq_decode and pq_append_: nearest centroids, table lookup, and the write of new tokens to a cache layer.
//
//   code[b,h,t,m] = argmin_c sum_j (x[b,h,t,m,j] - codebook[h,c,m,j])^2, fp32, the lowest index on ties
//
// A block takes kTokens tokens of one (row, KV head) of the keys or of the values. It brings them to shared memory as
// fp32 (keys of an append rotated to their frame and transformed), then every thread compares one subspace of
// kPerThread tokens with every centroid: neighbouring threads have neighbouring subspaces, so a centroid's load is
// coalesced, and it serves kPerThread tokens. With one token (decode) `Parts` threads share a subspace's centroids
// instead.
#include <algorithm>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"

namespace million {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 64;    // tokens of a block
constexpr int kPerThread = 8;  // tokens that share a thread's centroid loads
constexpr int kParts = 8;      // threads that share the centroids of one subspace when there are few tokens

struct Best {
  float distance;
  int code;
};

// Codes of the tokens x [tokens, D] fp32 in shared memory; `write(token, subspace, code)` stores one.
template <int d, int Tokens, int Parts, class Write>
__device__ void nearest(const float* x, int tokens, int D, const __half* codebook, int S, const Write& write) {
  const int groups = (tokens + Tokens - 1) / Tokens;
  // Parts neighbours in a warp share a work item, so every lane of a warp must reach the shuffles.
  const int items = (groups * S * Parts + kWarp - 1) / kWarp * kWarp;
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int part = item % Parts, m = item / Parts % S, first = item / (Parts * S) * Tokens;
    const bool live = first < tokens;
    float mine[Tokens][d];
    Best best[Tokens];
#pragma unroll
    for (int t = 0; t < Tokens; t++) {
      best[t] = {INFINITY, 0};
#pragma unroll
      for (int j = 0; j < d; j++) mine[t][j] = live && first + t < tokens ? x[(first + t) * D + m * d + j] : 0.f;
    }
    if (live) {
      constexpr int kShare = kCentroids / Parts;
#pragma unroll 4
      for (int c = part * kShare; c < (part + 1) * kShare; c++) {
        float centroid[d];
        const __half2* at = reinterpret_cast<const __half2*>(codebook + (int64_t(c) * S + m) * d);
#pragma unroll
        for (int j = 0; j < d / 2; j++) {
          const float2 pair = __half22float2(at[j]);
          centroid[2 * j] = pair.x, centroid[2 * j + 1] = pair.y;
        }
#pragma unroll
        for (int t = 0; t < Tokens; t++) {
          float distance = 0.f;
#pragma unroll
          for (int j = 0; j < d; j++) distance = fmaf(mine[t][j] - centroid[j], mine[t][j] - centroid[j], distance);
          if (distance < best[t].distance) best[t] = {distance, c};
        }
      }
    }
#pragma unroll
    for (int t = 0; t < Tokens; t++) {
#pragma unroll
      for (int step = 1; step < Parts; step *= 2) {
        const float distance = __shfl_xor_sync(~0u, best[t].distance, step);
        const int code = __shfl_xor_sync(~0u, best[t].code, step);
        if (distance < best[t].distance || (distance == best[t].distance && code < best[t].code))
          best[t] = {distance, code};
      }
      if (part == 0 && live && first + t < tokens) write(first + t, m, static_cast<uint8_t>(best[t].code));
    }
  }
}

template <class Write>
__device__ void nearest(const float* x, int tokens, int D, const Coded& book, int h, const Write& write) {
  const __half* codebook = reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * D;
  const bool few = tokens <= 2;
  switch (book.d) {
    case 2:
      return few ? nearest<2, 1, kParts>(x, tokens, D, codebook, book.S, write)
                 : nearest<2, kPerThread, 1>(x, tokens, D, codebook, book.S, write);
    case 4:
      return few ? nearest<4, 1, kParts>(x, tokens, D, codebook, book.S, write)
                 : nearest<4, kPerThread, 1>(x, tokens, D, codebook, book.S, write);
    default:
      return few ? nearest<8, 1, kParts>(x, tokens, D, codebook, book.S, write)
                 : nearest<8, kPerThread, 1>(x, tokens, D, codebook, book.S, write);
  }
}

__global__ void __launch_bounds__(kThreads) encode_kernel(const Encode a) {
  extern __shared__ float x[];  // [kTokens, D]
  const int b = blockIdx.y / a.H, h = blockIdx.y % a.H, first = blockIdx.x * kTokens;
  const int tokens = min(kTokens, a.T - first);
  for (int i = threadIdx.x; i < tokens * a.D; i += kThreads)
    x[i] = load(a.x.at(b, h, first + i / a.D), i % a.D, a.dtype);
  __syncthreads();
  uint8_t* codes = a.book.codes + (int64_t(blockIdx.y) * a.T + first) * a.book.S;
  nearest(x, tokens, a.D, a.book, h, [&](int t, int m, uint8_t code) { codes[t * a.book.S + m] = code; });
}

__global__ void __launch_bounds__(kThreads) decode_kernel(const Decode a) {
  const int D = a.book.S * a.book.d;
  const int64_t per_head = a.T * D, total = int64_t(a.B) * a.H * per_head;
  const __half* codebook = reinterpret_cast<const __half*>(a.book.codebook);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const int h = i / per_head % a.H, channel = i % D;
    const uint8_t code = a.codes[i / D * a.book.S + channel / a.book.d];
    store(a.out, i, __half2float(codebook[(int64_t(h) * kCentroids + code) * D + channel]), a.dtype);
  }
}

// y[t] = T x[t] for few tokens: a warp forms one channel, reading its row of T along its length.
__device__ void transform_few(const float* transform, const float* x, float* y, int tokens, int D) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int c = warp; c < D; c += kThreads / kWarp)
    for (int t = 0; t < tokens; t++) {
      float sum = 0.f;
      for (int j = lane; j < D; j += kWarp) sum = fmaf(transform[int64_t(c) * D + j], x[t * D + j], sum);
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) y[t * D + c] = sum;
    }
}

// The same for many: a thread forms one channel of kSums tokens, T comes in slices of kSlice columns.
constexpr int kSlice = 32, kSums = 32;
__device__ void transform_many(const float* transform, const float* x, float* y, int tokens, int D, float* slice) {
  const int channels = min(D, kThreads), groups = kThreads / channels;
  const int c = threadIdx.x % channels, group = threadIdx.x / channels;
  for (int first = 0; first < tokens; first += groups * kSums) {
    const int mine = first + group * kSums;
    float sums[kSums] = {};
    for (int j0 = 0; j0 < D; j0 += kSlice) {
      __syncthreads();
      const int columns = min(kSlice, D - j0);
      for (int i = threadIdx.x; i < D * kSlice; i += kThreads)
        if (i % kSlice < columns)
          slice[i / kSlice * (kSlice + 1) + i % kSlice] = transform[int64_t(i / kSlice) * D + j0 + i % kSlice];
      __syncthreads();
      if (group >= groups) continue;
      for (int j = 0; j < columns; j += 4) {
        float t[4];
#pragma unroll
        for (int u = 0; u < 4; u++) t[u] = slice[c * (kSlice + 1) + j + u];
#pragma unroll
        for (int s = 0; s < kSums; s++) {
          if (mine + s >= tokens) break;
          const float4 v = *reinterpret_cast<const float4*>(x + (mine + s) * D + j0 + j);
          sums[s] = fmaf(t[0], v.x, fmaf(t[1], v.y, fmaf(t[2], v.z, fmaf(t[3], v.w, sums[s]))));
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; s++)
      if (group < groups && mine + s < tokens) y[(mine + s) * D + c] = sums[s];
  }
}

// blockIdx: token block, (row, KV head), keys or values.
__global__ void __launch_bounds__(kThreads) append_kernel(const Layer a) {
  extern __shared__ float shared[];  // x [kTokens, D], then for keys y [kTokens, D]
  float* x = shared;
  const int H = a.H, b = blockIdx.y / H, h = blockIdx.y % H, first = blockIdx.x * kTokens;
  const int n = a.n, R = a.R, tokens = min(kTokens, n - first), D = a.D;
  const bool keys = blockIdx.z == 0;
  const Strided& source = keys ? a.k_new : a.v_new;
  const int64_t slot0 = first_slot(a) + first;
  const int64_t head = int64_t(b) * H + h;
  const int start = a.start[b];
  void* ring = keys ? a.k_ring : a.v_ring;
  void* sinks = keys ? a.k_sinks : a.v_sinks;
  for (int i = threadIdx.x; i < tokens * D; i += kThreads) {
    const int t = i / D, c = i % D;
    const float value = load(source.at(b, h, first + t), c, a.dtype);
    x[i] = value;
    const int64_t slot = slot0 + t, rank = slot - start;
    if (slot < 0) continue;
    // A chunk longer than the ring leaves its last R tokens; the others would race with them for the same place.
    if (R > 0 && first + t >= n - R) store(ring, (head * R + slot % R) * D + c, value, a.dtype);
    if (rank >= 0 && rank < a.N) store(sinks, (head * a.N + rank) * D + c, value, a.dtype);
  }
  __syncthreads();
  if (keys && a.inv_freq != nullptr) {
    float* y = shared + kTokens * D;
    for (int i = threadIdx.x; i < tokens * D; i += kThreads) {
      const int64_t slot = max(slot0 + i / D, int64_t(0));
      y[i] = frame_channel(a, x + i / D * D, i % D, frame_position(a, b, slot / a.frame_tokens));
    }
    __syncthreads();
    x = y;
  }
  if (keys && a.transform != nullptr) {
    float* y = x == shared ? shared + kTokens * D : shared;
    const float* transform = a.transform + int64_t(h) * D * D;
    if (tokens <= 2)
      transform_few(transform, x, y, tokens, D);
    else
      transform_many(transform, x, y, tokens, D, shared + 2 * kTokens * D);
    __syncthreads();
    x = y;
  }
  const Coded& book = keys ? a.k : a.v;
  uint8_t* codes = book.codes + head * book.slots * book.S;
  nearest(x, tokens, D, book, h, [&](int t, int m, uint8_t code) {
    const int64_t slot = slot0 + t;
    if (slot >= 0 && slot < book.slots) codes[code_offset(book.layout, slot, m, book.S)] = code;
  });
}

}  // namespace

cudaError_t encode_launch(const Encode& a, cudaStream_t stream) {
  const dim3 grid((a.T + kTokens - 1) / kTokens, a.B * a.H);
  const size_t shared = size_t(std::min(a.T, kTokens)) * a.D * sizeof(float);
  cudaFuncSetAttribute(encode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  encode_kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t decode_launch(const Decode& a, cudaStream_t stream) {
  const int64_t total = int64_t(a.B) * a.H * a.T * a.book.S * a.book.d;
  decode_kernel<<<std::min<int64_t>((total + kThreads - 1) / kThreads, 1 << 14), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t append_launch(const Layer& a, cudaStream_t stream) {
  const dim3 grid((a.n + kTokens - 1) / kTokens, a.B * a.H, 2);
  const size_t shared = (size_t(2) * kTokens + kSlice + 1) * a.D * sizeof(float);
  cudaFuncSetAttribute(append_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  append_kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace million
