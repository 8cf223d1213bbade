// What both attention kernels share: which tokens a row of queries sees, running softmax, exact tokens, results.
#pragma once

#include <type_traits>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"

namespace million {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLazy = 8.f;  // how far (log2) a score may exceed the reference maximum before it is raised

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

constexpr int kMaxSlot = 1 << 30;  // buffers are shorter (checked by the host)

__device__ __forceinline__ int slot_index(int64_t slot) {
  return int(min(max(slot, int64_t(-kMaxSlot)), int64_t(kMaxSlot)));
}

// The slots that the rows of a block read from codes, and which of them every row reads.
struct Range {
  int begin, end;  // any row
  int all_end;     // slots from `begin` on before this: every row, if there is no mask
};

// Some rows (query, head of the group) of one row b and KV head h, and where their tokens lie.
struct RowBlock {
  const Attention& a;
  const Layer& layer;
  int b, h;
  int row0, rows;  // rows row0 .. row0 + rows - 1 of the launch are this block's
  int64_t first;   // slot of the first new token

  __device__ RowBlock(const Attention& a, int row_and_head, int row0, int rows)
      : a(a),
        layer(a.layer),
        b(row_and_head / int(a.layer.H)),
        h(row_and_head % int(a.layer.H)),
        row0(row0),
        rows(min(rows, a.rows - row0)),
        first(first_slot(a.layer)) {}

  __device__ int query(int r) const { return a.query0 + min(row0 + r, a.rows - 1) / a.G; }
  __device__ int64_t position(int r) const { return first + query(r); }  // slot of a row's own token
  __device__ int64_t ring_begin() const { return max(layer.clock[2], first - layer.R); }

  __device__ bool masked(int r, int64_t slot) const {
    if (a.mask == nullptr) return false;
    return slot >= a.mask_slots || !a.mask[(int64_t(b) * layer.n + query(r)) * a.mask_slots + slot];
  }
  __device__ bool from_ring(int r, int64_t slot) const { return slot > position(r) - layer.R && slot >= ring_begin(); }

  __device__ Range range() const {
    return {slot_index(max(int64_t(layer.start[b]) + layer.N, int64_t(0))), coded_end(rows - 1), coded_end(0)};
  }
  // End of the slots that row r reads from codes: what follows is not stored, or in the ring.
  __device__ int coded_end(int r) const {
    const int64_t stored = min(first, min(layer.k.slots, layer.v.slots));
    return slot_index(min(stored, max(position(r) - layer.R + 1, ring_begin())));
  }

  __device__ const __half* codebook(const Coded& book) const {
    return reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * layer.D;
  }
  __device__ int64_t head() const { return int64_t(b) * layer.H + h; }

  // Channels of row r's query, as the model gave them.
  __device__ const char* query_row(int r) const { return a.q.at(b, h * a.G + (row0 + r) % a.G, query(r)); }

  // Writes row r's channel c of the result. `total` is the softmax denominator of the scores relative to `top` (log2).
  __device__ void store_result(int r, int c, float numerator, float total, float top) const {
    const int head = h * a.G + (row0 + r) % a.G, heads = int(layer.H) * a.G;
    // A query that sees nothing (left padding) gets zeros and an LSE of -inf, never NaN.
    store(a.out, ((int64_t(b) * layer.n + query(r)) * heads + head) * layer.D + c,
          total == 0.f ? 0.f : numerator / total, layer.dtype);
    if (a.lse && c == 0)
      a.lse[(int64_t(b) * heads + head) * layer.n + query(r)] =
          total == 0.f ? -INFINITY : (top + log2f(total)) / kLog2e;
  }
};

// What a warp has summed up of its rows. `o` holds the lane's channels, `sum` the lane's tokens.
template <int Rows, int Pairs>
struct Running {
  float top[Rows], sum[Rows];
  float2 o[Rows][Pairs];

  __device__ Running() {
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      top[r] = -INFINITY, sum[r] = 0.f;
#pragma unroll
      for (int j = 0; j < Pairs; j++) o[r][j] = {0.f, 0.f};
    }
  }

