// What the tensor core kernel is made of: its constants, the shape of a block, what lies in shared memory beside the
// tables, and sums that are merged.
#pragma once

#include <type_traits>

#include "attention.cuh"
#include "attention_tables.cuh"
#include "ptx.cuh"

namespace million {
namespace mma {

// Where dynamic shared memory begins (checked): the driver keeps the first KiB, which older GPUs do not count.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedBase = 0;
#else
constexpr int kSharedBase = 1024;
#endif
constexpr int kTile = 64;
#ifdef MILLION_RACECHECK
constexpr int kArrivals = kWarp;  // compute-sanitizer does not see that a lane arrives for its warp, after __syncwarp
#else
constexpr int kArrivals = 1;
#endif
constexpr float kLowest = -1e30f;  // below any score, and finite

template <int D_, int KD_, int VD_, int Rows_, bool Narrow = false, int Batch = 1>
struct Shape {
  static constexpr int D = D_, KD = KD_, VD = VD_;
  static constexpr int Rows = Rows_;  // query rows of a block: 2, 4, 8 or 16
  // A operands are 16 query rows x rotations, B operands what is looked up; of two query rows, which with four
  // rotations are no more than the columns of B, it is the other way round: half the products. (Not with head_dim 256,
  // where it was slower.)
  static constexpr bool kLookedUpA = Rows == 2 && D <= 128;
  // Rows of the batch that share a block and its tables, 1 or 2. Of two each has one query row.
  static constexpr int kBatch = Batch;
  static_assert(Batch == 1 || (Batch == 2 && kLookedUpA));
  // Rows of A are query rows x rotations: with more than four query rows there is not room for all four, and lanes
  // exchange what they look up instead.
  static constexpr int kRotations = Rows <= 4 ? 4 : 16 / Rows;
  static constexpr bool kExchanges = kRotations < 4;
  static constexpr int kHalves = Rows == 2 ? 1 : 2;  // query rows of a lane: rh, and rh + kApartRows
  static constexpr int kOperandRows = rows_of_operands(Rows), kApartRows = kOperandRows / 2;
  static constexpr int kOwn = 4 / kRotations;       // fours of tokens of a lane in a tile
  static constexpr int kLaneRows = kOwn * kHalves;  // its rows for one four, then for the next
  // Keys' and values' tables too large for one block: keys' warps in one, values' in another of a cluster of two.
  static constexpr bool kApart = D > 128;
  // Of warps: a register that spills, or codes of half a tile instead of a whole one, cost more than a pair brings.
  static constexpr int kPairs = kApart ? 8 : Rows >= 4 || VD < 8 ? 6 : 8;
  // Whether a register is left for a lane's number, which else is asked for wherever it is used.
  static constexpr bool kHoldsLane = Rows == 4 && VD < 8 && !kApart;
  static constexpr int kBlocks = kApart ? 2 : 1;          // of a split
  static constexpr int kValueWarp = kApart ? 0 : kPairs;  // the first of those for values, or that prepare queries
  static constexpr int kHalf = kPairs * kWarp, kThreads = kApart ? kHalf : 2 * kHalf;
  using K = KeyTable<D, KD, Narrow>;
  using V = ValueTable<D, VD, Narrow>;
  static constexpr bool kOnePage = K::kRowBytes + V::kRowBytes <= kRow;  // for both tables, row by row
  static constexpr int kValueTable = kApart     ? 0
                                     : kOnePage ? K::kRowBytes
                                                : (K::kBytes + 127) / 128 * 128;  // where it begins
  static constexpr int kTableBytes = kApart     ? (K::kBytes > V::kBytes ? K::kBytes : V::kBytes)
                                     : kOnePage ? kPage
                                                : kValueTable + V::kBytes;
  static constexpr int kOperands = kOperandRows / 4 * D;         // uint2 of the operands of a frame's queries
  static constexpr int kLine = D / 2;                            // pairs of channels
  static constexpr int kFrames = 16 / Rows;                      // whose queries are prepared with one product
  static constexpr int kKept = Rows > 8 ? 1 : Rows > 4 ? 2 : 8;  // frames whose queries stay in shared memory
};

// Where a query row of the block is.
struct Row {
  int position, coded_end, query;  // slot of its own token; end of the slots it reads from codes; its new token
  int64_t out, lse;                // its first element of the results
};

// Frames of the block's tiles.
struct Frames {
  int begin, end;
};

// Tiles that are read from codes.
struct Run {
  int begin, end;
};

// The exact tokens in order: sinks, ring, new tokens.
struct Exact {
  int tokens, sinks, ring, oldest, ring_slot, first, start;  // `ring` tokens from slot `oldest`, place `ring_slot`, on
};
struct ExactPlace {
  const char *k, *v;
  int64_t k_stride, v_stride;  // of a token, bytes
};

// Where the tokens of a row of the batch are, and which pairs of warps read them.
struct Tokens {
  Range seen;
  Exact exact;
  ExactPlace places[3];     // sinks, ring, new tokens
  const uint8_t* codes[2];  // of the row's KV head: keys', values'
  int origin;
  int first_pair, pairs;
};

template <class S>
struct Scratch {
  // Probabilities as operands: of four tokens of a lane's query rows, the first two of row rh, of row rh + kApartRows
  // if there is one, then the others. [rh][fours]
  using Four = std::conditional_t<S::kHalves == 2, uint4, uint2>;
  using Fours = Four[S::kApartRows][kTile / 4];
  struct Slot {  // of a pair's tile: probabilities, and what its earlier results are to be multiplied with first
    Fours p;
    float factor[S::Rows];
    int rescale;
    int pad[3];
    static constexpr int kSent = S::Rows * (2 * kTile + 4) + 4;  // bytes of it, between blocks
  } slots[S::kPairs][2];
  union {
    __half turned[2][16][S::D + 8];  // rotated queries of a product, and of the next; rows on different banks
    // Then, of the splits of a cluster: a pair of channels, reference maximum, sum.
    float4 from_splits[S::Rows * S::kLine + kMaxCluster];
  };
  uint2 prepared[S::kKept][S::kOperands];  // queries of the block's frames, if they are this few
  float query[S::Rows][S::D];              // divided by its power of two
  uint2 raw[S::kOperands];                 // the same as operands
  float frequencies[S::D / 2];
  Four zeros[kTile / 4];     // what lanes read whose probabilities another rotation takes
  float magnitude[S::Rows];  // the power of two, times scale * log2(e)
  Row rows[S::Rows];
  Tokens tokens[S::kBatch];
  Run runs[S::kPairs];
  int busy;     // pairs that have exact tokens, from the first on; 0 if all have
  bool in_two;  // keys' table is brought twice
  Frames frames;
  uint32_t arguments;               // where `begin` leaves what it has read, for no other use
  float2 ends[S::kPairs][S::Rows];  // reference maximum (log2), sum
  uint64_t full[S::kPairs][2], empty[S::kPairs][2], k_table, k_more, v_table, queries, parts;
};

// A lane's codes of a tile come in chunks of 16 bytes. Warps keep a tile of them in registers, or half, where that is
// whole chunks, and ask for more as soon as a chunk is done with.
struct Unit {
  int words, per_tile;
  constexpr Unit(int tile_words, bool whole)
      : words(tile_words % 8 || whole ? tile_words : tile_words / 2), per_tile(tile_words % 8 || whole ? 1 : 2) {}
};

// A lane's places in its table, for each width of rotation.
template <class Table>
struct Places {
  uint32_t four[4], two[2], one;
  Places() = default;
  // `base`: where shared memory begins, relative to kSharedBase.
  __device__ Places(int n, int c, uint32_t base) {
#pragma unroll
    for (int x = 0; x < 4; x++) four[x] = opaque(base + Table::lane_place(4, x, n, c));
#pragma unroll
    for (int x = 0; x < 2; x++) two[x] = opaque(base + Table::lane_place(2, x, n, c));
    one = opaque(base + Table::lane_place(1, 0, n, c));
  }
  __device__ __forceinline__ uint32_t at(int width, int x) const {
    return width == 4 ? four[x & 3] : width == 2 ? two[x & 1] : one;
  }
};

__device__ __forceinline__ uint32_t to_half2(uint32_t x) {
  const __half2 y = __float22half2_rn(__bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x)));
  return reinterpret_cast<const uint32_t&>(y);
}
// Pairs of bf16 numbers as fp16, all after one branch.
template <int Words>
__device__ __forceinline__ void to_half(uint32_t* x, DType dtype) {
  if (dtype != DType::bf16) return;
#pragma unroll
  for (int i = 0; i < Words; i++) x[i] = to_half2(x[i]);
}

