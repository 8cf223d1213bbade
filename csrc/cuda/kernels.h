// What bind.cpp and the CUDA kernels share: plain structs of device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include "../common/layer.h"

namespace million {

struct Attention {
  Layer layer;
  Strided q;
  int G;                     // query heads a KV head
  float by_heads, by_group;  // 1 / layer.H, 1 / G: a division of integers takes some 30 instructions
  int query0, rows;          // this launch's first query; its queries * G
  const uint8_t* mask;       // [B, n, mask_slots] or null
  int64_t mask_slots;
  float scale;
  void* out;        // [B, n, H * G, D] of the layer's dtype
  float* lse;       // [B, H * G, n], or null
  int splits;       // blocks that share the tokens of a row
  int frames;       // prepared queries a row, at least 1
  void* prepared;   // queries, T^-T R(-t_f) q: fp32 [B, H, frames, rows, D] * scale * log2(e); tensor core kernel:
                    // fp16 [B, H, frames, units, D * U], units of U = `rows_of_operands` rows, of blocks with more
                    // frames than they can keep
  float* partials;  // [B, H, rows, splits, D + 2]: numerator, reference maximum (log2), denominator

  int at_once;  // blocks that run at the same time: multiprocessors
  int shared;   // bytes of shared memory that a block can have

  // Tensor core kernel only.
  int block_rows;   // query rows of a block, at most
  bool crowded;     // most of them have a block
  bool overlap;     // the GPU can start a kernel before the one it depends on has ended
  bool clusters;    // the splits of a row are a cluster and merge by themselves:
  int share;        // each so many pairs of channels,
  float per_share;  // 1 / share
  int sure;         // splits that may have something to do however short the text is: exact tokens, a cluster's part
  int few;          // up to so many tiles of codes are theirs alone:
  uint32_t gather;  // 2^16 splits / sure
  int one_table;    // up to so many tiles a block looks keys up in one table, not in two copies of it
  uint32_t by_splits, by_ring, by_frame;  // `reciprocal` of splits, recent tokens, tokens of a frame
};

struct Encode {
  Strided x;
  DType dtype;
  int B, H, T, D;
  Coded book;  // codes: [B, H, T, S], plain
};

struct Decode {
  const uint8_t* codes;  // [B, H, T, S], plain
  int B, H;
  int64_t T;
  Coded book;
  DType dtype;
  void* out;  // [B, H, T, S * d]
};

struct Dequantize {
  Coded book;         // codes packed as its layout
  int64_t row, head;  // bytes from a row's codes to the next, and from a KV head's
  bool aligned;       // four codes at a time can be loaded
  int B, H, D;
  int64_t T;  // slots
  DType dtype;
  void* out;              // [B, H, T, D]
  const void* inverse;    // T^-1: fp32 [H, D, D] row after row, or fp16 column after column; null for the identity
  const float* inv_freq;  // [half]; null without frames or rotation
  const int32_t* origin;  // [B]
  int half, frame_tokens, first_slot;
  bool interleaved;
};

constexpr int kMaxCluster = 16;         // blocks
constexpr int kMergedAtOnce = 16;       // splits of a row, by the kernel that merges those that are no cluster
constexpr int kMostShared = 227 << 10;  // that a block can have on any GPU
constexpr int kWideShared = 161 << 10;  // shared memory that a block with head_dim above 128 needs

// Query rows of which a block of so many at most prepares operands together: those that are not there are zeros.
constexpr int rows_of_operands(int rows) { return rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

// Shared memory of a block of the tensor core kernel beside its tables, at most.
constexpr int scratch_bytes(int64_t D, int rows = 8) { return (rows > 8 ? 60 : D > 128 ? 56 : 34) << 10; }

// Each launches on `stream` and returns cudaGetLastError(). head_dim: a multiple of 8, at most 256.
cudaError_t encode_launch(const Encode&, cudaStream_t);
cudaError_t decode_launch(const Decode&, cudaStream_t);
// `split`: the inverse is fp32. `shared`: bytes of shared memory that a block can have.
cudaError_t dequantize_launch(const Dequantize&, bool split, int multiprocessors, int shared, cudaStream_t);
// `early`: one token, and its attention is the last thing that was launched: need not wait for it.
cudaError_t append_launch(const Layer&, bool early, cudaStream_t);
cudaError_t attention_rows_launch(const Attention&, cudaStream_t);  // layout rows64

// Layouts mma_k and mma_v. Bytes of shared memory that the kernel for these channels a subspace, the fastest that a
// block of `shared` bytes can run or else the smallest, takes for its tables; 0 if there is none.
int attention_mma_tables(int64_t D, int64_t k_dim, int64_t v_dim, int shared);
// For how many query rows a block can be made, of 4, 8 and 16: no more than the launch has use for.
struct RowLimits {
  int least, most;
};
RowLimits attention_mma_rows(const Attention&);
cudaError_t attention_mma_launch(const Attention&, cudaStream_t);

}  // namespace million
