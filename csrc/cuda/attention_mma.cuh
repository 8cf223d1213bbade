// PQ attention on tensor cores, for layouts mma_k and mma_v: head_dim 64, 96, 128, 256 and 16-bit models.
//
//   out[b,i,h,:] = sum_s p_s v_s,  p = softmax_s(scale q . k_s),  as in attention.cu
//
// Every centroid that a token needs is looked up once, in shared memory, straight into the B operand of an mma
// instruction; nothing is decoded to memory first. With mma.m16n8k16, lane l = 4 n + c holds, of column n, the depths
// of its c. A lookup is free of bank conflicts if its lanes (those that shared memory serves together: 32 of 4 bytes,
// 16 of 8, 8 of 16) ask for entries that lie on different banks, and a table row (one code's entries) lies across the
// banks by subspace. So lanes that would ask for one subspace of different tokens take turns: their steps are rotated,
// and the rotation is undone in the A operand, whose 16 rows are 4 query rows x 4 rotations; or 8 x 2 or 16 x 1, and
// for the rotations that are missing lanes exchange, by selects, what they looked up in two steps.
//
// Scores. Columns are tokens, depths are channels. At step s lane (n, c) looks up subspace 4 (s ^ rot) + c of token n,
// rot = (n & 3) ^ 2 half for two groups of eight tokens (half = 0, 1). Row (query row, r) of A holds the query with its
// steps rotated by r, so column n of the result is right in the row whose r equals rot. Over the two halves every lane
// ends up with exactly one right score of the 16 tokens for each of its query rows.
//
// Values. Columns are subspaces, depths are tokens. At step i lane (n, c) looks up subspace w n + (i ^ c) of its four
// tokens; row (query row, r) of A holds the probabilities of the tokens of c = r only. Two PRMTs transpose a pair of
// lookups into (token, next token) of each channel.
//
// With eight query rows the steps s and s ^ 2 are exchanged where bit 1 of the rotation is set, so only bit 0 is left
// to the rows of A; with sixteen also s and s ^ 1, and every column is right in every row.
//
// With one or two query rows, but for head_dim 256, what is looked up for scores is A (`kLookedUpA`), 16 rows instead
// of 8 columns, so half the products: two rows x four rotations are the columns of B, row n of A is token n of the
// first half, row n + 8 of the second. Values need no transposition: depths are pairs (channel 0, channel 1) of one
// token, as a lookup comes. With two query rows, those of A that are free hold (0, p) for the second channel beside (p,
// 0) for the first. With one row (`One`) both are columns of B, in four rotations, and row n of A is subspace n of one
// step, row n + 8 of the next.
//
// Steps rotate in groups of w = 4, then 2, then 1 (`rotation_width`); where w leaves lanes on the same banks, a table
// holds its entries several times (replicas).
//
// A block is one split of the tokens of one row b, KV head and tile of query rows (or of two rows b and b + 1,
// `kBatch`, each with one query row: half the pairs have the first row's tokens). Its warps come in pairs, one for the
// scores and one for the values of the same tiles of 64 tokens; probabilities go through two slots of shared memory.
// Before the codes
//   * the warps for scores do the scores of exact tokens (sinks, ring, new), 16 at a time, with loads in place of
//   lookups;
//   * the warps for values prepare the queries of the block's RoPE frames, q_f = T^-T R(-t_f) q / power of two in the
//     order of A, with T^-1 in registers (those for scores rotate for all products but the first); then they do the
//     values of exact tokens.
// The splits of a row are a cluster of blocks, if so many fit, and send their parts to each other's shared memory; else
// they leave partial results and a second kernel merges.
//
// With head_dim 256 the tables of keys and of values need a block each (`kApart`): the two are a cluster, all warps of
// the first have scores, all of the second values. Probabilities go to slots in the other block's shared memory
// (st.async), whose barriers count their bytes; the splits of a row are merged by the second kernel.
#pragma once

#include <cuda_pipeline.h>

#include <atomic>
#include <cfloat>
#include <utility>

#include "attention.cuh"
#include "attention_mma.h"
#include "attention_mma_shape.cuh"

namespace million {
namespace mma {

template <class F, int... I>
__device__ __forceinline__ void for_each(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
__device__ __forceinline__ void static_for(const F& f) {
  for_each(f, std::make_integer_sequence<int, N>());
}

template <class S>
struct Block : RowBlock {
  using K = typename S::K;
  using V = typename S::V;

  char* shared;
  Scratch<S>& scratch;
  int lane, warp, n, c;

  // Of two rows of the batch, b and the next, `rows` counts the query rows of both, one of each; of the last there may
  // be no next.
  __device__ Block(const Attention& a, char* shared)
      : RowBlock(a, blockIdx.y, blockIdx.z * S::Rows, S::Rows),
        shared(shared),
        scratch(*reinterpret_cast<Scratch<S>*>(shared + S::kTableBytes)),
        lane(S::kHoldsLane ? opaque(threadIdx.x % kWarp) : threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        n(lane >> 2),
        c(lane & 3) {
    if (kTogether) b *= 2, rows = min(2, int(layer.B) - b);
  }

  // The row of the batch of a query row, and of the tokens that a warp reads, counted from the block's first.
  static constexpr bool kTogether = S::kBatch > 1;
  static __device__ int batch_row(int r) { return kTogether ? r : 0; }
  __device__ int which() const {
    return kTogether && rows > 1 ? warp % S::kPairs >= scratch.tokens[S::kBatch - 1].first_pair : 0;
  }
  __device__ const Tokens& tokens() const { return scratch.tokens[which()]; }

  // Which of the parts of a row's tokens the block has; of two blocks with one split the first has the scores.
  static __device__ int split() { return int(blockIdx.x) / S::kBlocks; }

  // A table by one bulk copy or two, or 16 bytes at a time: keys' by the threads of the warps for scores, values' by
  // those of the others.
  template <class Table>
  static constexpr bool by_bulk() {
#if __CUDA_ARCH__ >= 900
    return Table::kWhole;
#else
    return false;
#endif
  }
  template <class Table>
  static __device__ int arrivals() {
    return by_bulk<Table>() ? 1 : S::kHalf;
  }
  // Whether keys' table comes in two, unless the block has few tokens; and whether the second is the first, moved,
  // copied within the block: if so many blocks ask the L2 cache for tables at the same time that it is what they wait
  // for. Four warps are too few for that.
  static constexpr bool in_two() { return by_bulk<K>() && K::kCopies > 1; }
  static __device__ bool copies_second(const Attention& a) { return in_two() && S::kPairs > 4 && a.crowded; }

  // Bulk copies come in the order in which they are needed: T^-1 (by loads) and keys' first table before anything else,
  // then, when the block has read what it begins with, the rest. Each by one thread of the warps for values.
  __device__ void copy_page(uint64_t* barrier, const __half* codebook, char* to) const {
    barrier_expect(barrier, kPage);
    bulk_copy(to, codebook, kPage, barrier);
  }
  __device__ void start_first() const {
    if constexpr (by_bulk<K>()) copy_page(&scratch.k_table, codebook(layer.k), shared);
  }
  __device__ void start_second() const {
    if constexpr (by_bulk<V>() || in_two()) {
      if (threadIdx.x == S::kThreads - kWarp) {  // of the warp that rotates least
        if constexpr (in_two())
          if (scratch.in_two && !copies_second(a))
            copy_page(&scratch.k_more, codebook(layer.k), shared + kPage + K::kMove);
        if constexpr (by_bulk<V>()) copy_page(&scratch.v_table, codebook(layer.v), shared + S::kValueTable);
      }
    }
    load_table<V>(codebook(layer.v), shared + S::kValueTable, &scratch.v_table);
  }
  // Keys' second table, by the warps for scores, if possible those without exact tokens.
  __device__ void copy_second() const {
    if constexpr (in_two() && S::kPairs > 4) {
      if (!copies_second(a) || !scratch.in_two) return;
      constexpr int kAtOnce = 4, kBytes = kWarp * 16;
      if (warp >= scratch.busy) {
        barrier_wait(&scratch.k_table, 0);
#pragma unroll 1
        for (int i = (warp - scratch.busy) * kAtOnce; i < kPage / kBytes; i += (S::kPairs - scratch.busy) * kAtOnce) {
          const uint4* from = reinterpret_cast<const uint4*>(shared) + i * kWarp + lane;
          uint4* to = reinterpret_cast<uint4*>(shared + kPage + K::kMove) + i * kWarp + lane;
          uint4 x[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; j++) x[j] = from[j * kWarp];
#pragma unroll
          for (int j = 0; j < kAtOnce; j++) to[j * kWarp] = x[j];
        }
        __syncwarp();
      }
      if (lane < kArrivals) barrier_arrive(&scratch.k_more);
    }
  }
  // A table that does not come by bulk copies.
  template <class Table>
  static __device__ void load_table(const __half* codebook, char* to, uint64_t* barrier) {
    const int thread = threadIdx.x % S::kHalf;
    if constexpr (by_bulk<Table>()) {
      return;
    } else if constexpr (Table::kWhole) {
      const char* from = reinterpret_cast<const char*>(codebook);
#pragma unroll 2
      for (int i = thread * 16; i < kPage; i += S::kHalf * 16)
#pragma unroll
        for (int copy = 0; copy < Table::kCopies; copy++)
          __pipeline_memcpy_async(to + copy * (kPage + Table::kMove) + i, from + i, 16);
      barrier_arrive_after_copies(barrier);
    } else {
      constexpr int kVectors = Table::kRowBytes / 16, kStep = S::kHalf / kVectors;
      static_assert(kStep > 0);
      const int at = thread % kVectors * 16;
      const char* from = reinterpret_cast<const char*>(codebook) + Table::source(at);
      to += at / kRow * kPage + at % kRow;
      if (thread < kStep * kVectors)
#pragma unroll 2
        for (int code = thread / kVectors; code < kCentroids; code += kStep)
          __pipeline_memcpy_async(to + code * kRow, from + code * S::D * 2, 16);
      barrier_arrive_after_copies(barrier);
    }
  }

  // Barriers within the block: 0 is __syncthreads.
  enum Named { kValues = 1, kReady, kScores, kTurnedFree, kTurnedFull = kTurnedFree + 2 };

  // What needs nothing of the kernels before. By one thread a warp: of several lanes with barriers of their own one
  // would come after the other, each for 60 cycles.
  __device__ void begin() const {
    if (lane == 0) {
      if (warp < S::kPairs) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          barrier_init(&scratch.full[warp][i], S::kApart ? 1 : kArrivals);
          barrier_init(&scratch.empty[warp][i], S::kApart ? 1 : kArrivals);
        }
        if (S::kApart) barriers_to_cluster();
      }
      if (warp == S::kValueWarp) {
        barrier_init(&scratch.queries, S::kHalf);
      } else if (warp == S::kValueWarp + 1) {  // those that are told by copies or by other blocks
        barrier_init(&scratch.k_table, arrivals<K>());
        barrier_init(&scratch.v_table, arrivals<V>());
        barrier_init(&scratch.k_more, copies_second(a) ? S::kPairs * kArrivals : 1);
        barrier_init(&scratch.parts, 1);
        bulk_fence();
        barriers_to_cluster();
      }
    }
    for (int i = S::kThreads - 1 - int(threadIdx.x); i < int(sizeof(scratch.zeros) / 16); i += S::kThreads)
      reinterpret_cast<uint4*>(scratch.zeros)[i] = uint4{};
    // Arguments arrive in lines of 64 bytes, each waited for when it is first used: so all are used now.
    constexpr int kLineWords = 16, kWords = sizeof(Attention) / 4;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&a);
    uint32_t any = words[kWords - 1];
#pragma unroll
    for (int i = 0; i < kWords; i += kLineWords) any ^= words[i];
    if (lane == 0) store_shared(shared_address(&scratch.arguments), any);
  }

