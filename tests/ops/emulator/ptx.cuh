// csrc/cuda/ptx.cuh for the emulated GPU: the same functions, in C++.
#pragma once

#include "gpu.h"

#define DYNAMIC_SHARED_MEMORY(name) char* const name = gpu::current->block->shared

namespace million {

template <class T>
inline void load_here(T& to, const T* from) {
  to = *from;
}
inline void prefetch_l1(const void*) {}
inline void prefetch_l2(const void*) {}
inline void wait_for_kernels_before() {}
inline void let_next_kernel_start() {}

namespace mma {

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline float exp2_fast(float x) { return std::exp2(x); }

template <class T>
inline void load_shared(uint32_t at, T& x) {
  std::memcpy(&x, gpu::memory(at, sizeof x), sizeof x);
}
template <class T>
inline void store_shared(uint32_t at, T x) {
  std::memcpy(gpu::memory(at, sizeof x), &x, sizeof x);
}
template <int Imm, int Words>
inline void lookup(uint32_t address, uint32_t (&out)[Words]) {
  load_shared(address + Imm, out);
}

template <class T>
inline T opaque(T x) {
  return x;
}
inline uint4 load_codes(const uint8_t* at) { return *reinterpret_cast<const uint4*>(at); }
inline uint32_t shared_address(const void* p) { return gpu::address(p); }

inline void load_operand(const __half* row, uint32_t (&a)[4]) {
  const uint32_t mine = shared_address(row);
  const auto rows = gpu::exchange(&mine, 1);
  for (int i = 0; i < 4; i++)
    load_shared(gpu::bits<uint32_t>(rows[8 * i + gpu::current->lane / 4][0]) + gpu::current->lane % 4 * 4, a[i]);
}

inline uint32_t half2_bits(float x, float y) { return gpu::bits<uint32_t>(__floats2half2_rn(x, y)); }

inline float2 turn_of(float angle) { return {std::cos(angle), std::sin(angle)}; }

// Lane 4 g + c gives of A row g's depths 2 c, 2 c + 1, then row g + 8's, then both rows' depths 8 further; of B column
// g's depths 2 c, 2 c + 1, and 8 further; and gets of row g, then of row g + 8, columns 2 c and 2 c + 1.
inline void mma_dense(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float given[12];
  for (int i = 0; i < 6; i++) {
    const float2 x = __half22float2(gpu::bits<__half2>(words[i]));
    given[2 * i] = x.x, given[2 * i + 1] = x.y;
  }
  const auto all = gpu::exchange(given, 12);
  const int g = gpu::current->lane / 4, c = gpu::current->lane % 4;
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, column = 2 * c + i % 2;
    float sum = 0;
    for (int lane = 0; lane < 4; lane++)
      for (int further = 0; further < 2; further++)
        for (int k = 0; k < 2; k++)
          sum += all[4 * g + lane][2 * (2 * further + row) + k] * all[4 * column + lane][8 + 2 * further + k];
    d[i] += sum;
  }
}

inline void named_sync(int id, int threads) { gpu::named_barrier(id, threads, true); }
inline void named_arrive(int id, int threads) { gpu::named_barrier(id, threads, false); }

inline void barrier_init(uint64_t* barrier, int arrivals) {
  gpu::current->block->barriers[shared_address(barrier) & 0xffffff] = {arrivals, arrivals};
}
inline void barrier_arrive(uint32_t barrier) { gpu::arrive(barrier, 1, 0); }
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive(shared_address(barrier)); }
inline void barrier_arrive_there(uint32_t barrier) { barrier_arrive(barrier); }
inline void barrier_arrive_after_copies(uint64_t* barrier) { barrier_arrive(barrier); }
inline void barrier_expect(uint32_t barrier, int bytes) { gpu::arrive(barrier, 1, bytes); }
inline void barrier_expect(uint64_t* barrier, int bytes) { barrier_expect(shared_address(barrier), bytes); }
inline void barrier_wait(uint32_t barrier, int phase) {
  while ((gpu::barrier(barrier).phase & 1) == phase) gpu::yield();
}
inline void barrier_wait(uint64_t* barrier, int phase) { barrier_wait(shared_address(barrier), phase); }

inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  std::memcpy(to, from, bytes);
  gpu::arrive(shared_address(barrier), 0, -bytes);
}
inline void bulk_fence() {}

inline void cluster_arrive() {
  gpu::Cluster& cluster = *gpu::current->block->cluster;
  gpu::current->cluster_phase = cluster.phase;
  if (++cluster.arrived == int(cluster.blocks.size() * blockDim.x))
    cluster.arrived = 0, cluster.phase++, gpu::progress++;
}
inline void cluster_wait() {
  while (gpu::current->block->cluster->phase == gpu::current->cluster_phase) gpu::yield();
}
inline void barriers_to_cluster() {}
inline uint32_t in_block(uint32_t at, int block) { return (at & 0xffffff) | uint32_t(block) << 24; }
inline uint32_t in_block(const void* at, int block) { return in_block(shared_address(at), block); }
template <class T>
inline void send(uint32_t there, T x, uint32_t barrier) {
  if (there >> 24 != barrier >> 24) gpu::fail("what is sent and its barrier are in different blocks");
  store_shared(there, x);
  gpu::arrive(barrier, 0, -int64_t(sizeof x));
}

}  // namespace mma
}  // namespace million
