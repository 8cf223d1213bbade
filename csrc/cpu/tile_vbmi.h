// Code tiles by AVX-512 VBMI: VPERMI2B looks 64 codes up in a table of 128 bytes that sits in two registers.
//
// A channel of a codebook is 256 halves; as two planes of 256 low and 256 high bytes they take four table lookups, two
// blends by the code's top bit, and give the exact fp16 value of 64 tokens.
#pragma once

#include <immintrin.h>

#include "../common/shapes.h"
#include "simd.h"

namespace million {
namespace MILLION_ISA {

// 16 rows of 16 dwords to 16 columns.
static inline void transpose16(__m512i r[16]) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + 2 + j]);
    }
  // Lane L of r[i + j] now holds column 4 L + j of rows i .. i + 3.
  for (int j = 0; j < 4; j++) {
    s[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    s[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
    s[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    s[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(s[j], s[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(s[j], s[8 + j], 0xDD);
    r[4 + j] = _mm512_shuffle_i32x4(s[4 + j], s[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(s[4 + j], s[12 + j], 0xDD);
  }
}

// Codebook [256, D] fp16 to planes [D][2][256] uint8: low bytes, high bytes.
static void split_planes(const uint16_t* codebook, int64_t D, uint8_t* planes) {
  alignas(64) uint8_t index[2][64];  // bytes of 32 dwords: channel 0 low, channel 0 high; channel 1 low, channel 1 high
  for (int i = 0; i < 64; i++) index[0][i] = uint8_t(4 * (i % 32) + i / 32), index[1][i] = uint8_t(index[0][i] + 2);
  for (int64_t c0 = 0; c0 < kCentroids; c0 += 64)
    for (int64_t i0 = 0; i0 < D; i0 += 32) {
      const int64_t channels = min_of(32, D - i0);
      const __mmask32 there = uint32_t((uint64_t(1) << channels) - 1);
      __m512i pairs[4][16];  // [16 centroids each][pair of channels]
      for (int g = 0; g < 4; g++) {
        for (int c = 0; c < 16; c++)
          pairs[g][c] = _mm512_maskz_loadu_epi16(there, codebook + (c0 + 16 * g + c) * D + i0);
        transpose16(pairs[g]);
      }
      for (int64_t i = 0; i < channels; i++) {
        const __m512i take = _mm512_load_si512(index[i % 2]);
        const __m512i a = _mm512_permutex2var_epi8(pairs[0][i / 2], take, pairs[1][i / 2]);
        const __m512i b = _mm512_permutex2var_epi8(pairs[2][i / 2], take, pairs[3][i / 2]);
        uint8_t* plane = planes + (i0 + i) * 2 * kCentroids + c0;
        _mm512_storeu_si512(plane, _mm512_shuffle_i64x2(a, b, 0x44));
        _mm512_storeu_si512(plane + kCentroids, _mm512_shuffle_i64x2(a, b, 0xEE));
      }
    }
}

// 64 codes, put in the order in which unpacking low and high bytes returns the tokens' own, and their top bits.
struct CodeVector {
  __m512i codes;
  __mmask64 upper;

  explicit CodeVector(const uint8_t* from) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(from));
    upper = _mm512_movepi8_mask(codes);
  }

  __m512i bytes(const uint8_t* plane) const {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), codes, _mm512_loadu_si512(plane + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), codes, _mm512_loadu_si512(plane + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
  }

  // The halves of tokens 0 .. 31 and 32 .. 63 in one channel.
  void halves(const uint8_t* channel, __m512i& first, __m512i& second) const {
    const __m512i low = bytes(channel), high = bytes(channel + kCentroids);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }
};

static inline void store_halves(__m512i halves, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm512_castsi512_si256(halves)));
  _mm512_storeu_ps(to + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)));
}

// codes [S][64] to columns [S d][64].
static void decode_columns(const uint8_t* codes, const uint8_t* planes, int64_t S, int64_t d, float* columns) {
  for (int64_t m = 0; m < S; m++) {
    const CodeVector vector(codes + m * 64);
    for (int64_t i = 0; i < d; i++, planes += 2 * kCentroids, columns += 64) {
      __m512i first, second;
      vector.halves(planes, first, second);
      store_halves(first, columns);
      store_halves(second, columns + 32);
    }
  }
}

// codes [S][64] with d = 2, S a multiple of 16, to rows [64][stride].
static void decode_row_pairs(const uint8_t* codes, const uint8_t* planes, int64_t S, float* rows, int64_t stride) {
  for (int64_t m0 = 0; m0 < S; m0 += 16) {
    __m512i pairs[4][16];  // dword: both channels of a subspace; [16 tokens each][subspace]
    for (int64_t m = 0; m < 16; m++) {
      const CodeVector vector(codes + (m0 + m) * 64);
      const uint8_t* channel = planes + (m0 + m) * 4 * kCentroids;
      __m512i x0, x1, y0, y1;
      vector.halves(channel, x0, x1);
      vector.halves(channel + 2 * kCentroids, y0, y1);
      pairs[0][m] = _mm512_unpacklo_epi16(x0, y0);
      pairs[1][m] = _mm512_unpackhi_epi16(x0, y0);
      pairs[2][m] = _mm512_unpacklo_epi16(x1, y1);
      pairs[3][m] = _mm512_unpackhi_epi16(x1, y1);
    }
    for (int g = 0; g < 4; g++) {
      transpose16(pairs[g]);
      for (int j = 0; j < 16; j++) {
        const int token = g / 2 * 32 + j / 4 * 8 + g % 2 * 4 + j % 4;  // unpacking took four tokens of each eight
        store_halves(pairs[g][j], rows + token * stride + 2 * m0);
      }
    }
  }
}

}  // namespace MILLION_ISA
}  // namespace million