  // Pairs of channels of the result that this block of a cluster merges.
  __device__ int share_begin() const { return min(split() * a.share, rows * S::kLine); }
  __device__ int share_end() const { return min(share_begin() + a.share, rows * S::kLine); }

  // By one thread.
  __device__ void expect_parts() const {
    barrier_expect(&scratch.parts, (share_end() - share_begin()) * a.splits * sizeof(float4));
  }

  // What the warps that describe ask for early. Others do not: a load that nobody waits for holds up whoever is next to
  // use its register.
  struct Known {
    Clock clock;
    int origin;
  };
  __device__ bool describes() const { return warp == S::kPairs - 1; }
  __device__ bool describes_rows() const { return warp == 0; }
  __device__ Known ask_known() const {
    Known asked = {};
    if (describes() || describes_rows()) {
      const int row = b + batch_row(min(describes() ? described() : lane, rows - 1));
      asked.clock = ask_clock(row);
      if (layer.inv_freq != nullptr) asked.origin = __ldcg(layer.origin + row);
    }
    return asked;
  }
  // Which row of the batch a lane describes: of two each has half the lanes.
  static constexpr int kDescribing = kWarp / S::kBatch;
  __device__ int described() const { return lane / kDescribing; }

  // Tiles that are read from codes: so many from tile `first` on.
  struct Tiles {
    int first, count;
  };
  static __device__ Tiles tiles_of(const Range& seen) {
    const int first = max(seen.begin, 0) / kTile;
    return {first, max((seen.end + kTile - 1 >> 6) - first, 0)};
  }
  // How many of them the splits before this one have: they share them alike, but if there are few, so that it is the
  // last splits that have none.
  __device__ int tiles_before(int split, int count) const {
    const int shared_out = max(count, int(min(count, a.few) * a.gather + 0xffff >> 16));
    return split < a.splits ? min(count, int(__umulhi(shared_out, split * a.by_splits))) : count;
  }
  // Whether the split has nothing to do, as the number of splits comes from the capacity, not from the tokens; then it
  // leaves that it has seen nothing. Not asked of the first splits, which need not wait for the clock.
  __device__ bool may_idle() const { return split() >= a.sure; }
  __device__ bool idles() {
    know(ask_clock());
    const int count = tiles_of(range()).count;
    if (tiles_before(split(), count) < count) return false;
    if (threadIdx.x < rows) ends_of(a)[(head() * a.rows + row0 + threadIdx.x) * a.splits + split()] = {kLowest, 0.f};
    return true;
  }

  // Which tokens the block reads, and how they are shared out; computed once, by the last warp for scores, while all
  // others wait.
  __device__ void describe(const Known& asked) {
    if (!describes()) return;
    know(asked.clock);
    const int oldest = max(ring_begin(), 0);
    const int ring = max(min(first - oldest, int(layer.R)), 0), sinks = int(layer.N),
              exact = sinks + ring + int(layer.n);
    const Range seen = range();
    const Tiles all = tiles_of(seen);
    const int groups = (exact + kGroup - 1) / kGroup, split = this->split();
    const int begin = tiles_before(split, all.count), end = tiles_before(split + 1, all.count);
    const int mine = divide(max(groups - split + a.splits - 1, 0), a.splits, a.by_splits);
    const int turns = divide(oldest, int(layer.R), a.by_ring);
    const int tiles = end - begin;
    // The row's pairs: of two rows of the batch each has as many as it has work, one at least.
    int first_pair = 0, pairs = S::kPairs, most_tiles = tiles;
    if (kTogether && rows > 1) {
      const auto of_other = [](int x) { return __shfl_xor_sync(~0u, x, kDescribing); };
      const int work = tiles + kGroupTiles * mine, all_work = work + of_other(work);
      const int part = __float2int_rn(__fdividef(float(S::kPairs * work), float(max(all_work, 1))));
      const int of_first = min(max(described() == 0 ? part : S::kPairs - part, 1), S::kPairs - 1);
      pairs = __shfl_sync(~0u, of_first, 0);
      if (described() > 0) first_pair = pairs, pairs = S::kPairs - pairs;
      most_tiles += of_other(tiles);
    }
    // Pairs with exact tokens get fewer tiles: the first `more` pairs have a group more than the others.
    const uint32_t by_pairs = __float2uint_ru(__fdividef(4294967296.f, float(pairs)));
    const auto a_pair = [&](int x) { return S::kBatch == 1 ? x / S::kPairs : divide(x, pairs, by_pairs); };
    const int each = a_pair(mine), more = mine - each * pairs, rest = pairs - more;
    const int few = max(a_pair(tiles + kGroupTiles * mine) - kGroupTiles * (each + 1), 0);
    const int slot = (all.first + begin) * kTile, last = (all.first + end) * kTile - 1;
    const int frame = int(min(layer.frame_tokens, int64_t(kMaxSlot)));
    const int first_frame = divide(slot, frame, a.by_frame), last_frame = divide(max(last, 0), frame, a.by_frame);
    const int describer = lane % kDescribing;
    if (describer <= pairs) {
      // Of what the first pairs leave, describer - more parts of `rest`. The reciprocal is a float's, and a little too
      // large: the quotient is exact up to a million tiles, and then as good.
      const int left = tiles - more * few, part = describer - more;
      const uint32_t by = __float2uint_rz(__fdividef(4294967296.f, float(rest))) + 512;
      const int bound = all.first + begin + min(describer, more) * few +
                        (part >= rest ? left
                         : part > 0   ? int(__umulhi(left * part, by))
                                      : 0);
      if (describer < pairs) scratch.runs[first_pair + describer].begin = bound;
      if (describer > 0) scratch.runs[first_pair + describer - 1].end = bound;
    }
    Frames frames = slot > last                 ? Frames{0, 0}
                    : layer.inv_freq == nullptr ? Frames{0, 1}
                                                : Frames{first_frame, min(last_frame + 1, a.frames)};
    if constexpr (kTogether) {  // those of both rows
      const Frames other = {__shfl_xor_sync(~0u, frames.begin, kDescribing),
                            __shfl_xor_sync(~0u, frames.end, kDescribing)};
      if (frames.begin == frames.end)
        frames = other;
      else if (other.begin < other.end)
        frames = {min(frames.begin, other.begin), max(frames.end, other.end)};
    }
    if (describer == 0) {  // of one row of the batch, all lanes describe it
      Tokens& to = scratch.tokens[described()];
      to.exact = {exact, sinks, ring, oldest, ring > 0 ? oldest - turns * int(layer.R) : 0, first, start};
      to.seen = seen;
      to.origin = asked.origin;
      to.first_pair = first_pair, to.pairs = pairs;
    }
    if (lane == 0) {
      scratch.busy = pairs == S::kPairs && mine < S::kPairs ? mine : 0;
      scratch.in_two = most_tiles > a.one_table;
      scratch.frames = frames;
    }
  }

  // Where query rows are.
  __device__ void describe_rows(const Known& asked) {
    if (!describes_rows() || lane >= S::Rows) return;
    know(asked.clock);
    const int row = min(lane, rows - 1), at = query(row), own = query_head(row), heads = int(layer.H) * a.G;
    const int64_t b = this->b + batch_row(row);
    scratch.rows[lane] = {position(row), coded_end(row), at, ((b * layer.n + at) * heads + own) * S::D,
                          (b * heads + own) * layer.n + at};
  }

  // What needs no clock, by two of the warps for values: where exact tokens and codes are.
  __device__ void describe_places() const {
    constexpr int kToken = S::D * 2;  // bytes
    if (lane >= S::kBatch) return;
    Tokens& to = scratch.tokens[lane];
    const int b = this->b + batch_row(min(lane, rows - 1));
    const int64_t head = int64_t(b) * layer.H + h;
    if (warp == S::kValueWarp + 1) {
      const int64_t sink0 = head * layer.N * kToken, ring0 = head * layer.R * kToken;
      to.places[0] = {layer.k_sinks + sink0, layer.v_sinks + sink0, kToken, kToken};
      to.places[1] = {layer.k_ring + ring0, layer.v_ring + ring0, kToken, kToken};
      to.places[2] = {layer.k_new.at(b, h, 0), layer.v_new.at(b, h, 0), layer.k_new.token, layer.v_new.token};
    }
    if (warp == S::kValueWarp + 3) {
      to.codes[0] = layer.k.codes + head * layer.k.slots * (S::D / S::KD);
      to.codes[1] = layer.v.codes + head * layer.v.slots * (S::D / S::VD);
    }
  }

  // The row of a lane's accumulator: `rr` counts the lane's rows. It is the query row, but of a pair of warps that
  // reads tokens of the batch's second row: there the two are swapped, so that the one that counts is the first
  // everywhere.
  __device__ int column_row(int rr) const {
    return S::kLookedUpA ? c >> 1 : n / S::kRotations + S::kApartRows * (rr % S::kHalves);
  }
  __device__ int lane_row(int rr) const { return column_row(rr) ^ which(); }
  // Which scores a lane gets: of a batch's first or second half of tokens; and which four tokens of a tile they are,
  // one of each batch.
  __device__ int lane_half() const { return (c & 1) ^ (n >> 1 & 1); }
  __device__ int own(int rr = 0) const {
    if constexpr (S::kLookedUpA) return 4 * ((n & 3) ^ (2 * lane_half())) + (n >> 1);
    if constexpr (!S::kExchanges) return lane & 15;
    return (4 * (column_bit(rr) + 2 * (c & 1)) + c) ^ (8 * half_of(rr));
  }
  // With exchanges a lane's score is that of column 2 c or 2 c + 1 of either half: which is the right one by the row's
  // rotation, or with none each.
  __device__ int column_bit(int rr) const { return S::kRotations == 1 ? rr / S::kHalves >> 1 : n & 1; }
  static __device__ int half_of(int rr) { return rr / S::kHalves & 1; }
  // What lanes of the same rows differ by, in steps 1, 2, 4, 8 of what they do together.
  static constexpr int kWidest = 2 * S::kRotations;
  static constexpr int across(int step) { return S::kLookedUpA && step == 2 ? 16 : step; }

  __device__ bool masked(int r, int slot) const {
    if (a.mask == nullptr) return false;
    const int64_t row = int64_t(b + batch_row(min(r, rows - 1))) * layer.n + scratch.rows[r].query;
    return slot >= a.mask_slots || !a.mask[row * a.mask_slots + slot];
  }

  // ---- what a pair of warps works on ----

  // Its tiles of codes.
  __device__ Run run(int pair) const { return scratch.runs[pair]; }

  // Before them its exact tokens, 16 at a time: groups `first_group`, `first_group + group_step`, ...
  static constexpr int kGroup = 16, kGroupTiles = 2;  // what a group costs, in tiles
  __device__ int first_group(int pair) const { return (pair - tokens().first_pair) * a.splits + split(); }
  __device__ int group_step() const { return a.splits * (S::kBatch == 1 ? S::kPairs : tokens().pairs); }
  __device__ int groups() const { return (tokens().exact.tokens + kGroup - 1) / kGroup; }

