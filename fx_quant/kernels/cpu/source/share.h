// What every matmul over panels of 64 columns shares: how threads divide the output, and what is asked for ahead.

#include <algorithm>
#include <cstdint>
#include <cstring>

// Inductor turns this off for the loops that it writes itself.
#if defined(__clang__)
#define FXQ_VECTORIZED
#define FXQ_VECTORIZE _Pragma("clang loop vectorize(enable)")
#else
#define FXQ_VECTORIZED __attribute__((optimize("O3", "tree-loop-vectorize")))
#define FXQ_VECTORIZE
#endif

namespace {

constexpr int64_t FXQ_PANEL = 64;
constexpr int64_t FXQ_TILE_ROWS = 6;    // of a tile in registers
#ifndef FXQ_ROWS_AT_MOST
#define FXQ_ROWS_AT_MOST 6 // that a block has, where it is known that there are fewer rows
#endif
constexpr int64_t FXQ_CHUNK_ROWS = 384; // rows that stream past a panel while it is in cache

// What is instantiated for a block of ``rows``: none that is never called, as each takes a compiler's time.
constexpr int fxq_rows_of(int rows) {
  return rows < FXQ_ROWS_AT_MOST ? rows : FXQ_ROWS_AT_MOST;
}

// Passes of nearly as many rows each over the whole weight. Tiles of AMX are so fast that they would wait for an activation
// that does not stay in the second cache.
struct FxqPasses {
  int64_t rows, count;

  FxqPasses(int64_t rows, [[maybe_unused]] int64_t bytes_of_row) : rows(rows) {
    count = (rows + FXQ_CHUNK_ROWS - 1) / FXQ_CHUNK_ROWS;
#ifdef FXQ_AMX
    const int64_t most = std::max<int64_t>(64, (1 << 20) / std::max<int64_t>(bytes_of_row, 1));
    count = std::max(count, (rows + most / 2) / most);
#endif
  }
  int64_t start(int64_t pass) const {
    return rows * pass / count;
  }
};

// The rows from ``row`` on that are multiplied together, of ``blocks`` such blocks the one called ``index``.
struct FxqBlock {
  int64_t row, rows, index, blocks;
};

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

// The k from ``from`` to ``to`` of a panel of ``k``.
struct FxqPart {
  int64_t from, to, k;
};

// The parts of nearly equal size that all blocks of rows go over before the next, so that it is in cache for all but the
// first of them; one block needs no parts. Each but the last is a multiple of 64.
struct FxqParts {
  int64_t k, step, count;

  FxqParts(const FxqPlan& plan, int64_t blocks, int64_t k) : k(k) {
    const int64_t least = blocks == 1 ? 1 : std::max<int64_t>(1, (k + plan.chunk_k - 1) / plan.chunk_k);
    step = std::max<int64_t>(64, ((k + least - 1) / least + 63) / 64 * 64);
    count = std::max<int64_t>(1, (k + step - 1) / step);
  }
  FxqPart operator[](int64_t i) const {
    return {i * step, std::min(k, (i + 1) * step), k};
  }
};

// Rows of an activation as tiles of DOT want them: where they are, with what their sums start from. There are at most
// FXQ_CHUNK_ROWS, in blocks of nearly equal height.
template <typename DOT>
struct FxqTileRows {
  using A = typename DOT::A;
  const A* a;
  int64_t lda;
  alignas(64) typename DOT::Acc start[FXQ_CHUNK_ROWS];

  FxqTileRows(const A* a, int64_t lda, int64_t rows, int64_t, int64_t k) : a(a), lda(lda) {
    for (int64_t r = 0; r < rows; r++) {
      start[r] = DOT::row_start(a + r * lda, k);
    }
  }
};

// Asks for ``bytes`` from p on, which are wanted after the panel that comes first.
inline void fxq_expect(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
  }
}

// Rows of a panel to where they belong in ``out``, whose rows are ``stride`` apart.
template <typename T>
inline void fxq_store(const T* acc, int64_t rows, int64_t columns, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r++, acc += FXQ_PANEL, out += stride) {
    std::memcpy(out, acc, columns == FXQ_PANEL ? FXQ_PANEL * sizeof(T) : columns * sizeof(T));
  }
}

// One thread's part of the output: rows x panels.
struct FxqShare {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// Threads form a grid of row parts x panel parts, the one whose largest part is smallest; ties go to fewer row parts,
// because each row part reads the whole weight.
inline FxqShare fxq_share(
    int64_t rows, int64_t panels, int64_t threads, int64_t thread, int64_t tile_rows = FXQ_TILE_ROWS) {
  const int64_t blocks = (rows + tile_rows - 1) / tile_rows;
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
      std::min(rows, blocks * i / row_parts * tile_rows),
      std::min(rows, blocks * (i + 1) / row_parts * tile_rows),
      panels * j / panel_parts,
      panels * (j + 1) / panel_parts};
}

} // namespace
