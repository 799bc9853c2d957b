// The epilogue of an eager call where it is left to PyTorch: the sums are stored as they are.

namespace {

struct FxqEpilogue {
  const float *a_scale, *b_scale, *bias;
  int64_t a_scale_stride, b_scale_stride, kind;
  void* out;
};

// out[rows][width] of the panel at ``column`` from row ``first`` on.
inline void fxq_finish(
    const FxqEpilogue& e, const float* acc, int64_t first, int64_t rows, int64_t column, int64_t width, int64_t n) {
  for (int64_t r = 0; r < rows; r++) {
    float* out = static_cast<float*>(e.out) + (first + r) * n + column;
    std::memcpy(out, acc + r * FXQ_PANEL, width * sizeof(float));
  }
}

} // namespace
