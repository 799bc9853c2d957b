// Factors of any kind, read by ``fxq_read<T>`` of factors.h or factors_plain.h.

namespace {

inline void fxq_read(
    const FxqFactor& f, int64_t column, int64_t n, int64_t first, int64_t count, float (*out)[FXQ_PANEL]) {
  switch (f.kind) {
    case FXQ_NONE: return;
    case FXQ_FLOAT: return fxq_read<float>(f, column, n, first, count, out);
    case FXQ_INT8: return fxq_read<int8_t>(f, column, n, first, count, out);
    case FXQ_UINT8: return fxq_read<uint8_t>(f, column, n, first, count, out);
    case FXQ_INT32: return fxq_read<int32_t>(f, column, n, first, count, out);
    case FXQ_INT64: return fxq_read<int64_t>(f, column, n, first, count, out);
    case FXQ_BFLOAT16: return fxq_read<FxqBfloat16>(f, column, n, first, count, out);
    case FXQ_FLOAT16: return fxq_read<FxqFloat16>(f, column, n, first, count, out);
    case FXQ_INT16: return fxq_read<int16_t>(f, column, n, first, count, out);
  }
}

// Factors of some groups of a panel: floats where they are, if they are in panels. Copied first, they would come in
// bursts, for which a core waits that reads one stream of codes as fast as memory gives it.
struct FxqGroupFactors {
  const float* data;
  bool in_place;
  alignas(64) float copied[FXQ_GROUPS][FXQ_PANEL];

  void find(const FxqFactor& f, int64_t panel, int64_t n, int64_t first, int64_t count) {
    in_place = f.kind == FXQ_NONE || (f.kind == FXQ_FLOAT && f.panel_stride && f.group_stride == FXQ_PANEL);
    if (f.kind != FXQ_NONE && in_place) {
      data = static_cast<const float*>(f.data) + panel * f.panel_stride + first * FXQ_PANEL;
    } else {
      data = copied[0];
      fxq_read(f, panel * FXQ_PANEL, n, first, count, copied);
    }
  }
  const float* operator[](int64_t group) const {
    return data + group * FXQ_PANEL;
  }
  // What find() will want next, little by little.
  FxqAhead ahead(const FxqFactor& f, int64_t panel, int64_t first, int64_t count, int64_t steps) const {
    return in_place ? FxqAhead{reinterpret_cast<const char*>(&f), 0} : fxq_factors_ahead(f, panel, first, count, steps);
  }
};

} // namespace
