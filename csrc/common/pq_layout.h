// How codes are packed in memory: the one C++ statement of it (`src/million_ops/layout.py` is the Python one).
//
// A cache holds the codes of one layer as [B, H, tiles, tile_tokens * S] uint8. A layout says which byte of its tile
// holds subspace m of the tile's token t.
#pragma once

#include <cstdint>

namespace million {

enum Layout : int64_t {
  kPlain = 0,   // token after token
  kRows64 = 1,  // subspace after subspace, 64 tokens (one cache line) each
  kLayouts = 2,
};

constexpr int64_t tile_tokens(int64_t layout) { return layout == kRows64 ? 64 : 1; }

// Byte of (slot, subspace m) counted from the first tile of a (row, head).
constexpr int64_t code_offset(int64_t layout, int64_t slot, int64_t m, int64_t S) {
  return layout == kRows64 ? slot / 64 * 64 * S + m * 64 + slot % 64 : slot * S + m;
}

}  // namespace million
