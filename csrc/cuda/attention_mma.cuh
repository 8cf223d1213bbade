// PQ attention on tensor cores, for layouts mma_k and mma_v: head_dim 64, 96, 128 and 16-bit models.
//
//   out[b,i,h,:] = sum_s p_s v_s,  p = softmax_s(scale q . k_s),  as in attention.cu
//
// Every centroid that a token needs is looked up once, in shared memory, straight into the B operand of an mma
// instruction; nothing is decoded to memory first. With mma.m16n8k16, lane l = 4 n + c holds, of column n, the depths
// of its c. A lookup is free of bank conflicts if its lanes (those that shared memory serves together: 32 of 4 bytes,
// 16 of 8, 8 of 16) ask for entries that lie on different banks, and a table row (one code's entries) lies across the
// banks by subspace. So lanes that would ask for one subspace of different tokens take turns: their steps are rotated,
// and the rotation is undone in the A operand, whose 16 rows are 4 query rows x 4 rotations.
//
// Scores. Columns are tokens, depths are channels. At step s lane (n, c) looks up subspace 4 (s ^ rot) + c of token n,
// rot = (n & 3) ^ 2 half for two groups of eight tokens (half = 0, 1). Row (query row, r) of A holds the query with its
// steps rotated by r, so column n of the result is right in the row whose r equals rot. Over the two halves every lane
// ends up with exactly one right score of the 16 tokens for each of its query rows.
//
// Values. Columns are subspaces, depths are tokens. At step i lane (n, c) looks up subspace w n + (i ^ c) of its four
// tokens; row (query row, r) of A holds the probabilities of the tokens of c = r only. Two PRMTs transpose a pair of
// lookups into (token, next token) of each channel. With one or two query rows there is a shorter way: depths are pairs
// (channel 0, channel 1) of one token, and the rows that are free hold (0, p) for the second channel beside (p, 0) for
// the first, so that a lookup is an operand as it comes.
//
// Steps rotate in groups of w = 4, then 2, then 1 (`rotation_width`); where w leaves lanes on the same banks, a table
// holds its entries several times (replicas).
//
//   table image  [256, pages, 256 bytes]   page p of a table: 64 KiB of shared memory, a code's row every 256 bytes, so
//                                          that an address is (page, code, place in the row): one PRMT
//   prepared     [B, H, frames, tiles of 4 rows, 4 D] fp16   q_f / power of two in the order of A
//   magnitudes   [B, H, tiles of 4 rows, 4] fp32   the power of two, times scale * log2(e)
//
// A block is one split of the tokens of one row b, KV head and tile of query rows. Its warps come in pairs, one for the
// scores and one for the values of the same tiles of 64 tokens; probabilities go through two slots of shared memory.
// Exact tokens (sinks, ring, new) go the same way, 16 at a time, with loads in place of lookups, while the tables are
// on their way.
#pragma once

#include <cuda_pipeline.h>

#include <cfloat>
#include <utility>

#include "attention.cuh"

namespace million {
namespace mma {

constexpr int kSharedBase = 1024;  // where dynamic shared memory begins: the driver keeps the first KiB (checked)
constexpr int kPage = 1 << 16, kRow = 256;
constexpr int kTile = 64;
constexpr int kAhead = 2;          // tiles from the one at hand to the one that is brought to the L2 cache
constexpr float kLowest = -1e30f;  // below any score, and finite

template <class F, int... I>
__device__ __forceinline__ void for_each(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
__device__ __forceinline__ void static_for(const F& f) {
  for_each(f, std::make_integer_sequence<int, N>());
}

// One group of steps that rotate among themselves.
struct Group {
  int first, width;  // steps
};

// The group of a step.
constexpr Group group_of(int steps, int step) {
  const int width = rotation_width(steps, step);
  return {step / width * width, width};
}

// ---- tables: where a group's entries lie ----

// Keys of d channels a subspace. A group holds subspaces 4 first .. 4 (first + width) - 1 in order, `replicas` times.
template <int D, int d>
struct KeyTable {
  static constexpr int kSteps = D / d / 4;
  static constexpr int kTogether = 16 / d;  // values of n that shared memory serves together

  static constexpr int run(int width) { return width * 8 * d; }  // bytes of one replica
  static constexpr int replicas(int width) { return run(width) >= 128 ? 1 : 128 / run(width); }
  static constexpr int bytes(int width) { return run(width) * replicas(width); }
  static constexpr int offset(int step) {  // of a step's group in a row
    int at = 0;
    for (int s = 0; s < group_of(kSteps, step).first; s += rotation_width(kSteps, s))
      at += bytes(rotation_width(kSteps, s));
    return at;
  }
  static constexpr int kRowBytes = offset(kSteps - 1) + bytes(rotation_width(kSteps, kSteps - 1));
  static constexpr int kPages = (kRowBytes + kRow - 1) / kRow;

  // The lane's place in a group of this width at step `x` of the group.
  static __device__ uint32_t lane_place(int width, int x, int n, int c) {
    return (n / width % replicas(width)) * run(width) + (x ^ (n & (width - 1))) * 8 * d + c * 2 * d;
  }

  // Byte of the codebook's row that belongs at byte `at` of a table row.
  static __device__ int source(int at) {
    int from = 0;
    for (int s = 0; s < kSteps;) {
      const int width = rotation_width(kSteps, s);
      if (at < bytes(width)) return from + at % run(width);
      at -= bytes(width), from += run(width), s += width;
    }
    return 0;
  }
};

// Values. A group holds subspaces 8 first .. 8 (first + width) - 1 in lines of 128 bytes, one line for the values of n
// that are served together; a line holds its entries `replicas` times.
template <int D, int d>
struct ValueTable {
  static constexpr int kSteps = D / d / 8;
  static constexpr int kTogether = 16 / d, kLines = 8 / kTogether, kGroupBytes = kLines * 128;

  static constexpr int run(int width) { return 32 * width; }
  static constexpr int offset(int step) {
    int at = 0;
    for (int s = 0; s < group_of(kSteps, step).first; s += rotation_width(kSteps, s)) at += kGroupBytes;
    return at;
  }
  static constexpr int kRowBytes = offset(kSteps - 1) + kGroupBytes;
  static constexpr int kPages = (kRowBytes + kRow - 1) / kRow;

  static __device__ uint32_t lane_place(int width, int x, int n, int c) {
    const int at =
        n / kTogether * 128 + (c / width) * run(width) + (n % kTogether * width + (x ^ (c & (width - 1)))) * 2 * d;
    return at / kRow * kPage + at % kRow;
  }
  static __device__ int source(int at) {
    int from = 0;
    for (int s = 0; s < kSteps;) {
      const int width = rotation_width(kSteps, s);
      if (at < kGroupBytes) return from + at / 128 * run(width) + at % 128 % run(width);
      at -= kGroupBytes, from += kLines * run(width), s += width;
    }
    return 0;
  }
};

// ---- instructions ----

__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Reads of tables are no `volatile`: the compiler may interleave them. What keeps them behind the barrier that fills
// the tables is that lane places pass through `opaque` after it.
template <int Imm, int Words>
__device__ __forceinline__ void lookup(uint32_t address, uint32_t (&out)[Words]) {
  if constexpr (Words == 1)
    asm("ld.shared.b32 %0, [%1+%2];" : "=r"(out[0]) : "r"(address), "n"(Imm));
  else if constexpr (Words == 2)
    asm("ld.shared.v2.b32 {%0,%1}, [%2+%3];" : "=r"(out[0]), "=r"(out[1]) : "r"(address), "n"(Imm));
  else
    asm("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
        : "r"(address), "n"(Imm));
}

__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x)::"memory");
  return x;
}

