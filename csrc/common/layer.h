// One cache layer as plain structs of raw pointers, the same for the kernels of every device. No torch.
#pragma once

#include <cstdint>

namespace million {

enum class DType : int { f32, bf16, f16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// [B, heads, n, D] with contiguous channels; strides in bytes.
struct Strided {
  const char* data;
  int64_t row, head, token;

  constexpr const char* at(int64_t b, int64_t h, int64_t t) const { return data + b * row + h * head + t * token; }
};

// Packed codes of keys or values and their codebook [H, 256, S, d] fp16.
struct Coded {
  uint8_t* codes;
  const uint16_t* codebook;
  int64_t S, d, layout, slots;  // slots: capacity, whole tiles
};

// The names are those of `million_ops/ops.py`.
struct Layer {
  int64_t B, H, D, n;
  DType dtype;
  Strided k_new, v_new;
  Coded k, v;
  const float* transform;   // [H, D, D]: T in append, its inverse in attention; null for the identity
  const uint16_t* inverse;  // instead of it in attention over layout mma_k: fp16, [H, D, D] column after column
  const float* inv_freq;    // [half]; null when keys stay as the model gave them (no frames or no rotation)
  int64_t half, frame_tokens;
  bool interleaved;
  char *k_ring, *v_ring, *k_sinks, *v_sinks;
  int64_t R, N;          // recent tokens, sink tokens
  const int64_t* clock;  // [3], on the layer's device
  int64_t offset;
  int64_t first,
      ring_lo;  // CPU only: slot of the first new token and oldest slot that the ring may serve, of the clock
  const int32_t *start, *origin;
};

// A clock that makes no sense must not overflow; slots beyond the buffers are checked where they are used.
constexpr int64_t kFarSlot = int64_t(1) << 40;

}  // namespace million