  // An exact token; slot -1 for none, with the address of one that is there.
  struct Token {
    int slot;
    bool in_ring;
    const char *k, *v;
  };
  __device__ Token token(int i) const {
    const Tokens& tokens = this->tokens();
    const Exact& e = tokens.exact;
    const int after_ring = e.sinks + e.ring, r = i - e.sinks;
    const int kind = i >= e.tokens ? 2 : i < e.sinks ? 0 : i < after_ring ? 1 : 2;
    const int place = kind == 0 ? i : kind == 1 ? e.ring_slot + r : i - after_ring;
    const int slot = kind == 0 ? e.start + i : kind == 1 ? e.oldest + r : e.first + place;
    // Not stored yet; already read as a sink.
    const bool none = i >= e.tokens || slot < max(e.start, 0) || (kind == 0 && slot >= e.first) ||
                      (kind == 1 && slot < e.start + e.sinks);
    const int at = i >= e.tokens ? 0 : kind == 1 && place >= int(layer.R) ? place - int(layer.R) : place;
    const ExactPlace& where = tokens.places[kind];
    return {none ? -1 : slot, kind == 1, where.k + at * where.k_stride, where.v + at * where.v_stride};
  }
  // The ring's oldest slot holds for every row; how far the ring reaches back depends on the row.
  __device__ bool sees(int r, const Token& t) const { return sees(r, t.slot, t.in_ring); }
  __device__ bool sees(int r, int slot, bool in_ring) const {
    const int position = scratch.rows[r].position;
    return slot >= 0 && slot <= position && (!in_ring || slot > position - int(layer.R)) && !masked(r, slot);
  }

  // ---- codes ----

  // A whole tile where registers suffice: what is looked up next has been asked for a tile before, which is long enough
  // for memory.
  static constexpr bool fits(int words) { return words <= 32; }
  static constexpr bool kRoom = S::Rows > 2 || S::kThreads <= 384;  // for them
  static constexpr Unit kKeyUnit{2 * K::kSteps, kRoom && fits(2 * K::kSteps)};
  static constexpr Unit kValueUnit{4 * V::kSteps, kRoom && S::VD < 8 && fits(4 * V::kSteps)};
  static constexpr int kWords = kKeyUnit.words > kValueUnit.words ? kKeyUnit.words : kValueUnit.words;
  // Whether it is the address that says that no tile comes, not a predicate: as measured.
  static constexpr bool kByAddress = S::Rows != 4;
  // As measured, too: whether tiles of one frame have code of their own; whether a query's operands are loaded from a
  // few addresses and constants.
  static constexpr bool kPeels = S::VD < 8 || S::Rows > 4;
  static constexpr bool kFewAddresses = S::KD == 2 && S::Rows <= 4;
  static constexpr int kKeyTile = kTile * S::D / S::KD, kValueTile = kTile * S::D / S::VD;  // bytes
  using Words = uint32_t[kWords];

  // Codes: the lane's of the run's first tile.
  __device__ const uint8_t* key_codes(const Run& tiles) const {
    return tokens().codes[0] + int64_t(tiles.begin) * kKeyTile + lane * 16;
  }
  __device__ const uint8_t* value_codes(const Run& tiles) const {
    return tokens().codes[1] + int64_t(tiles.begin) * kValueTile + lane * 16;
  }

  static __device__ __forceinline__ void fetch(Words& words, int chunk, const uint8_t* unit) {
    const uint4 x = load_codes(unit + chunk * 512);
    words[4 * chunk] = x.x, words[4 * chunk + 1] = x.y, words[4 * chunk + 2] = x.z, words[4 * chunk + 3] = x.w;
  }

  // Brings a tile, `tile` being the lane's place in it, to the L2 cache. Not within the loop: prefetches take bandwidth
  // that loads, which are asked for a tile ahead, do not need.
  __device__ __forceinline__ void prefetch(const uint8_t* tile, int bytes) const {
    if (lane * 128 < bytes) prefetch_l2(tile + lane * 112);
  }

  // ---- prepared queries ----

  // Where they lie: the block's for each frame from `frame` on, `stride` apart.
  struct Prepared {
    uint2* at;
    int frame, stride;
  };
  __device__ Prepared prepared(const Frames& frames) const {
    if (frames.end - frames.begin <= S::kKept) return {scratch.prepared[0], frames.begin, S::kOperands};
    const int units = (a.rows + S::kOperandRows - 1) / S::kOperandRows;
    return {static_cast<uint2*>(a.prepared) + (head() * a.frames * units + row0 / S::kOperandRows) * S::kOperands, 0,
            units * S::kOperands};
  }

  // A warp's columns of T^-1, `kUnits` times 8 channels, as B operands of two steps at a time. They stay in registers
  // for all products.
  static constexpr int kUnits = (S::D / 8 + S::kPairs - 1) / S::kPairs;
  using Inverse = uint4[kUnits][S::D / 32];
  __device__ int unit(int u) const { return warp - S::kValueWarp + u * S::kPairs; }
  // T^-1 lies in memory column after column, so that a lane reads eight depths of its column at once: they are in the
  // order `depth_of`.
  __device__ void take_inverse(Inverse& to) const {
    if (layer.inverse == nullptr) {
#pragma unroll
      for (int u = 0; u < kUnits; u++)
#pragma unroll
        for (int i = 0; i < S::D / 32; i++) {
          const uint32_t one = 4 * i + c == unit(u) ? 0x3c00u << n % 2 * 16 : 0;  // of the lane's 8 depths the n-th
          to[u][i] = {n / 2 == 0 ? one : 0, n / 2 == 1 ? one : 0, n / 2 == 2 ? one : 0, n / 2 == 3 ? one : 0};
        }
      return;
    }
    const uint4* const from = reinterpret_cast<const uint4*>(layer.inverse) + int64_t(h) * (S::D * S::D / 8) + c;
#pragma unroll
    for (int u = 0; u < kUnits; u++)
#pragma unroll
      for (int i = 0; i < S::D / 32; i++)
        to[u][i] = __ldg(from + (8 * min(unit(u), S::D / 8 - 1) + n) * (S::D / 8) + 4 * i);
  }
  // The depth of a channel: lane c's eight of two steps, 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of each, are neighbours.
  static __device__ __forceinline__ uint32_t depth_of(uint32_t channel) {
    return channel / 32 * 32 + channel % 8 / 4 * 16 + channel % 4 / 2 * 8 + channel % 32 / 8 * 2 + channel % 2;
  }

  // Where row r's channels `channel` and the next are in operands of the block's query rows, counted in half2:
  // [subspace][r % kApartRows][pair of channels][r / kApartRows]. `load_query` reads them.
  static __device__ __forceinline__ uint32_t operand(uint32_t r, uint32_t channel) {
    constexpr uint32_t kApart = S::kApartRows;
    return ((channel / S::KD * kApart + r % kApart) * (S::KD / 2) + channel % S::KD / 2) * 2 + r / kApart;
  }

  // The block's queries, divided by a power of two so that fp16 neither overflows nor loses small ones: for `prepare`,
  // and as operands for exact tokens. A warp a row, from the last but one down: the last describes, the first have
  // exact tokens. `asked`: the warp's first row, asked for early.
  static constexpr int kQueryWords = (S::kLine + kWarp - 1) / kWarp;
  static constexpr int kTurns = (S::Rows + S::kPairs - 1) / S::kPairs;  // rows of a warp
  using Asked = uint32_t[kTurns][kQueryWords];
  using From = const uint32_t* [kTurns];
  __device__ int first_row() const { return (2 * S::kPairs - 2 - warp) % S::kPairs; }
  __device__ const uint32_t* query_words(int r) const {
    const int row = min(r, rows - 1);
    return reinterpret_cast<const uint32_t*>(query_row(row, b + batch_row(row)));
  }
  __device__ void find_queries(From& from) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) from[turn] = query_words(first_row() + turn * S::kPairs);
  }
  __device__ void ask_queries(const From& from, Asked& to) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
