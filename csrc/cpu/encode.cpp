// Encode, decode and append. Compiled without contraction to FMA, so that a token gets the same code whether it comes
// alone or in a block, and on every x86 machine the same distance.
#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "simd.h"

namespace million {
namespace MILLION_ISA {

// Sum over each group of d adjacent lanes, in all of its lanes, as a tree of pairs: ((0 + 1) + (2 + 3)) + ...
template <int d>
static inline vf8 sum_groups(vf8 x) {
  x += MILLION_PERMUTE(x, vi8, 1, 0, 3, 2, 5, 4, 7, 6);
  if (d >= 4) x += MILLION_PERMUTE(x, vi8, 2, 3, 0, 1, 6, 7, 4, 5);
  if (d >= 8) x += MILLION_PERMUTE(x, vi8, 4, 5, 6, 7, 0, 1, 2, 3);
  return x;
}
template <int d>
static inline vf16 sum_groups(vf16 x) {
  x += MILLION_PERMUTE(x, vi16, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  if (d >= 4) x += MILLION_PERMUTE(x, vi16, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  if (d >= 8) x += MILLION_PERMUTE(x, vi16, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  return x;
}

// code[t][m] = argmin_c sum_i (x[t][m d + i] - codebook[c][m][i])^2, the lowest c on ties.
//
//   x         [tokens, D]   fp32
//   codebook  [256, S, d]   fp16, of one KV head
//   codes     [tokens, S]   uint8
//
// One token: lanes are channels, C vectors of them at a time so that their chains of minima overlap.
template <int d, class V, class I, int C>
static void encode_channels(const float* x, const uint16_t* codebook, int64_t D, uint8_t* codes) {
  constexpr int L = sizeof(V) / sizeof(float);
  V point[C], best[C];
  I index[C];
  for (int v = 0; v < C; v++) point[v] = load<V>(x + v * L), best[v] = V{} + INFINITY, index[v] = I{};
  for (int c = 0; c < kCentroids; c++)
    for (int v = 0; v < C; v++) {
      V centroid;
      load_halves(codebook + c * D + v * L, centroid);
      const V difference = point[v] - centroid;
      const V distance = sum_groups<d>(difference * difference);
      const I closer = distance < best[v];
      index[v] = closer ? I{} + c : index[v];
      best[v] = closer ? distance : best[v];
    }
  for (int v = 0; v < C; v++)
    for (int m = 0; m < L / d; m++) codes[v * L / d + m] = uint8_t(index[v][m * d]);
}

template <int d>
static void encode_token(const float* x, const uint16_t* codebook, int64_t D, uint8_t* codes) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 64 <= D; i += 64) encode_channels<d, vf16, vi16, 4>(x + i, codebook + i, D, codes + i / d);
#endif
  for (; i + 32 <= D; i += 32) encode_channels<d, vf8, vi8, 4>(x + i, codebook + i, D, codes + i / d);
  for (; i < D; i += 8) encode_channels<d, vf8, vi8, 1>(x + i, codebook + i, D, codes + i / d);
}

// The sum of d vectors in the order of `sum_groups`.
template <int d>
struct SumOf {
  static vf tree(const vf* x) { return SumOf<d / 2>::tree(x) + SumOf<d / 2>::tree(x + d / 2); }
};
template <>
struct SumOf<1> {
  static vf tree(const vf* x) { return *x; }
};

// A block of tokens, given as columns [D][kBlockTokens]: lanes are tokens, two vectors of them at a time.
template <int d>
static void encode_columns(const float* columns, int64_t tokens, const uint16_t* codebook, int64_t S, uint8_t* codes) {
  constexpr int C = 2;
  for (int64_t m = 0; m < S; m++, columns += d * kBlockTokens) {
    float centroids[kCentroids][d];
    for (int c = 0; c < kCentroids; c++) halves_to_floats<d>(codebook + (c * S + m) * d, centroids[c]);
    for (int64_t t0 = 0; t0 < tokens; t0 += C * W) {
      vf point[d][C], best[C];
      vi index[C];
      for (int v = 0; v < C; v++) best[v] = vf{} + INFINITY, index[v] = vi{};
      for (int i = 0; i < d; i++)
        for (int v = 0; v < C; v++) point[i][v] = load<vf>(columns + i * kBlockTokens + t0 + v * W);
      for (int c = 0; c < kCentroids; c++)
        for (int v = 0; v < C; v++) {
          vf square[d];
          for (int i = 0; i < d; i++) {
            const vf difference = point[i][v] - centroids[c][i];
            square[i] = difference * difference;
          }
          const vf distance = SumOf<d>::tree(square);
          const vi closer = distance < best[v];
          index[v] = closer ? vi{} + c : index[v];
          best[v] = closer ? distance : best[v];
        }
      for (int v = 0; v < C; v++)
        for (int64_t t = t0 + v * W; t < min_of(tokens, t0 + (v + 1) * W); t++)
          codes[t * S + m] = uint8_t(index[v][(t - t0) % W]);
    }
  }
}

template <int d>
static void encode_block(const float* x, int64_t tokens, const uint16_t* codebook, int64_t D, float* columns,
                         uint8_t* codes) {
  if (tokens >= W) {
    transpose_tile(x, tokens, D, D, columns);
    return encode_columns<d>(columns, tokens, codebook, D / d, codes);
  }
  for (int64_t t = 0; t < tokens; t++) encode_token<d>(x + t * D, codebook, D, codes + t * (D / d));
}

// Scratch of a thread: a block of vectors, before and after the transform and as columns, its codes, a rotation.
struct Scratch {
  float *x, *y, *columns, *cosines, *sines;
  uint8_t* codes;

  Scratch(char* memory, int64_t D) {
    x = reinterpret_cast<float*>(memory);
    y = x + kBlockTokens * D;
    columns = y + kBlockTokens * D;
    cosines = columns + kBlockTokens * D;
    sines = cosines + D;
    codes = reinterpret_cast<uint8_t*>(sines + D);
  }
};

static size_t encode_scratch(int64_t D) { return (3 * kBlockTokens + 2) * D * sizeof(float) + kBlockTokens * D; }

static void encode_block(const float* x, int64_t tokens, const Coded& book, int64_t h, const Scratch& s,
                         uint8_t* codes) {
  const int64_t D = book.S * book.d;
  const uint16_t* codebook = book.codebook + h * kCentroids * D;
  if (book.d == 2) encode_block<2>(x, tokens, codebook, D, s.columns, codes);
  if (book.d == 4) encode_block<4>(x, tokens, codebook, D, s.columns, codes);
  if (book.d == 8) encode_block<8>(x, tokens, codebook, D, s.columns, codes);
}

// Work item: KV head x row x block of tokens.
static void encode(const Encode& a, int64_t begin, int64_t end, char* memory) {
  const Scratch s(memory, a.D);
  const int64_t blocks = token_blocks(a.T);
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const int64_t tokens = min_of(kBlockTokens, a.T - t0);
    for (int64_t t = 0; t < tokens; t++) to_floats(a.dtype, a.x.at(b, h, t0 + t), s.x + t * a.D, a.D);
    encode_block(s.x, tokens, a.book, h, s, a.book.codes + ((b * a.H + h) * a.T + t0) * a.book.S);
  }
}

template <int d>
static void decode_token(const uint8_t* codes, const uint16_t* codebook, int64_t S, float* x) {
  for (int64_t m = 0; m < S; m++) halves_to_floats<d>(codebook + (codes[m] * S + m) * d, x + m * d);
}

// x[t][m d + i] = codebook[code[t][m]][m][i]. Work item: KV head x row x block of tokens.
//
//   codes     [B, H, T, S]     uint8
//   codebook  [H, 256, S, d]   fp16
//   out       [B, H, T, S d]   dtype
static void decode(const Decode& a, int64_t begin, int64_t end, char* memory) {
  const int64_t S = a.book.S, D = S * a.book.d, blocks = token_blocks(a.T);
  const Scratch s(memory, D);
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const uint16_t* codebook = a.book.codebook + h * kCentroids * D;
    for (int64_t t = t0; t < min_of(t0 + kBlockTokens, a.T); t++) {
      const int64_t token = (b * a.H + h) * a.T + t;
      if (a.book.d == 2) decode_token<2>(a.codes + token * S, codebook, S, s.x);
      if (a.book.d == 4) decode_token<4>(a.codes + token * S, codebook, S, s.x);
      if (a.book.d == 8) decode_token<8>(a.codes + token * S, codebook, S, s.x);
      from_floats(a.dtype, s.x, a.out + token * D * size_of(a.dtype), D);
    }
  }
}

// y = T x for one vector; lanes are input channels, four outputs at a time.
static void transform_vector(const float* T, const float* x, int64_t D, float* y) {
  for (int64_t o = 0; o < D; o += 4) {
    vf8 sum[4] = {};
    for (int64_t i = 0; i < D; i += 8)
      for (int j = 0; j < 4; j++) sum[j] += load<vf8>(T + (o + j) * D + i) * load<vf8>(x + i);
    for (int j = 0; j < 4; j++) y[o + j] = sum_groups<8>(sum[j])[0];
  }
}

static void pack_block(const uint8_t* codes, int64_t tokens, int64_t slot, const Coded& to, uint8_t* packed) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t m = 0; m < to.S; m++)
      if (slot + t >= 0 && slot + t < to.slots) packed[code_offset(to.layout, slot + t, m, to.S)] = codes[t * to.S + m];
}

