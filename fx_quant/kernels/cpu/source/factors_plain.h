// Factors of factor.h as the columns of a panel want them, in C++ that a compiler vectorizes.

namespace {

template <typename T>
FXQ_TARGET __attribute__((always_inline)) inline float fxq_value(T x) {
  return static_cast<float>(x);
}
FXQ_TARGET __attribute__((always_inline)) inline float fxq_value(FxqBfloat16 x) {
  return fxq_float(x.bits);
}
FXQ_TARGET __attribute__((always_inline)) inline float fxq_value(FxqFloat16 x) {
  // The exponent is moved by 112; infinities and NaN have all of its bits.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t bits = magnitude;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  value *= 0x1p112f;
  std::memcpy(&bits, &value, sizeof(value));
  bits |= sign | (magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0u);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Row j of ``out`` is group ``first`` + j of the 64 rows from ``column`` on; rows beyond n are 0 or those of padding.
template <typename T>
FXQ_TARGET FXQ_VECTORIZED inline void fxq_read(
    const FxqFactor& f, int64_t column, int64_t n, int64_t first, int64_t count, float (*out)[FXQ_PANEL]) {
  const T* data = static_cast<const T*>(f.data) + first * f.group_stride;
  for (int64_t j = 0; j < count; j++, data += f.group_stride) {
    if (f.panel_stride) {
      const T* panel = data + column / FXQ_PANEL * f.panel_stride;
      for (int64_t c = 0; c < FXQ_PANEL; c++) {
        out[j][c] = fxq_value(panel[c]);
      }
    } else {
      for (int64_t c = 0; c < FXQ_PANEL; c++) {
        out[j][c] = column + c < n ? fxq_value(data[fxq_row(f, column + c)]) : 0.0f;
      }
    }
  }
}

} // namespace
