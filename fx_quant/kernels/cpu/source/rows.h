// A packed weight, and rows of an activation as the panels of such a weight want them.

#include <vector>

namespace {

// [n, k] weight in panels of 64 columns; factors of groups of ``group`` neighbours along k. ``row_scale`` is the
// activation's: element (r, j) for row r and group j. Without groups there is no scale here.
struct FxqWeight {
  const uint8_t* codes;
  int64_t n, k, group;
  FxqFactor scale, zero_point;
  const float* row_scale;
  int64_t row_scale_stride, row_scale_group_stride;
  // Of int8 activations only: their zero point for each row, and the sums of the weight's codes over each group.
  const int32_t* row_zero_point;
  int64_t row_zero_point_stride;
  FxqFactor code_sum;
};

// The scale of a row of the activation and a group; null where there is none.
inline const float* fxq_row_scale(const FxqWeight& w, int64_t row, int64_t group) {
  return w.row_scale == nullptr ? nullptr
                                : w.row_scale + row * w.row_scale_stride + group * w.row_scale_group_stride;
}

// Rows of an activation where tiles read them: copied where they begin in the same few places of the first cache.
template <typename A>
struct FxqSpread {
  const A* data;
  int64_t stride;

  FxqSpread(const A* a, int64_t lda, [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t k) : data(a), stride(lda) {
#ifdef FXQ_AMX
    constexpr int64_t LINE = 64 / sizeof(A);
    if (rows > 6 && lda % (16 * LINE) == 0) {
      stride = (k + LINE - 1) / LINE * LINE + LINE;
      copy_.resize(rows * stride + LINE);
      A* const start = copy_.data() + (LINE - reinterpret_cast<uintptr_t>(copy_.data()) / sizeof(A) % LINE) % LINE;
      for (int64_t r = 0; r < rows; r++) {
        std::memcpy(start + r * stride, a + r * lda, k * sizeof(A));
      }
      data = start;
    }
#endif
  }

 private:
  std::vector<A> copy_;
};

// Rows of an activation. What a zero point is multiplied by, their sums over the groups along k, is known beforehand.
template <typename A>
class FxqRows {
  FxqSpread<A> spread_;

 public:
  FxqRows(const A* a, int64_t lda, int64_t rows, const FxqWeight& w, bool sums)
      : spread_(a, lda, rows, w.k),
        data(spread_.data),
        stride(spread_.stride),
        groups_((w.k + w.group - 1) / w.group) {
    if (!sums || w.zero_point.kind == FXQ_NONE) {
      return;
    }
    sums_.resize(rows * groups_);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < groups_; j++) {
        float sum = 0.0f;
        for (int64_t k = j * w.group; k < std::min(w.k, (j + 1) * w.group); k++) {
          sum += fxq_float(a[r * lda + k]);
        }
        sums_[r * groups_ + j] = sum;
      }
    }
  }
  float sum(int64_t row, int64_t group) const {
    return sums_[row * groups_ + group];
  }

  const A* const data;
  const int64_t stride;

 private:
  int64_t groups_;
  std::vector<float> sums_;
};

} // namespace