#pragma unroll
      for (int i = 0; i < kQueryWords; i++)
        to[turn][i] = first_row() + turn * S::kPairs < rows && i * kWarp + lane < S::kLine
                          ? __ldcg(from[turn] + i * kWarp + lane)
                          : 0;
  }
  __device__ void load_queries(Asked& asked) const {
#pragma unroll 1
    for (int r = first_row(); r < S::Rows; r += S::kPairs) {
      float2 x[kQueryWords];
      float most = 0.f;
#pragma unroll
      for (int i = 0; i < kQueryWords; i++) {
        x[i] = to_floats(asked[0][i], layer.dtype);
#pragma unroll
        for (int turn = 1; turn < kTurns; turn++) asked[turn - 1][i] = asked[turn][i];
        most = fmaxf(most, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
      }
      float power = __int_as_float(__float_as_int(warp_max(most)) & 0x7f800000);
      power = power > 0.f ? power : 1.f;
      const float by = (a.scale < 0.f ? -1.f : 1.f) / power;  // a larger score is a larger product
#pragma unroll
      for (int i = 0; i < kQueryWords; i++)
        if (const uint32_t channel = 2 * (i * kWarp + lane); channel < S::D) {
          const float2 y = {x[i].x * by, x[i].y * by};
          *reinterpret_cast<float2*>(&scratch.query[r][channel]) = y;
          reinterpret_cast<__half2*>(scratch.raw)[operand(r, channel)] = __float22half2_rn(y);
        }
      if (lane == 0) scratch.magnitude[r] = fmaxf(power * fabsf(a.scale) * kLog2e, FLT_MIN);
    }
  }

  // Frequencies go past the registers: who waits for a register may wait for all loads so far, T^-1 among them.
  __device__ void ask_frequencies(int thread) const {
    if (thread < S::D / 2) {
      const bool there = layer.inv_freq != nullptr && thread < layer.half;
      __pipeline_memcpy_async(&scratch.frequencies[thread], layer.inv_freq + (there ? thread : 0), 4, there ? 0 : 4);
    }
    __pipeline_commit();
  }
  static __device__ void frequencies_there() { __pipeline_wait_prior(0); }

  // Products with T^-1 that prepare the queries of these frames.
  static __device__ int products(const Frames& frames) {
    return (frames.end - frames.begin + S::kFrames - 1) / S::kFrames;
  }

  // R(-t_f) q for the rows of a product, kFrames frames x the block's query rows, in fp16: a model's own rotation
  // rounds no less. `Count` query rows of a pair of channels are taken first and then turned for one frame or many:
  // what is stored may be what is loaded, for all that the compiler knows, so that loads wait for stores before them.
  struct Rotation {
    int half, tokens;    // pairs that rotate; tokens of a frame
    int origin, second;  // of the (first) row of the batch, of the other
  };
  __device__ Rotation rotation() const {
    return {layer.inv_freq ? int(layer.half) : 0, int(min(layer.frame_tokens, int64_t(kMaxSlot))),
            scratch.tokens[0].origin, scratch.tokens[S::kBatch - 1].origin};
  }
  template <int Count>
  struct Pair {
    uint32_t first, second;  // depths
    bool rotates;
    float frequency;
    float2 q[Count];
  };
  template <int Count>
  __device__ __forceinline__ Pair<Count> take(const Rotation& by, uint32_t row, uint32_t pair) const {
    const bool rotates = int(pair) < by.half, apart = rotates && !layer.interleaved;
    const uint32_t first = apart ? pair : 2 * pair, second = apart ? pair + by.half : 2 * pair + 1;
    Pair<Count> taken = {depth_of(first), depth_of(second), rotates, scratch.frequencies[pair]};
#pragma unroll
    for (int k = 0; k < Count; k++) taken.q[k] = {scratch.query[row + k][first], scratch.query[row + k][second]};
    return taken;
  }
  template <int Count>
  __device__ __forceinline__ void turn(const Rotation& by, const Pair<Count>& pair, int frame, __half (&x)[Count],
                                       __half (&y)[Count]) const {
    const auto turn_from = [&](int origin) {
      const int position = frame * by.tokens + origin;
      const float2 turn = turn_of(-static_cast<float>(position) * pair.frequency);
      return pair.rotates ? turn : float2{1.f, 0.f};
    };
    float2 turn = turn_from(by.origin);
#pragma unroll
    for (int k = 0; k < Count; k++) {
      if (S::kBatch > 1 && k == 1 && by.second != by.origin) turn = turn_from(by.second);
      x[k] = __float2half_rn(pair.q[k].x * turn.x - pair.q[k].y * turn.y);
      y[k] = __float2half_rn(pair.q[k].y * turn.x + pair.q[k].x * turn.y);
    }
  }
  template <int Count>
  static __device__ __forceinline__ void put(const Pair<Count>& pair, const __half (&x)[Count],
                                             const __half (&y)[Count], __half (*to)[S::D + 8]) {
#pragma unroll
    for (int k = 0; k < Count; k++) to[k][pair.first] = x[k], to[k][pair.second] = y[k];
  }

  // The warps for scores rotate for all products but the first, one ahead of those that multiply: a thread always the
  // same pair of channels.
  __device__ void help_prepare(const Frames& frames) const {
    // A part is some rows of a frame, whose queries fit a thread's registers.
    constexpr int kRows = S::Rows < 8 ? S::Rows : 8, kParts = 16 / kRows, kOfFrame = S::Rows / kRows;
    constexpr int kAtOnce = S::kHalf / S::kLine, kTurns = (kParts + kAtOnce - 1) / kAtOnce;
    static_assert(kTurns == 1 || kOfFrame == 1);
    const Rotation by = rotation();
    const int count = products(frames);
    if (count < 2) return;
    const int own = int(threadIdx.x) / S::kLine;  // the first of the parts that the thread turns to
    const Pair<kRows> pair = take<kRows>(by, own % kOfFrame * kRows, threadIdx.x % S::kLine);
#pragma unroll 1
    for (int product = 1; product < count; product++) {
      named_sync(kTurnedFree + (product & 1), S::kThreads);
      __half x[kTurns][kRows], y[kTurns][kRows];
#pragma unroll
      for (int i = 0; i < kTurns; i++)
        turn<kRows>(by, pair, frames.begin + product * S::kFrames + (own + i * kAtOnce) / kOfFrame, x[i], y[i]);
#pragma unroll
      for (int i = 0; i < kTurns; i++)
        if (const int part = own + i * kAtOnce; own < kAtOnce && part < kParts)
          put<kRows>(pair, x[i], y[i], &scratch.turned[product & 1][part * kRows]);
      named_arrive(kTurnedFull + (product & 1), S::kThreads);
    }
  }

  // q_f = T^-T R(-t_f) q of the block's frames: products on tensor cores. By the warps for values, or those of the
  // block of keys. Blocks that share a frame write the same.
  __device__ void prepare(const Frames& frames, const Prepared& to, const Inverse& inverse) const {
    const int count = products(frames);
    if (!S::kApart && count > 1) named_arrive(kTurnedFree + 1, S::kThreads);
    // Where the lane's two rows of a product go.
    __half2* at[2];
    int frame[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t row = n + 8 * i, r = row % S::Rows, channel = 8 * unit(0) + 2 * c;
      frame[i] = frames.begin + row / S::Rows;
      at[i] = reinterpret_cast<__half2*>(to.at) +
              int64_t(frames.begin + int(row / S::Rows) - to.frame) * (2 * to.stride) + operand(r, channel);
    }
#pragma unroll 1
    for (int product = 0; product < count; product++) {
      const __half(&turned)[16][S::D + 8] = scratch.turned[product & 1];
      if (S::kApart || product == 0) {
        const Rotation by = rotation();
        const int first = frames.begin + product * S::kFrames;
        const int items = min(frames.end - first, S::kFrames) * (S::Rows / 2 * S::kLine);
#pragma unroll 1
        for (int i = threadIdx.x % S::kHalf; i < items; i += S::kHalf) {
          const int row = i / S::kLine * 2;  // of the product
          const Pair<2> pair = take<2>(by, row % S::Rows, i % S::kLine);
          __half x[2], y[2];
          turn<2>(by, pair, first + row / S::Rows, x, y);
          put<2>(pair, x, y, &scratch.turned[product & 1][row]);
        }
        named_sync(kValues, S::kHalf);
      } else {
        named_sync(kTurnedFull + (product & 1), S::kThreads);
      }
      float y[kUnits][4] = {};
#pragma unroll
      for (int i = 0; i < S::D / 32; i++) {
        uint32_t left[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
          load_operand(&turned[lane & 15][32 * i + 16 * half + (lane >> 4) * 8], left[half]);
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
          mma_dense(y[u], left[0], inverse[u][i].x, inverse[u][i].y);
          mma_dense(y[u], left[1], inverse[u][i].z, inverse[u][i].w);
        }
      }
      if (!S::kApart && product + 2 < count) named_arrive(kTurnedFree + (product & 1), S::kThreads);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (frame[i] < frames.end) {
#pragma unroll
          for (int u = 0; u < kUnits; u++)
            if (unit(u) < S::D / 8)
              at[i][4 * S::kOperandRows * S::kPairs * u] = __floats2half2_rn(y[u][2 * i], y[u][2 * i + 1]);
          frame[i] += S::kFrames;
        }
        at[i] += 2 * S::kFrames * to.stride;
      }
    }
  }

  // ---- scores ----

  // A operands, or with A looked up B operands.
  using Query = uint32_t[S::D / 16][S::kLookedUpA ? 2 : 4];
  struct Frame {
    int tokens, now, border;  // tokens of a frame; the one whose query is loaded, and its end
  };

  // The step whose part of the query row `r` of A holds at `step`.
  static __device__ __forceinline__ int rotated(int step, int r) {
    const Group group = group_of(K::kSteps, step);
    return group.first + ((step - group.first) ^ (r & (group.width - 1)));
  }
  // The bits of its rotation for which a lane exchanges what it looks up in steps of a group, those that A has no rows
  // for.
  template <class Table>
  static constexpr int exchanged(int step) {
    return (group_of(Table::kSteps, step).width - 1) & ~(S::kRotations - 1) & 3;
  }
  // Steps of which all is looked up before the first product: what lanes exchange, and what one product takes (bit 0:
  // two steps that follow each other). They differ in these bits from the one without any.
  template <int Bits>
  struct Steps {
    static constexpr int bits = Bits, count = bits == 3 ? 4 : bits ? 2 : 1;
    static constexpr int from(int first, int i) { return first + (bits == 2 ? 2 * i : i); }
    static constexpr int apart(int bit) { return bits == 2 ? 1 : bit; }
  };
  template <int Count, int Words>
  static __device__ __forceinline__ void exchange(uint32_t (&x)[Count][Words], int apart, bool exchanges) {
#pragma unroll
    for (int i = 0; i < Count; i++)
#pragma unroll
      for (int word = 0; word < Words; word++)
        if (!(i & apart)) {
          const uint32_t low = x[i][word], high = x[i + apart][word];
          x[i][word] = exchanges ? high : low, x[i + apart][word] = exchanges ? low : high;
        }
  }

  // With it operands are registers of their own, which a zero that the compiler knows is not: that would be moved next
  // to the others before every product.
  static __device__ __forceinline__ uint32_t unknown_zero() { return blockDim.x ^ S::kThreads; }

  // The lane's part of the operands of a frame.
  __device__ __forceinline__ void load_query(int frame, const Prepared& prepared, Query& q) const {
    const int r = n & (S::kRotations - 1), rh = n / S::kRotations ^ which();
    // [step][c][rh][pair of channels][rh, rh + kApartRows] half2
    constexpr int kStep = 4 * S::kApartRows * (S::KD / 2);
    const uint2* from =
        prepared.at + int64_t(frame - prepared.frame) * prepared.stride + (c * S::kApartRows + rh) * (S::KD / 2);
    const uint2* four[4];  // of a group of four steps
#pragma unroll
    for (int x = 0; x < 4; x++) four[x] = opaque(from + (x ^ r) * kStep);
#pragma unroll
    for (int step = 0; step < K::kSteps; step++) {
      const Group group = group_of(K::kSteps, step);
      const uint2* const mine = kFewAddresses && group.width == 4 ? four[step - group.first & 3] + group.first * kStep
                                                                  : from + rotated(step, r) * kStep;
#pragma unroll
      for (int sub = 0; sub < S::KD / 2; sub++) {
        const uint2 x = mine[sub];
        const int u = step * (S::KD / 2) + sub;  // pair of depths: operand u / 2, its lower or upper half
        if constexpr (S::kLookedUpA)
          q[u / 2][u % 2] = x.x;
        else
          q[u / 2][u % 2 * 2] = x.x, q[u / 2][u % 2 * 2 + 1] = S::kHalves == 2 ? x.y
                                                               : S::KD < 8     ? x.x & unknown_zero()
                                                                               : 0u;
      }
    }
  }

  // Of a later frame, to the L1 cache.
  __device__ void prefetch_query(int frame, const Prepared& prepared) const {
    if (frame >= scratch.frames.end || prepared.at == scratch.prepared[0]) return;
    const uint2* const from = prepared.at + int64_t(frame - prepared.frame) * prepared.stride;
#pragma unroll
    for (int line = 0; line < S::kOperands / 16; line += kWarp)
      if (line + lane < S::kOperands / 16) prefetch_l1(from + (line + lane) * 16);
  }

  // Waits for the loads of a query here: else the first instruction of every tile that uses it might wait, and with it
  // for the codes that are on their way.
  static __device__ __forceinline__ void settle(Query& q) {
    const uint32_t zero = unknown_zero();
#pragma unroll
    for (auto& operand : q)
#pragma unroll
      for (uint32_t& x : operand) x ^= zero;
  }

  // Adds the products of a query with what `look(step, half, out)` gives for every step of `Batches` x 2 halves. With A
  // looked up the two halves of a batch are the upper and lower half of A.
  using Products = float[S::kLookedUpA ? 1 : 2][4];  // of a batch
  template <int Batches, class Look>
  __device__ __forceinline__ void multiply(const Query& q, Products (&acc)[Batches], const Look& look) const {
    static_for<K::kSteps>([&](auto step_) {
      constexpr int first = decltype(step_)::value;
      using Set = Steps<exchanged<K>(first) | int(S::KD == 2)>;
      if constexpr (first & Set::bits) return;
      static_for<Batches>([&](auto batch_) {
        constexpr int kWords = S::KD / 2;  // of a lookup
        uint32_t x[2][Set::count][kWords];
        static_for<2>([&](auto half_) {
          constexpr int half = decltype(half_)::value;
          static_for<Set::count>([&](auto i_) {
            constexpr int i = decltype(i_)::value;
            look(std::integral_constant<int, Set::from(first, i)>(), batch_, half_, x[half][i]);
          });
          if constexpr (exchanged<K>(first) & 2) exchange(x[half], Set::apart(2), (n >> 1 & 1) != half);
          if constexpr (exchanged<K>(first) & 1) exchange(x[half], Set::apart(1), n & 1);
        });
        // Two registers of them, one below the other, are the depths of an operand.
        constexpr int kOfStep = S::KD == 8 ? 2 : 1;  // operands; of two steps with KD = 2
        static_for<Set::count * S::KD / 4>([&](auto u_) {
          constexpr int u = decltype(u_)::value, i = S::KD == 2 ? 2 * u : u / kOfStep;
          constexpr int at = Set::from(first, i) * kWords / 2 + u % kOfStep;
          const auto word = [&](int half, int k) { return x[half][(2 * u + k) / kWords][(2 * u + k) % kWords]; };
          if constexpr (S::kLookedUpA) {
            mma_dense(acc[decltype(batch_)::value][0], {word(0, 0), word(1, 0), word(0, 1), word(1, 1)}, q[at][0],
                      q[at][1]);
          } else {
            mma_dense(acc[decltype(batch_)::value][0], q[at], word(0, 0), word(0, 1));
            mma_dense(acc[decltype(batch_)::value][1], q[at], word(1, 0), word(1, 1));
          }
        });
      });
    });
  }

  // The right scores of a batch for each of the lane's rows: one, one of each half, or all.
  __device__ __forceinline__ void pick(const Products& acc, float (&s)[S::kLaneRows]) const {
    const int r = n & 3;
    const bool odd = r & 1, upper = (c & 1) ^ (r >> 1);
#pragma unroll
    for (int rr = 0; rr < S::kLaneRows; rr++) {
      const int e = rr % S::kHalves * 2;
      if constexpr (S::kLookedUpA) {
        const float (&x)[4] = acc[0];
        const float low = odd ? x[1] : x[0], high = odd ? x[3] : x[2];
        s[rr] = upper ? high : low;
      } else if constexpr (S::kExchanges) {
        const float (&x)[4] = acc[half_of(rr)];
        s[rr] = column_bit(rr) ? x[e + 1] : x[e];
      } else {
        const float low = odd ? acc[0][e + 1] : acc[0][e], high = odd ? acc[1][e + 1] : acc[1][e];
        s[rr] = upper ? high : low;
      }
    }
  }

  struct Softmax {
    float top[S::kHalves], sum[S::kHalves], magnitude[S::kHalves];
  };

  // Where the warps of a pair meet: addresses in shared memory of the first of two slots, and of the barriers that say
  // that it is full or empty. Apart, what the other block waits for is the other block's.
  struct Link {
    uint32_t slot, full, base;  // `base`: where `full` is in the block that has `empty`
    __device__ uint32_t empty(int it) const {
      return base + uint32_t(offsetof(Scratch<S>, empty) - offsetof(Scratch<S>, full)) + (it & 1) * 8;
    }
  };
  __device__ Link link(int pair) const {
    const uint32_t slot = opaque(shared_address(&scratch.slots[pair][0]));
    const uint32_t full = opaque(shared_address(&scratch.full[pair][0]));
    if constexpr (!S::kApart) return {slot, full, full};
    if (blockIdx.x % 2 == 0) return {in_block(slot, 1), in_block(full, 1), full};
    return {slot, full, in_block(full, 0)};
  }
  using Slot = typename Scratch<S>::Slot;
  using Four = typename Scratch<S>::Four;

  // Scores of a tile, the lane's four tokens of each of its rows, to probabilities in the pair's slot.
  __device__ __forceinline__ void publish(float (&s)[S::kLaneRows][4], Softmax& state, const Link& link, int it) const {
    const int own = this->own();
    const uint32_t slot = link.slot + (it & 1) * sizeof(Slot), full = link.full + (it & 1) * 8,
                   factor = slot + offsetof(Slot, factor);
    float highest[S::kHalves];
    bool raise = false;
#pragma unroll
    for (int rr = 0; rr < S::kHalves; rr++) {
      const auto of_four = [](const float (&x)[4]) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); };
      float most = of_four(s[rr]);
