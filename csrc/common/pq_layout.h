// How codes are packed in memory: the one C++ statement of it (`src/million_ops/layout.py` is the Python one, and
// explains the layouts).
//
// A cache holds the codes of one layer as [B, H, tiles, tile_tokens * S] uint8. A layout says which byte of its tile
// holds subspace m of the tile's token t.
#pragma once

#include <cstdint>

namespace million {

enum Layout : int64_t {
  kPlain = 0,   // token after token
  kRows64 = 1,  // subspace after subspace, 64 tokens (one cache line) each
  kMmaK = 2,    // keys as the lanes of a warp look them up for mma.m16n8k16, S a multiple of 8
  kMmaV = 3,    // values, the same
  kLayouts = 4,
};

constexpr int64_t tile_tokens(int64_t layout) { return layout == kPlain ? 1 : 64; }

// Subspaces of a buffer come in multiples of this.
constexpr int64_t subspace_step(int64_t layout) { return layout == kMmaK || layout == kMmaV ? 8 : 1; }

// Lookup steps go in groups of 4, then 2, then 1; within a group lanes take them in rotated order.
constexpr int rotation_width(int steps, int step) { return step < steps / 4 * 4 ? 4 : step < steps / 2 * 2 ? 2 : 1; }

// Byte `at` of lane `lane`'s codes: a warp reads 16 bytes a lane at a time.
constexpr int lane_byte(int lane, int at) { return at / 16 * 512 + lane * 16 + at % 16; }

constexpr int mma_k_byte(int t, int m, int S) {
  const int steps = S / 4, c = m % 4, step = m / 4, w = rotation_width(steps, step);
  const int batch = t % 4, n = (t >> 2) % 4 * 2 + (t >> 4) % 2, half = (t >> 5) ^ ((t >> 2) & 1);
  const int own = step ^ (((n & 3) ^ (2 * half)) & (w - 1));
  return lane_byte(4 * n + c, (2 * batch + half) * steps + own);
}

constexpr int mma_v_byte(int t, int m, int S) {
  const int steps = S / 8, w = rotation_width(steps, m / 8), base = m / 8 / w * w;
  const int n = (m - 8 * base) / w, c = (t >> 2) % 4, own = base + (((m - 8 * base) % w) ^ (c & (w - 1)));
  return lane_byte(4 * n + c, ((t >> 4) * steps + own) * 4 + t % 4);
}

// Where the tile of a slot begins, counted from the first tile of a (row, head), and the byte of its subspace m in
// there.
constexpr int64_t tile_offset(int64_t layout, int64_t slot, int64_t S) {
  return (layout == kPlain ? slot : slot / 64 * 64) * S;
}
constexpr int tile_byte(int64_t layout, int64_t slot, int m, int S) {
  const int t = int(slot % 64);
  return layout == kMmaK     ? mma_k_byte(t, m, S)
         : layout == kMmaV   ? mma_v_byte(t, m, S)
         : layout == kRows64 ? m * 64 + t
                             : m;
}
constexpr int64_t code_offset(int64_t layout, int64_t slot, int64_t m, int64_t S) {
  return tile_offset(layout, slot, S) + tile_byte(layout, slot, int(m), int(S));
}

}  // namespace million
