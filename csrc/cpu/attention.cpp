// Attention of n new tokens over the cache and themselves, from codes.
//
// With q_f = T^-T R(-t_f) q for the frame f of slot s, and c(s) the centroids of the slot's codes:
//
//   score(s) = scale * q . k(s)        for exact keys: the new tokens, the sinks and the ring
//   score(s) = scale * q_f . c_k(s)    for all other slots
//   out      = sum_s softmax(score)(s) v(s)
//
//   q          [B, H G, n, D]          fp32, bf16 or fp16; query head h G + g reads KV head h
//   k, v       [B, H, n, D]            the same
//   codes      packed (pq_layout.h)    uint8
//   ring       [B, H, R, D]            dtype of q, slot modulo R
//   sinks      [B, H, N, D]            dtype of q, slots start[b] .. start[b] + N - 1
//   out        [B, n, H G, D]          dtype of q
//   lse        [B, H G, n]             fp32
//
// A work item is (KV head, row b, block of queries, split): it walks over its share of the tiles of kBlockTokens slots,
// decodes each to fp32 once for all its queries (rows of a small dense product), and keeps an online softmax in base 2.
// `merge` joins the splits of a block. Tiles of codes come first, then the exact tokens: sinks, ring, new.
#include "gemm.h"
#include "tile.h"

namespace million {
namespace MILLION_ISA {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

static inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return max_of(low, min_of(x, high)); }

// Scratch of a thread, cut from one piece of memory.
struct Scratch {
  uint8_t *k_planes, *v_planes;          // codebooks of the current head
  float *keys, *values;                  // the tile: [D][kTile] and [kTile][row_stride(D)]
  float *queries, *framed;               // [rows][D] scaled queries, and prepared for a frame
  float *scores, *mixed;                 // [rows][kTile], and the part of another frame
  float* partial;                        // [rows][D + 2]: numerator, reference maximum, denominator
  float *decay, *cosines, *sines;        // [rows], [D], [D]
  uint8_t *visible, *k_codes, *v_codes;  // [queries][kTile], [S][kTile] x 2
  size_t bytes;

  Scratch(const Attention& a, char* memory) {
    const int64_t D = a.layer.D, rows = a.block_rows();
    size_t at = 0;
    const auto bytes_of = [&](int64_t count) {
      const size_t from = at;
      at = (at + count + 63) / 64 * 64;
      return reinterpret_cast<uint8_t*>(memory + from);
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(bytes_of(count * sizeof(float))); };
    k_planes = bytes_of(Decoder::planes_bytes(D)), v_planes = bytes_of(Decoder::planes_bytes(D));
    keys = floats(kTile * D), values = floats(kTile * row_stride(D));
    queries = floats(rows * D), framed = floats(rows * D);
    scores = floats(rows * kTile), mixed = floats(rows * kTile);
    partial = floats(rows * (D + 2));
    decay = floats(rows), cosines = floats(D), sines = floats(D);
    visible = bytes_of(a.block_queries * kTile);
    k_codes = bytes_of(kTile * D / 2), v_codes = bytes_of(kTile * D / 2);
    bytes = at;
  }
};

size_t attend_scratch(const Attention& a) { return Scratch(a, nullptr).bytes; }

// One work item.
struct Item {
  const Attention& a;
  const Layer& layer;
  const Scratch& s;
  Decoder &keys, &values;
  const int64_t h, b, q0, q1, D, rows;
  float* const partial;
  int64_t start, coded_first, end, frame = -1;

  Item(const Attention& args, const Scratch& scratch, Decoder& k, Decoder& v, int64_t index, float* to)
      : a(args),
        layer(args.layer),
        s(scratch),
        keys(k),
        values(v),
        h(index / (args.splits * args.blocks * args.layer.B)),
        b(index / (args.splits * args.blocks) % args.layer.B),
        q0(index / args.splits % args.blocks * args.block_queries),
        q1(min_of(q0 + args.block_queries, args.layer.n)),
        D(args.layer.D),
        rows((q1 - q0) * args.G),
        partial(to) {
    start = layer.start[b];
    coded_first = max_of(start + layer.N, 0);  // older slots are sinks or padding
    end = clamp(layer.first, 0, min_of(layer.k.slots, layer.v.slots));
  }

