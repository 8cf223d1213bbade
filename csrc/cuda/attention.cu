// PQ attention for every shape: head_dim up to 256, d_m 2, 4 and 8, any group, any number of new tokens.
//
//   out[b,i,h,:] = sum_s p_s v_s,  p = softmax_s(scale q . k_s),  s over the visible slots of row b,
//   k_s = R(t_f) T^-1 codebook[k_code_s] and v_s = codebook[v_code_s], or the exact vectors of sinks, ring and new
//   tokens
//
// q . k_s is formed as q_f . codebook[k_code_s] with q_f = T^-T R(-t_f) q, prepared once a frame.
//
//   prepared [B, H, frames, rows, D] fp32     q_f * scale * log2(e); rows: (query, head of the group)
//   k_codes  [B, H, tiles, S, 64] uint8       layout rows64
//   tables   [256, D] fp16 in shared memory   one row a code, as the codebook lies in memory
//   partials [B, H, rows, splits, D + 2] fp32
//
// Three launches: `prepare_kernel`, `attend_kernel` (a block: one split of the tokens of one row and KV head for up to
// Rows rows), `merge_kernel`.
//
// In attend_kernel the lanes of a warp share the channels of one token: lane l looks up pairs of channels whose places
// in a table row fall on 32 different banks, whatever the codes, so lookups never conflict. Partial dot products of 32
// tokens are then summed over the lanes by a butterfly that leaves token l's score in lane l.
#include <cuda_pipeline.h>

#include <algorithm>

#include "attention.cuh"

namespace million {
namespace {

constexpr int kGroup = 32;  // tokens that a warp scores at a time, half a tile

// A table row holds Row channels, 64, 128 or 256: head_dim and padding.
template <int Row>
constexpr int table_bytes() {
  return kCentroids * Row * 2;
}

// ---- prepared queries ----

// blockIdx: frame, (row, KV head), row of the launch; a thread a channel.
__global__ void prepare_kernel(const Attention a) {
  extern __shared__ float vectors[];  // q [D], rotated [D]
  const Layer& layer = a.layer;
  const int H = layer.H, b = blockIdx.y / H, h = blockIdx.y % H, D = layer.D, f = blockIdx.x, row = blockIdx.z;
  if (f > 0 && int64_t(f) * layer.frame_tokens >= first_slot(layer)) return;  // nothing is stored in this frame
  const int c = threadIdx.x;
  float *q = vectors, *rotated = vectors + D;
  q[c] = load(a.q.at(b, h * a.G + row % a.G, a.query0 + row / a.G), c, layer.dtype);
  __syncthreads();
  float sum = frame_channel(layer, q, c, layer.inv_freq ? frame_position(layer, b, f) : 0);
  if (layer.transform) {
    rotated[c] = sum;
    __syncthreads();
    const float* inverse = layer.transform + int64_t(h) * D * D + c;
    sum = 0.f;
#pragma unroll 32
    for (int j = 0; j < D; j++) sum = fmaf(rotated[j], inverse[j * D], sum);
  }
  static_cast<float*>(a.prepared)[((int64_t(blockIdx.y) * a.frames + f) * a.rows + row) * D + c] =
      sum * a.scale * kLog2e;
}

// ---- attention ----

// Sums `partial(t)` of 2^Bits tokens over the lanes: afterwards `out` is the sum for token t0 + (lane mod 2^Bits).
template <int Bits, int T, int Rows, class Partial>
__device__ __forceinline__ void reduce_tokens(const Partial& partial, float (&out)[Rows]) {
  if constexpr (Bits == 0) {
    partial(std::integral_constant<int, T>(), out);
  } else {
    constexpr int kHalf = 1 << (Bits - 1);
    float low[Rows], high[Rows];
    reduce_tokens<Bits - 1, T>(partial, low);
    reduce_tokens<Bits - 1, T + kHalf>(partial, high);
    const bool upper = threadIdx.x & kHalf;
#pragma unroll
    for (int r = 0; r < Rows; r++)
      out[r] = (upper ? high[r] : low[r]) + __shfl_xor_sync(~0u, upper ? low[r] : high[r], kHalf);
  }
}

// What a warp has summed up of its rows. `o` holds the lane's channels, `sum` the lane's tokens.
template <int Rows, int Pairs>
struct Running {
  float top[Rows], sum[Rows];
  float2 o[Rows][Pairs];

  __device__ Running() {
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      top[r] = -INFINITY, sum[r] = 0.f;
#pragma unroll
      for (int j = 0; j < Pairs; j++) o[r][j] = {0.f, 0.f};
    }
  }