__device__ __forceinline__ float2 to_floats(uint32_t x, DType dtype) {
  return dtype == DType::bf16 ? __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x))
                              : __half22float2(reinterpret_cast<const __half2&>(x));
}

// Channels of an exact token, as the model gave them.
template <int Words>
__device__ __forceinline__ void load_exact(const char* at, uint32_t (&out)[Words]) {
#pragma unroll
  for (int i = 0; i < Words; i++) out[i] = __ldcg(reinterpret_cast<const uint32_t*>(at) + i);
}

// Place of a pair of channels of a row of numerators, so that the lanes that write them together write to different
// banks: all but the lowest four bits of `line` stay, and those by which such lanes differ come to where they do not.
template <int VD>
__device__ __forceinline__ int spread(int line) {
  const int c = line >> 4;
  return line ^ (VD == 2 ? (c & 1) << 2 : VD == 4 ? (c & 1) << 3 | (c >> 1 & 1) : c & 3);
}

// Partial results: numerators [B, H, rows, splits, D], then (reference maximum (log2), sum) [B, H, rows, splits].
__device__ __forceinline__ float2* ends_of(const Attention& a) {
  return reinterpret_cast<float2*>(a.partials) + a.layer.B * a.layer.H * a.rows * a.splits * (a.layer.D / 2);
}

