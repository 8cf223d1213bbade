// pq_encode and pq_append_: nearest centroids, and the write of new tokens to a cache layer.
//
//   code[b,h,t,m] = argmin_c sum_j (x[b,h,t,m,j] - codebook[h,c,m,j])^2, fp32, the lowest index on ties
//
// Many tokens: a block takes kTokens tokens of one (row, KV head) of the keys or of the values. It brings them to
// shared memory as fp32 (keys of an append rotated to their frame and transformed), then a warp takes a subspace of all
// of them. Tensor cores form the distances to all centroids as |c|^2 - 2 x c + |x|^2 with x, |c|^2 and |x|^2 as sums of
// two fp16 numbers (centroids are fp16 already), which tells the nearest eight centroids up to a rounding error; those
// are compared as defined, or all of them where eight others are about as near.
//
// Few tokens (decode), where every wait counts: a block takes 32 channels of one token, so that the rows of T it needs
// and the centroids of its subspaces are each loaded at once.
#include <algorithm>
#include <climits>
#include <type_traits>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"
#include "ptx.cuh"

namespace million {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTokens = 64;                       // tokens of a block
constexpr int token_row(int D) { return D + 4; }  // floats from a token to the next: rows lie on other banks
// Centroids in shared memory: kStaged pairs of channels of all of them, |c|^2 in the subspace of each warp, and a
// column of ones.
constexpr int kStaged = 32, kStagedRow = kStaged + kWarps + 1, kStagedWords = kCentroids * kStagedRow;
static_assert(kStagedRow % 2 == 1);  // rows lie on other banks

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

// Distances to the 8 centroids of a tile for 16 tokens, both as operands of tensor cores: the pairs of depths are
// (x rounded, c), (the rest of x, c), (1, |c|^2), (|x|^2, 1).
constexpr uint32_t kOnes = 0x3c003c00;                           // 1, 1
constexpr int token_words(int d) { return d == 2 ? 4 : d + 1; }  // of a token in shared memory

// A number as two of fp16, the greater in the lower half.
__device__ __forceinline__ uint32_t in_two(float x) {
  const __half2 both = __floats2half2_rn(x, x - __half2float(__float2half_rn(x)));
  return reinterpret_cast<const uint32_t&>(both);
}

template <int d>
struct Operands {
  static constexpr int kPairs = d / 2, kToken = d == 2 ? 2 : d == 4 ? 4 : 6, kTile = d == 2 ? 1 : 2;

  // Writes a token's words. x: its channels times -2 and the scale; `length`: |x|^2.
  static __device__ __forceinline__ void store(const float (&x)[d], float length, uint32_t* to) {
    uint32_t rounded[kPairs], rest[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; j++) mma::split(x[2 * j], x[2 * j + 1], rounded[j], rest[j]);
    if constexpr (d == 2) {
      *reinterpret_cast<uint4*>(to) = uint4{rounded[0], rest[0], kOnes, in_two(length)};
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; j++) to[j] = rounded[j], to[kPairs + j] = rest[j];
      to[d] = in_two(length);
    }
  }

  // Lane (n, c)'s part of a token n (`half` 0) or n + 8 (1) whose words are at `from`.
  static __device__ __forceinline__ void token(const uint32_t* from, int c, int half, uint32_t (&to)[kToken]) {
    to[half] = from[c];
    if constexpr (d == 8) to[2 + half] = from[4 + c];
    if constexpr (d > 2) to[kToken - 2 + half] = c == 0 ? kOnes : c == 1 ? from[d] : 0u;
  }

  // Where lane (n, c) finds its part of centroid n in a row of `staged`: channels of the subspace at `channels`.
  static __device__ __forceinline__ int2 places(int channels, int warp, int c) {
    const int square = kStaged + warp, one = kStaged + kWarps;
    if constexpr (d == 2) return {c < 2 ? channels : c == 2 ? square : one, 0};
    return {channels + c % kPairs, c == 1 ? one : square};
  }

  static __device__ __forceinline__ void distances(const uint32_t (&x)[kToken], const uint32_t (&c)[kTile],
                                                   float (&to)[4]) {
#pragma unroll
    for (float& y : to) y = 0.f;
    if constexpr (d == 2) {
      mma::mma_dense_8(to, x[0], x[1], c[0]);
    } else if constexpr (d == 4) {
      mma::mma_dense(to, x, c[0], c[1]);
    } else {
      const uint32_t channels[4] = {x[0], x[1], x[2], x[3]};
      mma::mma_dense(to, channels, c[0], c[0]);
      mma::mma_dense_8(to, x[4], x[5], c[1]);
    }
  }
};

// Where a token's codes go.
struct Place {
  uint8_t* tile;  // null: nowhere
  int layout, t, S;