  // Scores (log2) to probabilities relative to `top`, which is raised when a score leaves it far behind. `counts`:
  // whether this lane adds its tokens to `sum`.
  __device__ __forceinline__ void probabilities(float (&s)[Rows], bool counts = true) {
    bool raise = false;
#pragma unroll
    for (int r = 0; r < Rows; r++) raise |= !(s[r] <= top[r] + kLazy);  // NaN too: it must reach the result
    if (__any_sync(~0u, raise)) {
#pragma unroll
      for (int r = 0; r < Rows; r++) {
        const float higher = fmaxf(top[r], warp_max(s[r]));
        const float factor = higher == -INFINITY ? 1.f : exp2f(top[r] - higher);
        top[r] = higher, sum[r] *= factor;
#pragma unroll
        for (int j = 0; j < Pairs; j++) o[r][j].x *= factor, o[r][j].y *= factor;
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      s[r] = s[r] == -INFINITY ? 0.f : exp2f(s[r] - top[r]);
      sum[r] += counts ? s[r] : 0.f;
    }
  }
};

// Attention over one warp's share of sinks, ring and new tokens. `warp` of `warps`: among all warps of all splits of
// the rows; `pair(j)`: the lane's j-th pair of channels. Several tokens are loaded at once, to wait for memory once.
template <int Rows, int Pairs, class PairOf>
__device__ __forceinline__ void exact_tokens(const RowBlock& block, Running<Rows, Pairs>& state, const PairOf& pair,
                                             int warp, int warps) {
  constexpr int kBatch = Pairs > 2 ? 2 : 4;
  const Attention& a = block.a;
  const Layer& layer = block.layer;
  const int D = int(layer.D), N = int(layer.N), R = int(layer.R), start = layer.start[block.b];
  const int64_t head = block.head();
  const int first = block.first, oldest = max(block.ring_begin(), 0);
  const int ring_tokens = max(min(first - oldest, R), 0), tokens = N + ring_tokens + int(layer.n);
  if (warp >= tokens) return;
  float2 q[Rows][Pairs];
  int position[Rows];
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    position[r] = first + block.query(r);
#pragma unroll
    for (int j = 0; j < Pairs; j++) {
      q[r][j] = {0.f, 0.f};
      if (r < block.rows && 2 * pair(j) < D) {
        const float factor = a.scale * kLog2e;
        const float2 x = load_pair(block.query_row(r), pair(j), layer.dtype);
        q[r][j] = {x.x * factor, x.y * factor};
      }
    }
  }
  for (int i0 = warp; i0 < tokens; i0 += warps * kBatch) {
    float2 key[kBatch][Pairs], value[kBatch][Pairs];
    int slots[kBatch];
    bool always[kBatch];  // whether every later query reads the token exactly: a sink, or new
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      const int i = i0 + u * warps;
      const bool is_sink = i < N, is_new = i >= N + ring_tokens;
      const int slot = is_sink ? start + i : is_new ? first + i - N - ring_tokens : oldest + i - N;
      // Not there; not stored yet; already read as a sink.
      const bool skip =
          i >= tokens || slot < start || slot < 0 || (is_sink ? slot >= first : !is_new && slot < start + N);
      slots[u] = skip ? -1 : slot;
      always[u] = is_sink || is_new;
      if (skip) continue;
      const int64_t row = is_sink ? head * N + i : head * R + (is_new ? 0 : slot % R);
      const int64_t bytes = row * D * size_of(layer.dtype), token = slot - first;
      const char* k =
          is_new ? layer.k_new.at(block.b, block.h, token) : (is_sink ? layer.k_sinks : layer.k_ring) + bytes;
      const char* v =
          is_new ? layer.v_new.at(block.b, block.h, token) : (is_sink ? layer.v_sinks : layer.v_ring) + bytes;
#pragma unroll
      for (int j = 0; j < Pairs; j++)
        if (2 * pair(j) < D) {
          key[u][j] = load_pair(k, pair(j), layer.dtype);
          value[u][j] = load_pair(v, pair(j), layer.dtype);
        }
    }
#pragma unroll
    for (int u = 0; u < kBatch; u++) {
      if (slots[u] < 0) continue;
      float s[Rows] = {};
#pragma unroll
      for (int j = 0; j < Pairs; j++)
        if (2 * pair(j) < D)
#pragma unroll
          for (int r = 0; r < Rows; r++) s[r] = fmaf(q[r][j].x, key[u][j].x, fmaf(q[r][j].y, key[u][j].y, s[r]));
#pragma unroll
      for (int r = 0; r < Rows; r++) {
        // `oldest` holds for every row; how far the ring reaches back depends on the row.
        const bool seen =
            slots[u] <= position[r] && (always[u] || slots[u] > position[r] - R) && !block.masked(r, slots[u]);
        s[r] = warp_sum(s[r]);
        s[r] = seen ? s[r] : -INFINITY;
      }
      state.probabilities(s, threadIdx.x % kWarp == 0);  // all lanes hold the same token: one counts it
#pragma unroll
      for (int j = 0; j < Pairs; j++) {
        if (2 * pair(j) >= D) continue;
#pragma unroll
        for (int r = 0; r < Rows; r++)
          if (s[r] != 0.f) {  // a slot that nobody sees may hold NaN
            state.o[r][j].x = fmaf(s[r], value[u][j].x, state.o[r][j].x);
            state.o[r][j].y = fmaf(s[r], value[u][j].y, state.o[r][j].y);
          }
      }
    }
  }
}

