// What bind.cpp and the kernels share: plain structs, raw pointers, no torch.
//
// attention.cpp and encode.cpp are compiled once per instruction set (MILLION_ISA names it) into a namespace of their
// own; `pick_kernels` chooses at run time. They use no templates of the standard library: such a function, compiled for
// AVX-512, could be the copy that the linker keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/layer.h"

namespace million {

struct Attention {
  Layer layer;
  Strided q;
  int64_t G;            // query heads a KV head
  const uint8_t* mask;  // [B, n, mask_slots] or null
  int64_t mask_slots;
  float scale;
  char* out;   // [B, n, H * G, D] of the layer's dtype
  float* lse;  // [B, H * G, n]
  // Work items: KV head x row x block of queries x split of the cache, in that order, whatever the number of threads.
  int64_t block_queries, blocks, splits;
  float* partials;  // splits > 1: [items][block_queries * G][D + 2]: numerator, reference maximum, denominator

  int64_t groups() const { return layer.H * layer.B * blocks; }
  int64_t items() const { return groups() * splits; }
  int64_t block_rows() const { return block_queries * G; }
};

struct Encode {
  Strided x;
  DType dtype;
  int64_t B, H, T, D;
  Coded book;  // codes: [B, H, T, S]
};

struct Decode {
  const uint8_t* codes;  // [B, H, T, S]
  int64_t B, H, T;
  Coded book;
  DType dtype;
  char* out;  // [B, H, T, S * d]
};

constexpr int64_t kBlockTokens = 64;  // tokens of a work item of encode, decode and append; also the attention tile

constexpr int64_t token_blocks(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// Each function runs the work items [begin, end) with `scratch` of the size that the function below it returns.
struct Kernels {
  const char* name;
  void (*encode)(const Encode&, int64_t begin, int64_t end, char* scratch);
  void (*decode)(const Decode&, int64_t begin, int64_t end, char* scratch);
  void (*append)(const Layer&, int64_t begin, int64_t end, char* scratch);
  void (*attend)(const Attention&, int64_t begin, int64_t end, char* scratch);
  void (*merge)(const Attention&, int64_t begin, int64_t end);  // items: groups()
  size_t (*encode_scratch)(int64_t D);                          // for encode, decode and append
  size_t (*attend_scratch)(const Attention&);
};

}  // namespace million