#pragma unroll
      for (int o = 1; o < S::kOwn; o++) most = fmaxf(most, of_four(s[o * S::kHalves + rr]));
      highest[rr] = most * state.magnitude[rr];
      raise |= highest[rr] > state.top[rr] + kLazy;
    }
    raise = __any_sync(~0u, raise);
    float factors[S::kHalves] = {};
    barrier_wait(link.empty(it), (it >> 1 & 1) ^ 1);
    if (raise) {
#pragma unroll
      for (int rr = 0; rr < S::kHalves; rr++) {
#pragma unroll
        for (int step = kWidest; step; step /= 2)
          highest[rr] = fmaxf(highest[rr], __shfl_xor_sync(~0u, highest[rr], across(step)));
        highest[rr] = fmaxf(highest[rr], state.top[rr]);
        factors[rr] = exp2_fast(state.top[rr] - highest[rr]);
        state.top[rr] = highest[rr], state.sum[rr] *= factors[rr];
        if (!S::kApart && own == 0) store_shared(factor + 4 * column_row(rr), __float_as_uint(factors[rr]));
      }
    }
#pragma unroll
    for (int o = 0; o < S::kOwn; o++) {
      Four four;
#pragma unroll
      for (int rr = 0; rr < S::kHalves; rr++) {
        const float (&x)[4] = s[o * S::kHalves + rr];
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = exp2_fast(fmaf(x[i], state.magnitude[rr], -state.top[rr]));
        state.sum[rr] += (p[0] + p[1]) + (p[2] + p[3]);
        uint32_t* const to = reinterpret_cast<uint32_t*>(&four) + rr;
        to[0] = half2_bits(p[0], p[1]), to[S::kHalves] = half2_bits(p[2], p[3]);
        if constexpr (S::kApart)
          if (own == 0 && o == 0) send(factor + 4 * column_row(rr), __float_as_uint(factors[rr]), full);
      }
      const int at = S::kLookedUpA || S::kExchanges ? 16 * column_row(0) + this->own(o * S::kHalves) : lane;
      const uint32_t to = slot + at * sizeof(Four);
      if constexpr (S::kApart)
        send(to, four, full);
      else
        store_shared(to, four);
    }
    if constexpr (S::kApart) {
      if (lane == 0) send(slot + uint32_t(offsetof(Slot, rescale)), uint32_t(raise), full);
    } else {
      if (lane == 0) store_shared(slot + offsetof(Slot, rescale), uint32_t(raise));
      __syncwarp();
      if (lane < kArrivals) barrier_arrive(full);
    }
  }

  static __device__ __forceinline__ const char* from_lane(const char* x, int lane) {
    return reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(x), lane));
  }

  // Scores of 16 exact tokens, as token 4 i of a tile that has no others.
  __device__ void exact_scores(int group, const Query& q, float (&s)[S::kLaneRows][4]) const {
    const Token mine = token(group * kGroup + (S::kExchanges ? lane & 15 : own()));
    // To the L2 cache: what the other warp of the pair asks for next.
    const int line = S::kLookedUpA ? column_row(0) : lane >> 4;
    if (line == 0 || S::D > 64) prefetch_l2(mine.v + line * 128);
    const char* keys[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int other = half ^ (n >> 1 & 1);  // of the lane whose token it is
      keys[half] =
          from_lane(mine.k, S::kLookedUpA ? 4 * n + other : 4 * (2 * other + (n & 1)) + (n >> 1)) + c * S::KD * 2;
    }
    uint32_t channels[K::kSteps][2][S::KD / 2];
    static_for<K::kSteps>([&](auto step_) {
      static_for<2>([&](auto half_) {
        constexpr int step = decltype(step_)::value, half = decltype(half_)::value;
        constexpr Group at = group_of(K::kSteps, step);
        constexpr int x = (step - at.first) ^ (2 * half & (at.width - 1));
        load_exact(keys[half] + (at.first + (x ^ (n & (at.width - 1)))) * (8 * S::KD), channels[step][half]);
      });
    });
    to_half<K::kSteps * S::KD>(&channels[0][0][0], layer.dtype);
    Products acc[1] = {};
    multiply<1>(q, acc, [&](auto step_, auto, auto half_, auto& out) {
#pragma unroll
      for (int i = 0; i < S::KD / 2; i++) out[i] = channels[decltype(step_)::value][decltype(half_)::value][i];
    });
    float x[S::kLaneRows];
    pick(acc[0], x);
#pragma unroll
    for (int o = 0; o < S::kOwn; o++) {
      int slot = mine.slot;
      bool in_ring = mine.in_ring;
      if constexpr (S::kExchanges) {
        const int from = own(o * S::kHalves);
        slot = __shfl_sync(~0u, slot, from), in_ring = __shfl_sync(~0u, int(in_ring), from);
      }
#pragma unroll
      for (int rr = o * S::kHalves; rr < (o + 1) * S::kHalves; rr++) {
        s[rr][0] = sees(lane_row(rr), slot, in_ring) ? x[rr] : -INFINITY;
        s[rr][1] = s[rr][2] = s[rr][3] = -INFINITY;
      }
    }
  }

  // Tiles that every query row sees all of.
  struct Whole {
    int begin;
    uint32_t count;
  };
  __device__ Whole whole() const {
    const Range& seen = tokens().seen;
    const int begin = (max(seen.begin, 0) + kTile - 1) / kTile;
    return {begin, a.mask == nullptr ? uint32_t(max(seen.all_end / kTile - begin, 0)) : 0};
  }

  // Scores of a tile from its codes.
  __device__ __forceinline__ void coded_scores(int tile, bool more, const uint8_t* codes, Words& words,
                                               const Places<K>& places, const Prepared& prepared, const Whole& whole,
                                               Frame& frame, Query& q, float (&s)[S::kLaneRows][4]) const {
    const int slot0 = tile * kTile;
    const auto slot = [&](int rr) { return slot0 + 4 * own(rr); };
    // What the frames before `from` gave: opaque, so that the compiler makes a copy of the loop's body for tiles of one
    // frame, which selects nothing (`kPeels`).
    float before[S::kLaneRows][4] = {};
    for (int from = slot0;; from = frame.border) {  // frames of this tile from slot `from` on: nearly always one
      if (from >= frame.border) {
        load_query(++frame.now, prepared, q), frame.border += frame.tokens;
        prefetch_query(frame.now + 1, prepared);
        settle(q);
      }
      const bool last = slot0 + kTile <= frame.border;
      // What is looked up after this: the tile again, for its next frame, or the next tile.
      const uint8_t* next = !last ? codes : more || !kByAddress ? codes + kKeyTile : nullptr;
      constexpr int kBatches = 4 / kKeyUnit.per_tile;  // of a unit
#pragma unroll 1
      for (int unit = 0; unit < kKeyUnit.per_tile; unit++) {
        const bool inside = unit + 1 < kKeyUnit.per_tile;
        const uint8_t* after = inside ? codes + kKeyUnit.words * 128 : next;
        static_for<kBatches / 2>([&](auto both_) {
          constexpr int first = 2 * decltype(both_)::value;
          Products acc[2] = {};
          multiply<2>(q, acc, [&](auto step_, auto batch_, auto half_, auto& out) {
            constexpr int step = decltype(step_)::value, half = decltype(half_)::value,
                          batch = first + decltype(batch_)::value;
            constexpr Group group = group_of(K::kSteps, step);
            constexpr int at = (2 * batch + half) * K::kSteps + step;
            constexpr int x = (step - group.first) ^ (2 * half & (group.width - 1)), offset = K::offset(step);
            lookup<kSharedBase + offset / kRow * kPage + offset % kRow>(
                prmt(words[at / 4], places.at(group.width, x), 0x7604 | at % 4 << 4), out);
          });
          if (kByAddress ? after != nullptr : inside || more || !last) {
            constexpr int kChunks = kKeyUnit.words / 4;
#pragma unroll
            for (int i = first * kChunks / kBatches; i < (first + 2) * kChunks / kBatches; i++) fetch(words, i, after);
          }
          // Two tokens of the lane's four: they move up, which leaves the four in order.
          const int token = kKeyUnit.per_tile == 2 ? 2 * unit : first;
#pragma unroll
          for (int rr = 0; rr < S::kLaneRows; rr++) {
            const float low = s[rr][0], high = s[rr][1];
            s[rr][0] = s[rr][2], s[rr][1] = s[rr][3], s[rr][2] = low, s[rr][3] = high;
          }
#pragma unroll
          for (int batch = 0; batch < 2; batch++) {
            float x[S::kLaneRows];
            pick(acc[batch], x);
#pragma unroll
            for (int rr = 0; rr < S::kLaneRows; rr++)
              s[rr][2 + batch] = kPeels || slot(rr) + token + batch >= from ? x[rr] : s[rr][2 + batch];
          }
        });
      }
      if (kPeels && from > slot0) {
#pragma unroll
        for (int rr = 0; rr < S::kLaneRows; rr++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (slot(rr) + i < from) s[rr][i] = before[rr][i];
      }
      if (__builtin_expect(last, 1)) break;
#pragma unroll
      for (int rr = 0; rr < S::kLaneRows; rr++)
#pragma unroll
        for (int i = 0; i < 4; i++) before[rr][i] = kPeels ? opaque(s[rr][i]) : 0.f;
    }
    if (uint32_t(tile - whole.begin) < whole.count) return;
    const Range& seen = tokens().seen;
    if (slot0 < seen.begin || slot0 + kTile > seen.all_end) {
#pragma unroll
      for (int rr = 0; rr < S::kLaneRows; rr++) {
        const int end = scratch.rows[lane_row(rr)].coded_end;
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (slot(rr) + i < seen.begin || slot(rr) + i >= end) s[rr][i] = -INFINITY;
      }
    }
    if (a.mask != nullptr) {
#pragma unroll 1
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int rr = 0; rr < S::kLaneRows; rr++) {
          const bool hidden = masked(lane_row(rr), slot(rr) + i);
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (i == j && hidden) s[rr][j] = -INFINITY;
        }
      }
    }
  }

  // ---- values ----

  // Accumulators of a step: for each pair of channels (sub) the first and the second, [0], [1] of lane row rh, [2], [3]
  // of rh + kApartRows. With two query rows, [0], [1] of the first channel and [2], [3] of the second. With one (`One`)
  // of two pairs of channels (of two steps, or two of a step): [0], [1] of the first pair, [2], [3] of the second;
  // lanes c < 2 have the first channel, for rotations 2 c and 2 c + 1, the others the second.
  static constexpr int kSubs = S::VD / 2, kParities = S::Rows == 2 ? 1 : 2;
  template <bool One>
  using Outputs = std::conditional_t<One, float[V::kSteps * kSubs / 2][4], float[V::kSteps][kSubs][kParities][4]>;

  template <class Outputs>
  static __device__ void zero(Outputs& o) {
    float* x = reinterpret_cast<float*>(&o);
#pragma unroll
    for (int i = 0; i < int(sizeof(Outputs) / sizeof(float)); i++) x[i] = 0.f;
  }

  // Adds the values of a tile with the probabilities of the pair's slot. `Units` parts of a tile: `ask(unit)` hears
  // that one comes (the first before the probabilities are waited for), `look(step, batch, unit, token, out)` gives the
  // values of a batch in it, and `done(batch, step, unit)` hears that a step needs no more.
  // `last`: how many such calls there are.
  template <int Units, bool One, class Ask, class Look, class Done>
  __device__ __forceinline__ void accumulate(Outputs<One>& o, const Link& link, int it, int last, const Ask& ask,
                                             const Look& look, const Done& done) const {
    const int r = n & (S::kRotations - 1), rh = n / S::kRotations;
    const uint32_t slot = link.slot + (it & 1) * sizeof(Slot), full = link.full + (it & 1) * 8;
    const uint32_t shares = (c & (S::kRotations - 1)) == r ? slot + (One ? c : kTile / 4 * rh + c) * sizeof(Four)
                                                           : shared_address(scratch.zeros);
    if (S::kApart && lane == 0) barrier_expect(full, Slot::kSent);
    ask(0);
    barrier_wait(full, it >> 1 & 1);
    uint32_t rescale;
    load_shared(slot + offsetof(Slot, rescale), rescale);
    if (rescale) {
      const auto factor = [&](int row) {
        uint32_t x;
        load_shared(slot + offsetof(Slot, factor) + 4 * row, x);
        return __uint_as_float(x);
      };
      if constexpr (One) {
        const float by = factor(0);
#pragma unroll
        for (auto& x : o)
#pragma unroll
          for (int i = 0; i < 4; i++) x[i] *= by;
      } else {
        const float low = factor(rh), high = S::kHalves == 2 ? factor(rh + S::kApartRows) : low;
#pragma unroll
        for (int i = 0; i < V::kSteps; i++)
#pragma unroll
          for (int sub = 0; sub < kSubs; sub++)
#pragma unroll
            for (int e = 0; e < kParities; e++) {
              float (&x)[4] = o[i][sub][e];
              x[0] *= low, x[1] *= low, x[2] *= high, x[3] *= high;
            }
      }
    }
#pragma unroll 1
    for (int unit = 0; unit < Units; unit++) {
      if (unit > 0) ask(unit);
      static_for<4 / Units>([&](auto batch_) {
        constexpr int batch = decltype(batch_)::value;
        // Operands: of four rows and more; of two rows (two of them) and of one, for one channel or the other.
        uint32_t p[2][4];
        Four four;
        load_shared(shares + 4 * (unit * (4 / Units) + batch) * sizeof(Four), four);
        if constexpr (One) {
          const int first = rh ? 0x1044 : 0x4410, second = rh ? 0x3244 : 0x4432;
          p[0][0] = prmt(four.x, 0, first), p[0][1] = prmt(four.x, 0, second);
          p[0][2] = prmt(four.y, 0, first), p[0][3] = prmt(four.y, 0, second);
        } else if constexpr (S::Rows == 2) {
          p[0][0] = four.x & 0xffff, p[0][1] = four.x << 16, p[0][2] = four.x >> 16, p[0][3] = four.x & 0xffff0000;
          p[1][0] = four.y & 0xffff, p[1][1] = four.y << 16, p[1][2] = four.y >> 16, p[1][3] = four.y & 0xffff0000;
        } else {
          p[0][0] = four.x, p[0][1] = four.y, p[0][2] = four.z, p[0][3] = four.w;
        }
        static_for<V::kSteps>([&](auto steps_) {
          constexpr int first = decltype(steps_)::value;
          using Set = Steps<exchanged<V>(first) | int(One && kSubs == 1)>;
          if constexpr (first & Set::bits) return;
          uint32_t v[Set::count][4 * kSubs];  // of four tokens
          static_for<Set::count>([&](auto i_) {
            constexpr int i = decltype(i_)::value, step = Set::from(first, i);
            static_for<4>([&](auto token_) {
              look(std::integral_constant<int, step>(), batch_, unit, token_,
                   reinterpret_cast<uint32_t (&)[kSubs]>(v[i][kSubs * decltype(token_)::value]));
            });
            if constexpr (One) done(batch_, std::integral_constant<int, step>(), unit);
          });
          if constexpr (exchanged<V>(first) & 2) exchange(v, Set::apart(2), c & 2);
          if constexpr (exchanged<V>(first) & 1) exchange(v, Set::apart(1), c & 1);
          if constexpr (One) {
            const auto pair = [&](int token, int i) { return v[i / kSubs][kSubs * token + i % kSubs]; };
#pragma unroll
            for (int i = 0; i < Set::count * kSubs; i += 2)
#pragma unroll
              for (int t = 0; t < 4; t += 2)
                mma_dense(o[(first * kSubs + i) / 2], {pair(t, i), pair(t, i + 1), pair(t + 1, i), pair(t + 1, i + 1)},
                          p[0][t], p[0][t + 1]);
          } else {
#pragma unroll
            for (int i = 0; i < Set::count; i++) {
#pragma unroll
              for (int sub = 0; sub < kSubs; sub++) {
                auto& x = o[Set::from(first, i)][sub];
                const auto y = [&](int token) { return v[i][kSubs * token + sub]; };
                if constexpr (S::Rows == 2) {
                  mma_dense(x[0], p[0], y(0), y(1));
                  mma_dense(x[0], p[1], y(2), y(3));
                } else {
                  mma_dense(x[0], p[0], prmt(y(0), y(1), 0x5410), prmt(y(2), y(3), 0x5410));
                  mma_dense(x[1], p[0], prmt(y(0), y(1), 0x7632), prmt(y(2), y(3), 0x7632));
                }
              }
            }
          }
          if constexpr (!One)
            static_for<Set::count>([&](auto i_) {
              done(batch_, std::integral_constant<int, Set::from(first, decltype(i_)::value)>(), unit);
            });
        });
      });
    }
    __syncwarp();
    if constexpr (S::kApart) {
      // Not of the last two: then the block that it tells may have ended.
      if (lane == 0 && it + 2 < last) barrier_arrive_there(link.empty(it));
    } else {
      if (lane < kArrivals) barrier_arrive(link.empty(it));
    }
  }

  template <bool One>
  __device__ void exact_values(int group, Outputs<One>& o, const Link& link, int it, int last) const {
    const Token mine = token(group * kGroup + (lane & 15));
    bool any = sees(One ? which() : 0, mine);  // row sees it: what no row sees may be NaN
    if constexpr (!One) {
      // The rows' positions follow each other: without a mask, what lies between what the first and the last see is
      // seen.
      const int last_position = scratch.rows[rows - 1].position;
      any = mine.slot >= 0 && mine.slot <= last_position &&
            (!mine.in_ring || mine.slot > scratch.rows[0].position - int(layer.R));
      if (a.mask != nullptr && any) {
        any = false;
#pragma unroll 1
        for (int r = 0; r < rows; r++) any |= sees(r, mine);
      }
    }
    const uint32_t live = __ballot_sync(~0u, any);
    // As many units are asked for at once as registers allow.
    constexpr int kUnits = 1, kBatches = 4 / kUnits;
    uint32_t values[kBatches][V::kSteps][kSubs];
    accumulate<kUnits, One>(
        o, link, it, last,
        [&](int unit) {
          static_for<kBatches>([&](auto batch_) {
            constexpr int batch = decltype(batch_)::value;
            const int own = 4 * (unit * kBatches + batch) + c;
            const char* from = from_lane(mine.v, own) + n * S::VD * 2;
            static_for<V::kSteps>([&](auto step_) {
              constexpr int step = decltype(step_)::value;
              constexpr Group at = group_of(V::kSteps, step);
              const int m = 8 * at.first + (at.width - 1) * n + ((step - at.first) ^ (c & (at.width - 1)));
              load_exact(from + m * S::VD * 2, values[batch][step]);
            });
          });
          to_half<kBatches * V::kSteps * kSubs>(&values[0][0][0], layer.dtype);
          static_for<kBatches>([&](auto batch_) {
            constexpr int batch = decltype(batch_)::value;
            const bool seen = live >> (4 * (unit * kBatches + batch) + c) & 1;
#pragma unroll
            for (int i = 0; i < V::kSteps * kSubs; i++)
              (&values[batch][0][0])[i] = seen ? (&values[batch][0][0])[i] : 0u;
          });
        },
        [&](auto step_, auto batch_, int, auto token_, auto& out) {
          constexpr int step = decltype(step_)::value, batch = decltype(batch_)::value, token = decltype(token_)::value;
#pragma unroll
          for (int i = 0; i < kSubs; i++) out[i] = token == 0 ? values[batch][step][i] : 0u;
        },
        [](auto, auto, int) {});
  }

  template <bool One>
  __device__ __forceinline__ void coded_values(Outputs<One>& o, const Link& link, int it, int last,
                                               const uint8_t* codes, Words& words, const Places<V>& places) const {
    const bool more = it + 1 < last;
    const uint8_t* next = more || !kByAddress ? codes + kValueTile : nullptr;
    accumulate<kValueUnit.per_tile, One>(
        o, link, it, last, [](int) {},
        [&](auto step_, auto batch_, int, auto token_, auto& out) {
          constexpr int step = decltype(step_)::value, batch = decltype(batch_)::value, token = decltype(token_)::value;
          constexpr Group group = group_of(V::kSteps, step);
          constexpr int offset = V::offset(step);
          lookup<kSharedBase + S::kValueTable + offset / kRow * kPage + offset % kRow>(
              prmt(words[batch * V::kSteps + step], places.at(group.width, step - group.first), 0x7604 | token << 4),
              out);
        },
        [&](auto batch_, auto step_, int unit) {
          constexpr int word = decltype(batch_)::value * V::kSteps + decltype(step_)::value;
          const bool inside = unit + 1 < kValueUnit.per_tile;
          const uint8_t* after = inside ? codes + kValueUnit.words * 128 : next;
          if (word % 4 == 3 && (kByAddress ? after != nullptr : inside || more)) fetch(words, word / 4, after);
        });
  }

  // Writes a pair's numerators, [kRotations][Rows][D], pairs of channels in the order `spread`.
  template <bool One>
  __device__ void store_values(const Outputs<One>& o, float* to) const {
    const int r = n & (S::kRotations - 1), rh = n / S::kRotations;
    to += (One ? which() : r * S::Rows + rh) * S::D;
    static_for<V::kSteps>([&](auto step_) {
      constexpr int step = decltype(step_)::value;
      constexpr Group group = group_of(V::kSteps, step);
      // In step x ^ rotation is subspace x of the group.
      const auto line = [&](int column, int rotation, int sub) {
        const int x = (step - group.first) ^ (rotation & (group.width - 1));
        return 2 * spread<S::VD>((8 * group.first + group.width * column + x) * (S::VD / 2) + sub);
      };
#pragma unroll
      for (int sub = 0; sub < kSubs; sub++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          if constexpr (One) {
            const int i = step * kSubs + sub, rotation = 2 * (c & 1) + j, channel = c >> 1;
            to[rotation * S::Rows * S::D + line(n, rotation, sub) + channel] = o[i / 2][i % 2 * 2 + j];
          } else {
            float2* at = reinterpret_cast<float2*>(to + line(2 * c + j, r, sub));
            const auto& x = o[step][sub];
            if constexpr (S::Rows == 2) {
              at[0] = {x[0][j], x[0][j + 2]};
            } else {
              at[0] = {x[0][j], x[1][j]};
              at[S::D / 2 * S::kApartRows] = {x[0][j + 2], x[1][j + 2]};  // so many rows on
            }
          }
        }
      }
    });
  }

  // ---- merging ----

  // Merges the pairs of this block: the result if there is one split, else its part of it. A thread takes pairs of
  // channels.
  static constexpr int kPart = S::kRotations * S::Rows * S::D;  // numerators of a pair
  __device__ void finish(const float* numerators) const {
    constexpr int kLine = S::kLine;
    for (int i = threadIdx.x; i < rows * kLine; i += S::kThreads) {
      const int r = i / kLine, line = i % kLine;
      // All loads at once: reference maximum and factors before the numerators. A pair that saw nothing has kLowest and
      // zeros.
      float2 ends[S::kPairs];
      Merged row;
#pragma unroll
      for (int pair = 0; pair < S::kPairs; pair++) {
        ends[pair] = scratch.ends[pair][r];
        row.top = fmaxf(row.top, ends[pair].x);
      }
      // Of two rows of the batch a pair has one alone, and leaves nothing of the other.
      const int second = kTogether && rows > 1 ? scratch.tokens[S::kBatch - 1].first_pair : S::kPairs;
#pragma unroll
      for (int pair = 0; pair < S::kPairs; pair++) {
        float2 x = {0.f, 0.f};
#pragma unroll
        for (int rotation = 0; rotation < S::kRotations; rotation++) {
          const float2 y = *reinterpret_cast<const float2*>(
              &numerators[pair * kPart + (rotation * S::Rows + r) * S::D + 2 * spread<S::VD>(line)]);
          x.x += y.x, x.y += y.y;
        }
        if (kTogether && (pair >= second) != r) x = {0.f, 0.f};
        row.add_below(ends[pair], x);
      }
      if (a.splits == 1) {
        row.store(a, scratch.rows[r].out, scratch.rows[r].lse, line);
      } else if (a.clusters) {
        const int owner = int((i + .5f) * a.per_share);  // i / a.share
        send(in_block(&scratch.from_splits[split() * a.share + i - owner * a.share], owner),
             float4{row.x.x, row.x.y, row.top, row.total}, in_block(&scratch.parts, owner));
      } else {
        const int64_t at = (head() * a.rows + row0 + r) * a.splits + split();
        reinterpret_cast<float2*>(a.partials)[at * kLine + line] = row.x;
        if (line == 0) ends_of(a)[at] = {row.top, row.total};
      }
    }
#if __CUDA_ARCH__ >= 900
    if (!a.clusters) return;
    // The splits are a cluster: each merges its share. Eight lanes a pair of channels.
    constexpr int kLanes = 8, kAtOnce = S::kThreads / kLanes;
    const int begin = share_begin(), end = share_end();
    if (begin < end) barrier_wait(&scratch.parts, 0);
    for (int first = begin; first < end; first += kAtOnce) {
      const int i = min(first + int(threadIdx.x) / kLanes, end - 1), r = i / kLine, line = i % kLine;
      Merged row;
      float4 parts[kMaxCluster / kLanes];
#pragma unroll
      for (int j = 0; j < kMaxCluster / kLanes; j++) {
        const int split = threadIdx.x % kLanes + j * kLanes;
        parts[j] = split < a.splits ? scratch.from_splits[split * a.share + i - begin] : float4{0.f, 0.f, kLowest, 0.f};
        row.top = fmaxf(row.top, parts[j].z);
      }
      row.top = lanes_max<kLanes>(row.top);
#pragma unroll
      for (int j = 0; j < kMaxCluster / kLanes; j++) row.add_below({parts[j].z, parts[j].w}, {parts[j].x, parts[j].y});
      row.add_lanes<kLanes>();
      if (threadIdx.x % kLanes == 0 && first + int(threadIdx.x) / kLanes < end)
        row.store(a, scratch.rows[r].out, scratch.rows[r].lse, line);
    }
#endif
  }

  // ---- the two kinds of warps ----

  __device__ Frame first_frame(const Run& tiles) const {
    if (layer.inv_freq == nullptr) return {0, 0, kMaxSlot};
    const Frames& frames = scratch.frames;
    const int tokens = int(min(layer.frame_tokens, int64_t(kMaxSlot)));
    const int now = frames.end - frames.begin == 1 ? frames.begin : tiles.begin * kTile / tokens;
    return {tokens, now, int(min((int64_t(now) + 1) * tokens, int64_t(kMaxSlot)))};
  }

  // To the L2 cache: the tile that a pair begins with, as soon as it is known: till then memory has nothing to do.
  __device__ void prefetch_first(int pair) const {
    const Run tiles = run(pair);
    if (tiles.begin >= tiles.end) return;
    prefetch(key_codes(tiles), kKeyTile);
    prefetch(value_codes(tiles), kValueTile);
  }

  // Whether the lane's scores are of a query that is not the tokens' row's: then nobody reads its probabilities.
  __device__ bool others(int rr) const { return kTogether && column_row(rr) != 0; }

  __device__ void score(int pair, const Prepared& prepared) const {
    const Prepared raw = {scratch.raw, 0, 0};  // not rotated: exact tokens keep their positions
    Query q;
    Softmax state;
#pragma unroll
    for (int rr = 0; rr < S::kHalves; rr++)
      state.top[rr] = others(rr) ? -kLowest : kLowest, state.sum[rr] = 0.f,
      state.magnitude[rr] = scratch.magnitude[lane_row(rr)];
    float s[S::kLaneRows][4];
    // Exact tokens, then tiles of codes, in one loop, so that the instructions of `publish` are there once and have
    // been fetched when the first tile needs them. `next` is a tile, or the complement of a group of exact tokens.
    const uint8_t* at = nullptr;
    Words words = {};
    Places<K> places = {};
    Whole whole = {};
    Frame frame = {};
    const Link link = this->link(pair);
    const int end = run(pair).end;
    int next = ~first_group(pair);
    for (int it = 0; next != end; it++) {
      if (next < 0 && ~next < groups()) {
        load_query(0, raw, q);
        exact_scores(~next, q, s);
        next -= group_step();
        at = nullptr, frame = {}, places = {}, whole = {};  // known: takes no registers till here
#pragma unroll
        for (int i = 0; i < kWords; i++) words[i] = 0;
      } else {
        if (next < 0) {
          const Run tiles = run(pair);
          next = tiles.begin, at = key_codes(tiles), frame = first_frame(tiles), whole = this->whole();
          if (next != end) {
#pragma unroll
            for (int i = 0; i < kKeyUnit.words / 4; i++) fetch(words, i, at);
          }
          // Even if there are no codes: the table must be there before it is overwritten.
          barrier_wait(&scratch.k_table, 0);
          int column = n;
          if constexpr (in_two()) {
            if (scratch.in_two)
              barrier_wait(&scratch.k_more, 0);
            else
              column = K::in_first(n);
          }
          places = Places<K>(column, c, shared_address(shared) - kSharedBase);
          barrier_wait(&scratch.queries, 0);
          if (next == end) break;
          load_query(frame.now, prepared, q);
        }
        coded_scores(next, next + 1 < end, at, words, places, prepared, whole, frame, q, s);
        next++, at += kKeyTile;
      }
      publish(s, state, link, it);
    }
#pragma unroll
    for (int rr = 0; rr < S::kHalves; rr++) {
#pragma unroll
      for (int step = kWidest; step; step /= 2) state.sum[rr] += __shfl_xor_sync(~0u, state.sum[rr], across(step));
      if (own() != 0) continue;
      float2& to = scratch.ends[pair][lane_row(rr)];
      if (others(rr)) state.top[rr] = kLowest, state.sum[rr] = 0.f;
      if constexpr (S::kApart)
        send(in_block(&to, 1), uint2{__float_as_uint(state.top[rr]), __float_as_uint(state.sum[rr])},
             in_block(&scratch.parts, 1));
      else
        to = {state.top[rr], state.sum[rr]};
    }
  }

  // The numerators of a pair, which lie over the tables: `free` waits until nobody needs those.
  template <class Free>
  __device__ void values(int pair, float* numerators, const Free& free) const {
    const auto weigh_and_store = [&](auto one) {
      Outputs<one()> o;
      weigh<one()>(pair, o);
      free();
      store_values<one()>(o, numerators + pair * kPart);
    };
    if constexpr (S::kLookedUpA) {
      if (kTogether || rows == 1) return weigh_and_store(std::true_type());
    }
    if constexpr (!kTogether) weigh_and_store(std::false_type());
  }

  template <bool One>
  __device__ void weigh(int pair, Outputs<One>& o) const {
    zero(o);
    const Run tiles = run(pair);
    const Link link = this->link(pair);
    const int own = first_group(pair), step = group_step();
    const int last = (max(groups() - own, 0) + step - 1) / step + max(tiles.end - tiles.begin, 0);
    int it = 0;
    for (int group = own; group < groups(); group += step, it++) exact_values<One>(group, o, link, it, last);
    barrier_wait(&scratch.v_table, 0);
    if (tiles.begin < tiles.end) {
      const uint8_t* at = value_codes(tiles);
      Words words;
#pragma unroll
      for (int i = 0; i < kValueUnit.words / 4; i++) fetch(words, i, at);
      const Places<V> places(n, c, shared_address(shared) - kSharedBase);
      for (; it < last; it++, at += kValueTile) coded_values<One>(o, link, it, last, at, words, places);
    }
  }
};

