// pq_decode: table lookup. pq_dequantize: packed codes back to keys or values as the model gave them,
//
//   x[b,h,s,:] = R(t_f) T^-1 c,  c[m] = codebook[h, code[b,h,s,m], m, :],  f the frame of slot s
//
// A block takes tiles of 64 slots of one (row, KV head). Each thread has the same bytes of every tile, so what token
// and subspace they belong to is looked up once, in an inversion of the layout. Centroids go to shared memory as fp16,
// which they are, T^-1 multiplies them on tensor cores, the rotation turns the products where they lie, in fp32.
#include <algorithm>

#include "../common/pq_layout.h"
#include "../common/shapes.h"
#include "device.cuh"
#include "ptx.cuh"

namespace million {
namespace {

constexpr int kTokens = 64;                    // of a tile here
constexpr int row_of(int D) { return D + 8; }  // channels from a token to the next: rows lie on other banks

// Of values, of keys with T^-1 in fp16, in fp32.
enum class Mode { plain, half, split };

// How a block of up to D channels works. `table`: the codebook is in shared memory.
template <int D, Mode mode, bool table>
struct Shape {
  static constexpr bool kPlain = mode == Mode::plain, kSplit = mode == Mode::split;
  static constexpr int kThreads = D <= 128 ? 256 : 512;      // of more channels a thread's T^-1 would spill
  static constexpr bool kKept = D <= 128 || !kSplit;         // T^-1 stays in registers
  static constexpr bool kInPlace = D <= 128 || kSplit;       // products take the place of centroids
  static constexpr int kParts = kInPlace || kPlain ? 1 : 2;  // of a tile, which get vectors one by one
  static constexpr int kBlocks = D <= 64 || (D <= 128 && !kSplit) ? 2 : 1;  // at once
  static constexpr int kHalves = kTokens * row_of(D) * 2, kFloats = kPlain ? 0 : kTokens / kParts * row_of(D) * 4;
  static constexpr int kStaged = kPlain ? kHalves : kInPlace ? kFloats : kHalves + kFloats;  // bytes
  static_assert(kTokens * D / 2 * 4 <= kStaged);                                             // places, at first
  // Shared memory for so many channels or fewer.
  static constexpr int bytes(int channels) { return (table ? kCentroids * channels * 2 : 0) + kStaged; }
};
// bind.cpp refuses head_dim 256 where a block has less.
static_assert(Shape<256, Mode::plain, true>::bytes(256) <= kWideShared);
static_assert(Shape<256, Mode::half, false>::bytes(256) <= kWideShared);
static_assert(Shape<256, Mode::split, false>::bytes(256) <= kWideShared);

constexpr int kDecodeThreads = 256;

__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(const Decode a) {
  const int D = a.book.S * a.book.d;
  const int64_t per_head = a.T * D, total = int64_t(a.B) * a.H * per_head;
  const __half* codebook = reinterpret_cast<const __half*>(a.book.codebook);
  for (int64_t i = int64_t(blockIdx.x) * kDecodeThreads + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * kDecodeThreads) {
    const int h = i / per_head % a.H, channel = i % D;
    const uint8_t code = a.codes[i / D * a.book.S + channel / a.book.d];
    store(a.out, i, __half2float(codebook[(int64_t(h) * kCentroids + code) * D + channel]), a.dtype);
  }
}

// T^-1 as B operands: of a step of 16 depths k and 8 columns n, the lane's four of T^-1[n][k]. fp32 as a sum of two
// fp16 numbers.
template <bool Split>
struct Inverse {
  uint32_t high[2], low[Split ? 2 : 1];

