// Vectors, conversions and elementary functions for the instruction set this file is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace million {
namespace MILLION_ISA {

typedef float vf4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf16 __attribute__((vector_size(64)));
typedef int32_t vi4 __attribute__((vector_size(16)));
typedef int32_t vi8 __attribute__((vector_size(32)));
typedef int32_t vi16 __attribute__((vector_size(64)));

#if defined(__AVX512F__)
typedef vf16 vf;
typedef vi16 vi;
#elif defined(__AVX2__)
typedef vf8 vf;
typedef vi8 vi;
#else
typedef vf4 vf;
typedef vi4 vi;
#endif
constexpr int W = sizeof(vf) / sizeof(float);

template <class V>
static inline V load(const float* p) {
  V x;
  memcpy(&x, p, sizeof(V));
  return x;
}
template <class V>
static inline void store(float* p, V x) {
  memcpy(p, &x, sizeof(V));
}

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static inline float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// ---- fp16 and bf16 ----

static inline float half_to_float(uint16_t h) {
#if defined(__aarch64__)
  __fp16 x;
  memcpy(&x, &h, 2);
  return x;
#else
  const uint32_t w = uint32_t(h) << 16, twice = w + w;
  const float normal = as_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = as_float((twice >> 17) | (126u << 23)) - 0.5f;
  return as_float((w & 0x80000000u) | as_bits(twice < (1u << 27) ? subnormal : normal));
#endif
}

// Round to nearest even. Adding a power of two of the right size lets the FPU round at fp16's last bit.
static inline uint16_t float_to_half(float f) {
  float base = (fabsf(f) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t w = as_bits(f), twice = w + w, sign = w & 0x80000000u;
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  base = as_float((bias >> 1) + 0x07800000u) + base;
  const uint32_t bits = as_bits(base);
  const uint32_t rounded = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return uint16_t((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : rounded));
}

static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = as_bits(f);
  return f != f ? uint16_t(0x7FC0) : uint16_t((u + 0x7FFFu + ((u >> 16) & 1)) >> 16);
}

// `count` halves that share a centroid: 2, 4 or 8.
template <int count>
static inline void halves_to_floats(const uint16_t* from, float* to) {
#if defined(__F16C__)
  __m128i packed = _mm_setzero_si128();
  memcpy(&packed, from, 2 * count);
  const __m256 x = _mm256_cvtph_ps(packed);
  memcpy(to, &x, 4 * count);
#else
  for (int i = 0; i < count; i++) to[i] = half_to_float(from[i]);
#endif
}

static inline void load_halves(const uint16_t* from, vf8& x) {
  halves_to_floats<8>(from, reinterpret_cast<float*>(&x));
}

#if defined(__AVX512F__)
static inline void load_halves(const uint16_t* from, vf16& x) {
  x = (vf16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
#endif

// `count` is a multiple of 8, as every head_dim is.
static inline void to_floats(DType dtype, const char* from, float* to, int64_t count) {
  if (dtype == DType::f32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == DType::f16) {
    for (int64_t i = 0; i < count; i += 8) halves_to_floats<8>(reinterpret_cast<const uint16_t*>(from) + i, to + i);
  } else {
    const uint16_t* u = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = as_float(uint32_t(u[i]) << 16);
  }
}

static inline void from_floats(DType dtype, const float* from, char* to, int64_t count) {
  uint16_t* u = reinterpret_cast<uint16_t*>(to);
  if (dtype == DType::f32) {
    memcpy(to, from, count * sizeof(float));
  } else if (dtype == DType::f16) {
#if defined(__F16C__)
    for (int64_t i = 0; i < count; i += 8)
      _mm_storeu_si128((__m128i*)(u + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t i = 0; i < count; i++) u[i] = float_to_half(from[i]);
#endif
  } else {
    for (int64_t i = 0; i < count; i++) u[i] = float_to_bf16(from[i]);
  }
}

// ---- shuffles ----

#if defined(__clang__)
#define MILLION_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define MILLION_PERMUTE(a, lanes, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define MILLION_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi4{__VA_ARGS__})
#define MILLION_PERMUTE(a, lanes, ...) __builtin_shuffle(a, lanes{__VA_ARGS__})
#endif

// Four rows of four to four columns.
static inline void transpose4(vf4& a, vf4& b, vf4& c, vf4& d) {
  const vf4 ab_lo = MILLION_SHUFFLE(a, b, 0, 4, 1, 5), ab_hi = MILLION_SHUFFLE(a, b, 2, 6, 3, 7);
  const vf4 cd_lo = MILLION_SHUFFLE(c, d, 0, 4, 1, 5), cd_hi = MILLION_SHUFFLE(c, d, 2, 6, 3, 7);
  a = MILLION_SHUFFLE(ab_lo, cd_lo, 0, 1, 4, 5);
  b = MILLION_SHUFFLE(ab_lo, cd_lo, 2, 3, 6, 7);
  c = MILLION_SHUFFLE(ab_hi, cd_hi, 0, 1, 4, 5);
  d = MILLION_SHUFFLE(ab_hi, cd_hi, 2, 3, 6, 7);
}

// from [tokens][stride] to [D][kBlockTokens]; tokens are taken in fours, so rows up to the next multiple of 4 are read.
static inline void transpose_tile(const float* from, int64_t tokens, int64_t D, int64_t stride, float* to) {
  for (int64_t t = 0; t < tokens; t += 4)
    for (int64_t i = 0; i < D; i += 4) {
      vf4 a = load<vf4>(from + t * stride + i), b = load<vf4>(from + (t + 1) * stride + i);
      vf4 c = load<vf4>(from + (t + 2) * stride + i), d = load<vf4>(from + (t + 3) * stride + i);
      transpose4(a, b, c, d);
      float* p = to + i * kBlockTokens + t;
      store(p, a), store(p + kBlockTokens, b), store(p + 2 * kBlockTokens, c), store(p + 3 * kBlockTokens, d);
    }
}

// ---- reductions and elementary functions ----

template <class Combine>
static inline float reduce_lanes(vf x, const Combine& combine) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

// 2^x to 2 ulp for x <= 0; exactly 0 below -126 (so for -inf); NaN stays NaN.
static inline vf exp2_nonpositive(vf x) {
  const vf clamped = x < -126.0f ? vf{} - 126.0f : x;
  const vf shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const vf r = clamped - (shifted - 12582912.0f);
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const vf y = (vf)((vi)p + ((vi)shifted << 23));
  return x < -126.0f ? vf{} : y;
}

// cos and sin of position * inv_freq[i] (that product in fp32, as models compute it).
static inline void rotation(int64_t position, const float* inv_freq, int64_t half, float* cosines, float* sines) {
  const float p = float(position);
  for (int64_t i = 0; i < half; i++) {
    const double x = double(p * inv_freq[i]);
    const double shifted = x * 0.63661977236758134308 + 6755399441055744.0;  // x / (pi/2), rounded by 1.5 * 2^52
    const double r = x - (shifted - 6755399441055744.0) * 1.57079632679489661923;
    uint64_t quadrant;
    memcpy(&quadrant, &shifted, 8);
    const double z = r * r;
    const double s =
        r + r * z * (-1.66666666666666e-1 + z * (8.3333333322e-3 + z * (-1.98412698e-4 + z * 2.7557313e-6)));
    const double c =
        1.0 - 0.5 * z + z * z * (4.16666666666666e-2 + z * (-1.388888888e-3 + z * (2.4801587e-5 + z * -2.7557314e-7)));
    const double sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    sines[i] = float(quadrant & 2 ? -sine : sine);
    cosines[i] = float((quadrant + 1) & 2 ? -cosine : cosine);
  }
}

// RoPE by the negative angle, in place: the pairs (i, i + half), or (2 i, 2 i + 1) when interleaved.
static inline void rotate_back(float* x, const float* cosines, const float* sines, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i * step], b = x[i * step + other];
    x[i * step] = a * cosines[i] + b * sines[i];
    x[i * step + other] = b * cosines[i] - a * sines[i];
  }
}

}  // namespace MILLION_ISA
}  // namespace million