// blockIdx: split, (row, KV head), tile of query rows.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) attend_kernel(const __grid_constant__ Attention a) {
  DYNAMIC_SHARED_MEMORY(shared);
  // The host checked that it is so; the upper byte is the block's rank in its cluster.
  if ((shared_address(shared) & 0xffffff) != kSharedBase) __trap();
  Block<S> block(a, shared);
  block.begin();
  typename Block<S>::From own_queries;
  block.find_queries(own_queries);
  __syncthreads();
  wait_for_kernels_before();
  // Not before: the append that may start from here on reads what the kernels before have written.
  let_next_kernel_start();
  if (__builtin_expect(block.may_idle(), 0))
    if (block.idles()) return;
  // All that is needed is asked for before anything is waited for.
  const typename Block<S>::Known known = block.ask_known();
  const bool scores = block.warp < S::kPairs;
  const int pair = scores ? block.warp : block.warp - S::kPairs;
  using K = typename S::K;
  float* numerators = reinterpret_cast<float*>(shared);  // [kPairs][kRotations][Rows][D], after the tables
  // Who has arrived at the cluster's barrier is ready for the parts of other splits, which lie over `turned`.
  if (scores) {
    typename Block<S>::Asked asked;
    block.ask_queries(own_queries, asked);
    if (threadIdx.x == 0) block.start_first();
    block.describe(known);
    block.describe_rows(known);
    block.load_queries(asked);
    named_arrive(Block<S>::kReady, S::kThreads);
    named_sync(Block<S>::kScores, S::kThreads);  // the block is described, by warps of either kind
    Block<S>::template load_table<K>(block.codebook(a.layer.k), shared, &block.scratch.k_table);
    block.prefetch_first(pair);
    block.copy_second();
    const Frames frames = block.scratch.frames;
    block.help_prepare(frames);
    if (a.clusters) cluster_arrive();
    block.score(pair, block.prepared(frames));
    __syncthreads();
  } else {
    const int thread = threadIdx.x - S::kHalf;
    block.ask_frequencies(thread);
    typename Block<S>::Inverse inverse;
    block.take_inverse(inverse);
    if (a.clusters && thread == kWarp) block.expect_parts();
    block.describe_places();
    block.frequencies_there();
    named_arrive(Block<S>::kScores, S::kThreads);
    named_sync(Block<S>::kReady, S::kThreads);  // the block is described
    block.start_second();
    const Frames frames = block.scratch.frames;
    block.prepare(frames, block.prepared(frames), inverse);
    barrier_arrive(&block.scratch.queries);
    if (a.clusters) cluster_arrive();
    block.values(pair, numerators, [&] {
      barrier_wait(&block.scratch.k_table, 0);
      if constexpr (Block<S>::in_two())
        if (block.scratch.in_two) barrier_wait(&block.scratch.k_more, 0);
      __syncthreads();
    });
  }
  if (a.clusters) cluster_wait();
  __syncthreads();
  block.finish(numerators);
}

