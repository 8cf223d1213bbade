// A GPU for tests on a CPU: enough of CUDA to compile the tensor core kernel's sources as they are and to run them. A
// thread of the GPU is a coroutine; those of a cluster of blocks take turns, and one that waits lets the others go on.
// What lanes do together (shuffles, ballots, `mma`) waits for the whole warp, so it must not stand in a branch that
// only some lanes take.
//
// Found is what is read without having been written (shared memory begins as NaN), places outside shared memory,
// misaligned accesses, barriers that are used before they are initialised or get too many arrivals, and blocks that
// wait for ever; a barrier that is missing where another order of warps (`schedule`) gives another result. Not found
// is what depends on the order in which one thread's accesses reach another, of which a GPU promises less.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace gpu {

constexpr int kWarp = 32;
constexpr uint32_t kBase = 1024;  // where a block's shared memory begins; above 24 bits is its rank in its cluster

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

struct Block;
struct Thread {
  dim3 index;
  int lane, warp, cluster_phase = 0;
  Block* block;
  void* stack_pointer = nullptr;
  bool ended = false;
};
// Words that the lanes of a warp give each other. A lane may be one exchange ahead of others, so there are two sets.
struct Exchange {
  int arrived = 0, phase = 0;
  float words[2][kWarp][12];
};
struct NamedBarrier {
  int arrived = 0, phase = 0;
};
struct Barrier {
  int expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};
struct Cluster {
  std::vector<Block*> blocks;
  int arrived = 0, phase = 0;
};
struct Block {
  dim3 index, threads;
  uint32_t rank;
  Cluster* cluster;
  char* shared;
  size_t bytes;
  std::vector<Exchange> warps;
  NamedBarrier named[16];
  std::map<uint32_t, Barrier> barriers;
};

extern Thread* current;
extern int64_t progress;  // counts what others may have waited for
void yield();
extern unsigned schedule;  // 0: warps take turns; else the seed of random turns
void launch(dim3 grid, dim3 threads, size_t shared, int cluster, const std::function<void()>& kernel);
void named_barrier(int id, int threads, bool waits);

inline char* memory(uint32_t address, size_t bytes) {
  const uint32_t rank = address >> 24, at = (address & 0xffffff) - kBase;
  const auto& blocks = current->block->cluster->blocks;
  if (rank >= blocks.size() || at + bytes > blocks[rank]->bytes) fail("an address outside shared memory");
  if (at % bytes) fail("a misaligned address in shared memory");
  return blocks[rank]->shared + at;
}
inline uint32_t address(const void* p) {
  const Block& block = *current->block;
  const int64_t at = static_cast<const char*>(p) - block.shared;
  if (at < 0 || at >= int64_t(block.bytes)) fail("a pointer that is not to the block's shared memory");
  return (uint32_t(at) + kBase) | block.rank << 24;
}

// Gives `count` words and returns those of all lanes.
template <class Word>
inline const float (*exchange(const Word* words, int count))[12] {
  static_assert(sizeof(Word) == 4);
  Exchange& warp = current->block->warps[current->warp];
  const int phase = warp.phase;
  float (*all)[12] = warp.words[phase & 1];
  std::memcpy(all[current->lane], words, count * sizeof(Word));
  if (++warp.arrived == kWarp)
    warp.arrived = 0, warp.phase++, progress++;
  else
    while (warp.phase == phase) yield();
  return all;
}
template <class T>
inline T from_lane(T x, int lane) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &x, sizeof(T));
  std::memcpy(&x, exchange(words, sizeof(T) / 4)[lane & 31], sizeof(T));
  return x;
}

inline Barrier& barrier(uint32_t address) {
  auto& all = current->block->cluster->blocks.at(address >> 24)->barriers;
  const auto found = all.find(address & 0xffffff);
  if (found == all.end()) fail("a barrier that is not initialised");
  return found->second;
}
inline void arrive(uint32_t address, int threads, int64_t bytes) {
  Barrier& b = barrier(address);
  b.pending -= threads, b.bytes += bytes;
  if (b.pending < 0) fail("more arrivals at a barrier than it expects");
  if (b.pending == 0 && b.bytes == 0) b.phase++, b.pending = b.expected, progress++;
}

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace gpu

struct BuiltIn {
  struct Component {
    unsigned (*read)();
    operator unsigned() const { return read(); }
  } x, y, z;
};
#define BUILT_IN(name, where) \
  inline const BuiltIn name = {{[] { return where.x; }}, {[] { return where.y; }}, {[] { return where.z; }}}
BUILT_IN(threadIdx, gpu::current->index);
BUILT_IN(blockIdx, gpu::current->block->index);
BUILT_IN(blockDim, gpu::current->block->threads);

template <class T>
inline T __shfl_sync(unsigned, T x, int lane) {
  return gpu::from_lane(x, lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T x, int mask) {
  return gpu::from_lane(x, gpu::current->lane ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  const uint32_t mine = x;
  const auto all = gpu::exchange(&mine, 1);
  unsigned result = 0;
  for (int lane = 0; lane < gpu::kWarp; lane++) result |= gpu::bits<uint32_t>(all[lane][0]) << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline void __syncwarp() { gpu::from_lane(0, 0); }
inline void __syncthreads() { gpu::named_barrier(0, blockDim.x, true); }
inline void __trap() { gpu::fail("trap"); }

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __float2uint_ru(float x) { return x >= 4294967296.f ? ~0u : uint32_t(std::ceil(x)); }
inline uint32_t __float2uint_rz(float x) { return x >= 4294967296.f ? ~0u : uint32_t(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int_as_float(int x) { return gpu::bits<float>(x); }
inline int __float_as_int(float x) { return gpu::bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return gpu::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return gpu::bits<uint32_t>(x); }
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }

struct __half {
  _Float16 x;
};
struct __half2 {
  __half x, y;
};
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __half2float(__half x) { return float(x.x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

struct __nv_bfloat16 {
  uint16_t x;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t y = gpu::bits<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return gpu::bits<float>(uint32_t(x.x) << 16); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  std::memcpy(to, from, bytes - zeros);
  std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {}

// ---- the host's side ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth,
  cudaDevAttrClockRate
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// An H200's.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount    ? 132
           : which == cudaDevAttrMemoryClockRate      ? 3201000
           : which == cudaDevAttrGlobalMemoryBusWidth ? 6144
                                                      : 1980000;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  return *count = 124 / int(config->attrs[0].val.clusterDim.x), cudaSuccess;
}
template <class Kernel, class Argument>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Argument& argument) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = int(config->attrs[i].val.clusterDim.x);
  gpu::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, [&] { kernel(argument); });
  return cudaSuccess;
}
