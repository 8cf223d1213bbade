// How attention is divided into blocks. Host code.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace million {

// Query rows of a block, and how many blocks share the tokens of a row: what makes the whole launch shortest when the
// cache is full, because the length is known on the device alone.
struct Plan {
  int rows, splits;
};

// Costs are in tokens of a block of the tensor core kernel with at most 4 query rows, as measured on an H200
// (cuda/NOTES.md): what a block does before its first token and after its last (start), its part of the merging
// (kMerge), and the launch that merges what clusters cannot (kLaunch). As many blocks run at once as there are
// multiprocessors. If they take all, down to the last two, one waits for what is still there of other kernels
// (kNoneLeft); with more query rows, whose merging is more work, it helps to leave some (few_left).
struct Cost {
  int rows;
  double start, token, few_left;
};
constexpr Cost kCosts[] = {{4, 1000, 1, 0}, {8, 1300, 1.3, 120}, {16, 1600, 1.75, 360}};
constexpr double kMerge = 16, kLaunch = 450, kNoneLeft = 1400;

inline Plan plan_for(const Attention& a, bool tensor_cores) {
  const bool apart = tensor_cores && a.layer.D > 128;  // two blocks a split, which are the cluster
  const int64_t at_once = std::max(1, a.at_once / (apart ? 2 : 1)), cluster = apart ? 1 : 8,
                tokens = std::min(a.layer.k.slots, a.layer.v.slots);
  Plan best = {};
  double best_cost = 0;
  const auto consider = [&](const Cost& cost, bool most) {
    const int64_t blocks = a.layer.B * a.layer.H * ((a.rows + cost.rows - 1) / cost.rows);
    for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(at_once, tokens / 64)); splits++) {
      const int64_t waves = (blocks * splits + at_once - 1) / at_once,
                    left = (waves * at_once - blocks * splits) * (apart ? 2 : 1);
      // Blocks with fewer rows than they can have read the same codes again and bring more tables: only where there are
      // multiprocessors to spare.
      if (!most && 3 * blocks * splits > 2 * at_once) break;
      double total = waves * (cost.start + cost.token * ((tokens + splits - 1) / splits)) + kMerge * splits;
      if (tensor_cores && a.overlap)
        total += (splits > cluster ? kLaunch : 0) + (left < 3 ? kNoneLeft : left < 8 ? cost.few_left : 0);
      if (best.splits == 0 || total < best_cost) best = {cost.rows, int(splits)}, best_cost = total;
    }
  };
  if (!tensor_cores) {
    consider({8, 1000, a.rows > 4 ? 2. : 1., 0}, true);
    return best;
  }
  const RowLimits rows = attention_mma_rows(a);
  for (const Cost& cost : kCosts)
    if (cost.rows >= rows.least && cost.rows <= rows.most) consider(cost, cost.rows == rows.most);
  return best;
}

}  // namespace million