  // Query j reads slots [coded_first, ring_first(j)) from codes and [ring_first(j), end) from the ring.
  int64_t ring_first(int64_t j) const {
    const int64_t served = max_of(layer.ring_lo, layer.first - layer.R);
    return clamp(max_of(served, layer.first + j - layer.R + 1), min_of(coded_first, end), end);
  }

  bool allowed(int64_t j, int64_t slot) const {
    return !a.mask || (slot >= 0 && slot < a.mask_slots && a.mask[(b * layer.n + j) * a.mask_slots + slot]);
  }

  void load_queries() const {
    for (int64_t j = q0; j < q1; j++)
      for (int64_t g = 0; g < a.G; g++) {
        float* q = s.queries + ((j - q0) * a.G + g) * D;
        to_floats(layer.dtype, a.q.at(b, h * a.G + g, j), q, D);
        for (int64_t i = 0; i < D; i++) q[i] *= a.scale * kLog2e;
      }
    for (int64_t r = 0; r < rows; r++) {
      float* p = partial + r * (D + 2);
      memset(p, 0, (D + 2) * sizeof(float));
      p[D] = -INFINITY;
    }
  }

  // framed = T^-T R(-t_f) q.
  void prepare_frame(int64_t f) {
    if (f == frame) return;
    frame = f;
    if (layer.inv_freq)
      rotation(f * layer.frame_tokens + layer.origin[b], layer.inv_freq, layer.half, s.cosines, s.sines);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t count = min_of(kTile, rows - r0);
      float* x = layer.transform ? s.values : s.framed + r0 * D;  // the value tile is free between two tiles
      memcpy(x, s.queries + r0 * D, count * D * sizeof(float));
      for (int64_t r = 0; layer.inv_freq && r < count; r++)
        rotate_back(x + r * D, s.cosines, s.sines, layer.half, layer.interleaved);
      if (layer.transform) gemm(count, D, D, x, D, layer.transform + h * D * D, D, nullptr, s.framed + r0 * D, D);
    }
  }

  // Turns a tile's scores into probabilities and adds them, and their `values`, to the partial result.
  // `visible` [queries][kTile] or null when every query sees the whole tile.
  void accumulate(int64_t tokens, const uint8_t* visible) const {
    for (int64_t r = 0; r < rows; r++) {
      float* score = s.scores + r * kTile;
      float& maximum = partial[r * (D + 2) + D];
      if (visible) {
        const uint8_t* sees = visible + r / a.G * kTile;
        for (int64_t t = 0; t < kTile; t++) score[t] = sees[t] ? score[t] : -INFINITY;
      }
      vf high = load<vf>(score);
      for (int64_t t = W; t < kTile; t += W) {
        const vf x = load<vf>(score + t);
        high = x > high ? x : high;
      }
      const auto larger = [](float x, float y) { return x > y ? x : y; };
      const float top = larger(reduce_lanes(high, larger), maximum);
      // Nothing seen so far: any finite reference does, the probabilities are exactly zero.
      const float reference = top == -INFINITY ? 0.0f : top;
      vf sum = {};
      for (int64_t t = 0; t < kTile; t += W) {
        const vf p = exp2_nonpositive(load<vf>(score + t) - reference);
        sum += p;
        store(score + t, p);
      }
      s.decay[r] = maximum == top ? 1.0f : exp2f(maximum - top);
      float& denominator = partial[r * (D + 2) + D + 1];
      denominator = denominator * s.decay[r] + reduce_lanes(sum, [](float x, float y) { return x + y; });
      maximum = top;
    }
    gemm(rows, D, tokens, s.scores, kTile, s.values, row_stride(D), s.decay, partial, D + 2);
  }