  // Scores (log2) to probabilities relative to `top`, which is raised when a score leaves it far behind. `counts`:
  // whether this lane adds its tokens to `sum`.
  __device__ __forceinline__ void probabilities(float (&s)[Rows], bool counts = true) {
    bool raise = false;
#pragma unroll
    for (int r = 0; r < Rows; r++) raise |= !(s[r] <= top[r] + kLazy);  // NaN too: it must reach the result
    if (__any_sync(~0u, raise)) {
#pragma unroll
      for (int r = 0; r < Rows; r++) {
        const float higher = fmaxf(top[r], warp_max(s[r]));
        const float factor = higher == -INFINITY ? 1.f : exp2f(top[r] - higher);
        top[r] = higher, sum[r] *= factor;
#pragma unroll
        for (int j = 0; j < Pairs; j++) o[r][j].x *= factor, o[r][j].y *= factor;
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      s[r] = s[r] == -INFINITY ? 0.f : exp2f(s[r] - top[r]);
      sum[r] += counts ? s[r] : 0.f;
    }
  }
};

// Attention over one warp's share of sinks, ring and new tokens. `warp` of `warps`: among all warps of all splits of
// the rows; `pair(j)`: the lane's j-th pair of channels. Several tokens are loaded at once, to wait for memory once.
template <int Rows, int Pairs, class PairOf>
__device__ __forceinline__ void exact_tokens(const RowBlock& block, Running<Rows, Pairs>& state, const PairOf& pair,
                                             int warp, int warps) {
  constexpr int kBatch = Pairs > 2 ? 2 : 4;
  const Attention& a = block.a;
  const Layer& layer = block.layer;
  const int D = int(layer.D), N = int(layer.N), R = int(layer.R), start = layer.start[block.b];
  const int64_t head = block.head();
  // Slots fit 31 bits where they can hold a token; a clock far off must not wrap.
  const int first = slot_index(block.first), oldest = slot_index(max(block.ring_begin(), int64_t(0)));
  const int ring_tokens = max(min(first - oldest, R), 0), tokens = N + ring_tokens + int(layer.n);
  if (warp >= tokens) return;
  float2 q[Rows][Pairs];
  int position[Rows];
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    position[r] = first + block.query(r);
#pragma unroll
    for (int j = 0; j < Pairs; j++) {
      q[r][j] = {0.f, 0.f};
      if (r < block.rows && 2 * pair(j) < D) {
        const float factor = a.scale * kLog2e;
        const float2 x = load_pair(block.query_row(r), pair(j), layer.dtype);
        q[r][j] = {x.x * factor, x.y * factor};
      }
    }
  }
  for (int i0 = warp; i0 < tokens; i0 += warps * kBatch) {
    float2 key[kBatch][Pairs], value[kBatch][Pairs];
    int slots[kBatch];
    bool always[kBatch];  // whether every later query reads the token exactly: a sink, or new
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      const int i = i0 + u * warps;
      const bool is_sink = i < N, is_new = i >= N + ring_tokens;
      const int slot = is_sink ? start + i : is_new ? first + i - N - ring_tokens : oldest + i - N;
      // Not there; not stored yet; already read as a sink.
      const bool skip =
          i >= tokens || slot < start || slot < 0 || (is_sink ? slot >= first : !is_new && slot < start + N);
      slots[u] = skip ? -1 : slot;
      always[u] = is_sink || is_new;
      if (skip) continue;
      const int64_t row = is_sink ? head * N + i : head * R + (is_new ? 0 : slot % R);
      const int64_t bytes = row * D * size_of(layer.dtype), token = slot - first;
      const char* k =
          is_new ? layer.k_new.at(block.b, block.h, token) : (is_sink ? layer.k_sinks : layer.k_ring) + bytes;
      const char* v =
          is_new ? layer.v_new.at(block.b, block.h, token) : (is_sink ? layer.v_sinks : layer.v_ring) + bytes;
#pragma unroll
      for (int j = 0; j < Pairs; j++)
        if (2 * pair(j) < D) {
          key[u][j] = load_pair(k, pair(j), layer.dtype);
          value[u][j] = load_pair(v, pair(j), layer.dtype);
        }
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (slots[u] < 0) continue;
      float s[Rows] = {};
#pragma unroll
      for (int j = 0; j < Pairs; j++)
        if (2 * pair(j) < D)
#pragma unroll
          for (int r = 0; r < Rows; r++) s[r] = fmaf(q[r][j].x, key[u][j].x, fmaf(q[r][j].y, key[u][j].y, s[r]));
#pragma unroll
      for (int r = 0; r < Rows; r++) {
        // `oldest` holds for every row; how far the ring reaches back depends on the row.
        const bool seen =
            slots[u] <= position[r] && (always[u] || slots[u] > position[r] - R) && !block.masked(r, slots[u]);
        s[r] = warp_sum(s[r]);
        s[r] = seen ? s[r] : -INFINITY;
      }
      state.probabilities(s, threadIdx.x % kWarp == 0);  // all lanes hold the same token: one counts it
#pragma unroll
      for (int j = 0; j < Pairs; j++) {
        if (2 * pair(j) >= D) continue;
#pragma unroll
        for (int r = 0; r < Rows; r++)
          if (s[r] != 0.f) {  // a slot that nobody sees may hold NaN
            state.o[r][j].x = fmaf(s[r], value[u][j].x, state.o[r][j].x);
            state.o[r][j].y = fmaf(s[r], value[u][j].y, state.o[r][j].y);
          }
      }
    }
  }
}

}  // namespace million
