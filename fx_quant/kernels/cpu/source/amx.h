// The tiles of AMX as a thread has them, and an activation as they read it.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

// The tiles of a thread: sums 0 to 3, a 4 and 5, b 6 and 7, with ``deep`` bytes of a row of a. They are let go of when
// the thread's part is done.
struct FxqTiles {
  int64_t rows = 0, deep = 0;

  FXQ_TARGET void configure(int64_t wanted, int64_t bytes = 64) {
    if (rows == wanted && deep == bytes) {
      return;
    }
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    const uint8_t upper = std::min<int64_t>(wanted, 16), lower = wanted > 16 ? wanted - 16 : upper;
    const uint8_t down = static_cast<uint8_t>(bytes / 4);
    const uint8_t heights[8] = {upper, upper, lower, lower, upper, lower, down, down};
    for (int tile = 0; tile < 8; tile++) {
      config.rows[tile] = heights[tile];
      config.bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? bytes : 64);
    }
    _tile_loadconfig(&config);
    rows = wanted;
    deep = bytes;
  }
  FXQ_TARGET ~FxqTiles() {
    if (rows) {
      _tile_release();
    }
  }
};

// Rows of an activation where tiles read them: for each block of rows 64 bytes of every row, then the next 64 bytes of
// every row, so that a tile is one piece of memory. As they are given they lie a power of two apart more often than not,
// which is in few places of the first cache. What is past k is 0.
template <typename A>
class FxqSteps {
  static constexpr int64_t DEEP = 64 / sizeof(A);
  std::unique_ptr<A[]> copy_;
  const A* data_;
  int64_t steps_;

 public:
  FxqSteps(const A* a, int64_t lda, int64_t rows, int64_t blocks, int64_t k) : steps_((k + DEEP - 1) / DEEP) {
    copy_.reset(new A[(rows * steps_ + 1) * DEEP]);
    A* out = copy_.get() + (64 - reinterpret_cast<uintptr_t>(copy_.get()) % 64) % 64 / sizeof(A);
    data_ = out;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = rows * block / blocks, height = rows * (block + 1) / blocks - first;
      for (int64_t r = 0; r < height; r++) {
        const A* const row = a + (first + r) * lda;
        A* const at = out + r * DEEP;
        for (int64_t step = 0; step < k / DEEP; step++) {
          std::memcpy(at + step * height * DEEP, row + step * DEEP, 64);
        }
        if (k % DEEP) {
          A* const last = at + k / DEEP * height * DEEP;
          std::memset(last, 0, 64);
          std::memcpy(last, row + k / DEEP * DEEP, k % DEEP * sizeof(A));
        }
      }
      out += height * steps_ * DEEP;
    }
  }
  // Those of the block that begins at ``row``.
  const A* from(int64_t row) const {
    return data_ + row * steps_ * DEEP;
  }
};

// What is asked for while tiles multiply: the lines from ``at`` to ``end``, ``step`` bytes of them at a time.
struct FxqTilesAhead {
  const char *at, *end;
  int64_t step;

  __attribute__((always_inline)) inline void ask() {
    for (const char* to = std::min(at + step, end); at < to; at += 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

// The sums of one or two tiles of rows, all 0.
template <bool TWO>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// They, to ``out``, whose rows are ``columns`` elements of 4 bytes apart.
template <bool TWO, typename T>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_store_sums(T* out, int64_t columns) {
  _tile_stored(0, out, columns * 4);
  _tile_stored(1, out + 16, columns * 4);
  if (TWO) {
    _tile_stored(2, out + 16 * columns, columns * 4);
    _tile_stored(3, out + 16 * columns + 16, columns * 4);
  }
}

} // namespace
