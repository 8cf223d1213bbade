// The launches of the tensor core kernel: the choice of its instance, and the merging of its splits.
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <initializer_list>

#include "attention_mma.cuh"
#include "attention_mma.h"

namespace million {
namespace {

// blockIdx: query row of the launch; a thread a pair of channels.
__global__ void merge_kernel(const __grid_constant__ Attention a) {
  let_next_kernel_start();  // it starts when the splits do, which have waited
  const int64_t row = blockIdx.x;
  const RowBlock block(a, int(row / a.rows), int(row % a.rows), 1);
  const int line = threadIdx.x, lines = int(a.layer.D) / 2;
  const float2* ends = mma::ends_of(a) + row * a.splits;
  const float2* from = reinterpret_cast<const float2*>(a.partials) + row * a.splits * lines + line;
  mma::Merged merged;
  constexpr int kAtOnce = kMergedAtOnce;
  // Twice: before the splits are there for the instructions and addresses alone, which would be fetched while all wait.
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    if (pass == 1) wait_for_kernels_before();
    merged = {};
    for (int split = 0; split < a.splits; split += kAtOnce) {
      float2 end[kAtOnce], x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int at = min(split + i, a.splits - 1);
        end[i] = __ldcg(ends + at), x[i] = __ldcg(from + at * lines);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (split + i >= a.splits || end[i].y == 0.f) end[i] = {mma::kLowest, 0.f}, x[i] = {0.f, 0.f};
      merged.add<kAtOnce>(end, x);
    }
  }
  const int query = block.query(0), head = block.query_head(0), heads = int(a.layer.H) * a.G;
  merged.store(a, ((int64_t(block.b) * a.layer.n + query) * heads + head) * a.layer.D,
               (int64_t(block.b) * heads + head) * a.layer.n + query, line);
}

}  // namespace

int attention_mma_tables(int64_t D, int64_t k_dim, int64_t v_dim, int shared) {
  const auto of = mma::instance(D, k_dim, v_dim, shared, INT64_MAX, 1);
  return of ? of->table_bytes : 0;
}

RowLimits attention_mma_rows(const Attention& a) {
  static const char* const given = std::getenv("MILLION_GPU_ROWS");  // for tests
  const Layer& x = a.layer;
  const auto of = mma::instance(x.D, x.k.d, x.v.d, a.shared, INT64_MAX, a.rows);
  const bool sixteen = of->sixteen_rows && of->table_bytes + scratch_bytes(x.D, 16) <= a.shared;
  const int most = std::min(a.rows <= 4 ? 4 : a.rows <= 8 ? 8 : 16, sixteen ? 16 : 8);
  if (!given) return {4, most};
  const int wanted = std::atoi(given), rows = std::min(most, wanted >= 16 ? 16 : wanted >= 8 ? 8 : 4);
  return {rows, rows};
}

cudaError_t attention_mma_launch(const Attention& a, cudaStream_t stream) {
  const Layer& x = a.layer;
  const int64_t tokens = std::min(x.k.slots, x.v.slots) / a.splits;
  return mma::instance(x.D, x.k.d, x.v.d, a.shared, tokens, a.block_rows)->launch(a, stream);
}

namespace mma {

cudaError_t merge(const Attention& a, cudaStream_t stream) {
  // A multiprocessor whose blocks have little shared memory takes none that need more until they have ended: these wait
  // for the splits, and the append beside them would wait for these.
  cudaFuncSetAttribute(merge_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.layer.B * a.layer.H * a.rows);
  config.blockDim = dim3(a.layer.D / 2);
  config.stream = stream;
  cudaLaunchAttribute early;  // be there when the last split ends
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = a.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, merge_kernel, a);
}

namespace {

// Whether memory brings a token's 128 bytes no faster than narrow tables serve their lookups, which takes some 7.3
// cycles: an H100 has 12.8 bytes a cycle and multiprocessor, an H200 18.4.
bool slow_memory() {
  const auto of = [](cudaDeviceAttr which) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, which, device);
    return double(value);
  };
  const double bytes = of(cudaDevAttrMemoryClockRate) * 2 * of(cudaDevAttrGlobalMemoryBusWidth) / 8;
  const double cycles = of(cudaDevAttrClockRate) * of(cudaDevAttrMultiProcessorCount);
  return bytes > 0 && bytes < 15 * cycles;
}

// For tests: 'n' for narrow tables, 'w' for wide ones, 's' for those with keys' table once; 0 if nothing is given.
char given_tables() {
  static const char* const given = std::getenv("MILLION_GPU_TABLES");
  return given ? *given : 0;
}

}  // namespace

// Tokens of a block for which bringing 64 KiB of tables less, 1 us, is worth more than lookups without bank conflicts,
// whatever the memory: measured on an H200.
constexpr int64_t kFewTokens = 3000;

const Instance* instance(int64_t D, int64_t k_dim, int64_t v_dim, int shared, int64_t tokens, int rows) {
  const Instance* smallest = nullptr;
  // The first of the lists with this shape that fits beside what blocks of so many rows have.
  const auto first_of = [&](std::initializer_list<const Instance*> lists, int rows) -> const Instance* {
    for (const Instance* list : lists)
      for (; list->launch; list++) {
        if (list->D != D || list->k_dim != k_dim || list->v_dim != v_dim || (rows > 8 && !list->sixteen_rows)) continue;
        if (list->table_bytes + scratch_bytes(D, rows) <= shared) return list;
        if (smallest == nullptr || list->table_bytes < smallest->table_bytes) smallest = list;
      }
    return nullptr;
  };
  const auto all = {instances_64(), instances_96(), instances_128(), instances_256(), instances_narrow()};
  if (rows > 8)
    if (const Instance* of = first_of(all, rows)) return of;
  // Measured where keys' narrow table is all that differs (one page instead of two).
  static const bool slow = slow_memory();  // GPUs of one machine are taken to be alike
  const bool narrow = given_tables() ? given_tables() == 'n' : slow || tokens <= kFewTokens;
  if (narrow && D == 128 && k_dim == 2)
    if (const Instance* of = first_of({instances_narrow()}, 8)) return of;
  const Instance* of = first_of(all, 8);
  return of ? of : smallest;
}

int one_table() { return given_tables() == 's' ? INT_MAX : given_tables() ? 0 : kFewTokens / kTile; }

}  // namespace mma
}  // namespace million