// The same where keys' and values' tables need a block each, which are a cluster: the first prepares queries and sends
// the second its probabilities, tile by tile.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1) attend_apart_kernel(const __grid_constant__ Attention a) {
  DYNAMIC_SHARED_MEMORY(shared);
  if ((shared_address(shared) & 0xffffff) != kSharedBase) __trap();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  Block<S> block(a, shared);
  Scratch<S>& scratch = block.scratch;
  block.begin();
  typename Block<S>::From own_queries;
  block.find_queries(own_queries);
  __syncthreads();
  cluster_arrive();  // the barriers are there
  wait_for_kernels_before();
  let_next_kernel_start();
  if (block.may_idle())
    if (block.idles()) return;
  const typename Block<S>::Known known = block.ask_known();
  const int pair = block.warp;
  using K = typename S::K;
  using V = typename S::V;
  static_assert(!K::kWhole && !V::kWhole);  // `load_table` leaves those to bulk copies
  if (blockIdx.x % 2 == 0) {
    typename Block<S>::Asked asked;
    block.ask_queries(own_queries, asked);
    block.ask_frequencies(threadIdx.x);
    typename Block<S>::Inverse inverse;
    block.take_inverse(inverse);
    Block<S>::template load_table<K>(block.codebook(a.layer.k), shared, &scratch.k_table);
    block.describe(known);
    block.describe_rows(known);
    block.describe_places();
    block.load_queries(asked);
    block.frequencies_there();
    __syncthreads();
    block.prefetch_first(pair);
    const Frames frames = scratch.frames;
    block.prepare(frames, block.prepared(frames), inverse);
    barrier_arrive(&scratch.queries);
    cluster_wait();
    block.score(pair, block.prepared(frames));
  } else {
    if (threadIdx.x == 0) barrier_expect(&scratch.parts, sizeof(scratch.ends));
    Block<S>::template load_table<V>(block.codebook(a.layer.v), shared, &scratch.v_table);
    block.describe(known);
    block.describe_rows(known);
    block.describe_places();
    __syncthreads();
    cluster_wait();
    float* numerators = reinterpret_cast<float*>(shared);
    block.values(pair, numerators, [] { __syncthreads(); });
    barrier_wait(&scratch.parts, 0);
    __syncthreads();
    block.finish(numerators);
  }
