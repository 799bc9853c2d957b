// Scales and zero points of a weight [n, k], and where each is.

#include <algorithm>
#include <cstdint>

namespace {

enum FxqKind : int64_t {
  FXQ_NONE = 0,
  FXQ_FLOAT = 1,
  FXQ_INT8 = 2,
  FXQ_UINT8 = 3,
  FXQ_INT32 = 4,
  FXQ_INT64 = 5,
  FXQ_BFLOAT16 = 6,
  FXQ_FLOAT16 = 7,
  FXQ_INT16 = 8
};

// Bit patterns of 16-bit floats.
struct FxqBfloat16 {
  uint16_t bits;
};
struct FxqFloat16 {
  uint16_t bits;
};

// Element (i, j) belongs to rows i * rows.. of the weight and to group j along k; a stride of 0 repeats one. With a
// panel_stride, which is 0 otherwise, the 64 rows of a panel are side by side, and no row is missing. A zero point that
// is ``added`` is an offset of the scaled codes, code * scale + offset, where another is one of the codes alone.
struct FxqFactor {
  FxqKind kind;
  const void* data;
  int64_t rows, row_stride, group_stride, panel_stride, added;
};

constexpr int64_t FXQ_GROUPS = 16; // groups that are read at once

// Where the factors of a row of the weight are: rows of their own, mostly, and a division takes as long as a read.
inline int64_t fxq_row(const FxqFactor& f, int64_t row) {
  return (f.rows == 1 ? row : row / f.rows) * f.row_stride;
}

constexpr int64_t FXQ_KIND_SIZES[] = {0, 4, 1, 1, 4, 8, 2, 2, 2};

// What fxq_read will want next of a panel, to be asked for little by little: ``count`` groups from ``first`` on, over
// ``steps`` steps. The rows of factors that are not in panels are each elsewhere, and not asked for.
inline FxqAhead fxq_factors_ahead(const FxqFactor& f, int64_t panel, int64_t first, int64_t count, int64_t steps) {
  const int64_t size = FXQ_KIND_SIZES[f.kind];
  const char* data = static_cast<const char*>(f.data) + (panel * f.panel_stride + first * f.group_stride) * size;
  if (f.panel_stride == 0) {
    return {reinterpret_cast<const char*>(&f), 0};
  }
  return {data, count * f.group_stride * size / std::max<int64_t>(steps, 1)};
}

} // namespace