// codes[slot] = argmin(T R(-t_f) k), codes[slot] = argmin(v), and k, v as they are to ring and sinks.
//
//   k, v      [B, H, n, D]                 fp32, bf16 or fp16
//   codes     packed (pq_layout.h)         uint8
//   ring      [B, H, R, D], slot modulo R  dtype of k; of a chunk longer than R the last R tokens
//   sinks     [B, H, N, D]                 dtype of k; slots start[b] .. start[b] + N - 1
//
// t_f = slot / F * F + origin[b]. Work item: KV head x row x block of tokens.
static void append(const Layer& a, int64_t begin, int64_t end, char* memory) {
  const Scratch s(memory, a.D);
  const int64_t D = a.D, blocks = token_blocks(a.n), bytes = D * size_of(a.dtype);
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const int64_t tokens = min_of(kBlockTokens, a.n - t0), slot0 = a.first + t0, bh = b * a.H + h;

    int64_t frame = -1;
    for (int64_t t = 0; t < tokens; t++) {
      float* x = s.x + t * D;
      to_floats(a.dtype, a.k_new.at(b, h, t0 + t), x, D);
      if (a.inv_freq) {
        if ((slot0 + t) / a.frame_tokens != frame) {
          frame = (slot0 + t) / a.frame_tokens;
          rotation(frame * a.frame_tokens + a.origin[b], a.inv_freq, a.half, s.cosines, s.sines);
        }
        rotate_back(x, s.cosines, s.sines, a.half, a.interleaved);
      }
      if (a.transform) transform_vector(a.transform + h * D * D, x, D, s.y + t * D);
    }
    encode_block(a.transform ? s.y : s.x, tokens, a.k, h, s, s.codes);
    pack_block(s.codes, tokens, slot0, a.k, a.k.codes + bh * a.k.slots * a.k.S);

    for (int64_t t = 0; t < tokens; t++) to_floats(a.dtype, a.v_new.at(b, h, t0 + t), s.x + t * D, D);
    encode_block(s.x, tokens, a.v, h, s, s.codes);
    pack_block(s.codes, tokens, slot0, a.v, a.v.codes + bh * a.v.slots * a.v.S);

    for (int64_t t = t0; t < t0 + tokens; t++) {
      const int64_t slot = a.first + t, rank = slot - a.start[b];
      if (slot >= 0 && a.R > 0 && t >= a.n - a.R) {
        const int64_t to = (bh * a.R + slot % a.R) * bytes;
        memcpy(a.k_ring + to, a.k_new.at(b, h, t), bytes);
        memcpy(a.v_ring + to, a.v_new.at(b, h, t), bytes);
      }
      if (rank >= 0 && rank < a.N) {
        const int64_t to = (bh * a.N + rank) * bytes;
        memcpy(a.k_sinks + to, a.k_new.at(b, h, t), bytes);
        memcpy(a.v_sinks + to, a.v_new.at(b, h, t), bytes);
      }
    }
  }
}

void attend(const Attention&, int64_t, int64_t, char*);
void merge(const Attention&, int64_t, int64_t);
size_t attend_scratch(const Attention&);

#define MILLION_STRING_OF(x) #x
#define MILLION_STRING(x) MILLION_STRING_OF(x)

extern const Kernels kernels = {
    MILLION_STRING(MILLION_ISA), encode, decode, append, attend, merge, encode_scratch, attend_scratch,
};

}  // namespace MILLION_ISA
}  // namespace million
