// Codes of a packed panel as float32: [k][64], what float32.h multiplies.
//
// decode() writes ``count`` k, rounded up to STEP: (code - zero point) * scale of the 64 columns; null is 0 and 1. Bytes
// are packed as [k][64] too.

namespace {

template <typename CODES_>
struct FxqDecode {
  using CODES = CODES_;
  static constexpr bool ROUNDS = false;
  static constexpr int64_t STEP = 1;
  static constexpr int64_t BYTES = 64; // of one k of a panel

  FXQ_TARGET static void decode(
      const uint8_t* p, int64_t count, const float* zero_point, const float* scale, float* out) {
    __m512 zero[4], factor[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      zero[q] = fxq_or(zero_point, q * 16, 0.0f);
      factor[q] = fxq_or(scale, q * 16, 1.0f);
    }
    for (int64_t k = 0; k < count; k++, p += 64, out += 64) {
#pragma GCC unroll 2
      for (int q = 0; q < 4; q += 2) {
        __m512 low, high;
        CODES::floats(p + q * 16, low, high);
        _mm512_store_ps(out + q * 16, _mm512_mul_ps(_mm512_sub_ps(low, zero[q]), factor[q]));
        _mm512_store_ps(out + q * 16 + 16, _mm512_mul_ps(_mm512_sub_ps(high, zero[q + 1]), factor[q + 1]));
      }
    }
  }
};

template <>
struct FxqDecode<FxqNibbles> {
  using CODES = FxqNibbles;
  static constexpr bool ROUNDS = false;
  static constexpr int64_t STEP = 8;
  static constexpr int64_t BYTES = 32;

  FXQ_TARGET static void decode(
      const uint8_t* p, int64_t count, const float* zero_point, const float* scale, float* out) {
    for (int64_t k = 0; k < count; k += 8, p += 256, out += 512) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        const __m512 zero = _mm512_add_ps(fxq_or(zero_point, q * 16, 0.0f), _mm512_set1_ps(8.0f));
        const __m512 factor = fxq_or(scale, q * 16, 1.0f);
        const __m512i word = _mm512_loadu_si512(p + q * 64);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const __m512 code = FxqNibbles::floats(word, i);
          _mm512_store_ps(out + i * 64 + q * 16, _mm512_mul_ps(_mm512_sub_ps(code, zero), factor));
        }
      }
    }
  }
};

} // namespace
