// What bind.cpp and the CUDA kernels share: plain structs of device pointers, no torch.
#pragma once

#include <cuda_runtime.h>

#include "../common/layer.h"

namespace million {

struct Attention {
  Layer layer;
  Strided q;
  int G;                // query heads a KV head
  int query0, rows;     // this launch's first query; its queries * G
  const uint8_t* mask;  // [B, n, mask_slots] or null
  int64_t mask_slots;
  float scale;
  void* out;        // [B, n, H * G, D] of the layer's dtype
  float* lse;       // [B, H * G, n], or null
  int splits;       // blocks that share the tokens of a row
  int frames;       // prepared queries a row, at least 1
  float* prepared;  // [B, H, frames, rows, D]: T^-T R(-t_f) q * scale * log2(e)
  float* partials;  // [B, H, rows, splits, D + 2]: numerator, reference maximum (log2), denominator
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

// Each launches on `stream` and returns cudaGetLastError(). head_dim: a multiple of 8, at most 256; layout: rows64.
cudaError_t encode_launch(const Encode&, cudaStream_t);
cudaError_t decode_launch(const Decode&, cudaStream_t);
cudaError_t append_launch(const Layer&, cudaStream_t);
cudaError_t attention_launch(const Attention&, cudaStream_t);

}  // namespace million
