// Instructions that CUDA C++ has no name for, one small function each (sm_90 where it says so, else sm_80), and the
// arithmetic in pairs of fp16 numbers around them.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

// Shared memory whose size the launch gives, as `char name[]`.
#define DYNAMIC_SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

namespace million {

// A load that is asked for here, not where it is used.
__device__ __forceinline__ void load_here(int64_t& to, const int64_t* from) {
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(to) : "l"(from));
}
__device__ __forceinline__ void load_here(int32_t& to, const int32_t* from) {
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(to) : "l"(from));
}

__device__ __forceinline__ void prefetch_l1(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Of kernels that are launched before the one they depend on has ended: waits for it; lets the next one start.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

namespace mma {

__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Reads of tables are no `volatile`: the compiler may interleave them. What keeps them behind the barrier that fills
// the tables is that lane places pass through `opaque` after it.
template <int Imm, int Words>
__device__ __forceinline__ void lookup(uint32_t address, uint32_t (&out)[Words]) {
  if constexpr (Words == 1)
    asm("ld.shared.b32 %0, [%1+%2];" : "=r"(out[0]) : "r"(address), "n"(Imm));
  else if constexpr (Words == 2)
    asm("ld.shared.v2.b32 {%0,%1}, [%2+%3];" : "=r"(out[0]), "=r"(out[1]) : "r"(address), "n"(Imm));
  else
    asm("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4+%5];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
        : "r"(address), "n"(Imm));
}

// Accesses at an address in shared memory. Loads stay behind barriers, which are `volatile` too.
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint2 x) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t at, uint32_t& x) {
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at));
}
__device__ __forceinline__ void load_shared(uint32_t at, uint2& x) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at));
}
__device__ __forceinline__ void load_shared(uint32_t at, uint4& x) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
}

__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x)::"memory");
  return x;
}

__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
template <class T>
__device__ __forceinline__ const T* opaque(const T* x) {
  asm("" : "+l"(x));
  return x;
}

__device__ __forceinline__ uint4 load_codes(const uint8_t* at) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(at));
  return r;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The A operand of 16 rows x 16 depths of fp16 in shared memory; `row` is that of lane % 16, at depth 8 (lane / 16).
__device__ __forceinline__ void load_operand(const __half* row, uint32_t (&a)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row)));
}

__device__ __forceinline__ uint32_t half2_bits(float x, float y) {
  const __half2 r = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(r);
}

// Two numbers as fp16, and what the rounding lost.
__device__ __forceinline__ void split(float x, float y, uint32_t& rounded, uint32_t& rest) {
  const __half2 r = __floats2half2_rn(x, y);
  const float2 back = __half22float2(r);
  const __half2 l = __floats2half2_rn(x - back.x, y - back.y);
  rounded = reinterpret_cast<const uint32_t&>(r), rest = reinterpret_cast<const uint32_t&>(l);
}

// Cosine and sine, to 1e-6 up to angles of 2^24: full turns are taken off in three steps, each exact, of 2 pi as a sum
// of three numbers.
__device__ __forceinline__ float2 turn_of(float angle) {
  const float turns = rintf(angle * 0.15915494f);
  float rest = fmaf(-turns, 6.28125f, angle);
  rest = fmaf(-turns, 0.0019353072f, rest);
  rest = fmaf(-turns, 1.0253132e-11f, rest);
  return {__cosf(rest), __sinf(rest)};
}

__device__ __forceinline__ void mma_dense(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of 8 depths.
__device__ __forceinline__ void mma_dense_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Barrier `id` of the block, of so many threads: waits for all of them, or only arrives.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Arrives when the thread's asynchronous copies so far are there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and waits for so many bytes of bulk copies as well.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  barrier_expect(shared_address(barrier), bytes);
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// A cluster's barrier that orders nothing else: releasing one flushes all writes of the GPU's memory, some 2000 cycles.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}
// Lets the other blocks of a cluster use barriers that this thread has initialised.
__device__ __forceinline__ void barriers_to_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// The address in the shared memory of another block of the cluster of what lies at `at` in this one's.
__device__ __forceinline__ uint32_t in_block(uint32_t at, int block) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
#endif
  return there;
}
__device__ __forceinline__ uint32_t in_block(const void* at, int block) { return in_block(shared_address(at), block); }
// Writes x to such an address, and tells a barrier of that block.
__device__ __forceinline__ void send(uint32_t there, float4 x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(there),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
               : "memory");
#endif
}
__device__ __forceinline__ void send(uint32_t there, uint4 x, uint32_t barrier) {
  send(there, float4{__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)}, barrier);
}
__device__ __forceinline__ void send(uint32_t there, uint2 x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(there),
               "r"(x.x), "r"(x.y), "r"(barrier)
               : "memory");
#endif
}
__device__ __forceinline__ void send(uint32_t there, uint32_t x, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(x),
               "r"(barrier)
               : "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive_there(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// Between ordinary accesses to shared memory and bulk copies to it.
__device__ __forceinline__ void bulk_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) { barrier_arrive(shared_address(barrier)); }
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(phase)
                 : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(phase)
                 : "memory");
#endif
  } while (!done);
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int phase) {
  barrier_wait(shared_address(barrier), phase);
}

}  // namespace mma
}  // namespace million