  __device__ void put(int m, uint8_t code) const {
    if (tile != nullptr) tile[tile_byte(layout, t, m, S)] = code;
  }
};

// Codes of the tokens x [kTokens, token_row(D)] fp32 in shared memory, of which `tokens` are there;
// `place(token)` says where its codes go: `put(subspace, code)`. `staged`: [kCentroids, kStagedRow] in shared memory;
// `operands`: [kWarps, kTokens, token_words(d)].
template <int d, class Places>
__device__ void nearest(const float* x, int tokens, int D, const __half* codebook, int S, uint32_t* staged,
                        uint32_t* operands, const Places& place) {
  using Of = Operands<d>;
  constexpr int kPairs = d / 2, kTiles = kTokens / 16, kRows = 2 * kTiles, kMine = kTokens / kWarp;
  constexpr int kBlock = 32;  // centroids of which a lane holds 8 for each of its tokens
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, n = lane >> 2, c = lane & 3, words = D / 2;
  uint32_t* own = operands + warp * kTokens * token_words(d);
  const auto token_of = [&](int j) { return 16 * (2 * j + (c >> 1)) + n + 8 * (c & 1); };  // that the lane ends up with
  const float* from[kMine];
  Place to[kMine];
#pragma unroll
  for (int j = 0; j < kMine; j++) to[j] = place(token_of(j)), from[j] = x + min(token_of(j), tokens - 1) * token_row(D);
  for (int first = 0; first < words; first += kStaged) {
    const int count = min(kStaged, words - first);
    __syncthreads();  // tokens are there, and what was staged is done with
    {
      const uint32_t* book = reinterpret_cast<const uint32_t*>(codebook) + first + lane;
#pragma unroll 8
      for (int i = warp; i < kCentroids; i += kWarps)
        if (lane < count) staged[i * kStagedRow + lane] = __ldg(book + i * words);
      if (first == 0) staged[threadIdx.x * kStagedRow + kStaged + kWarps] = kOnes;
    }
    __syncthreads();
    for (int s = warp; s < count / kPairs; s += kWarps) {
      const int m = first / kPairs + s;
      const auto centroid_at = [&](int i, float (&centroid)[d]) {
#pragma unroll
        for (int j = 0; j < kPairs; j++) {
          const uint32_t word = staged[i * kStagedRow + s * kPairs + j];
          const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
          centroid[2 * j] = pair.x, centroid[2 * j + 1] = pair.y;
        }
      };
      // Distances are scaled by the square of a power of two, so that the longest centroid's |c|^2 is 4 to 16.
      float squares[kCentroids / kWarp] = {}, widest = 0.f;
#pragma unroll
      for (int i = 0; i < kCentroids / kWarp; i++) {
        float centroid[d];
        centroid_at(lane + i * kWarp, centroid);
#pragma unroll
        for (int j = 0; j < d; j++) squares[i] = fmaf(centroid[j], centroid[j], squares[i]);
        widest = fmaxf(widest, squares[i]);
      }
      widest = warp_max(widest);
      const int exponent = (__float_as_int(widest) >> 23) - 127;
      const int power = min(max(1 - (exponent >> 1), -30), 30);
      const float scale = __int_as_float((127 + 2 * power) << 23);
      widest *= scale;
#pragma unroll
      for (int i = 0; i < kCentroids / kWarp; i++)
        staged[(lane + i * kWarp) * kStagedRow + kStaged + warp] = in_two(squares[i] * scale);
      float points[kMine][d], lengths[kMine];
#pragma unroll
      for (int j = 0; j < kMine; j++) {
        float scaled[d], length = 0.f;
#pragma unroll
        for (int k = 0; k < d; k++) {
          points[j][k] = from[j][m * d + k];
          length = fmaf(points[j][k], points[j][k], length), scaled[k] = points[j][k] * (-2.f * scale);
        }
        lengths[j] = length * scale;
        Of::store(scaled, lengths[j], own + token_of(j) * token_words(d));
      }
      __syncwarp();
      uint32_t a[kTiles][Of::kToken];
#pragma unroll
      for (int r = 0; r < kRows; r++) Of::token(own + (8 * r + n) * token_words(d), c, r % 2, a[r / 2]);

      // The nearest of each of the lane's tokens among its centroids, and the second nearest of other blocks: distances
      // as integers, which order like positive floats, with block and lane in their last bits.
      int best[kRows], second[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) best[r] = second[r] = INT_MAX;
      const int2 places = Of::places(s * kPairs, warp, c);
      const uint32_t* at = staged + n * kStagedRow;
#pragma unroll 2
      for (int block = 0; block < kCentroids / kBlock; block++, at += kBlock * kStagedRow) {
        uint32_t b[4][Of::kTile];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          b[i][0] = at[8 * i * kStagedRow + places.x];
          if constexpr (d > 2) b[i][1] = at[8 * i * kStagedRow + places.y];
        }
        const int tag = 4 * block + c;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          float y[4][4];
#pragma unroll
          for (int i = 0; i < 4; i++) Of::distances(a[tile], b[i], y[i]);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const auto value = [&](int i) { return __float_as_int(y[i / 2][2 * half + i % 2]); };
            int least = __vimin3_s32(value(0), value(1), value(2));
            least = __vimin3_s32(least, value(3), value(4));
            least = __vimin3_s32(least, value(5), value(6));
            least = (min(least, value(7)) & ~31) | tag;
            const int r = 2 * tile + half;
            second[r] = min(second[r], max(best[r], least));
            best[r] = min(best[r], least);
          }
        }
      }
      __syncwarp();  // squares and tokens of this subspace are done with
                     // The four lanes of a token share out what they found.