template <int Lanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = 1; step < Lanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// A row's sums for a pair of channels, as parts are added in order.
struct Merged {
  float top = kLowest, total = 0.f;
  float2 x = {0.f, 0.f};

  // Parts, of which those that saw nothing have kLowest and zeros. None waits for another's exponential.
  template <int Parts>
  __device__ __forceinline__ void add(const float2 (&ends)[Parts], const float2 (&y)[Parts]) {
    const float before = top;
#pragma unroll
    for (int i = 0; i < Parts; i++) top = fmaxf(top, ends[i].x);
    const float mine = exp2_fast(before - top);
    total *= mine, x = {x.x * mine, x.y * mine};
#pragma unroll
    for (int i = 0; i < Parts; i++) add_below(ends[i], y[i]);
  }

  // A part whose reference maximum is at most `top`.
  __device__ __forceinline__ void add_below(float2 end, float2 y) {
    const float theirs = exp2_fast(end.x - top);
    total += end.y * theirs;
    x = {x.x + y.x * theirs, x.y + y.y * theirs};
  }

  // The sums of `Lanes` neighbouring lanes with the same `top` together, in each of them.
  template <int Lanes>
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) {
      total += __shfl_xor_sync(~0u, total, step);
      x.x += __shfl_xor_sync(~0u, x.x, step), x.y += __shfl_xor_sync(~0u, x.y, step);
    }
  }

  // `out`, `lse`: the row's first element of the results.
  __device__ __forceinline__ void store(const Attention& a, int64_t out, int64_t lse, int line) const {
    // A query that sees nothing (left padding) gets zeros and an LSE of -inf, never NaN.
    const float by = total == 0.f ? 0.f : __fdividef(1.f, total);
    const float2 y = {x.x * by, x.y * by};
    void* to = static_cast<char*>(a.out) + (out + 2 * line) * 2;
    if (a.layer.dtype == DType::bf16)
      *static_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(y.x, y.y);
    else
      *static_cast<__half2*>(to) = __floats2half2_rn(y.x, y.y);
    if (a.lse && line == 0) a.lse[lse] = total == 0.f ? -INFINITY : (top + log2f(total)) * kLn2;
  }
};

}  // namespace mma
}  // namespace million
