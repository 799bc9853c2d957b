// Factors of factor.h as the columns of a panel want them, in C++ that a compiler vectorizes, and by eight with AVX2.

#include <immintrin.h>

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

FXQ_TARGET __attribute__((always_inline)) inline __m256i fxq_bits(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FXQ_TARGET __attribute__((always_inline)) inline __m256 fxq_load(const FxqBfloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(fxq_bits(&p->bits), 16));
}
// As fxq_value does it: AVX2 does not promise instructions for float16.
FXQ_TARGET __attribute__((always_inline)) inline __m256 fxq_load(const FxqFloat16* p) {
  const __m256i bits = fxq_bits(&p->bits), magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fff));
  const __m256i infinite = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7bff));
  const __m256i sign = _mm256_slli_epi32(_mm256_sub_epi32(bits, magnitude), 16);
  const __m256i more = _mm256_and_si256(infinite, _mm256_set1_epi32(0x7f800000));
  const __m256 value =
      _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 13)), _mm256_set1_ps(0x1p112f));
  return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_or_si256(sign, more)));
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
