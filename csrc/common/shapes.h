// Which shapes the compiled kernels take. `src/million_ops/layout.py` has the same for Python.
#pragma once

#include <cstdint>

namespace million {

constexpr int64_t kCentroids = 256;   // 8-bit codes
constexpr int64_t kMaxHeadDim = 512;  // bounds the scratch memory of a thread
constexpr int64_t kChannelStep = 8;   // head_dim is a multiple of this, so of every subspace's channels

constexpr bool is_subspace_dim(int64_t d) { return d == 2 || d == 4 || d == 8; }

}  // namespace million
