// pq_encode, pq_decode and pq_append_: nearest centroids, table lookup, and the write of new tokens to a cache layer.
//
//   code[b,h,t,m] = argmin_c sum_j (x[b,h,t,m,j] - codebook[h,c,m,j])^2, fp32, the lowest index on ties
//
// Many tokens: a block takes kTokens tokens of one (row, KV head) of the keys or of the values. It brings them to
// shared memory as fp32 (keys of an append rotated to their frame and transformed), then every thread compares one
// subspace of kPerThread tokens with every centroid: neighbouring threads have neighbouring subspaces, so a centroid's
// load is coalesced, and it serves kPerThread tokens. A first pass looks for the nearest block of kBlock centroids by
// |c|^2 - 2 x c, which rounds; a second compares that block as defined, or all of them where another block is about as
// near.
//
// Few tokens (decode), where every wait counts: a block takes 32 channels of one token, so that the rows of T it needs
// and the centroids of its subspaces are each loaded at once.
#include <algorithm>
#include <type_traits>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"

namespace million {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokens = 64;    // tokens of a block
constexpr int kPerThread = 8;  // tokens that share a thread's centroid loads

// The centroid at `words`. The loads are of what no kernel writes (`ldg`), so that they need not wait for stores of
// codes.
template <int d>
__device__ __forceinline__ void load_centroid(const uint32_t* words, float (&centroid)[d]) {
#pragma unroll
  for (int j = 0; j < d / 2; j++) {
    const uint32_t word = __ldg(words + j);
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    centroid[2 * j] = pair.x, centroid[2 * j + 1] = pair.y;
  }
}

template <int d>
__device__ __forceinline__ float distance_to(const float (&x)[d], const float (&centroid)[d]) {
  float distance = 0.f;
#pragma unroll
  for (int j = 0; j < d; j++) distance = fmaf(x[j] - centroid[j], x[j] - centroid[j], distance);
  return distance;
}

// Codes of the tokens x [tokens, D] fp32 in shared memory; `write(token, subspace, code)` stores one.
template <int d, class Write>
__device__ void nearest(const float* x, int tokens, int D, const __half* codebook, int S, const Write& write) {
  constexpr int kBlock = d == 2 ? 8 : 4;  // centroids that the second pass compares
  const int groups = (tokens + kPerThread - 1) / kPerThread;
  for (int item = threadIdx.x; item < groups * S; item += kThreads) {
    const int m = item % S, first = item / S * kPerThread;
    const uint32_t* mine = reinterpret_cast<const uint32_t*>(codebook + m * d);
    const int stride = S * (d / 2);  // words from a centroid to the next
    float scaled[kPerThread][d], best[kPerThread], second[kPerThread], widest = 0.f;
    int block[kPerThread];
#pragma unroll
    for (int t = 0; t < kPerThread; t++) {
      best[t] = second[t] = INFINITY, block[t] = 0;
#pragma unroll
      for (int j = 0; j < d; j++) scaled[t][j] = -2.f * x[min(first + t, tokens - 1) * D + m * d + j];
    }
    const uint32_t* at = mine;
    for (int c0 = 0; c0 < kCentroids; c0 += kBlock) {
      float nearest[kPerThread];
#pragma unroll
      for (int t = 0; t < kPerThread; t++) nearest[t] = INFINITY;
#pragma unroll 4
      for (int c = 0; c < kBlock; c++, at += stride) {
        float centroid[d], square = 0.f;
        load_centroid<d>(at, centroid);
#pragma unroll
        for (int j = 0; j < d; j++) square = fmaf(centroid[j], centroid[j], square);
        widest = fmaxf(widest, square);
#pragma unroll
        for (int t = 0; t < kPerThread; t++) {
          float value = square;
#pragma unroll
          for (int j = 0; j < d; j++) value = fmaf(centroid[j], scaled[t][j], value);
          nearest[t] = fminf(nearest[t], value);
        }
      }
#pragma unroll
      for (int t = 0; t < kPerThread; t++) {
        second[t] = fminf(second[t], fmaxf(best[t], nearest[t]));
        block[t] = nearest[t] < best[t] ? c0 : block[t];
        best[t] = fminf(best[t], nearest[t]);
      }
    }
    const auto compare = [&](auto unrolled, int t, int begin, int end, int& code) {
      float point[d], least = INFINITY;
#pragma unroll
      for (int j = 0; j < d; j++) point[j] = -0.5f * scaled[t][j];
      const uint32_t* at = mine + begin * stride;
#pragma unroll decltype(unrolled)::value
      for (int c = begin; c < end; c++, at += stride) {
        float centroid[d];
        load_centroid<d>(at, centroid);
        const float distance = distance_to<d>(point, centroid);
        if (distance < least) least = distance, code = c;
      }
    };
    int code[kPerThread] = {};
#pragma unroll
    for (int t = 0; t < kPerThread; t++)
      compare(std::integral_constant<int, kBlock>(), t, block[t], block[t] + kBlock, code[t]);
#pragma unroll
    for (int t = 0; t < kPerThread; t++) {
      float length = 0.f;
#pragma unroll
      for (int j = 0; j < d; j++) length = fmaf(scaled[t][j], scaled[t][j], length);
      // What rounding may have moved the two values by. Not so for NaN either: then every centroid is compared.
      const float doubt = (d + 2) * 0x1p-22f * (widest + 2.f * sqrtf(0.25f * length * widest));
      if (!(second[t] - best[t] > doubt)) {
        code[t] = 0;
        compare(std::integral_constant<int, 2>(), t, 0, kCentroids, code[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kPerThread; t++)
      if (first + t < tokens) write(first + t, m, static_cast<uint8_t>(code[t]));
  }
}

template <class Write>
__device__ void nearest(const float* x, int tokens, int D, const Coded& book, int h, const Write& write) {
  const __half* codebook = reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * D;
  switch (book.d) {
    case 2: return nearest<2>(x, tokens, D, codebook, book.S, write);
    case 4: return nearest<4>(x, tokens, D, codebook, book.S, write);
    default: return nearest<8>(x, tokens, D, codebook, book.S, write);
  }
}

__global__ void __launch_bounds__(kThreads, 2) encode_kernel(const Encode a) {
  extern __shared__ float x[];  // [kTokens, D]
  const int b = blockIdx.y / a.H, h = blockIdx.y % a.H, first = blockIdx.x * kTokens;
  const int tokens = min(kTokens, a.T - first);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int t = warp; t < tokens; t += kWarps)
    for (int c = lane; c < a.D / 2; c += kWarp)
      *reinterpret_cast<float2*>(&x[t * a.D + 2 * c]) = load_pair(a.x.at(b, h, first + t), c, a.dtype);
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

// y[t] = T x[t]: a thread forms one channel of kSums tokens, T comes in slices of kSlice columns. x has kTokens rows,
// of which those from `tokens` on may be anything.
constexpr int kSlice = 32, kSums = 32, kMaxPairs = 4;  // of channels that turn together, a lane: head_dim up to 256
__device__ void transform_tokens(const float* transform, const float* x, float* y, int tokens, int D, float* slice) {
  static_assert(kTokens % kSums == 0);
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
      if (group >= groups || mine >= tokens) continue;
      for (int j = 0; j < columns; j += 4) {
        float t[4];
#pragma unroll
        for (int u = 0; u < 4; u++) t[u] = slice[c * (kSlice + 1) + j + u];
#pragma unroll
        for (int s = 0; s < kSums; s++) {
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
__global__ void __launch_bounds__(kThreads, 2) append_kernel(const Layer a) {
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
  // A warp a token, a lane some pairs of channels: as they lie, then those that turn together.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int half = keys && a.inv_freq != nullptr ? int(a.half) : 0;
  float2 turn[kMaxPairs];
  int64_t turned = -1;  // frame of `turn`
#pragma unroll 2
  for (int t = warp; t < tokens; t += kWarps) {
    const char* from = source.at(b, h, first + t);
    float* to = x + t * D;
    const int64_t slot = slot0 + t, rank = slot - start;
    // A chunk longer than the ring leaves its last R tokens; the others would race with them for the same place.
    const bool recent = slot >= 0 && R > 0 && first + t >= n - R, sink = slot >= 0 && rank >= 0 && rank < a.N;
    for (int c = lane; c < D / 2; c += kWarp) {
      const float2 value = load_pair(from, c, a.dtype);
      *reinterpret_cast<float2*>(to + 2 * c) = value;
      if (recent) store_pair(ring, (head * R + slot % R) * (D / 2) + c, value, a.dtype);
      if (sink) store_pair(sinks, (head * a.N + rank) * (D / 2) + c, value, a.dtype);
    }
    if (half == 0) continue;
    const int64_t frame = max(slot, int64_t(0)) / a.frame_tokens;
    if (frame != turned) {
      const float position = static_cast<float>(frame_position(a, b, frame));
#pragma unroll
      for (int i = 0; i < kMaxPairs; i++)
        if (lane + i * kWarp < half) sincosf(-position * a.inv_freq[lane + i * kWarp], &turn[i].y, &turn[i].x);
      turned = frame;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMaxPairs; i++) {
      const int pair = lane + i * kWarp;
      if (pair >= half) continue;
      float& u = to[a.interleaved ? 2 * pair : pair];
      float& v = to[a.interleaved ? 2 * pair + 1 : pair + half];
      const float2 before = {u, v};
      u = before.x * turn[i].x - before.y * turn[i].y, v = before.y * turn[i].x + before.x * turn[i].y;
    }
  }
  __syncthreads();
  if (keys && a.transform != nullptr) {
    float* y = shared + kTokens * D;
    const float* transform = a.transform + int64_t(h) * D * D;
    transform_tokens(transform, x, y, tokens, D, shared + 2 * kTokens * D);
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

constexpr int kFew = 4, kChannels = 32;  // tokens of the kernel for few; channels of its blocks

// Nearest centroids of kChannels / d subspaces of one token, point [kChannels] in shared memory: the threads share a
// subspace's centroids. `write(subspace of these, code)`.
template <int d, class Write>
__device__ void nearest_few(const float* point, int channels, const __half* codebook, int S, const Write& write) {
  constexpr int kSubspaces = kChannels / d, kParts = kThreads / kSubspaces, kShare = kCentroids / kParts;
  __shared__ float distances[kParts][kSubspaces];
  __shared__ int codes[kParts][kSubspaces];
  const int m = threadIdx.x % kSubspaces, part = threadIdx.x / kSubspaces;
  if (m * d < channels) {
    float mine[d], centroids[kShare][d], least = INFINITY;
    int code = 0;
    const int stride = S * (d / 2);
    const uint32_t* first = reinterpret_cast<const uint32_t*>(codebook + m * d) + part * kShare * stride;
#pragma unroll
    for (int i = 0; i < kShare; i++) load_centroid<d>(first + i * stride, centroids[i]);
#pragma unroll
    for (int j = 0; j < d; j++) mine[j] = point[m * d + j];
#pragma unroll
    for (int i = 0; i < kShare; i++) {
      const float distance = distance_to<d>(mine, centroids[i]);
      if (distance < least) least = distance, code = part * kShare + i;
    }
    distances[part][m] = least, codes[part][m] = code;
  }
  __syncthreads();
  if (part == 0 && m * d < channels) {
    float least = INFINITY;
    int code = 0;
#pragma unroll 8
    for (int i = 0; i < kParts; i++)  // in the order of the centroids, so that the lowest index wins a tie
      if (distances[i][m] < least) least = distances[i][m], code = codes[i][m];
    write(m, static_cast<uint8_t>(code));
  }
}

// blockIdx: kChannels channels, (row, KV head), token x (keys, values).
__device__ void append_few(const Layer& a) {
  __shared__ float x[256], rotated[256], point[kChannels];  // head_dim up to 256
  const int b = blockIdx.y / int(a.H), h = blockIdx.y % int(a.H), t = blockIdx.z / 2, D = int(a.D), R = int(a.R);
  const int channel0 = blockIdx.x * kChannels, channels = min(kChannels, D - channel0);
  const bool keys = blockIdx.z % 2 == 0;
  const int64_t slot = first_slot(a) + t, head = int64_t(b) * a.H + h, rank = slot - a.start[b];
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  if (thread < D) {
    const float value = load((keys ? a.k_new : a.v_new).at(b, h, t), thread, a.dtype);
    x[thread] = value;
    if (slot >= 0 && thread >= channel0 && thread < channel0 + channels) {
      if (R > 0 && t >= int(a.n) - R)
        store(keys ? a.k_ring : a.v_ring, (head * R + slot % R) * D + thread, value, a.dtype);
      if (rank >= 0 && rank < a.N)
        store(keys ? a.k_sinks : a.v_sinks, (head * a.N + rank) * D + thread, value, a.dtype);
    }
  }
  __syncthreads();
  const float* from = x;
  if (keys && a.inv_freq != nullptr) {
    if (thread < D)
      rotated[thread] = frame_channel(a, x, thread, frame_position(a, b, max(slot, int64_t(0)) / a.frame_tokens));
    __syncthreads();
    from = rotated;
  }
  constexpr int kRows = kChannels / (kThreads / kWarp);  // of T, a warp
  if (keys && a.transform != nullptr) {
    float sums[kRows] = {};
    const float* rows = a.transform + (int64_t(h) * D + channel0 + warp * kRows) * D;
#pragma unroll 4
    for (int j = lane; j < D; j += kWarp)
#pragma unroll
      for (int r = 0; r < kRows; r++)
        if (warp * kRows + r < channels) sums[r] = fmaf(__ldg(rows + r * D + j), from[j], sums[r]);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int step = 16; step; step /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], step);
      if (lane == 0) point[warp * kRows + r] = sums[r];
    }
  } else if (thread < channels) {
    point[thread] = from[channel0 + thread];
  }
  __syncthreads();
  const Coded& book = keys ? a.k : a.v;
  if (slot < 0 || slot >= book.slots) return;
  const __half* codebook = reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * D + channel0;
  uint8_t* codes = book.codes + head * book.slots * book.S;
  const int S = int(book.S), first = channel0 / int(book.d);
  const auto write = [&](int m, uint8_t code) { codes[code_offset(book.layout, slot, first + m, S)] = code; };
  switch (book.d) {
    case 2: return nearest_few<2>(point, channels, codebook, S, write);
    case 4: return nearest_few<4>(point, channels, codebook, S, write);
    default: return nearest_few<8>(point, channels, codebook, S, write);
  }
}

// Launched early, it runs beside the attention of its one token: that query sees neither the slot whose code is written
// nor what the ring loses. The kernels after this one wait for it alone, so it ends last.
__global__ void __launch_bounds__(kThreads) append_few_kernel(const Layer a) {
  append_few(a);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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

cudaError_t append_launch(const Layer& a, bool early, cudaStream_t stream) {
  if (a.n <= kFew) {
    const dim3 grid((a.D + kChannels - 1) / kChannels, a.B * a.H, 2 * a.n);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = dim3(kThreads), config.stream = stream;
    cudaLaunchAttribute start;
    start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    start.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &start, config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, append_few_kernel, a);
  }
  const dim3 grid((a.n + kTokens - 1) / kTokens, a.B * a.H, 2);
  const size_t shared = (size_t(2) * kTokens + kSlice + 1) * a.D * sizeof(float);
  cudaFuncSetAttribute(append_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  append_kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace million