  // Slots [slot, slot + kTile) from codes.
  void coded_tile(int64_t slot) {
    keys.set_head(h), values.set_head(h);
    keys.columns(b * layer.H + h, slot, s.keys, s.values);
    const int64_t F = layer.inv_freq ? layer.frame_tokens : INT64_MAX;
    const int64_t from = max_of(slot, coded_first), to = min_of(slot + kTile, ring_first(q1 - 1));
    for (int64_t f = from / F; f * F < to; f++) {
      prepare_frame(f);
      const float* q = layer.inv_freq || layer.transform ? s.framed : s.queries;
      const bool whole = from / F == (to - 1) / F;
      gemm(rows, kTile, D, q, D, s.keys, kTile, nullptr, whole ? s.scores : s.mixed, kTile);
      if (whole) break;
      const int64_t low = max_of(f * F, slot) - slot, high = min_of((f + 1) * F, slot + kTile) - slot;
      for (int64_t r = 0; r < rows; r++)
        memcpy(s.scores + r * kTile + low, s.mixed + r * kTile + low, (high - low) * sizeof(float));
    }

    values.rows(b * layer.H + h, slot, s.values);
    const bool whole = !a.mask && slot >= coded_first && slot + kTile <= ring_first(q0);
    for (int64_t j = whole ? q1 : q0; j < q1; j++) {
      const int64_t stop = ring_first(j);
      for (int64_t t = 0; t < kTile; t++) {
        const int64_t x = slot + t;
        s.visible[(j - q0) * kTile + t] = x >= coded_first && x < stop && allowed(j, x);
      }
    }
    accumulate(kTile, whole ? nullptr : s.visible);
  }

  // Exact tokens [first, first + count) of the list sinks, ring, new.
  void exact_tile(int64_t first, int64_t count, int64_t sinks_first, int64_t sinks, int64_t ring0, int64_t ring) {
    memset(s.visible, 0, (q1 - q0) * kTile);
    const int64_t bh = b * layer.H + h, bytes = D * size_of(layer.dtype);
    const char* v_from[kTile];
    for (int64_t t = 0; t < count; t++) {
      int64_t e = first + t, slot, seen_from = q0;  // queries >= seen_from and < seen_to see it
      int64_t seen_to = q1;
      const char* k_from;
      if (e < sinks) {
        slot = sinks_first + e;
        k_from = layer.k_sinks + (bh * layer.N + slot - start) * bytes;
        v_from[t] = layer.v_sinks + (bh * layer.N + slot - start) * bytes;
      } else if ((e -= sinks) < ring) {
        slot = ring0 + e;
        k_from = layer.k_ring + (bh * layer.R + slot % layer.R) * bytes;
        v_from[t] = layer.v_ring + (bh * layer.R + slot % layer.R) * bytes;
        seen_to = min_of(q1, slot - layer.first + layer.R);  // slot > first + j - R
      } else {
        e -= ring;
        slot = layer.first + e;
        k_from = layer.k_new.at(b, h, e);
        v_from[t] = layer.v_new.at(b, h, e);
        seen_from = slot < start ? q1 : max_of(q0, e);
      }
      bool seen = false;
      for (int64_t j = seen_from; j < seen_to; j++) {
        const bool sees = allowed(j, slot);
        s.visible[(j - q0) * kTile + t] = sees;
        seen |= sees;
      }
      if (!seen) v_from[t] = nullptr;
      to_floats(layer.dtype, k_from, s.values + t * row_stride(D), D);
    }
    transpose_tile(s.values, count, D, row_stride(D), s.keys);
    gemm(rows, kTile, D, s.queries, D, s.keys, kTile, nullptr, s.scores, kTile);
    // What nobody may see can be anything, NaN included, and 0 * NaN must not reach the sum.
    for (int64_t t = 0; t < count; t++)
      if (v_from[t])
        to_floats(layer.dtype, v_from[t], s.values + t * row_stride(D), D);
      else
        memset(s.values + t * row_stride(D), 0, D * sizeof(float));
    accumulate(count, s.visible);
  }