__device__ __forceinline__ uint4 load_codes(const uint8_t* at) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(at));
  return r;
}

__device__ __forceinline__ void mma_dense(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Arrives when the thread's asynchronous copies so far are there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int phase) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(phase)
                 : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(phase)
                 : "memory");
#endif
  } while (!done);
}

// ---- the kernel's shape ----

template <int D_, int KD_, int VD_, int Rows_>
struct Shape {
  static constexpr int D = D_, KD = KD_, VD = VD_;
  static constexpr int Rows = Rows_;                 // query rows of a block: 2, 4 or 8
  static constexpr int kTiles = Rows > 4 ? 2 : 1;    // A operands of 4 query rows
  static constexpr int kHalves = Rows == 2 ? 1 : 2;  // query rows of a lane in a tile: rh, and rh + 2
  static constexpr int kLaneRows = kTiles * kHalves;
  static constexpr int kPairs = Rows == 8   ? 4
                                : Rows == 4 ? 6
                                            : 8;  // of warps: one spilled register costs more than a pair brings
  static constexpr int kThreads = kPairs * 2 * kWarp;
  using K = KeyTable<D, KD>;
  using V = ValueTable<D, VD>;
  static constexpr int kTableBytes = (K::kPages + V::kPages) * kPage;
  static constexpr int kLine = D / 2;  // pairs of channels
};

// Where a query row of the block is.
struct Row {
  int position, coded_end, query;  // slot of its own token; end of the slots it reads from codes; its new token
  int64_t out, lse;                // its first element of the results
};

// The exact tokens in order: sinks, ring, new tokens.
struct Exact {
  int tokens, sinks, ring, oldest, first, start;  // `ring` tokens from slot `oldest` on
};

template <class S>
struct Scratch {
  struct Slot {  // probabilities of a pair's tile, and what its earlier results are to be multiplied with first
    __half p[S::Rows][kTile];
    float factor[S::Rows];
    int rescale;
    int pad[3];
  } slots[S::kPairs][2];
  Row rows[S::Rows];
  Range seen;
  Exact exact;
  float2 ends[S::kPairs][S::Rows];  // reference maximum (log2), sum
  uint64_t full[S::kPairs][2], empty[S::kPairs][2], tables;
};

// A lane's codes of a tile come in chunks of 16 bytes. Warps keep half a tile of them in registers, where that is whole
// chunks, and ask for more as soon as a chunk is done with.
struct Unit {
  int words, per_tile;
  constexpr Unit(int tile_words)
      : words(tile_words % 8 ? tile_words : tile_words / 2), per_tile(tile_words % 8 ? 1 : 2) {}
};

// A lane's places in its table, for each width of rotation.
template <class Table>
struct Places {
  uint32_t four[4], two[2], one;
  __device__ Places(int n, int c) {
#pragma unroll
    for (int x = 0; x < 4; x++) four[x] = opaque(Table::lane_place(4, x, n, c));
    two[0] = opaque(Table::lane_place(2, 0, n, c)), two[1] = opaque(Table::lane_place(2, 1, n, c));
    one = opaque(Table::lane_place(1, 0, n, c));
  }
  __device__ __forceinline__ uint32_t at(int width, int x) const {
    return width == 4 ? four[x & 3] : width == 2 ? two[x & 1] : one;
  }
};

__device__ __forceinline__ uint32_t to_half2(uint32_t x, DType dtype) {
  if (dtype != DType::bf16) return x;
  const __half2 y = __float22half2_rn(__bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x)));
  return reinterpret_cast<const uint32_t&>(y);
}

// Channels of an exact token as the tables' entries are, fp16; zero where `live` is not set. It loads all the same, so
// that a warp's loads do not wait for each other.
template <int Words>
__device__ __forceinline__ void load_exact(const char* at, bool live, DType dtype, uint32_t (&out)[Words]) {
#pragma unroll
  for (int i = 0; i < Words; i++) {
    const uint32_t x = to_half2(__ldcg(reinterpret_cast<const uint32_t*>(at) + i), dtype);
    out[i] = live ? x : 0u;
  }
}

// Partial results: numerators [B, H, rows, splits, D], then (reference maximum (log2), sum) [B, H, rows, splits].
__device__ __forceinline__ float2* ends_of(const Attention& a) {
  return reinterpret_cast<float2*>(a.partials) + a.layer.B * a.layer.H * a.rows * a.splits * (a.layer.D / 2);
}

// A row's sums for a pair of channels, as parts are added in order.
struct Merged {
  float top = kLowest, total = 0.f;
  float2 x = {0.f, 0.f};

