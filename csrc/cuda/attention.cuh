// What both attention kernels share: which tokens a row of queries sees, and where its result goes.
#pragma once

#include <type_traits>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"
#include "ptx.cuh"

namespace million {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLazy = 8.f;  // how far (log2) a score may exceed the reference maximum before it is raised

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// x / y of 0 <= x < 2^21, with by = 1 / y.
__device__ __forceinline__ int quotient(int x, float by) { return int((x + .5f) * by); }

// x / y, with by = reciprocal(y), of 0 <= x < 2^31; of y = 0 it is some number.
inline uint32_t reciprocal(int64_t y) {
  return y <= 1 ? (y > 0 ? ~0u : 0u) : uint32_t(((int64_t(1) << 32) + y - 1) / y);
}
__device__ __forceinline__ int divide(int x, int y, uint32_t by) {
  const int quotient = int(__umulhi(x, by)), rest = x - quotient * y;  // exact, or off by one
  return quotient + (rest >= y) - (rest < 0);
}

// The slots that the rows of a block read from codes, and which of them every row reads.
struct Range {
  int begin, end;  // any row
  int all_end;     // slots from `begin` on before this: every row, if there is no mask
};

// What says where a row's tokens lie, as it is in memory.
struct Clock {
  int64_t now, oldest;
  int32_t start;
};

// Some rows (query, head of the group) of one row b and KV head h, and where their tokens lie.
struct RowBlock {
  const Attention& a;
  const Layer& layer;
  int b, h;
  int row0, rows;            // rows row0 .. row0 + rows - 1 of the launch are this block's
  int first, oldest, start;  // slots: of the first new token, the oldest that the ring may hold, the row's first

  // Without the clock: `ask_clock` and `know` follow, and what needs no clock may stand between them.
  __device__ RowBlock(const Attention& a, int row_and_head, int row0, int rows)
      : a(a),
        layer(a.layer),
        b(quotient(row_and_head, a.by_heads)),
        h(row_and_head - b * int(a.layer.H)),
        row0(row0),
        rows(min(rows, a.rows - row0)) {}

  __device__ Clock ask_clock() const { return ask_clock(b); }
  __device__ Clock ask_clock(int b) const {
    Clock asked;
    load_here(asked.now, layer.clock);
    load_here(asked.oldest, layer.clock + 2);
    load_here(asked.start, layer.start + b);
    return asked;
  }
  __device__ void know(const Clock& asked) {
    first = slot_index(first_slot(layer, asked.now));
    oldest = slot_index(asked.oldest);
    start = slot_index(asked.start);
  }

  __device__ int query(int r) const { return a.query0 + quotient(min(row0 + r, a.rows - 1), a.by_group); }
  __device__ int query_head(int r) const { return h * a.G + row0 + r - quotient(row0 + r, a.by_group) * a.G; }
  __device__ int position(int r) const { return first + query(r); }  // slot of a row's own token
  __device__ int ring_begin() const { return max(oldest, first - int(layer.R)); }

  __device__ bool masked(int r, int64_t slot) const {
    if (a.mask == nullptr) return false;
    return slot >= a.mask_slots || !a.mask[(int64_t(b) * layer.n + query(r)) * a.mask_slots + slot];
  }
  __device__ bool from_ring(int r, int64_t slot) const { return slot > position(r) - layer.R && slot >= ring_begin(); }

  __device__ Range range() const { return {max(start + int(layer.N), 0), coded_end(rows - 1), coded_end(0)}; }
  // End of the slots that row r reads from codes: what follows is not stored, or in the ring.
  __device__ int coded_end(int r) const {
    const int stored = min(first, min(int(layer.k.slots), int(layer.v.slots)));
    return min(stored, max(position(r) - int(layer.R) + 1, ring_begin()));
  }

  __device__ const __half* codebook(const Coded& book) const {
    return reinterpret_cast<const __half*>(book.codebook) + int64_t(h) * kCentroids * layer.D;
  }
  __device__ int64_t head() const { return int64_t(b) * layer.H + h; }

  // Channels of row r's query, as the model gave them.
  __device__ const char* query_row(int r) const { return query_row(r, b); }
  __device__ const char* query_row(int r, int b) const { return a.q.at(b, query_head(r), query(r)); }

  // Writes row r's channel c of the result. `total` is the softmax denominator of the scores relative to `top` (log2).
  __device__ void store_result(int r, int c, float numerator, float total, float top) const {
    const int head = query_head(r), heads = int(layer.H) * a.G;
    // A query that sees nothing (left padding) gets zeros and an LSE of -inf, never NaN.
    store(a.out, ((int64_t(b) * layer.n + query(r)) * heads + head) * layer.D + c,
          total == 0.f ? 0.f : numerator / total, layer.dtype);
    if (a.lse && c == 0)
      a.lse[(int64_t(b) * heads + head) * layer.n + query(r)] =
          total == 0.f ? -INFINITY : (top + log2f(total)) / kLog2e;
  }
};

}  // namespace million
