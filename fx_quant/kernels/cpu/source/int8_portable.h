// int8 codes in plain C++, which a compiler turns into the widest multiply-add of 16-bit lanes that it knows.
//
// The weight is read as it is stored, [n][k], so b of a panel is [64][k]. A block of the activation is widened to
// 16 bits first: of products of 8 bits compilers make much slower code.

#define FXQ_TARGET

#include <cstdint>
#include <cstring>

namespace {

struct FxqInt8Portable {
  using A = int8_t;
  using B = int8_t;
  using Acc = int32_t;
  static constexpr int64_t GROUP = 1;
  static constexpr int ROWS = 4;
  struct State {};

  static Acc row_start(const A*, int64_t) {
    return 0;
  }
};

constexpr int64_t FXQ_WIDE_K = 2048; // of the activation, widened at a time: 4 rows are 16 KiB

// out[ROWS][COLUMNS] += a[ROWS][k] x b[COLUMNS][k]
template <int ROWS, int COLUMNS>
FXQ_VECTORIZED __attribute__((noinline)) void fxq_sums(
    const int16_t (*a)[FXQ_WIDE_K], const int8_t* b, int64_t ldb, int64_t k, int32_t* out) {
  uint32_t sum[ROWS][COLUMNS] = {}; // modulo 2^32, as every other sum of codes
  FXQ_VECTORIZE
  for (int64_t i = 0; i < k; i++) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; c++) {
        sum[r][c] += static_cast<uint32_t>(int32_t(a[r][i]) * int32_t(b[c * ldb + i]));
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < COLUMNS; c++) {
      out[r * FXQ_PANEL + c] = static_cast<int32_t>(sum[r][c] + static_cast<uint32_t>(out[r * FXQ_PANEL + c]));
    }
  }
}

template <int ROWS>
FXQ_VECTORIZED __attribute__((noinline)) void fxq_sums_of_panel(
    int64_t width, const int8_t* a, int64_t lda, const int8_t* b, const FxqPart& part, int32_t* out) {
  alignas(64) int16_t wide[ROWS][FXQ_WIDE_K];
  if (part.from == 0) {
    std::memset(out, 0, ROWS * FXQ_PANEL * sizeof(*out));
  }
  for (int64_t from = part.from; from < part.to; from += FXQ_WIDE_K) {
    const int64_t count = std::min(FXQ_WIDE_K, part.to - from);
    for (int r = 0; r < ROWS; r++) {
      FXQ_VECTORIZE
      for (int64_t i = 0; i < count; i++) {
        wide[r][i] = a[r * lda + from + i];
      }
    }
    int64_t c = 0;
    for (; c + 4 <= width; c += 4) {
      fxq_sums<ROWS, 4>(wide, b + c * part.k + from, part.k, count, out + c);
    }
    for (; c < width; c++) {
      fxq_sums<ROWS, 1>(wide, b + c * part.k + from, part.k, count, out + c);
    }
  }
}

// out[rows of the block][width] += they x part of a panel; the first part starts from nothing
template <typename DOT>
inline void fxq_tile(
    typename DOT::State&,
    const FxqPlan&,
    const FxqTileRows<DOT>& rows,
    const FxqBlock& block,
    int64_t width,
    const int8_t* panel,
    const FxqPart& part,
    int32_t* out) {
  const int8_t* const a = rows.a + block.row * rows.lda;
  switch (block.rows) {
    case 1: return fxq_sums_of_panel<1>(width, a, rows.lda, panel, part, out);
    case 2: return fxq_sums_of_panel<2>(width, a, rows.lda, panel, part, out);
    case 3: return fxq_sums_of_panel<3>(width, a, rows.lda, panel, part, out);
    default: return fxq_sums_of_panel<4>(width, a, rows.lda, panel, part, out);
  }
}

} // namespace