  __device__ __forceinline__ void add(float2 end, float2 y) {
    if (end.y == 0.f) return;  // it saw nothing
    const float higher = fmaxf(top, end.x), mine = exp2_fast(top - higher), theirs = exp2_fast(end.x - higher);
    top = higher, total = total * mine + end.y * theirs;
    x = {x.x * mine + y.x * theirs, x.y * mine + y.y * theirs};
  }

  // `out`, `lse`: the row's first element of the results.
  __device__ __forceinline__ void store(const Attention& a, int64_t out, int64_t lse, int line) const {
    // A query that sees nothing (left padding) gets zeros and an LSE of -inf, never NaN.
    const float2 y = total == 0.f ? float2{0.f, 0.f} : float2{x.x / total, x.y / total};
    void* to = static_cast<char*>(a.out) + (out + 2 * line) * 2;
    if (a.layer.dtype == DType::bf16)
      *static_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(y.x, y.y);
    else
      *static_cast<__half2*>(to) = __floats2half2_rn(y.x, y.y);
    if (a.lse && line == 0) a.lse[lse] = total == 0.f ? -INFINITY : (top + log2f(total)) / kLog2e;
  }
};

template <class S>
struct Block : RowBlock {
  using K = typename S::K;
  using V = typename S::V;

  char* shared;
  Scratch<S>& scratch;
  int lane, warp, n, c;

  __device__ Block(const Attention& a, char* shared)
      : RowBlock(a, blockIdx.y, blockIdx.z * S::Rows, S::Rows),
        shared(shared),
        scratch(*reinterpret_cast<Scratch<S>*>(shared + S::kTableBytes)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        n(lane >> 2),
        c(lane & 3) {}

  template <class Table>
  static __device__ void load_table(const __half* codebook, char* to) {
    constexpr int kVectors = Table::kRowBytes / 16, kStep = S::kThreads / kVectors;
    const int at = threadIdx.x % kVectors * 16;
    const char* from = reinterpret_cast<const char*>(codebook) + Table::source(at);
    to += at / kRow * kPage + at % kRow;
    if (int(threadIdx.x) < kStep * kVectors)
#pragma unroll 4
      for (int code = threadIdx.x / kVectors; code < kCentroids; code += kStep)
        __pipeline_memcpy_async(to + code * kRow, from + code * S::D * 2, 16);
  }

  // What all warps will read, computed once.
  __device__ void describe() const {
    const int r = threadIdx.x;
    if (r < S::Rows) {
      const int row = min(r, rows - 1), at = query(row), own = h * a.G + (row0 + row) % a.G, heads = int(layer.H) * a.G;
      scratch.rows[r] = {slot_index(position(row)), coded_end(row), at,
                         ((int64_t(b) * layer.n + at) * heads + own) * S::D, (int64_t(b) * heads + own) * layer.n + at};
    }
    if (r == S::Rows) scratch.seen = range();
    if (r == S::Rows + 1) {
      const int at = slot_index(first), oldest = slot_index(max(ring_begin(), int64_t(0)));
      const int ring = max(min(at - oldest, int(layer.R)), 0), sinks = int(layer.N);
      scratch.exact = {sinks + ring + int(layer.n), sinks, ring, oldest, at, layer.start[b]};
    }
  }

  // The query row of a lane's accumulator: `rr` counts the lane's rows.
  __device__ int lane_row(int rr) const { return (n >> 2) + 2 * (rr % S::kHalves) + 4 * (rr / S::kHalves); }

  __device__ bool masked(int r, int slot) const {
    return a.mask != nullptr &&
           (slot >= a.mask_slots || !a.mask[(int64_t(b) * layer.n + scratch.rows[r].query) * a.mask_slots + slot]);
  }

  // ---- what a pair of warps works on ----

  // Its tiles of codes.
  struct Run {
    int begin, end;
  };
  __device__ Run run(int pair) const {
    const Range seen = scratch.seen;
    const int tile0 = seen.begin / kTile, all = max((seen.end + kTile - 1) / kTile - tile0, 0);
    const int begin = int(int64_t(all) * blockIdx.x / a.splits), end = int(int64_t(all) * (blockIdx.x + 1) / a.splits);
    // Pairs with exact tokens get fewer tiles: the first `more` pairs have a group more than the others.
    const int tiles = end - begin, mine = max(groups() - int(blockIdx.x) + a.splits - 1, 0) / a.splits,
              more = mine % S::kPairs;
    const int few = max((tiles + kGroupTiles * mine) / S::kPairs - kGroupTiles * (mine / S::kPairs + 1), 0);
    const auto bound = [&](int p) {
      const int rest = tiles - more * few;
      return tile0 + begin + (p <= more ? p * few : more * few + rest * (p - more) / (S::kPairs - more));
    };
    return {bound(pair), bound(pair + 1)};
  }

  // Before them its exact tokens, 16 at a time: groups `first_group`, `first_group + group_step`, ...
  static constexpr int kGroup = 16, kGroupTiles = 3;  // what a group costs, in tiles
  __device__ int first_group(int pair) const { return pair * a.splits + int(blockIdx.x); }
  __device__ int group_step() const { return a.splits * S::kPairs; }
  __device__ int groups() const { return (scratch.exact.tokens + kGroup - 1) / kGroup; }

  // An exact token; slot -1 for none.
  struct Token {
    int slot;
    bool in_ring;
    const char *k, *v;
  };
  __device__ Token token(int i) const {
    const Exact e = scratch.exact;
    const bool is_sink = i < e.sinks, is_new = i >= e.sinks + e.ring;
    const int slot = is_sink ? e.start + i : is_new ? e.first + i - e.sinks - e.ring : e.oldest + i - e.sinks;
    // Not stored yet; already read as a sink.
    if (i >= e.tokens || slot < e.start || slot < 0 ||
        (is_sink ? slot >= e.first : !is_new && slot < e.start + e.sinks))
      return {-1, false, layer.k_new.at(b, h, 0), layer.v_new.at(b, h, 0)};  // some token that is there
    if (is_new) return {slot, false, layer.k_new.at(b, h, slot - e.first), layer.v_new.at(b, h, slot - e.first)};
    const int64_t at = (is_sink ? head() * e.sinks + i : head() * layer.R + slot % int(layer.R)) * (S::D * 2);
    return {slot, !is_sink, (is_sink ? layer.k_sinks : layer.k_ring) + at,
            (is_sink ? layer.v_sinks : layer.v_ring) + at};
  }
  // The ring's oldest slot holds for every row; how far the ring reaches back depends on the row.
  __device__ bool sees(int r, const Token& t) const {
    const int position = scratch.rows[r].position;
    return t.slot >= 0 && t.slot <= position && (!t.in_ring || t.slot > position - int(layer.R)) && !masked(r, t.slot);
  }

  // ---- codes ----

  static constexpr Unit kKeyUnit{2 * K::kSteps}, kValueUnit{4 * V::kSteps};
  static constexpr int kWords = kKeyUnit.words > kValueUnit.words ? kKeyUnit.words : kValueUnit.words;
  static constexpr int kKeyTile = kTile * S::D / S::KD, kValueTile = kTile * S::D / S::VD;  // bytes
  using Words = uint32_t[kWords];

  // The warp's codes, keys' or values': the lane's of the run's first tile.
  __device__ const uint8_t* codes(const Run& tiles) const {
    const Coded& book = warp < S::kPairs ? layer.k : layer.v;
    const int subspaces = warp < S::kPairs ? S::D / S::KD : S::D / S::VD;
    return book.codes + (head() * book.slots + int64_t(tiles.begin) * kTile) * subspaces + lane * 16;
  }

  static __device__ __forceinline__ void fetch(Words& words, int chunk, const uint8_t* unit) {
    const uint4 x = load_codes(unit + chunk * 512);
    words[4 * chunk] = x.x, words[4 * chunk + 1] = x.y, words[4 * chunk + 2] = x.z, words[4 * chunk + 3] = x.w;
  }

  // Replaces the chunks that batch `Batch` of the unit's was the last to need. `next`: the unit after this, null for
  // none.
  template <bool Keys, int Batch>
  static __device__ __forceinline__ void refill(Words& words, const uint8_t* next) {
    constexpr Unit unit = Keys ? kKeyUnit : kValueUnit;
    constexpr int kChunks = unit.words / 4, kBatches = 4 / unit.per_tile;
    if (next != nullptr)
#pragma unroll
      for (int i = Batch * kChunks / kBatches; i < (Batch + 1) * kChunks / kBatches; i++) fetch(words, i, next);
  }

  // Brings a tile to the L2 cache, some tiles before its codes are loaded: registers need only cover the way from
  // there.
  static __device__ __forceinline__ void prefetch(const uint8_t* tile, int bytes, int lane) {
    if (lane * 128 < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(tile + lane * 112));
  }

  // ---- scores ----

  using Query = uint32_t[S::kTiles][S::D / 16][4];
  struct Frame {
    int tokens, now, border;  // tokens of a frame; the one whose query is loaded, and its end
  };

  __device__ void load_magnitude(float (&magnitude)[S::kLaneRows]) const {
    const int tiles = (a.rows + 3) / 4;
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++)
      magnitude[rr] =
          __ldcg(a.magnitudes + (head() * tiles + row0 / 4) * 4 + min(lane_row(rr), 4 * (tiles - row0 / 4) - 1));
  }