#pragma unroll
      for (int step = 1; step <= 2; step *= 2) {
        const bool upper = c & step;
#pragma unroll
        for (int r = 0; r < kRows / (2 * step); r++) {
          const int give = upper ? best[2 * r] : best[2 * r + 1], keep = upper ? best[2 * r + 1] : best[2 * r];
          const int give2 = upper ? second[2 * r] : second[2 * r + 1],
                    keep2 = upper ? second[2 * r + 1] : second[2 * r];
          const int got = __shfl_xor_sync(~0u, give, step), got2 = __shfl_xor_sync(~0u, give2, step);
          second[r] = __vimin3_s32(keep2, got2, max(keep, got)), best[r] = min(keep, got);
        }
      }
#pragma unroll
      for (int j = 0; j < kMine; j++) {
        float least = INFINITY;
        int code = 0;
        const int begin = (best[j] >> 2 & 7) * kBlock + (best[j] & 3) * 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float centroid[d];
          centroid_at(begin + i / 2 * 8 + i % 2, centroid);
          const float distance = distance_to<d>(points[j], centroid);
          if (distance < least) least = distance, code = begin + i / 2 * 8 + i % 2;
        }
        // What rounding may have moved the two by: of centroids that can be as near, of the token, of the distance (the
        // bits that hold the block), and of fp16 below its normal numbers, where it is times a centroid. Not so for NaN
        // either.
        const float near = __int_as_float(best[j]), gap = __int_as_float(second[j]) - near;
        const float floor = 0x1p-20f * __int_as_float((127 + max(-power, 0)) << 23);
        const float doubt = fmaf(0x1p-19f, fminf(widest, 2.f * (lengths[j] + fabsf(near))) + lengths[j],
                                 fmaf(0x1p-17f, fabsf(near), floor));
        uint32_t doubtful = __ballot_sync(~0u, !(gap > doubt));
        while (doubtful) {  // the warp compares all centroids
          const int lane_of = __ffs(doubtful) - 1;
          doubtful &= doubtful - 1;
          float point[d], nearest = INFINITY;
          int found = 0;
#pragma unroll
          for (int k = 0; k < d; k++) point[k] = __shfl_sync(~0u, points[j][k], lane_of);
#pragma unroll 2
          for (int i = lane; i < kCentroids; i += kWarp) {
            float centroid[d];
            centroid_at(i, centroid);
            const float distance = distance_to<d>(point, centroid);
            if (distance < nearest) nearest = distance, found = i;
          }
#pragma unroll
          for (int step = 16; step; step /= 2) {
            const float theirs = __shfl_xor_sync(~0u, nearest, step);
            const int that = __shfl_xor_sync(~0u, found, step);
            if (theirs < nearest || (theirs == nearest && that < found)) nearest = theirs, found = that;
          }
          if (lane == lane_of) code = found;
        }
        if (token_of(j) < tokens) to[j].put(m, static_cast<uint8_t>(code));
      }
    }
  }
}

template <class Places>
__device__ void nearest(const float* x, int tokens, int D, const Coded& book, int h, uint32_t* staged,
                        const Places& place) {
  const __half* codebook = reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * D;
  uint32_t* operands = staged + kStagedWords;
  switch (book.d) {
    case 2: return nearest<2>(x, tokens, D, codebook, book.S, staged, operands, place);
    case 4: return nearest<4>(x, tokens, D, codebook, book.S, staged, operands, place);
    default: return nearest<8>(x, tokens, D, codebook, book.S, staged, operands, place);
  }
}

// Shared memory for D channels, d a subspace: tokens; centroids; tokens as operands.
constexpr size_t encode_bytes(int64_t D, int64_t d) {
  return (size_t(kTokens) * token_row(int(D)) + kStagedWords + kWarps * kTokens * token_words(int(d))) * 4;
}

