// Factors of any kind, read by ``fxq_read<T>`` of factors.h or factors_plain.h.

#include <type_traits>

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

// What scales of groups are in memory where they are read in place. Those of 16 bits are half as much to read.
#ifndef FXQ_SCALE
#define FXQ_SCALE float
#endif
using FxqScale = FXQ_SCALE;

// Factors of some groups of a panel: of type T where they are, if they are in panels. Copied first, they would come in
// bursts, for which a core waits that reads one stream of codes as fast as memory gives it.
template <typename T>
struct FxqGroupFactors {
  static constexpr FxqKind KIND = std::is_same_v<T, FxqFloat16> ? FXQ_FLOAT16
      : std::is_same_v<T, FxqBfloat16>                          ? FXQ_BFLOAT16
                                                                : FXQ_FLOAT;
  static constexpr bool COPIES = KIND == FXQ_FLOAT; // others are asked for only where they are in panels
  const T* data;
  bool in_place;
  alignas(64) float copied[COPIES ? FXQ_GROUPS : 1][FXQ_PANEL];

  void find(const FxqFactor& f, int64_t panel, int64_t n, int64_t first, int64_t count) {
    in_place = !COPIES || f.kind == FXQ_NONE || (f.kind == KIND && f.panel_stride && f.group_stride == FXQ_PANEL);
    if constexpr (COPIES) {
      if (!in_place || f.kind == FXQ_NONE) {
        data = copied[0];
        fxq_read(f, panel * FXQ_PANEL, n, first, count, copied);
        return;
      }
    }
    data = static_cast<const T*>(f.data) + panel * f.panel_stride + first * FXQ_PANEL;
  }
  const T* operator[](int64_t group) const {
    return data + group * FXQ_PANEL;
  }
  // What find() will want next, little by little.
  FxqAhead ahead(const FxqFactor& f, int64_t panel, int64_t first, int64_t count, int64_t steps) const {
    return in_place ? FxqAhead{reinterpret_cast<const char*>(&f), 0} : fxq_factors_ahead(f, panel, first, count, steps);
  }
};

} // namespace