  // The lane's part of the A operands: of the query as the model gave it,
  __device__ void load_raw_query(Query& q) const {
    const int r = n & 3, rh = n >> 2;
    const uint32_t sign = a.scale < 0.f ? 0x80008000u : 0u;  // so that a larger score is a larger product
#pragma unroll
    for (int qt = 0; qt < S::kTiles; qt++)
#pragma unroll
      for (int i = 0; i < S::kHalves; i++) {
        const int row = 4 * qt + rh + 2 * i;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(query_row(min(row, rows - 1))) + c * (S::KD / 2);
#pragma unroll
        for (int step = 0; step < K::kSteps; step++) {
          const Group group = group_of(K::kSteps, step);
          const int mine = group.first + ((step - group.first) ^ (r & (group.width - 1)));
#pragma unroll
          for (int sub = 0; sub < S::KD / 2; sub++) {
            const int u = step * (S::KD / 2) + sub;
            const uint32_t x = to_half2(__ldcg(from + mine * 2 * S::KD + sub), layer.dtype) ^ sign;
            q[qt][u / 2][u % 2 * 2 + i] = row < rows ? x : 0u;
            if (S::kHalves == 1) q[qt][u / 2][u % 2 * 2 + 1] = 0u;
          }
        }
      }
  }

  // and of a frame, prepared.
  __device__ __forceinline__ void load_query(int frame, Query& q) const {
    const int tiles = (a.rows + 3) / 4, r = n & 3, rh = n >> 2;
#pragma unroll
    for (int qt = 0; qt < S::kTiles; qt++) {
      const int64_t tile = (head() * a.frames + frame) * tiles + min(row0 / 4 + qt, tiles - 1);
      const uint2* from = static_cast<const uint2*>(a.prepared) + tile * S::D + (c * 2 + rh) * (S::KD / 2);
#pragma unroll
      for (int step = 0; step < K::kSteps; step++) {
        const Group group = group_of(K::kSteps, step);
        const int mine = group.first + ((step - group.first) ^ (r & (group.width - 1)));
#pragma unroll
        for (int sub = 0; sub < S::KD / 2; sub++) {
          // [step][c][rh][pair of channels][rh, rh + 2] half2
          const uint2 x = __ldcg(from + mine * 8 * (S::KD / 2) + sub);
          const int u = step * (S::KD / 2) + sub;  // pair of depths: operand u / 2, its lower or upper half
          q[qt][u / 2][u % 2 * 2] = x.x, q[qt][u / 2][u % 2 * 2 + 1] = S::kHalves == 2 ? x.y : 0u;
        }
      }
    }
  }

  // Waits for the loads of a query here: else the first instruction of every tile that uses it might wait, and with it
  // for the codes that are on their way.
  static __device__ __forceinline__ void settle(Query& q) {
    const uint32_t zero = blockDim.x ^ S::kThreads;  // which the compiler does not know
#pragma unroll
    for (int qt = 0; qt < S::kTiles; qt++)
#pragma unroll
      for (int i = 0; i < S::D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) q[qt][i][j] ^= zero;
  }