  __device__ __forceinline__ void take(const Dequantize& a, int h, int n, int k) {
    const int64_t head = int64_t(h) * a.D * a.D;
#pragma unroll
    for (int i = 0; i < 2; i++, k += 8) {
      const bool there = n < a.D && k < a.D;
      if constexpr (Split) {
        const float2 x = there ? __ldg(reinterpret_cast<const float2*>(static_cast<const float*>(a.inverse) + head +
                                                                       int64_t(n) * a.D + k))
                               : float2{};
        mma::split(x.x, x.y, high[i], low[i]);
      } else {  // column after column
        const uint16_t* at = static_cast<const uint16_t*>(a.inverse) + head + int64_t(k) * a.D + n;
        high[i] = there ? __ldg(at) | uint32_t(__ldg(at + a.D)) << 16 : 0;
      }
    }
  }
  __device__ __forceinline__ void multiply(float (&y)[4], const uint32_t (&x)[4]) const {
    mma::mma_dense(y, x, high[0], high[1]);
    if constexpr (Split) mma::mma_dense(y, x, low[0], low[1]);
  }
};

// `kD`: channels, or more.
template <int kD, Mode mode, bool kTable>
__global__ void __launch_bounds__(Shape<kD, mode, kTable>::kThreads, Shape<kD, mode, kTable>::kBlocks)
    dequantize_kernel(const Dequantize a) {
  using Of = Shape<kD, mode, kTable>;
  constexpr int kThreads = Of::kThreads, kWarps = kThreads / kWarp;
  constexpr int kRow = row_of(kD), kUnits = kD / 8 / kWarps, kSteps = kD / 16;
  constexpr int kVectors = kTokens / Of::kParts;
  constexpr int kWords = kTokens * (kD / 2) / 4 / kThreads;  // of 4 codes, a thread, at most
  extern __shared__ __align__(16) char shared[];
  const int D = a.D, S = int(a.book.S), d = int(a.book.d), h = blockIdx.y % a.H, b = blockIdx.y / a.H;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const uint16_t* const codebook = a.book.codebook + int64_t(h) * kCentroids * D;
  char* const staged = shared + (kTable ? kCentroids * D * 2 : 0);
  uint16_t* const centroids = reinterpret_cast<uint16_t*>(staged);                             // [kTokens, kRow] fp16
  float* const vectors = reinterpret_cast<float*>(staged + (Of::kInPlace ? 0 : Of::kHalves));  // [kVectors, kRow]
  if constexpr (kTable)
    for (int i = thread; i < kCentroids * D / 8; i += kThreads)
      reinterpret_cast<uint4*>(shared)[i] = __ldg(reinterpret_cast<const uint4*>(codebook) + i);

  // Of the thread's codes: where the centroid goes, and from which subspace it comes, in channels.
  const int words = kTokens * S / 4;
  uint32_t places[kWords][4];
  for (int i = thread; i < kTokens * S; i += kThreads) {
    const int t = i % kTokens, m = i / kTokens;
    reinterpret_cast<uint32_t*>(staged)[code_offset(a.book.layout, t, m, S)] = (t * kRow + m * d) | m * d << 16;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kWords; j++)
    if (const int word = thread + j * kThreads; word < words) {
      const uint4 x = reinterpret_cast<const uint4*>(staged)[word];
      places[j][0] = x.x, places[j][1] = x.y, places[j][2] = x.z, places[j][3] = x.w;
    }

  // Warp w forms columns 8 (w + 8 u) .. + 7.
  const int n = lane >> 2, c = lane & 3;
  Inverse<Of::kSplit> inverse[Of::kKept ? kSteps : 1][kUnits];
  if constexpr (Of::kKept && !Of::kPlain)
    if (a.inverse != nullptr) {
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int u = 0; u < kUnits; u++) inverse[step][u].take(a, h, 8 * (warp + kWarps * u) + n, 16 * step + 2 * c);
    }