#endif
}

template <class S>
constexpr auto kernel_of() {
  if constexpr (S::kApart)
    return attend_apart_kernel<S>;
  else
    return attend_kernel<S>;
}

// Whether the splits of a row can be clusters that merge by themselves: if that takes no more waves of blocks.
template <class S>
bool clusters_fit(cudaLaunchConfig_t config, int splits) {
  static std::atomic<int>
      known[kMaxCluster + 1];  // how many fit at once, plus 1; GPUs of one machine are taken to be alike
  if (splits > kMaxCluster) return false;
  int device = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (known[splits] == 0) {
    int most = 0;
    if (cudaOccupancyMaxActiveClusters(&most, kernel_of<S>(), &config) != cudaSuccess)
      most = 0, cudaGetLastError();  // clears it
    known[splits] = most + 1;
  }
  const int most = known[splits] - 1, clusters = int(config.gridDim.y * config.gridDim.z);
  return most > 0 && (clusters + most - 1) / most <= (clusters * splits + blocks - 1) / blocks;
}

// Whether two rows of the batch share a block: they start once where one in a block of its own would start after the
// other.
inline bool together(const Attention& a) {
  const auto waves = [&](int64_t blocks) { return (blocks + a.at_once - 1) / a.at_once; };
  const int64_t B = a.layer.B, H = a.layer.H;
  return a.rows == 1 && a.splits == 1 && 2 * waves((B + 1) / 2 * H) <= waves(B * H);
}

template <class S>
cudaError_t attend(const Attention& given, cudaStream_t stream) {
  constexpr int kShared = S::kTableBytes + sizeof(Scratch<S>);
  static_assert(sizeof(Scratch<S>) <= scratch_bytes(S::D, S::Rows) &&
                S::kPairs * Block<S>::kPart * sizeof(float) <= S::kTableBytes);
  Attention a = given;
  const auto kernel = kernel_of<S>();
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared) != cudaSuccess)
    return cudaGetLastError();  // and clears it
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.splits * S::kBlocks, (a.layer.B + S::kBatch - 1) / S::kBatch * a.layer.H,
                        (a.rows + S::Rows - 1) / S::Rows);
  a.crowded = 3 * int64_t(config.gridDim.x) * config.gridDim.y * config.gridDim.z > 2 * a.at_once;
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(S::kApart ? 2 : a.splits), 1, 1};
  config.numAttrs = 1;
  a.share = (std::min(S::Rows, a.rows) * S::kLine + a.splits - 1) / a.splits;
  a.per_share = 1.f / a.share;
  if (!S::kApart && a.overlap && a.splits > 1) {
    if (a.splits > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    a.clusters = clusters_fit<S>(config, a.splits);
  }
  const Layer& layer = a.layer;
  a.sure = a.splits;
  if (!a.clusters) {
    // To bring its tables costs a block as much as so many tiles, and its pairs do so many at the same time.
    constexpr int kFewTiles = 4, kAlways = 8;
    const int64_t groups = (layer.N + layer.R + layer.n + Block<S>::kGroup - 1) / Block<S>::kGroup;
    a.sure = int(std::min<int64_t>(a.splits, std::max<int64_t>(kAlways, groups)));
    if (a.sure < a.splits) a.few = kFewTiles * a.sure, a.gather = ((a.splits << 16) + a.sure - 1) / a.sure;
  }
  a.one_table = one_table();
  a.by_splits = reciprocal(a.splits), a.by_ring = reciprocal(layer.R);
  a.by_frame = reciprocal(std::min(layer.frame_tokens, int64_t(kMaxSlot)));
  config.numAttrs = a.clusters || S::kApart ? 1 : 0;
  if (a.overlap) {  // start before the memory of the kernel before is flushed
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, a);
  if (error == cudaSuccess && a.splits > 1 && !a.clusters) error = merge(a, stream);
  return error;
}

// Whether blocks of 16 query rows have room for what lies beside their tables.
template <int D, int KD, int VD, bool Narrow>
constexpr bool sixteen_rows() {
  using S = Shape<D, KD, VD, 16, Narrow>;
  return D <= 128 && S::kTableBytes + scratch_bytes(D, 16) <= kMostShared;
}

template <int D, int KD, int VD, bool Narrow>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  if constexpr (D <= 128)
    if (together(a)) return attend<Shape<D, KD, VD, 2, Narrow, 2>>(a, stream);
  if constexpr (sixteen_rows<D, KD, VD, Narrow>())
    if (a.block_rows > 8) return attend<Shape<D, KD, VD, 16, Narrow>>(a, stream);
  if (a.block_rows > 4) return attend<Shape<D, KD, VD, 8, Narrow>>(a, stream);
  if (a.rows > 2) return attend<Shape<D, KD, VD, 4, Narrow>>(a, stream);
  return attend<Shape<D, KD, VD, 2, Narrow>>(a, stream);
}

template <int D, int KD, int VD, bool Narrow = false>
constexpr Instance make_instance() {
  return {D,
          KD,
          VD,
          Shape<D, KD, VD, 4, Narrow>::kTableBytes,
          sixteen_rows<D, KD, VD, Narrow>(),
          attend<D, KD, VD, Narrow>};
}

}  // namespace mma
}  // namespace million