__global__ void __launch_bounds__(kThreads, 2) encode_kernel(const Encode a) {
  extern __shared__ __align__(16) float x[];  // [kTokens, token_row(D)], centroids, operands
  const int b = blockIdx.y / a.H, h = blockIdx.y % a.H, first = blockIdx.x * kTokens;
  const int tokens = min(kTokens, a.T - first), row = token_row(a.D);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int t = warp; t < tokens; t += kWarps)
    for (int c = lane; c < a.D / 2; c += kWarp)
      *reinterpret_cast<float2*>(&x[t * row + 2 * c]) = load_pair(a.x.at(b, h, first + t), c, a.dtype);
  uint8_t* codes = a.book.codes + (int64_t(blockIdx.y) * a.T + first) * a.book.S;
  uint32_t* staged = reinterpret_cast<uint32_t*>(x + kTokens * row);
  nearest(x, tokens, a.D, a.book, h, staged,
          [&](int t) { return Place{codes + t * a.book.S, kPlain, 0, int(a.book.S)}; });
}

// x[t] = T x[t]: a thread forms one channel of kSums tokens, T comes in slices of kSlice columns. x has kTokens rows of
// token_row(D), of which those from `tokens` on may be anything.
constexpr int kSlice = 32, kSums = 32, kMaxPairs = 4;  // of channels that turn together, a lane: head_dim up to 256
static_assert((kSlice + 1) * 256 <= kStagedWords);     // a slice lies where centroids will
__device__ void transform_tokens(const float* transform, float* x, int tokens, int D, float* slice) {
  static_assert(kTokens % kSums == 0);
  const int channels = min(D, kThreads), groups = kThreads / channels, row = token_row(D);
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
          const float4 v = *reinterpret_cast<const float4*>(x + (mine + s) * row + j0 + j);
          sums[s] = fmaf(t[0], v.x, fmaf(t[1], v.y, fmaf(t[2], v.z, fmaf(t[3], v.w, sums[s]))));
        }
      }
    }
    __syncthreads();  // these tokens have been read
#pragma unroll
    for (int s = 0; s < kSums; s++)
      if (group < groups && mine + s < tokens) x[(mine + s) * row + c] = sums[s];
  }
}

// blockIdx: token block, (row, KV head), keys or values.
__global__ void __launch_bounds__(kThreads, 2) append_kernel(const Layer a) {
  extern __shared__ __align__(16) float x[];  // [kTokens, token_row(D)], centroids, operands
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
    float* to = x + t * token_row(D);
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
  float* rest = x + kTokens * token_row(D);
  if (keys && a.transform != nullptr) transform_tokens(a.transform + int64_t(h) * D * D, x, tokens, D, rest);
  const Coded& book = keys ? a.k : a.v;
  uint8_t* codes = book.codes + head * book.slots * book.S;
  const auto place = [&](int t) {
    const int64_t slot = slot0 + t;
    const bool fits = slot >= 0 && slot < book.slots;
    return Place{fits ? codes + tile_offset(book.layout, slot, book.S) : nullptr, int(book.layout), int(slot & 63),
                 int(book.S)};
  };
  nearest(x, tokens, D, book, h, reinterpret_cast<uint32_t*>(rest), place);
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
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  // What is read last and known first, to the L2 cache: else each comes from DRAM when its turn has come.
  static_assert(kThreads == kCentroids);
  if (b == 0) {
    prefetch_l2((keys ? a.k : a.v).codebook + (int64_t(h) * kCentroids + thread) * D + channel0);
    if (keys && a.transform != nullptr && thread * 32 < channels * D)
      prefetch_l2(a.transform + (int64_t(h) * D + channel0) * D + thread * 32);
  }
  const int slot = slot_index(first_slot(a) + t), rank = slot - slot_index(a.start[b]);
  const int64_t head = int64_t(b) * a.H + h;
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
    const int frame_tokens = int(min(a.frame_tokens, int64_t(kMaxSlot)));
    if (thread < D) rotated[thread] = frame_channel(a, x, thread, frame_position(a, b, max(slot, 0) / frame_tokens));
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
// nor what the ring loses. The kernels after this one wait for it alone, so one block ends last; the others make room.
__global__ void __launch_bounds__(kThreads) append_few_kernel(const Layer a) {
  append_few(a);
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0) wait_for_kernels_before();
}

}  // namespace

cudaError_t encode_launch(const Encode& a, cudaStream_t stream) {
  const dim3 grid((a.T + kTokens - 1) / kTokens, a.B * a.H);
  const size_t shared = encode_bytes(a.D, a.book.d);
  cudaFuncSetAttribute(encode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  encode_kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t append_launch(const Layer& a, bool early, cudaStream_t stream) {
  if (a.n <= kFew) {
    // As the attention beside it.
    cudaFuncSetAttribute(append_few_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
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
  const size_t shared = encode_bytes(a.D, std::max(a.k.d, a.v.d));
  cudaFuncSetAttribute(append_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  append_kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace million