  const int tiles = int((a.T + kTokens - 1) / kTokens), frame_tokens = a.frame_tokens;
  const int origin = a.inv_freq != nullptr ? a.origin[b] : 0;
  const auto fetch = [&](int tile, uint32_t (&to)[kWords]) {
    const uint8_t* from = a.book.codes + b * a.row + h * a.head + int64_t(tile) * (kTokens * S);
    const int64_t left = a.T * S - int64_t(tile) * (kTokens * S);  // bytes
#pragma unroll
    for (int j = 0; j < kWords; j++) {
      const int at = 4 * (thread + j * kThreads);
      to[j] = 0;
      if (at >= kTokens * S) continue;
      if (a.aligned && at + 4 <= left) {
        to[j] = __ldg(reinterpret_cast<const uint32_t*>(from + at));
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (at + i < left) to[j] |= uint32_t(__ldg(from + at + i)) << 8 * i;
      }
    }
  };
  uint32_t codes[kWords];
  if (int(blockIdx.x) < tiles) fetch(blockIdx.x, codes);
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    __syncthreads();
    const auto lookup = [&](auto vector) {
      using Vector = decltype(vector);
#pragma unroll
      for (int j = 0; j < kWords; j++) {
        if (thread + j * kThreads >= words) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int code = codes[j] >> 8 * i & 255, from = code * D + int(places[j][i] >> 16);
          const Vector x = kTable ? *reinterpret_cast<const Vector*>(reinterpret_cast<const uint16_t*>(shared) + from)
                                  : __ldg(reinterpret_cast<const Vector*>(codebook + from));
          *reinterpret_cast<Vector*>(centroids + (places[j][i] & 0xffff)) = x;
        }
      }
    };
    d == 2 ? lookup(uint32_t()) : d == 4 ? lookup(uint2()) : lookup(uint4());
    if (D % 16 && thread < kTokens) *reinterpret_cast<uint4*>(centroids + thread * kRow + D) = uint4{};
    if (tile + int(gridDim.x) < tiles) fetch(tile + gridDim.x, codes);
    __syncthreads();

#pragma unroll 1
    for (int t_first = 0; t_first < kTokens; t_first += kVectors) {
      if (t_first) __syncthreads();
      if constexpr (!Of::kPlain) {
        if (a.inverse != nullptr) {
          constexpr int kTiles = kVectors / 16, kAtOnce = Of::kInPlace ? kTiles : 1;
#pragma unroll 1
          for (int first = 0; first < kTiles; first += kAtOnce) {
            float y[kAtOnce][kUnits][4] = {};
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
              if (16 * step >= D) break;
              if constexpr (!Of::kKept) {
#pragma unroll
                for (int u = 0; u < kUnits; u++)
                  inverse[0][u].take(a, h, 8 * (warp + kWarps * u) + n, 16 * step + 2 * c);
              }
#pragma unroll
              for (int i = 0; i < kAtOnce; i++) {
                uint32_t x[4];
                mma::load_operand(reinterpret_cast<const __half*>(centroids) +
                                      (t_first + 16 * (first + i) + lane % 16) * kRow + 16 * step + lane / 16 * 8,
                                  x);
#pragma unroll
                for (int u = 0; u < kUnits; u++) inverse[Of::kKept ? step : 0][u].multiply(y[i][u], x);
              }
            }
            if (Of::kInPlace) __syncthreads();
#pragma unroll
            for (int i = 0; i < kAtOnce; i++)
#pragma unroll
              for (int u = 0; u < kUnits; u++) {
                float* to = vectors + (16 * (first + i) + n) * kRow + 8 * (warp + kWarps * u) + 2 * c;
                *reinterpret_cast<float2*>(to) = {y[i][u][0], y[i][u][1]};
                *reinterpret_cast<float2*>(to + 8 * kRow) = {y[i][u][2], y[i][u][3]};
              }
          }
        } else {  // to fp32, maybe in its own place
          constexpr int kEach = kVectors * kD / 2 / kThreads, kAtOnce = Of::kInPlace ? kEach : 4;
          const __half2* from = reinterpret_cast<const __half2*>(centroids + t_first * kRow);
#pragma unroll 1
          for (int first = 0; first < kEach; first += kAtOnce) {
            float2 y[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
              const int at = thread + (first + i) * kThreads;
              y[i] = __half22float2(from[(at / (kD / 2) * kRow + at % (kD / 2) * 2) / 2]);
            }
            if (Of::kInPlace) __syncthreads();
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
              const int at = thread + (first + i) * kThreads;
              *reinterpret_cast<float2*>(vectors + at / (kD / 2) * kRow + at % (kD / 2) * 2) = y[i];
            }
          }
        }
        __syncthreads();
      }

      if (!Of::kPlain && a.inv_freq != nullptr) {  // a thread turns one pair of channels of neighbouring tokens
        constexpr int kPairs = kD / 2, kRun = kVectors / (kThreads / kPairs);
        if (const int pair = thread % kPairs; pair < a.half) {
          const int first = a.interleaved ? 2 * pair : pair, second = a.interleaved ? 2 * pair + 1 : pair + a.half;
          const int t0 = thread / kPairs * kRun;
          int slot = a.first_slot + tile * kTokens + t_first + t0;
          int64_t frame = slot / frame_tokens * int64_t(frame_tokens), border = frame + frame_tokens;
          const float frequency = __ldg(a.inv_freq + pair);
          const auto turn_at = [&](int64_t at) { return mma::turn_of(static_cast<float>(at + origin) * frequency); };
          float2 turn = turn_at(frame);
          float* at = vectors + t0 * kRow;
#pragma unroll 4
          for (int t = 0; t < kRun; t++, slot++, at += kRow) {
            if (slot >= border) turn = turn_at(border), border += frame_tokens;
            const float x = at[first], y = at[second];
            at[first] = x * turn.x - y * turn.y, at[second] = y * turn.x + x * turn.y;
          }
        }
        __syncthreads();
      }

      // Eight channels a thread.
      constexpr int kAcross = kD / 8, kAtOnce = kThreads / kAcross;
      const int channel = thread % kAcross * 8;
      if (channel >= D) continue;
