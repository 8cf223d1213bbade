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
// (cuda/NOTES.md): what a block does before its first token and after its last (start) and its part of the merging
// (kMerge; in clusters of more than 8 blocks kLargeCluster more). If the blocks take all multiprocessors, down to the
// last two, one waits for what is still there of other kernels (kNoneLeft); with more query rows, whose merging is more
// work, it helps a cluster to leave some (few_left).
struct Cost {
  int rows;
  double start, token, few_left;
};
constexpr Cost kCosts[] = {{4, 1000, 1, 0}, {8, 1250, 1.3, 120}, {16, 1600, 1.75, 120}};
constexpr double kMerge = 16, kLargeCluster = 150, kNoneLeft = 1400;
// Splits that are no cluster leave the merging to another kernel, which takes so many of a row at once (kMergeTurn, of
// which the first is its launch). Its blocks wait on the multiprocessors that no split has, kThreads threads on each,
// and what they read then comes through these, kBytes through each in a token's time.
constexpr double kMergeTurn = 220, kBytes = 200;
constexpr int64_t kThreads = 2048;

inline double cost_of_merge(const Attention& a, int64_t splits, int64_t left) {
  const int64_t threads = a.layer.D / 2, rows = std::min(a.layer.B * a.layer.H * a.rows, left * (kThreads / threads));
  return kMergeTurn * ((splits + kMergedAtOnce - 1) / kMergedAtOnce) +
         double(rows * splits * a.layer.D * 4) / (kBytes * std::max<int64_t>(left, 1));
}

inline Plan plan_for(const Attention& a, bool tensor_cores) {
  const bool apart = tensor_cores && a.layer.D > 128;  // two blocks a split, which are the cluster
  // As many blocks run at once as there are multiprocessors.
  const int64_t at_once = std::max(1, a.at_once / (apart ? 2 : 1)), tokens = std::min(a.layer.k.slots, a.layer.v.slots);
  Plan best = {};
  double best_cost = 0;
  const auto consider = [&](const Cost& cost, bool most) {
    const int64_t blocks = a.layer.B * a.layer.H * ((a.rows + cost.rows - 1) / cost.rows);
    // Of clusters with more than 8 blocks there is room for one in some 18 multiprocessors.
    const int64_t cluster = apart ? 1 : 18 * blocks <= a.at_once ? kMaxCluster : 8;
    for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(at_once, tokens / 64)); splits++) {
      const int64_t waves = (blocks * splits + at_once - 1) / at_once,
                    left = (waves * at_once - blocks * splits) * (apart ? 2 : 1);
      // Blocks with fewer rows than they can have read the same codes again and bring more tables: only where there are
      // multiprocessors to spare, and a cluster does.
      if (!most && (3 * blocks * splits > 2 * at_once || (!apart && splits > cluster))) break;
      double total = waves * (cost.start + cost.token * ((tokens + splits - 1) / splits)) + kMerge * splits;
      if (tensor_cores && a.overlap) {
        total += splits > cluster ? cost_of_merge(a, splits, left) : splits > 8 ? kLargeCluster : 0;
        total += left < 3 ? kNoneLeft : left < 8 && splits <= cluster ? cost.few_left : 0;
      }
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