  void run(int64_t split) {
    load_queries();
    const int64_t coded_end = ring_first(q1 - 1), ring0 = ring_first(q0);
    const int64_t tile0 = coded_first / kTile;
    const int64_t tiles = coded_end > coded_first ? (coded_end + kTile - 1) / kTile - tile0 : 0;
    const int64_t sinks_first = max_of(start, 0);
    const int64_t sinks = max_of(0, min_of(start + layer.N, end) - sinks_first), ring = end - ring0;
    const int64_t exact = sinks + ring + q1;
    const int64_t units = tiles + (exact + kTile - 1) / kTile;
    for (int64_t unit = units * split / a.splits; unit < units * (split + 1) / a.splits; unit++) {
      const int64_t e = (unit - tiles) * kTile;
      if (unit < tiles)
        coded_tile((tile0 + unit) * kTile);
      else
        exact_tile(e, min_of(kTile, exact - e), sinks_first, sinks, ring0, ring);
    }
  }
};

// Results of one block of queries from `splits` partial results that lie `step` floats apart.
static void finish(const Attention& a, int64_t group, float* partials, int64_t splits, int64_t step) {
  const Layer& layer = a.layer;
  const int64_t D = layer.D, h = group / (a.blocks * layer.B), b = group / a.blocks % layer.B;
  const int64_t q0 = group % a.blocks * a.block_queries, q1 = min_of(q0 + a.block_queries, layer.n);
  for (int64_t r = 0; r < (q1 - q0) * a.G; r++) {
    float* sum = partials + r * (D + 2);
    float top = -INFINITY, denominator = 0.0f;
    for (int64_t i = 0; i < splits; i++) top = sum[i * step + D] > top ? sum[i * step + D] : top;
    const float reference = top == -INFINITY ? 0.0f : top;
    for (int64_t i = 0; i < splits; i++) {
      const float* part = sum + i * step;
      const float weight = exp2f(part[D] - reference);
      denominator += part[D + 1] * weight;
      for (int64_t c = 0; c < D; c++) sum[c] = (i ? sum[c] : 0.0f) + part[c] * weight;
    }
    const float factor = denominator == 0.0f ? 0.0f : 1.0f / denominator;  // 0: a query that sees nothing
    for (int64_t c = 0; c < D; c++) sum[c] *= factor;
    const int64_t j = q0 + r / a.G, head = h * a.G + r % a.G, heads = layer.H * a.G;
    from_floats(layer.dtype, sum, a.out + ((b * layer.n + j) * heads + head) * D * size_of(layer.dtype), D);
    if (a.lse) a.lse[(b * heads + head) * layer.n + j] = top * kLn2 + logf(denominator);
  }
}

void attend(const Attention& a, int64_t begin, int64_t end, char* memory) {
  const Scratch s(a, memory);
  const int64_t step = a.block_rows() * (a.layer.D + 2);
  Decoder keys{a.layer.k, s.k_planes, s.k_codes}, values{a.layer.v, s.v_planes, s.v_codes};
  for (int64_t index = begin; index < end; index++) {
    float* partial = a.splits > 1 ? a.partials + index * step : s.partial;
    Item(a, s, keys, values, index, partial).run(index % a.splits);
    if (a.splits == 1) finish(a, index, partial, 1, step);
  }
}

void merge(const Attention& a, int64_t begin, int64_t end) {
  const int64_t step = a.block_rows() * (a.layer.D + 2);
  for (int64_t group = begin; group < end; group++)
    finish(a, group, a.partials + group * a.splits * step, a.splits, step);
}

}  // namespace MILLION_ISA
}  // namespace million
