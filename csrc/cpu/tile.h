// Tiles of kBlockTokens slots, from codes to dense fp32: keys as columns [D][kTile], values as rows [kTile][stride].
//
// The plain way looks centroids up in the fp16 codebook itself, one code at a time. With AVX-512 VBMI an instruction
// looks up 64 codes (tile_vbmi.h).
#pragma once

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "simd.h"

#if defined(__AVX512VBMI__)
#include "tile_vbmi.h"
#endif

namespace million {
namespace MILLION_ISA {

constexpr int64_t kTile = kBlockTokens;

// Rows of a value tile lie this far apart: a power of two would send all rows of a channel to the same few cache sets.
static inline int64_t row_stride(int64_t D) { return D + 16; }

// codes [S][kTile] and codebook [256, S, d] fp16 to rows [kTile][stride].
template <int d>
static void decode_rows(const uint8_t* codes, const uint16_t* codebook, int64_t S, float* rows, int64_t stride) {
  for (int64_t m = 0; m < S; m++, codes += kTile, codebook += d, rows += d)
    for (int64_t t = 0; t < kTile; t++) halves_to_floats<d>(codebook + codes[t] * S * d, rows + t * stride);
}

// The tile of slots [slot, slot + kTile) as [S][kTile]: in place where the layout is that, else a copy in `spare`, with
// zeros behind the last slot.
static const uint8_t* codes_by_subspace(const Coded& from, const uint8_t* codes, int64_t slot, uint8_t* spare) {
  if (from.layout == kRows64) return codes + code_offset(kRows64, slot, 0, from.S);
  for (int64_t m = 0; m < from.S; m++)
    for (int64_t t = 0; t < kTile; t++)
      spare[m * kTile + t] = slot + t < from.slots ? codes[code_offset(from.layout, slot + t, m, from.S)] : uint8_t(0);
  return spare;
}

// Keys or values of one KV head: what a thread prepares before its first tile of a head, and the tiles.
struct Decoder {
  const Coded& from;
  uint8_t* const planes;  // VBMI: the codebook as byte planes
  uint8_t* const spare;   // [S][kTile]
  const uint16_t* codebook = nullptr;
  int64_t head = -1;

  static constexpr int64_t planes_bytes(int64_t D) { return 2 * kCentroids * D; }

  void set_head(int64_t h) {
    if (h == head) return;
    head = h;
    codebook = from.codebook + h * kCentroids * from.S * from.d;
#if defined(__AVX512VBMI__)
    split_planes(codebook, from.S * from.d, planes);
#endif
  }

  const uint8_t* codes_of(int64_t b_h, int64_t slot) const {
    return codes_by_subspace(from, from.codes + b_h * from.slots * from.S, slot, spare);
  }

  void rows(int64_t b_h, int64_t slot, float* to) const {
    const uint8_t* codes = codes_of(b_h, slot);
    const int64_t stride = row_stride(from.S * from.d);
#if defined(__AVX512VBMI__)
    if (from.d == 2 && from.S % 16 == 0) return decode_row_pairs(codes, planes, from.S, to, stride);
#endif
    if (from.d == 2) decode_rows<2>(codes, codebook, from.S, to, stride);
    if (from.d == 4) decode_rows<4>(codes, codebook, from.S, to, stride);
    if (from.d == 8) decode_rows<8>(codes, codebook, from.S, to, stride);
  }

  // `spare_rows` has the size of a value tile.
  void columns(int64_t b_h, int64_t slot, float* to, float* spare_rows) const {
#if defined(__AVX512VBMI__)
    (void)spare_rows;
    decode_columns(codes_of(b_h, slot), planes, from.S, from.d, to);
#else
    rows(b_h, slot, spare_rows);
    transpose_tile(spare_rows, kTile, from.S * from.d, row_stride(from.S * from.d), to);
#endif
  }
};

}  // namespace MILLION_ISA
}  // namespace million
