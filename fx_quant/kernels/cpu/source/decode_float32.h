// Codes of a packed panel as float32: what float32.h multiplies.
//
// columns() gives the 64 columns of one k, that of part ``part`` of STEP k. Bytes are packed as [k][64].

namespace {

template <typename CODES>
struct FxqDecode {
  static constexpr bool SUBTRACTS = true, CORRECTS = false, IN_CACHE = false;
  static constexpr int64_t STEP = 1, PARTS = 1;
  static constexpr int64_t BYTES = 64; // of one k of a panel

  FXQ_INLINE static void columns(const uint8_t* p, int, __m512i (&out)[4]) {
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
      __m512 low, high;
      CODES::floats(p + j * 16, low, high);
      out[j] = _mm512_castps_si512(low);
      out[j + 1] = _mm512_castps_si512(high);
    }
  }
};

template <>
struct FxqDecode<FxqNibbles> {
  static constexpr bool SUBTRACTS = true, CORRECTS = false, IN_CACHE = false;
  static constexpr int64_t STEP = 8, PARTS = 8;
  static constexpr int64_t BYTES = 32;

  FXQ_INLINE static void columns(const uint8_t* p, int part, __m512i (&out)[4]) {
    // Four bits are looked up, so those of other codes need not be taken off.
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const unsigned shift = static_cast<unsigned>(part % 2 * 16 + part / 2 * 4);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512i word = _mm512_srli_epi32(_mm512_loadu_si512(p + j * 64), shift);
      out[j] = _mm512_castps_si512(_mm512_permutexvar_ps(word, values));
    }
  }
};

} // namespace
