// The instances of the tensor core kernel: a source file for each head_dim, and one for narrow tables, so that they
// compile in parallel.
#pragma once

#include "kernels.h"

namespace million {
namespace mma {

struct Instance {
  int64_t D, k_dim, v_dim;
  int table_bytes;
  bool sixteen_rows;  // in a block, if it has room for them
  cudaError_t (*launch)(const Attention&, cudaStream_t);
};

// Lists that end with an empty instance.
const Instance* instances_64();
const Instance* instances_96();
const Instance* instances_128();
const Instance* instances_256();
const Instance* instances_narrow();

// Merges what the splits of a launch have left in `partials`.
cudaError_t merge(const Attention&, cudaStream_t);

// The fastest for blocks of `shared` bytes with room for `tokens` tokens each and `rows` query rows, else the one that
// needs least; null if there is none.
const Instance* instance(int64_t D, int64_t k_dim, int64_t v_dim, int shared, int64_t tokens, int rows);

// Up to so many tiles in a block, which has room for more, one table of keys is better than two copies.
int one_table();

}  // namespace mma
}  // namespace million
