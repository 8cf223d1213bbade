// Code tiles to dense fp32 tiles: kBlockTokens keys as columns [D][tokens], or values as rows [tokens][D].
#pragma once

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "simd.h"

namespace million {
namespace MILLION_ISA {

// Codebook [256, S, d] fp16 of a KV head to table [S][256][d] fp32: what one subspace needs lies together, in L1.
template <int d>
static void make_table(const uint16_t* codebook, int64_t S, float* table) {
  float row[kMaxHeadDim];
  for (int64_t c = 0; c < kCentroids; c++) {
    halves_to_floats(codebook + c * S * d, row, S * d);
    for (int64_t m = 0; m < S; m++) memcpy(table + (m * kCentroids + c) * d, row + m * d, d * sizeof(float));
  }
}

// codes [S][kBlockTokens] to keys [D][kBlockTokens].
template <int d>
static void decode_columns(const uint8_t* codes, const float* table, int64_t S, float* keys) {
  for (int64_t m = 0; m < S; m++, codes += kBlockTokens, table += kCentroids * d, keys += d * kBlockTokens)
    for (int64_t t = 0; t < kBlockTokens; t += 4) {
      const float* c[4];
      for (int i = 0; i < 4; i++) c[i] = table + codes[t + i] * d;
      if (d == 2) {
        const vf4 a = {c[0][0], c[0][1], c[1][0], c[1][1]}, b = {c[2][0], c[2][1], c[3][0], c[3][1]};
        store(keys + t, vf4(MILLION_SHUFFLE(a, b, 0, 2, 4, 6)));
        store(keys + kBlockTokens + t, vf4(MILLION_SHUFFLE(a, b, 1, 3, 5, 7)));
      }
      for (int i = 0; i + 4 <= d; i += 4) {
        vf4 w = load<vf4>(c[0] + i), x = load<vf4>(c[1] + i), y = load<vf4>(c[2] + i), z = load<vf4>(c[3] + i);
        transpose4(w, x, y, z);
        float* p = keys + i * kBlockTokens + t;
        store(p, w), store(p + kBlockTokens, x), store(p + 2 * kBlockTokens, y), store(p + 3 * kBlockTokens, z);
      }
    }
}

// codes [S][kBlockTokens] to values [kBlockTokens][D].
template <int d>
static void decode_rows(const uint8_t* codes, const float* table, int64_t S, float* values) {
  for (int64_t m = 0; m < S; m++, codes += kBlockTokens, table += kCentroids * d, values += d)
    for (int64_t t = 0; t < kBlockTokens; t++) memcpy(values + t * S * d, table + codes[t] * d, d * sizeof(float));
}

// The tile of slots [slot, slot + kBlockTokens) as [S][kBlockTokens]: in place where the layout is that, else a copy in
// `spare`, with zeros behind the last slot.
static const uint8_t* codes_by_subspace(const Coded& from, const uint8_t* codes, int64_t slot, uint8_t* spare) {
  if (from.layout == kRows64) return codes + code_offset(kRows64, slot, 0, from.S);
  for (int64_t m = 0; m < from.S; m++)
    for (int64_t t = 0; t < kBlockTokens; t++)
      spare[m * kBlockTokens + t] =
          slot + t < from.slots ? codes[code_offset(from.layout, slot + t, m, from.S)] : uint8_t(0);
  return spare;
}

static inline void make_table(const Coded& from, int64_t h, float* table) {
  const uint16_t* codebook = from.codebook + h * kCentroids * from.S * from.d;
  if (from.d == 2) make_table<2>(codebook, from.S, table);
  if (from.d == 4) make_table<4>(codebook, from.S, table);
  if (from.d == 8) make_table<8>(codebook, from.S, table);
}

static inline void decode_columns(const Coded& from, const uint8_t* codes, const float* table, float* keys) {
  if (from.d == 2) decode_columns<2>(codes, table, from.S, keys);
  if (from.d == 4) decode_columns<4>(codes, table, from.S, keys);
  if (from.d == 8) decode_columns<8>(codes, table, from.S, keys);
}

static inline void decode_rows(const Coded& from, const uint8_t* codes, const float* table, float* values) {
  if (from.d == 2) decode_rows<2>(codes, table, from.S, values);
  if (from.d == 4) decode_rows<4>(codes, table, from.S, values);
  if (from.d == 8) decode_rows<8>(codes, table, from.S, values);
}

}  // namespace MILLION_ISA
}  // namespace million