template <int Row, int Rows, bool VShared>
struct Block : RowBlock {
  static constexpr int kPairs = Row / 64;  // pairs of channels of a lane
  using State = Running<Rows, kPairs>;

  const int D, lane, warp, warps;
  char* shared;  // [K table][V table, if VShared][probabilities: a warp's [kGroup][Rows]]

  __device__ Block(const Attention& a, char* shared)
      : RowBlock(a, blockIdx.y, blockIdx.z * Rows, Rows),
        D(int(a.layer.D)),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        warps(blockDim.x / kWarp),
        shared(shared) {
    know(ask_clock());
  }

  __device__ int pair(int j) const {  // place of the lane's j-th pair of channels, on 32 different banks over the warp
    return lane * kPairs + (kPairs == 1 ? j : kPairs == 2 ? j ^ (lane >> 4) : j ^ (lane >> 3));
  }

  __device__ void load_table(const Coded& book, char* table) const {
    constexpr int kVectors = Row / 8;
    const int used = D / 8;
    const uint4* source = reinterpret_cast<const uint4*>(codebook(book));
    for (int i = threadIdx.x; i < kCentroids * kVectors; i += blockDim.x) {
      const int code = i / kVectors, v = i % kVectors;
      if (v < used)
        __pipeline_memcpy_async(reinterpret_cast<uint4*>(table) + i, source + code * used + v, sizeof(uint4));
      else
        reinterpret_cast<uint4*>(table)[i] = uint4{0, 0, 0, 0};
    }
  }

