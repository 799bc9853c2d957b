// A register tile over packed panels of 64 columns, and how threads share the work.
//
// DOT, defined by the header of one kind of codes, says what one instruction does:
//   A, B, Acc   element types of the activation, the packed weight and the accumulator
//   GROUP       elements along k that one 32-bit lane holds
//   Vec         a register of 16 accumulators, with splat, dot and store
//   row_start   what the accumulators of a row start from
//
// The packed weight is [ceil(n/64)][ceil(k/GROUP)][64][GROUP]; the tile never reads past the end of a row of a.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t FXQ_PANEL = 64;
constexpr int64_t FXQ_TILE_ROWS = 6;    // 6 x 4 accumulators + 4 of b + 1 of a <= 32 registers
constexpr int64_t FXQ_CHUNK_ROWS = 384; // rows that stream past a panel while it is in cache

// What is asked for before it is needed: ``step`` bytes from ``at`` on for each line of a panel that is read.
struct FxqAhead {
  const char* at;
  int64_t step;
};

// One block of rows waits for memory, so it asks for what follows in its own stream. Several blocks read ``bytes`` of a
// panel again and again from cache, and the first four ask for those that come next, in equal parts. The plan says how
// far ahead the one asks, and whether the others do.
inline FxqAhead fxq_ahead(const FxqPlan& plan, int64_t block, int64_t blocks, const void* panel, int64_t bytes) {
  const char* at = static_cast<const char*>(panel);
  if (blocks == 1) {
    return {at + plan.ahead, 64};
  }
  if (!plan.next_panel) {
    return {at, 0};
  }
  const int64_t quarters = blocks == 2 || (blocks == 3 && block == 0) ? 2 : block < 4 ? 1 : 0;
  const int64_t first = blocks == 2 ? block * 2 : blocks == 3 && block > 0 ? block + 1 : block;
  return quarters ? FxqAhead{at + bytes + first * (bytes / 4), quarters * 16} : FxqAhead{at, 0};
}

// Asks for ``bytes`` from p on, which are wanted after the panel that comes first.
inline void fxq_expect(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T1);
  }
}

// acc[ROWS][4 registers of 16 columns] += a[ROWS][k] x panel
template <typename DOT, int ROWS>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_products(
    typename DOT::Vec (&acc)[ROWS][4],
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* panel,
    int64_t k,
    FxqAhead ahead) {
  constexpr int64_t GROUP = DOT::GROUP;
  const int64_t whole = k / GROUP;
  const char* b = reinterpret_cast<const char*>(panel);
  for (int64_t g = 0; g < whole; g++, b += 256) {
    __m512i columns[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      columns[j] = _mm512_loadu_si512(b + j * 64);
    }
    // Two of the four lines: of one row or two, that the hardware asks for in time, none.
    if (ROWS > 2) {
      _mm_prefetch(ahead.at, _MM_HINT_T0);
      _mm_prefetch(ahead.at + 64, _MM_HINT_T0);
      ahead.at += 4 * ahead.step;
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t lane;
      std::memcpy(&lane, a + r * lda + g * GROUP, sizeof(lane));
      const __m512i row = _mm512_set1_epi32(lane);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        acc[r][j] = DOT::dot(acc[r][j], columns[j], row);
      }
    }
  }
  const int64_t rest = k - whole * GROUP;
  if (rest) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t lane = 0;
      std::memcpy(&lane, a + r * lda + whole * GROUP, rest * sizeof(typename DOT::A));
      const __m512i row = _mm512_set1_epi32(lane);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        acc[r][j] = DOT::dot(acc[r][j], _mm512_loadu_si512(b + j * 64), row);
      }
    }
  }
}

// out[ROWS][64] = start[r] + a[ROWS][k] x panel
template <typename DOT, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_tile_rows(
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* panel,
    int64_t k,
    const typename DOT::Acc* start,
    FxqAhead ahead,
    typename DOT::Acc* out) {
  typename DOT::Vec acc[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      acc[r][j] = DOT::splat(start[r]);
    }
  }
  fxq_products<DOT, ROWS>(acc, a, lda, panel, k, ahead);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      DOT::store(out + r * FXQ_PANEL + j * 16, acc[r][j]);
    }
  }
}

template <typename DOT>
inline void fxq_tile(
    int64_t rows,
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* panel,
    int64_t k,
    const typename DOT::Acc* start,
    FxqAhead ahead,
    typename DOT::Acc* out) {
  switch (rows) {
    case 1: return fxq_tile_rows<DOT, 1>(a, lda, panel, k, start, ahead, out);
    case 2: return fxq_tile_rows<DOT, 2>(a, lda, panel, k, start, ahead, out);
    case 3: return fxq_tile_rows<DOT, 3>(a, lda, panel, k, start, ahead, out);
    case 4: return fxq_tile_rows<DOT, 4>(a, lda, panel, k, start, ahead, out);
    case 5: return fxq_tile_rows<DOT, 5>(a, lda, panel, k, start, ahead, out);
    default: return fxq_tile_rows<DOT, 6>(a, lda, panel, k, start, ahead, out);
  }
}

// One thread's part of the output: rows x panels.
struct FxqShare {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// Threads form a grid of row parts x panel parts, the one whose largest part is smallest; ties go to fewer row parts,
// because each row part reads the whole weight.
inline FxqShare fxq_share(int64_t rows, int64_t panels, int64_t threads, int64_t thread) {
  const int64_t blocks = (rows + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
  int64_t row_parts = 1, least = blocks * ((panels + threads - 1) / threads);
  for (int64_t parts = 2; parts <= std::min(threads, blocks); parts++) {
    const int64_t across = threads / parts;
    const int64_t work = ((blocks + parts - 1) / parts) * ((panels + across - 1) / across);
    if (work < least) {
      least = work;
      row_parts = parts;
    }
  }
  const int64_t panel_parts = threads / row_parts;
  if (thread >= row_parts * panel_parts) {
    return {0, 0, 0, 0};
  }
  const int64_t i = thread / panel_parts, j = thread % panel_parts;
  return {
      std::min(rows, blocks * i / row_parts * FXQ_TILE_ROWS),
      std::min(rows, blocks * (i + 1) / row_parts * FXQ_TILE_ROWS),
      panels * j / panel_parts,
      panels * (j + 1) / panel_parts};
}

} // namespace
