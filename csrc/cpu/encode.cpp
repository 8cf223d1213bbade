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
#if defined(__clang__)
#define MILLION_SWAP(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define MILLION_SWAP(x, ...) __builtin_shuffle(x, vi8{__VA_ARGS__})
#endif
  x += MILLION_SWAP(x, 1, 0, 3, 2, 5, 4, 7, 6);
  if (d >= 4) x += MILLION_SWAP(x, 2, 3, 0, 1, 6, 7, 4, 5);
  if (d >= 8) x += MILLION_SWAP(x, 4, 5, 6, 7, 0, 1, 2, 3);
  return x;
}

// code[t][m] = argmin_c sum_i (x[t][m d + i] - table[c][m d + i])^2, the lowest c on ties.
//
//   x      [tokens, D]  fp32
//   table  [256, D]     fp32, the codebook of one KV head
//   codes  [tokens, S]  uint8
//
// One token against all centroids; lanes are channels.
template <int d>
static void encode_token(const float* x, const float* table, int64_t D, uint8_t* codes) {
  for (int64_t i = 0; i < D; i += 8) {
    const vf8 point = load<vf8>(x + i);
    vf8 best = vf8{} + INFINITY;
    vi8 index = {};
    for (int c = 0; c < kCentroids; c++) {
      const vf8 difference = point - load<vf8>(table + c * D + i);
      const vf8 distance = sum_groups<d>(difference * difference);
      const vi8 closer = distance < best;
      index = closer ? vi8{} + c : index;
      best = closer ? distance : best;
    }
    for (int m = 0; m < 8 / d; m++) codes[i / d + m] = uint8_t(index[m * d]);
  }
}

static void encode_block(const float* x, int64_t tokens, const float* table, int64_t D, int64_t d, uint8_t* codes) {
  for (int64_t t = 0; t < tokens; t++) {
    uint8_t* row = codes + t * (D / d);
    if (d == 2) encode_token<2>(x + t * D, table, D, row);
    if (d == 4) encode_token<4>(x + t * D, table, D, row);
    if (d == 8) encode_token<8>(x + t * D, table, D, row);
  }
}

// Scratch of a thread: codebooks of K and V, a block of vectors before and after the transform, its codes, a rotation.
struct Scratch {
  float *k_table, *v_table, *x, *y, *cosines, *sines;
  uint8_t* codes;

  Scratch(char* memory, int64_t D) {
    k_table = reinterpret_cast<float*>(memory);
    v_table = k_table + kCentroids * D;
    x = v_table + kCentroids * D;
    y = x + kBlockTokens * D;
    cosines = y + kBlockTokens * D;
    sines = cosines + D;
    codes = reinterpret_cast<uint8_t*>(sines + D);
  }
};

static size_t encode_scratch(int64_t D) {
  return (2 * kCentroids + 2 * kBlockTokens + 2) * D * sizeof(float) + kBlockTokens * D;
}

// Work item: KV head x row x block of tokens.
static void encode(const Encode& a, int64_t begin, int64_t end, char* memory) {
  const Scratch s(memory, a.D);
  const int64_t blocks = token_blocks(a.T);
  int64_t table_head = -1;
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const int64_t tokens = min_of(kBlockTokens, a.T - t0);
    if (h != table_head) halves_to_floats(a.book.codebook + h * kCentroids * a.D, s.k_table, kCentroids * a.D);
    table_head = h;
    for (int64_t t = 0; t < tokens; t++) to_floats(a.dtype, a.x.at(b, h, t0 + t), s.x + t * a.D, a.D);
    encode_block(s.x, tokens, s.k_table, a.D, a.book.d, a.book.codes + ((b * a.H + h) * a.T + t0) * a.book.S);
  }
}

// out[t][m d + i] = codebook[code[t][m]][m d + i]. Work item: KV head x row x block of tokens.
//
//   codes     [B, H, T, S]     uint8
//   codebook  [H, 256, S, d]   fp16, converted once a head
//   out       [B, H, T, S d]   dtype
template <class Element>
static void decode_block(const uint8_t* codes, const Element* table, int64_t tokens, int64_t S, int64_t d,
                         Element* out) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t m = 0; m < S; m++) {
      const Element* centroid = table + (codes[t * S + m] * S + m) * d;
      for (int64_t i = 0; i < d; i++) *out++ = centroid[i];
    }
}

static void decode(const Decode& a, int64_t begin, int64_t end, char* memory) {
  const int64_t S = a.book.S, d = a.book.d, D = S * d, blocks = token_blocks(a.T);
  const Scratch s(memory, D);
  int64_t table_head = -1;
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const int64_t tokens = min_of(kBlockTokens, a.T - t0), first = (b * a.H + h) * a.T + t0;
    if (h != table_head) {
      halves_to_floats(a.book.codebook + h * kCentroids * D, s.v_table, kCentroids * D);
      from_floats(a.dtype, s.v_table, reinterpret_cast<char*>(s.k_table), kCentroids * D);
      table_head = h;
    }
    if (a.dtype == DType::f32)
      decode_block(a.codes + first * S, s.k_table, tokens, S, d, reinterpret_cast<float*>(a.out) + first * D);
    else
      decode_block(a.codes + first * S, reinterpret_cast<uint16_t*>(s.k_table), tokens, S, d,
                   reinterpret_cast<uint16_t*>(a.out) + first * D);
  }
}

// y = T x for one vector; lanes are input channels.
static void transform_vector(const float* T, const float* x, int64_t D, float* y) {
  for (int64_t o = 0; o < D; o++) {
    vf8 sum = {};
    for (int64_t i = 0; i < D; i += 8) sum += load<vf8>(T + o * D + i) * load<vf8>(x + i);
    y[o] = sum_groups<8>(sum)[0];
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
  int64_t table_head = -1;
  for (int64_t item = begin; item < end; item++) {
    const int64_t t0 = item % blocks * kBlockTokens, b = item / blocks % a.B, h = item / blocks / a.B;
    const int64_t tokens = min_of(kBlockTokens, a.n - t0), slot0 = a.first + t0, bh = b * a.H + h;
    if (h != table_head) {
      halves_to_floats(a.k.codebook + h * kCentroids * D, s.k_table, kCentroids * D);
      halves_to_floats(a.v.codebook + h * kCentroids * D, s.v_table, kCentroids * D);
      table_head = h;
    }

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
    encode_block(a.transform ? s.y : s.x, tokens, s.k_table, D, a.k.d, s.codes);
    pack_block(s.codes, tokens, slot0, a.k, a.k.codes + bh * a.k.slots * a.k.S);

    for (int64_t t = 0; t < tokens; t++) to_floats(a.dtype, a.v_new.at(b, h, t0 + t), s.x + t * D, D);
    encode_block(s.x, tokens, s.v_table, D, a.v.d, s.codes);
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