  // The lane's codes of kGroup tokens from `slot`: a word holds four tokens.
  __device__ __forceinline__ void load_codes(const Coded& book, int64_t slot,
                                             uint32_t (&words)[kPairs][kGroup / 4]) const {
    const uint8_t* codes = book.codes + (int64_t(b) * layer.H + h) * book.slots * book.S;
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
      const int m = min(2 * pair(j), D - 2) / book.d;
      const uint4* at = reinterpret_cast<const uint4*>(codes + code_offset(kRows64, slot, m, book.S));
#pragma unroll
      for (int i = 0; i < kGroup / 16; i++) {
        const uint4 w = __ldg(at + i);
        words[j][4 * i] = w.x, words[j][4 * i + 1] = w.y, words[j][4 * i + 2] = w.z, words[j][4 * i + 3] = w.w;
      }
    }
  }

  __device__ __forceinline__ float2 lookup(const char* table, int row_channels, uint32_t word, int byte,
                                           int pair) const {
    const uint32_t code = __byte_perm(word, 0, 0x4440 | byte);
    return __half22float2(reinterpret_cast<const __half2*>(table)[code * (row_channels / 2) + pair]);
  }

  __device__ __forceinline__ void load_query(int64_t frame, float2 (&q)[Rows][kPairs]) const {
    const int64_t head = (int64_t(b) * layer.H + h) * a.frames + frame;
#pragma unroll
    for (int r = 0; r < Rows; r++)
#pragma unroll
      for (int j = 0; j < kPairs; j++)
        q[r][j] = r < rows && 2 * pair(j) < D
                      ? reinterpret_cast<const float2*>(a.prepared)[((head * a.rows + row0 + r) * D) / 2 + pair(j)]
                      : float2{0.f, 0.f};
  }

  __device__ __forceinline__ void scores(const uint32_t (&words)[kPairs][kGroup / 4], const float2 (&q)[Rows][kPairs],
                                         float (&s)[Rows]) const {
    reduce_tokens<5, 0>(
        [&](auto token, float (&partial)[Rows]) {
          constexpr int t = decltype(token)::value;
#pragma unroll
          for (int r = 0; r < Rows; r++) partial[r] = 0.f;
#pragma unroll
          for (int j = 0; j < kPairs; j++) {
            const float2 k = lookup(shared, Row, words[j][t / 4], t % 4, pair(j));
#pragma unroll
            for (int r = 0; r < Rows; r++) partial[r] = fmaf(q[r][j].x, k.x, fmaf(q[r][j].y, k.y, partial[r]));
          }
        },
        s);
  }

  // Attention over the coded slots of one split.
  __device__ void coded(State& state) const {
    const Range range = this->range();
    const int64_t tile0 = range.begin / 64, tiles = max((range.end + 63) / 64 - tile0, int64_t(0));
    const int64_t begin = tile0 + tiles * blockIdx.x / a.splits, end = tile0 + tiles * (blockIdx.x + 1) / a.splits;
    if (begin >= end) return;
    load_table(layer.k, shared);
    char* v_table = shared + table_bytes<Row>();
    if (VShared) load_table(layer.v, v_table);
    float* p = reinterpret_cast<float*>(v_table + (VShared ? table_bytes<Row>() : 0)) + warp * kGroup * Rows;
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    float2 q[Rows][kPairs];
    int64_t frame = -1;
    for (int64_t group = 2 * begin + warp; group < 2 * end; group += warps) {
      const int64_t slot0 = group * kGroup, slot = slot0 + lane;
      uint32_t k_words[kPairs][kGroup / 4], v_words[kPairs][kGroup / 4];
      load_codes(layer.k, slot0, k_words);
      load_codes(layer.v, slot0, v_words);
      float s[Rows] = {};
      const bool framed = layer.inv_freq != nullptr;
      const int64_t last = framed ? (slot0 + kGroup - 1) / layer.frame_tokens : 0;
      for (int64_t f = framed ? slot0 / layer.frame_tokens : 0; f <= last; f++) {
        if (f >= a.frames) break;
        if (f != frame) load_query(frame = f, q);
        if (framed && f * layer.frame_tokens > slot0) {  // a frame that begins inside this group of tokens
          float later[Rows];
          scores(k_words, q, later);
#pragma unroll
          for (int r = 0; r < Rows; r++) s[r] = slot >= f * layer.frame_tokens ? later[r] : s[r];
        } else {
          scores(k_words, q, s);
        }
      }
      if (a.mask != nullptr || slot0 < range.begin || slot0 + kGroup > range.all_end) {
#pragma unroll
        for (int r = 0; r < Rows; r++) {
          const bool seen = slot >= range.begin && slot < range.end && !from_ring(r, slot) && !masked(r, slot);
          s[r] = seen ? s[r] : -INFINITY;
        }
      }
      state.probabilities(s);
      __syncwarp();  // the previous group's probabilities have been read
#pragma unroll
      for (int r = 0; r < Rows; r++) p[lane * Rows + r] = s[r];
      __syncwarp();
#pragma unroll
      for (int t = 0; t < kGroup; t++) {
        float weight[Rows];
#pragma unroll
        for (int r = 0; r < Rows; r++) weight[r] = p[t * Rows + r];
#pragma unroll
        for (int j = 0; j < kPairs; j++) {
          const float2 v = VShared ? lookup(v_table, Row, v_words[j][t / 4], t % 4, pair(j))
                                   : lookup(reinterpret_cast<const char*>(codebook(layer.v)), D, v_words[j][t / 4],
                                            t % 4, min(pair(j), D / 2 - 1));
#pragma unroll
          for (int r = 0; r < Rows; r++) {
            state.o[r][j].x = fmaf(weight[r], v.x, state.o[r][j].x);
            state.o[r][j].y = fmaf(weight[r], v.y, state.o[r][j].y);
          }
        }
      }
    }
  }

  __device__ void exact(State& state) const {
    exact_tokens(*this, state, [&](int j) { return pair(j); }, int(blockIdx.x) * warps + warp, a.splits * warps);
  }

  // Merges the warps and writes the block's partial result.
  __device__ void finish(State& state) const {
    float* numerators = reinterpret_cast<float*>(shared);  // [warps, Rows, Row]
    float* ends = numerators + warps * Rows * Row;         // [warps, Rows, 2]
    __syncthreads();                                       // the tables are no longer needed
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      const float sum = warp_sum(state.sum[r]);
#pragma unroll
      for (int j = 0; j < kPairs; j++)
        *reinterpret_cast<float2*>(numerators + (warp * Rows + r) * Row + 2 * pair(j)) = state.o[r][j];
      if (lane == 0) ends[(warp * Rows + r) * 2] = state.top[r], ends[(warp * Rows + r) * 2 + 1] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (D + 2); i += blockDim.x) {
      const int r = i / (D + 2), c = i % (D + 2);
      float top = -INFINITY, total = 0.f;
      for (int w = 0; w < warps; w++) top = fmaxf(top, ends[(w * Rows + r) * 2]);
      for (int w = 0; w < warps; w++) {
        const float own = ends[(w * Rows + r) * 2];
        if (own == -INFINITY && ends[(w * Rows + r) * 2 + 1] == 0.f) continue;  // saw nothing
        total += exp2f(own - top) * (c < D ? numerators[(w * Rows + r) * Row + c] : ends[(w * Rows + r) * 2 + 1]);
      }
      const int64_t row = (int64_t(b) * layer.H + h) * a.rows + row0 + r;
      a.partials[(row * a.splits + blockIdx.x) * (D + 2) + c] = c == D ? top : total;
    }
  }
};