  // Adds the products of a query with what `look(step, half, out)` gives for every step of `Batches` x 2 halves.
  template <int Batches, class Look>
  static __device__ __forceinline__ void multiply(const Query& q, float (&acc)[Batches][2][S::kTiles][4],
                                                  const Look& look) {
    constexpr int kOperands = S::D / 16, kPerLookup = S::KD == 8 ? 2 : 1;  // operands that a step's lookup fills
    static_for<kOperands / kPerLookup>([&](auto t_) {
      constexpr int t = decltype(t_)::value;
      static_for<2 * Batches>([&](auto part_) {
        constexpr int batch = decltype(part_)::value / 2, half = decltype(part_)::value % 2;
        uint32_t x[S::KD == 8 ? 4 : 2];
        if constexpr (S::KD == 2) {
          uint32_t low[1], high[1];
          look(std::integral_constant<int, 2 * t>(), std::integral_constant<int, batch>(),
               std::integral_constant<int, half>(), low);
          look(std::integral_constant<int, 2 * t + 1>(), std::integral_constant<int, batch>(),
               std::integral_constant<int, half>(), high);
          x[0] = low[0], x[1] = high[0];
        } else {
          look(t_, std::integral_constant<int, batch>(), std::integral_constant<int, half>(), x);
        }
#pragma unroll
        for (int u = 0; u < kPerLookup; u++)
#pragma unroll
          for (int qt = 0; qt < S::kTiles; qt++)
            mma_dense(acc[batch][half][qt], q[qt][t * kPerLookup + u], x[2 * u], x[2 * u + 1]);
      });
    });
  }

