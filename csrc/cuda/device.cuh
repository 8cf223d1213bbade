// Small device functions that more than one kernel uses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace million {

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ float load(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

// Channels 2 i and 2 i + 1, aligned to their pair.
__device__ __forceinline__ float2 load_pair(const void* data, int i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float2*>(data)[i];
  if (dtype == DType::bf16) return __bfloat1622float2(static_cast<const __nv_bfloat162*>(data)[i]);
  return __half22float2(static_cast<const __half2*>(data)[i]);
}

__device__ __forceinline__ void store(void* data, int64_t i, float x, DType dtype) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[i] = x;
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(data)[i] = __float2half_rn(x);
}

__device__ __forceinline__ void store_pair(void* data, int64_t i, float2 x, DType dtype) {
  if (dtype == DType::f32)
    static_cast<float2*>(data)[i] = x;
  else if (dtype == DType::bf16)
    static_cast<__nv_bfloat162*>(data)[i] = __floats2bfloat162_rn(x.x, x.y);
  else
    static_cast<__half2*>(data)[i] = __floats2half2_rn(x.x, x.y);
}

// Slot of the forward's first new token, by the clock.
__device__ __forceinline__ int64_t first_slot(const Layer& a, int64_t now) {
  return min(max(now, -kFarSlot), kFarSlot) + a.offset;
}
__device__ __forceinline__ int64_t first_slot(const Layer& a) { return first_slot(a, a.clock[0]); }

constexpr int kMaxSlot = 1 << 30;  // buffers are shorter (checked by the host)

__device__ __forceinline__ int slot_index(int64_t slot) {
  return int(min(max(slot, int64_t(-kMaxSlot)), int64_t(kMaxSlot)));
}

// Channel c of R(-t_f) x for the frame that holds `slot`, or of x where keys have no frames. x holds D channels.
// The angle is what models compute: the fp32 product of position and frequency.
__device__ __forceinline__ float frame_channel(const Layer& a, const float* x, int c, int64_t frame_position) {
  if (a.inv_freq == nullptr || c >= 2 * a.half) return x[c];
  const int half = a.half, pair = a.interleaved ? c >> 1 : c < half ? c : c - half;
  const bool second = a.interleaved ? c & 1 : c >= half;
  const int other = a.interleaved ? c ^ 1 : (second ? c - half : c + half);
  float sine, cosine;
  sincosf(-static_cast<float>(frame_position) * a.inv_freq[pair], &sine, &cosine);
  return second ? x[c] * cosine + x[other] * sine : x[c] * cosine - x[other] * sine;
}

// t_f of frame f in row b.
__device__ __forceinline__ int64_t frame_position(const Layer& a, int b, int64_t f) {
  return f * a.frame_tokens + a.origin[b];
}

}  // namespace million