#pragma unroll
      for (int first = 0; first < kVectors; first += kAtOnce) {
        const int t = first + thread / kAcross;
        const int64_t slot = int64_t(tile) * kTokens + t_first + t;
        if (slot >= a.T) break;
        const int64_t to = ((int64_t(blockIdx.y) * a.T + slot) * D + channel) * (a.dtype == DType::f32 ? 4 : 2);
        char* out = static_cast<char*>(a.out) + to;
        float2 x[4];
        if constexpr (Of::kPlain) {
          const uint4 half = *reinterpret_cast<const uint4*>(centroids + t * kRow + channel);
          if (a.dtype == DType::f16) {
            *reinterpret_cast<uint4*>(out) = half;
            continue;
          }
#pragma unroll
          for (int i = 0; i < 4; i++) x[i] = __half22float2(reinterpret_cast<const __half2*>(&half)[i]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++) x[i] = *reinterpret_cast<const float2*>(vectors + t * kRow + channel + 2 * i);
        }
        if (a.dtype == DType::f32) {
#pragma unroll
          for (int i = 0; i < 2; i++)
            reinterpret_cast<float4*>(out)[i] = {x[2 * i].x, x[2 * i].y, x[2 * i + 1].x, x[2 * i + 1].y};
        } else {
          uint4 packed;
#pragma unroll
          for (int i = 0; i < 4; i++) store_pair(&packed, i, x[i], a.dtype);
          *reinterpret_cast<uint4*>(out) = packed;
        }
      }
    }
  }
}

template <int kD, Mode mode, bool kTable>
cudaError_t dequantize(const Dequantize& a, int multiprocessors, int shared, cudaStream_t stream) {
  using Of = Shape<kD, mode, kTable>;
  const auto kernel = dequantize_kernel<kD, mode, kTable>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::min(Of::bytes(kD), shared)) !=
      cudaSuccess)
    return cudaGetLastError();  // and clears it
  const int64_t heads = int64_t(a.B) * a.H, tiles = (a.T + kTokens - 1) / kTokens;
  const int64_t blocks = (Of::kBlocks * multiprocessors + heads - 1) / heads;
  kernel<<<dim3(std::min(tiles, blocks), heads), Of::kThreads, Of::bytes(a.D), stream>>>(a);
  return cudaGetLastError();
}

template <Mode mode>
cudaError_t dequantize(const Dequantize& a, int multiprocessors, int shared, cudaStream_t stream) {
  if (a.D <= 64) return dequantize<64, mode, true>(a, multiprocessors, shared, stream);
  if (a.D <= 128) return dequantize<128, mode, true>(a, multiprocessors, shared, stream);
  if constexpr (mode != Mode::plain)
    if (Shape<256, mode, true>::bytes(a.D) > shared)
      return dequantize<256, mode, false>(a, multiprocessors, shared, stream);
  return dequantize<256, mode, true>(a, multiprocessors, shared, stream);
}

}  // namespace

cudaError_t decode_launch(const Decode& a, cudaStream_t stream) {
  const int64_t total = int64_t(a.B) * a.H * a.T * a.book.S * a.book.d;
  decode_kernel<<<std::min<int64_t>((total + kDecodeThreads - 1) / kDecodeThreads, 1 << 14), kDecodeThreads, 0,
                  stream>>>(a);
  return cudaGetLastError();
}

cudaError_t dequantize_launch(const Dequantize& a, bool split, int multiprocessors, int shared, cudaStream_t stream) {
  const auto launch = a.inverse == nullptr && a.inv_freq == nullptr ? dequantize<Mode::plain>
                      : split                                       ? dequantize<Mode::split>
                                                                    : dequantize<Mode::half>;
  return launch(a, multiprocessors, shared, stream);
}

}  // namespace million