  // The one right score of a batch for each of the lane's rows.
  __device__ __forceinline__ void pick(const float (&acc)[2][S::kTiles][4], float (&s)[S::kLaneRows]) const {
    const int r = n & 3;
    const bool odd = r & 1, upper = (c & 1) ^ (r >> 1);
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
      const int e = rr % S::kHalves * 2, qt = rr / S::kHalves;
      const float low = odd ? acc[0][qt][e + 1] : acc[0][qt][e], high = odd ? acc[1][qt][e + 1] : acc[1][qt][e];
      s[rr] = upper ? high : low;
    }
  }

  struct Softmax {
    float top[S::kLaneRows], sum[S::kLaneRows], magnitude[S::kLaneRows];
  };

  // Scores of a tile, the lane's four tokens of each of its rows, to probabilities in the pair's slot.
  __device__ __forceinline__ void publish(float (&s)[S::kLaneRows][4], Softmax& state, int pair, int it) const {
    const int own = lane & 15;
    float highest[S::kLaneRows];
    bool raise = false;
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
      highest[rr] = fmaxf(fmaxf(s[rr][0], s[rr][1]), fmaxf(s[rr][2], s[rr][3])) * state.magnitude[rr];
      raise |= highest[rr] > state.top[rr] + kLazy;
    }
    raise = __any_sync(~0u, raise);
    auto& slot = scratch.slots[pair][it & 1];
    barrier_wait(&scratch.empty[pair][it & 1], (it >> 1 & 1) ^ 1);
    if (raise) {
#pragma unroll
      for (int rr = 0; rr < S::kLaneRows; rr++) {
#pragma unroll
        for (int step = 8; step; step /= 2) highest[rr] = fmaxf(highest[rr], __shfl_xor_sync(~0u, highest[rr], step));
        highest[rr] = fmaxf(highest[rr], state.top[rr]);
        const float factor = exp2_fast(state.top[rr] - highest[rr]);
        state.top[rr] = highest[rr], state.sum[rr] *= factor;
        if (own == 0) slot.factor[lane_row(rr)] = factor;
      }
    }
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; i++) p[i] = exp2_fast(fmaf(s[rr][i], state.magnitude[rr], -state.top[rr]));
      state.sum[rr] += (p[0] + p[1]) + (p[2] + p[3]);
      const __half2 low = __floats2half2_rn(p[0], p[1]), high = __floats2half2_rn(p[2], p[3]);
      *reinterpret_cast<uint2*>(&slot.p[lane_row(rr)][4 * own]) =
          uint2{reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
    }
    if (lane == 0) slot.rescale = raise;
    __syncwarp();
    if (lane == 0) barrier_arrive(&scratch.full[pair][it & 1]);
  }

  static __device__ __forceinline__ const char* from_lane(const char* x, int lane) {
    return reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(x), lane));
  }

  // Scores of 16 exact tokens, as token 4 i of a tile that has no others.
  __device__ void exact_scores(int group, const Query& q, float (&s)[S::kLaneRows][4]) const {
    const Token mine = token(group * kGroup + (lane & 15));
    const char* keys[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
      keys[half] = from_lane(mine.k, 4 * (2 * (half ^ (n >> 1 & 1)) + (n & 1)) + (n >> 1)) + c * S::KD * 2;
    float acc[1][2][S::kTiles][4] = {};
    multiply<1>(q, acc, [&](auto step_, auto, auto half_, auto& out) {
      constexpr int step = decltype(step_)::value, half = decltype(half_)::value;
      constexpr Group at = group_of(K::kSteps, step);
      constexpr int x = (step - at.first) ^ (2 * half & (at.width - 1));
      load_exact(keys[half] + (at.first + (x ^ (n & (at.width - 1)))) * (8 * S::KD), true, layer.dtype, out);
    });
    float x[S::kLaneRows];
    pick(acc[0], x);
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
      s[rr][0] = sees(lane_row(rr), mine) ? x[rr] : -INFINITY;
      s[rr][1] = s[rr][2] = s[rr][3] = -INFINITY;
    }
  }

  // Scores of a tile from its codes.
  __device__ __forceinline__ void coded_scores(int tile, bool more, const uint8_t* codes, Words& words,
                                               const Places<K>& places, Frame& frame, Query& q,
                                               float (&s)[S::kLaneRows][4]) const {
    const int slot0 = tile * kTile, slot = slot0 + 4 * (lane & 15);
    for (int from = slot0;; from = frame.border) {  // frames of this tile from slot `from` on: nearly always one
      if (from >= frame.border) {
        load_query(++frame.now, q), frame.border += frame.tokens;
        settle(q);
      }
      const bool last = slot0 + kTile <= frame.border;
      // What is looked up after this: the tile again, for its next frame, or the next tile.
      const uint8_t* next = !last ? codes : more ? codes + kKeyTile : nullptr;
      constexpr int kBatches = 4 / kKeyUnit.per_tile;  // of a unit
#pragma unroll 1
      for (int unit = 0; unit < kKeyUnit.per_tile; unit++) {
        const uint8_t* after = unit + 1 < kKeyUnit.per_tile ? codes + kKeyUnit.words * 128 : next;
        static_for<kBatches / 2>([&](auto both_) {
          constexpr int first = 2 * decltype(both_)::value;
          float acc[2][2][S::kTiles][4] = {};
          multiply<2>(q, acc, [&](auto step_, auto batch_, auto half_, auto& out) {
            constexpr int step = decltype(step_)::value, half = decltype(half_)::value,
                          batch = first + decltype(batch_)::value;
            constexpr Group group = group_of(K::kSteps, step);
            constexpr int at = (2 * batch + half) * K::kSteps + step;
            constexpr int x = (step - group.first) ^ (2 * half & (group.width - 1)), offset = K::offset(step);
            lookup<kSharedBase + offset / kRow * kPage + offset % kRow>(
                prmt(words[at / 4], places.at(group.width, x), 0x7604 | at % 4 << 4), out);
          });
          refill<true, first>(words, after);
          refill<true, first + 1>(words, after);
          // Two tokens of the lane's four: they move up, which leaves the four in order.
#pragma unroll
          for (int rr = 0; rr < S::kLaneRows; rr++) {
            const float low = s[rr][0], high = s[rr][1];
            s[rr][0] = s[rr][2], s[rr][1] = s[rr][3], s[rr][2] = low, s[rr][3] = high;
          }
          const int token = slot + (kKeyUnit.per_tile == 2 ? 2 * unit : first);
#pragma unroll
          for (int batch = 0; batch < 2; batch++) {
            float x[S::kLaneRows];
            pick(acc[batch], x);
#pragma unroll
            for (int rr = 0; rr < S::kLaneRows; rr++)
              s[rr][2 + batch] = token + batch >= from ? x[rr] : s[rr][2 + batch];
          }
        });
      }
      if (last) break;
    }
    if (a.mask != nullptr || slot0 < scratch.seen.begin || slot0 + kTile > scratch.seen.all_end) {
#pragma unroll 1
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int rr = 0; rr < S::kLaneRows; rr++) {
          const int r = lane_row(rr), at = slot + i;
          const bool seen = at >= scratch.seen.begin && at < scratch.rows[r].coded_end && !masked(r, at);
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (i == j && !seen) s[rr][j] = -INFINITY;
        }
      }
    }
  }

  // ---- values ----

  // Accumulators of a step: for each pair of channels (sub) the first and the second, [0], [1] of lane row rh, [2], [3]
  // of rh + 2. With two query rows, [0], [1] of the first channel and [2], [3] of the second.
  static constexpr int kSubs = S::VD / 2, kParities = S::Rows == 2 ? 1 : 2;
  using Outputs = float[S::kTiles][V::kSteps][kSubs][kParities][4];

  static __device__ void zero(Outputs& o) {
    float* x = &o[0][0][0][0][0];
#pragma unroll
    for (int i = 0; i < int(sizeof(Outputs) / sizeof(float)); i++) x[i] = 0.f;
  }

  // Adds the values of a tile with the probabilities of the pair's slot; `look(step, batch, token, out)` gives those of
  // a batch of the `Units` of a tile, and `done(batch, unit)` hears that a batch needs no more.
  template <int Units, class Look, class Done>
  __device__ __forceinline__ void accumulate(Outputs& o, int pair, int it, const Look& look, const Done& done) const {
    const int r = n & 3, rh = n >> 2;
    const auto& slot = scratch.slots[pair][it & 1];
    barrier_wait(&scratch.full[pair][it & 1], it >> 1 & 1);
    if (slot.rescale) {
#pragma unroll
      for (int qt = 0; qt < S::kTiles; qt++) {
        const float low = slot.factor[4 * qt + rh], high = S::kHalves == 2 ? slot.factor[4 * qt + rh + 2] : low;
#pragma unroll
        for (int i = 0; i < V::kSteps; i++)
#pragma unroll
          for (int sub = 0; sub < kSubs; sub++)
#pragma unroll
            for (int e = 0; e < kParities; e++) {
              float (&x)[4] = o[qt][i][sub][e];
              x[0] *= low, x[1] *= low, x[2] *= high, x[3] *= high;
            }
      }
    }
    const bool live = c == r;
#pragma unroll 1
    for (int unit = 0; unit < Units; unit++) {
      static_for<4 / Units>([&](auto batch_) {
        constexpr int batch = decltype(batch_)::value;
        uint32_t p[S::kTiles][2][4];
#pragma unroll
        for (int qt = 0; qt < S::kTiles; qt++) {
          const int tokens = 16 * (unit * (4 / Units) + batch) + 4 * r;
          uint2 low = *reinterpret_cast<const uint2*>(&slot.p[4 * qt + rh][tokens]);
          low.x = live ? low.x : 0u, low.y = live ? low.y : 0u;
          if constexpr (S::Rows == 2) {
            p[qt][0][0] = low.x & 0xffff, p[qt][0][1] = low.x << 16, p[qt][0][2] = low.x >> 16,
            p[qt][0][3] = low.x & 0xffff0000;
            p[qt][1][0] = low.y & 0xffff, p[qt][1][1] = low.y << 16, p[qt][1][2] = low.y >> 16,
            p[qt][1][3] = low.y & 0xffff0000;
          } else {
            uint2 high = *reinterpret_cast<const uint2*>(&slot.p[4 * qt + rh + 2][tokens]);
            high.x = live ? high.x : 0u, high.y = live ? high.y : 0u;
            p[qt][0][0] = low.x, p[qt][0][1] = high.x, p[qt][0][2] = low.y, p[qt][0][3] = high.y;
          }
        }
        static_for<V::kSteps>([&](auto step_) {
          constexpr int step = decltype(step_)::value;
          uint32_t v[4][kSubs];
          static_for<4>([&](auto token_) { look(step_, batch_, unit, token_, v[decltype(token_)::value]); });
#pragma unroll
          for (int sub = 0; sub < kSubs; sub++) {
#pragma unroll
            for (int qt = 0; qt < S::kTiles; qt++) {
              if constexpr (S::Rows == 2) {
                mma_dense(o[qt][step][sub][0], p[qt][0], v[0][sub], v[1][sub]);
                mma_dense(o[qt][step][sub][0], p[qt][1], v[2][sub], v[3][sub]);
              } else {
                mma_dense(o[qt][step][sub][0], p[qt][0], prmt(v[0][sub], v[1][sub], 0x5410),
                          prmt(v[2][sub], v[3][sub], 0x5410));
                mma_dense(o[qt][step][sub][1], p[qt][0], prmt(v[0][sub], v[1][sub], 0x7632),
                          prmt(v[2][sub], v[3][sub], 0x7632));
              }
            }
          }
        });
        done(batch_, unit);
      });
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&scratch.empty[pair][it & 1]);
  }

  __device__ void exact_values(int group, Outputs& o, int pair, int it) const {
    const Token mine = token(group * kGroup + (lane & 15));
    bool any = false;  // row sees it: what no row sees may be NaN
    for (int r = 0; r < rows; r++) any |= sees(r, mine);
    const uint32_t live = __ballot_sync(~0u, any);
    const char* values[4];
#pragma unroll
    for (int batch = 0; batch < 4; batch++) values[batch] = from_lane(mine.v, 4 * batch + c) + n * S::VD * 2;
    accumulate<1>(
        o, pair, it,
        [&](auto step_, auto batch_, int, auto token_, auto& out) {
          constexpr int step = decltype(step_)::value, batch = decltype(batch_)::value;
          constexpr Group at = group_of(V::kSteps, step);
          const int m = 8 * at.first + (at.width - 1) * n + ((step - at.first) ^ (c & (at.width - 1)));
          if constexpr (decltype(token_)::value == 0) {
            load_exact(values[batch] + m * S::VD * 2, live >> (4 * batch + c) & 1, layer.dtype, out);
          } else {
#pragma unroll
            for (auto& word : out) word = 0;
          }
        },
        [](auto, int) {});
  }

  __device__ __forceinline__ void coded_values(Outputs& o, int pair, int it, bool more, const uint8_t* codes,
                                               Words& words, const Places<V>& places) const {
    const uint8_t* next = more ? codes + kValueTile : nullptr;
    accumulate<kValueUnit.per_tile>(
        o, pair, it,
        [&](auto step_, auto batch_, int, auto token_, auto& out) {
          constexpr int step = decltype(step_)::value, batch = decltype(batch_)::value, token = decltype(token_)::value;
          constexpr Group group = group_of(V::kSteps, step);
          constexpr int offset = V::offset(step);
          lookup<kSharedBase + K::kPages * kPage + offset / kRow * kPage + offset % kRow>(
              prmt(words[batch * V::kSteps + step], places.at(group.width, step - group.first), 0x7604 | token << 4),
              out);
        },
        [&](auto batch_, int unit) {
          refill<false, decltype(batch_)::value>(
              words, unit + 1 < kValueUnit.per_tile ? codes + kValueUnit.words * 128 : next);
        });
  }

  // Sums the rotations' parts of a pair's numerators and writes them, [Rows][D].
  __device__ void store_values(Outputs& o, float* to) const {
    const int r = n & 3, rh = n >> 2;
    static_for<V::kSteps>([&](auto step_) {
      constexpr int step = decltype(step_)::value;
      constexpr Group group = group_of(V::kSteps, step);
      if constexpr (step == group.first) {
#pragma unroll
        for (int qt = 0; qt < S::kTiles; qt++)
#pragma unroll
          for (int sub = 0; sub < kSubs; sub++)
#pragma unroll
            for (int e = 0; e < kParities; e++)
#pragma unroll
              for (int j = 0; j < 4; j++) {
                // Lane r holds subspace x of the group in step x ^ r: an exchange with lanes r ^ 2 and r ^ 1 leaves it
                // x = r.
                float x = o[qt][step][sub][e][j];
                if constexpr (group.width == 4) {
                  float y = o[qt][step + 1][sub][e][j];
                  x += __shfl_xor_sync(~0u, o[qt][step + 2][sub][e][j], 8);
                  y += __shfl_xor_sync(~0u, o[qt][step + 3][sub][e][j], 8);
                  x += __shfl_xor_sync(~0u, y, 4);
                } else {
                  x += __shfl_xor_sync(~0u, x, 8);
                  float y = x;
                  if constexpr (group.width == 2) {
                    y = o[qt][step + 1][sub][e][j];
                    y += __shfl_xor_sync(~0u, y, 8);
                  }
                  x += __shfl_xor_sync(~0u, y, 4);
                }
                if (r < group.width) {
                  const int m = 8 * group.first + group.width * (2 * c + (j & 1)) + r;
                  const int row = 4 * qt + rh + (S::Rows == 2 ? 0 : 2 * (j >> 1));
                  const int channel = m * S::VD + 2 * sub + (S::Rows == 2 ? j >> 1 : e);
                  to[row * S::D + channel] = x;
                }
              }
      }
    });
  }

  // ---- merging ----

  // Merges the pairs of this block: the result if there is one split, else its part of it. A thread takes pairs of
  // channels.
  __device__ void finish(const float* numerators) const {
    constexpr int kLine = S::kLine;
    for (int i = threadIdx.x; i < rows * kLine; i += S::kThreads) {
      const int r = i / kLine, line = i % kLine;
      Merged row;
#pragma unroll
      for (int pair = 0; pair < S::kPairs; pair++)
        row.add(scratch.ends[pair][r],
                *reinterpret_cast<const float2*>(&numerators[(pair * S::Rows + r) * S::D + 2 * line]));
      if (a.splits == 1) {
        row.store(a, scratch.rows[r].out, scratch.rows[r].lse, line);
      } else {
        const int64_t at = (head() * a.rows + row0 + r) * a.splits + blockIdx.x;
        reinterpret_cast<float2*>(a.partials)[at * kLine + line] = row.x;
        if (line == 0) ends_of(a)[at] = {row.top, row.total};
      }
    }
  }

  // ---- the two kinds of warps ----

  __device__ Frame first_frame(const Run& tiles) const {
    if (layer.inv_freq == nullptr) return {0, 0, kMaxSlot};
    const int tokens = int(min(layer.frame_tokens, int64_t(kMaxSlot))), now = tiles.begin * kTile / tokens;
    return {tokens, now, int(min((int64_t(now) + 1) * tokens, int64_t(kMaxSlot)))};
  }

  // All that this kernel reads was there before the kernel that prepares the queries began, but for what that one
  // writes.
  static __device__ void queries_are_there() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }
  __device__ void tables_are_there() const { barrier_wait(&scratch.tables, 0); }

  __device__ void score(int pair) const {
    const Run tiles = run(pair);
    const uint8_t* at = codes(tiles);
    Words words;
    if (tiles.begin < tiles.end) {
#pragma unroll
      for (int i = 0; i < kKeyUnit.words / 4; i++) fetch(words, i, at);
      for (int i = 0; i < kAhead && tiles.begin + i < tiles.end; i++) prefetch(at + i * kKeyTile, kKeyTile, lane);
    }
    Softmax state;
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++)
      state.top[rr] = kLowest, state.sum[rr] = 0.f, state.magnitude[rr] = fmaxf(fabsf(a.scale) * kLog2e, FLT_MIN);
    Query q;
    float s[S::kLaneRows][4];
    int it = 0;
    if (first_group(pair) < groups()) load_raw_query(q);
    for (int group = first_group(pair); group < groups(); group += group_step(), it++) {
      exact_scores(group, q, s);
      publish(s, state, pair, it);
    }
    queries_are_there();
    load_magnitude(state.magnitude);
    Frame frame = first_frame(tiles);
    if (tiles.begin < tiles.end) load_query(frame.now, q);
    tables_are_there();
    const Places<K> places(n, c);
    for (int tile = tiles.begin; tile < tiles.end; tile++, it++, at += kKeyTile) {
      if (tile + kAhead < tiles.end) prefetch(at + kAhead * kKeyTile, kKeyTile, lane);
      coded_scores(tile, tile + 1 < tiles.end, at, words, places, frame, q, s);
      publish(s, state, pair, it);
    }
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
#pragma unroll
      for (int step = 8; step; step /= 2) state.sum[rr] += __shfl_xor_sync(~0u, state.sum[rr], step);
      if ((lane & 15) == 0) scratch.ends[pair][lane_row(rr)] = {state.top[rr], state.sum[rr]};
    }
  }

  __device__ void weigh(int pair, Outputs& o) const {
    const Run tiles = run(pair);
    const uint8_t* at = codes(tiles);
    for (int i = 0; i < kAhead && tiles.begin + i < tiles.end; i++) prefetch(at + i * kValueTile, kValueTile, lane);
    Words words;
    if (tiles.begin < tiles.end)
#pragma unroll
      for (int i = 0; i < kValueUnit.words / 4; i++) fetch(words, i, at);
    zero(o);
    int it = 0;
    for (int group = first_group(pair); group < groups(); group += group_step(), it++) exact_values(group, o, pair, it);
    tables_are_there();
    const Places<V> places(n, c);
    for (int tile = tiles.begin; tile < tiles.end; tile++, it++, at += kValueTile) {
      if (tile + kAhead < tiles.end) prefetch(at + kAhead * kValueTile, kValueTile, lane);
      coded_values(o, pair, it, tile + 1 < tiles.end, at, words, places);
    }
  }
};