// blockIdx: split, (row, KV head), block of rows.
template <int Row, int Rows, bool VShared, int Threads>
__global__ void __launch_bounds__(Threads, 1) attend_kernel(const Attention a) {
  extern __shared__ __align__(16) char shared[];
  const Block<Row, Rows, VShared> block(a, shared);
  typename Block<Row, Rows, VShared>::State state;
  block.coded(state);
  block.exact(state);
  block.finish(state);
}

// One block a query head and query; threads: channels.
__global__ void merge_kernel(const Attention a) {
  const int D = int(a.layer.D), rows = a.rows, parts = a.splits;
  const int64_t row = blockIdx.x;
  const RowBlock block(a, int(row / rows), int(row % rows), 1);
  const float* partials = a.partials + row * parts * (D + 2);
  float top = -INFINITY, sum = 0.f;
  for (int i = 0; i < parts; i++) top = fmaxf(top, partials[i * (D + 2) + D]);
  float out = 0.f;
  for (int i = 0; i < parts; i++) {
    const float* part = partials + i * (D + 2);
    if (part[D] == -INFINITY && part[D + 1] == 0.f) continue;
    const float factor = exp2f(part[D] - top);
    sum += factor * part[D + 1];
    out += factor * part[threadIdx.x];
  }
  block.store_result(0, threadIdx.x, out, sum, top);
}

template <int Row, int Rows, bool VShared>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  constexpr int kThreads = Row == 256 || Rows == 8 ? 256 : Rows == 4 ? 384 : 512, kWarps = kThreads / kWarp;
  const size_t tables = table_bytes<Row>() * (VShared ? 2 : 1) + kWarps * kGroup * Rows * sizeof(float);
  const size_t merging = kWarps * Rows * (Row + 2) * sizeof(float);
  const size_t shared = std::max(tables, merging);
  const auto kernel = attend_kernel<Row, Rows, VShared, kThreads>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (set != cudaSuccess) return cudaGetLastError();  // and clears it
  const dim3 grid(a.splits, a.layer.B * a.layer.H, (a.rows + Rows - 1) / Rows);
  kernel<<<grid, kThreads, shared, stream>>>(a);
  return cudaGetLastError();
}

template <int Row, bool VShared>
cudaError_t attend(const Attention& a, cudaStream_t stream) {
  if (a.rows == 1) return attend<Row, 1, VShared>(a, stream);
  if (a.rows == 2) return attend<Row, 2, VShared>(a, stream);
  if (a.rows <= 4) return attend<Row, 4, VShared>(a, stream);
  return attend<Row, 8, VShared>(a, stream);
}

// The values' table goes to shared memory too where both fit; else its lookups go through the L1 cache.
template <int Row>
cudaError_t attend(const Attention& a, int shared_limit, cudaStream_t stream) {
  constexpr int kScratch = 24 << 10;
  if constexpr (2 * table_bytes<Row>() + kScratch <= 227 << 10)
    if (2 * table_bytes<Row>() + kScratch <= shared_limit) return attend<Row, true>(a, stream);
  return attend<Row, false>(a, stream);
}

}  // namespace

cudaError_t attention_rows_launch(const Attention& a, cudaStream_t stream) {
  const Layer& layer = a.layer;
  prepare_kernel<<<dim3(a.frames, layer.B * layer.H, a.rows), layer.D, 2 * layer.D * sizeof(float), stream>>>(a);
  const cudaError_t result = layer.D <= 64    ? attend<64>(a, a.shared, stream)
                             : layer.D <= 128 ? attend<128>(a, a.shared, stream)
                                              : attend<256>(a, a.shared, stream);
  if (result != cudaSuccess) return result;
  merge_kernel<<<layer.B * layer.H * a.rows, layer.D, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace million
