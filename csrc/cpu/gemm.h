// Dense product of small row-major matrices, for tiles that sit in L1 or L2.
#pragma once

#include "simd.h"

namespace million {
namespace MILLION_ISA {

// Registers of a block: kGemmRows x kGemmColumns accumulators leave room for a row of B and one broadcast.
#if defined(__AVX512F__)
constexpr int kGemmRows = 6, kGemmColumns = 4;
#else
constexpr int kGemmRows = 4, kGemmColumns = 2;
#endif

template <class V, int R, int C>
static inline void gemm_block(int64_t depth, const float* A, int64_t lda, const float* B, int64_t ldb,
                              const float* beta, float* out, int64_t ldo) {
  constexpr int L = sizeof(V) / sizeof(float);
  V sum[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sum[r][c] = beta ? load<V>(out + r * ldo + c * L) * beta[r] : V{};
  for (int64_t k = 0; k < depth; k++) {
    V b[C];
    for (int c = 0; c < C; c++) b[c] = load<V>(B + k * ldb + c * L);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) sum[r][c] += b[c] * A[r * lda + k];
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * ldo + c * L, sum[r][c]);
}

template <class V, int C>
static inline void gemm_rows(int64_t rows, int64_t depth, const float* A, int64_t lda, const float* B, int64_t ldb,
                             const float* beta, float* out, int64_t ldo) {
  int64_t r = 0;
  const auto next = [&](int count) { r += count, A += count * lda, out += count * ldo, beta += beta ? count : 0; };
  while (rows - r >= kGemmRows) gemm_block<V, kGemmRows, C>(depth, A, lda, B, ldb, beta, out, ldo), next(kGemmRows);
  switch (rows - r) {
    case 5: return gemm_block<V, 5, C>(depth, A, lda, B, ldb, beta, out, ldo);
    case 4: return gemm_block<V, 4, C>(depth, A, lda, B, ldb, beta, out, ldo);
    case 3: return gemm_block<V, 3, C>(depth, A, lda, B, ldb, beta, out, ldo);
    case 2: return gemm_block<V, 2, C>(depth, A, lda, B, ldb, beta, out, ldo);
    case 1: return gemm_block<V, 1, C>(depth, A, lda, B, ldb, beta, out, ldo);
  }
}

// out[r][c] = beta[r] * out[r][c] + sum_k A[r][k] B[k][c]; without beta the old value is not read. columns is a
// multiple of 8. Every element is summed in the order of k, so the result does not depend on how rows are grouped.
static inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* A, int64_t lda, const float* B,
                        int64_t ldb, const float* beta, float* out, int64_t ldo) {
  int64_t c = 0;
  for (; c + kGemmColumns * W <= columns; c += kGemmColumns * W)
    gemm_rows<vf, kGemmColumns>(rows, depth, A, lda, B + c, ldb, beta, out + c, ldo);
  for (; c + 16 <= columns; c += 16) gemm_rows<vf, 16 / W>(rows, depth, A, lda, B + c, ldb, beta, out + c, ldo);
  for (; c + 8 <= columns; c += 8) gemm_rows<vf4, 2>(rows, depth, A, lda, B + c, ldb, beta, out + c, ldo);
}

}  // namespace MILLION_ISA
}  // namespace million