// blockIdx: split, (row, KV head), tile of query rows.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) attend_kernel(const __grid_constant__ Attention a) {
  extern __shared__ __align__(1024) char shared[];
  if (shared_address(shared) != kSharedBase) __trap();  // the host checked that it is so
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const Block<S> block(a, shared);
  block.describe();
  if (threadIdx.x < S::kPairs * 2) {
    barrier_init(&block.scratch.full[0][0] + threadIdx.x, 1);
    barrier_init(&block.scratch.empty[0][0] + threadIdx.x, 1);
  } else if (threadIdx.x == S::kPairs * 2) {
    barrier_init(&block.scratch.tables, S::kThreads);
  }
  Block<S>::template load_table<typename S::K>(block.codebook(a.layer.k), shared);
  Block<S>::template load_table<typename S::V>(block.codebook(a.layer.v), shared + S::K::kPages * kPage);
  __syncthreads();
  barrier_arrive_after_copies(&block.scratch.tables);
  float* numerators = reinterpret_cast<float*>(shared);  // [kPairs][Rows][D], when the tables are done with
  if (block.warp < S::kPairs) {
    block.score(block.warp);
    __syncthreads();
  } else {
    const int pair = block.warp - S::kPairs;
    typename Block<S>::Outputs o;
    block.weigh(pair, o);
    __syncthreads();
    block.store_values(o, numerators + pair * S::Rows * S::D);
  }
  __syncthreads();
  block.finish(numerators);
}

template <class S>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  constexpr int kShared = S::kTableBytes + sizeof(Scratch<S>);
  static_assert(sizeof(Scratch<S>) <= kScratch && S::kPairs * S::Rows * S::D * sizeof(float) <= S::kTableBytes);
  const auto kernel = attend_kernel<S>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) != cudaSuccess)
    return cudaGetLastError();  // and clears it
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.splits, a.layer.B * a.layer.H, (a.rows + S::Rows - 1) / S::Rows);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  cudaLaunchAttribute early;  // start, and load tables, while the queries are being prepared
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = a.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <int D, int KD, int VD>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  if (a.rows <= 2) return attend<Shape<D, KD, VD, 2>>(a, stream);
  if (a.rows > 4) return attend<Shape<D, KD, VD, 8>>(a, stream);
  return attend<Shape<D, KD, VD, 4>>(a, stream);
}

}  // namespace mma
}  // namespace million
