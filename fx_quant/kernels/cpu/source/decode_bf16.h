// Codes of a packed panel as pairs of bfloat16, in which each is exact: what bf16.h multiplies.
//
// columns() gives the 64 columns of DOT::GROUP = 2 k, those of part ``part`` of STEP k. Bytes are packed as
// [k / 2][2 halves][4 lanes][2 quarters][4 columns][2]: within a lane of 16 bytes, interleaving makes neighbours of
// what belongs together, and each register has 16 columns in order.

namespace {

constexpr uint16_t fxq_bf16_of(int i) {
  int exponent = 0;
  while (i >> (exponent + 1)) {
    exponent++;
  }
  return i == 0 ? 0 : static_cast<uint16_t>((127 + exponent) << 7 | ((i << (7 - exponent)) & 0x7f));
}

// The low and the high byte of 128 words.
struct FxqBytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  template <typename F>
  constexpr explicit FxqBytes(F word) {
    for (int i = 0; i < 128; i++) {
      low[i] = static_cast<uint8_t>(word(i));
      high[i] = static_cast<uint8_t>(word(i) >> 8);
    }
  }
  FXQ_INLINE static __m512i look_up(const uint8_t (&table)[128], __m512i code) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  }
};

constexpr FxqBytes FXQ_INTEGERS(fxq_bf16_of);

// Bytes of bfloat16 of 64 codes; ``low`` and ``high`` are those of the codes in the same places.
template <typename CODES>
struct FxqWords;

template <>
struct FxqWords<FxqSigned> {
  FXQ_INLINE static void bytes(__m512i code, __m512i& low, __m512i& high) {
    const __m512i least = _mm512_set1_epi8(static_cast<char>(0x80)), magnitude = _mm512_abs_epi8(code);
    low = FxqBytes::look_up(FXQ_INTEGERS.low, magnitude);
    const __m512i unsigned_high = FxqBytes::look_up(FXQ_INTEGERS.high, magnitude);
    high = _mm512_ternarylogic_epi32(unsigned_high, code, least, 0xf8); // | (code & 0x80)
    // -128 has the index of 0.
    high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(code, least), _mm512_set1_epi8(static_cast<char>(0xc3)));
  }
};

template <>
struct FxqWords<FxqUnsigned> {
  FXQ_INLINE static void bytes(__m512i code, __m512i& low, __m512i& high) {
    // From 128 to 255 the exponent is the same, and the code less 128 is the mantissa.
    const __mmask64 is_large = _mm512_movepi8_mask(code);
    const __m512i small = FxqBytes::look_up(FXQ_INTEGERS.low, code);
    low = _mm512_mask_sub_epi8(small, is_large, code, _mm512_set1_epi8(static_cast<char>(0x80)));
    high = _mm512_mask_mov_epi8(FxqBytes::look_up(FXQ_INTEGERS.high, code), is_large, _mm512_set1_epi8(0x43));
  }
};

#ifdef FXQ_TABLE
constexpr uint16_t FXQ_FLOATS[128] = {FXQ_TABLE};
constexpr FxqBytes FXQ_FLOAT_BYTES([](int i) { return FXQ_FLOATS[i]; });

template <>
struct FxqWords<FxqFloat8> {
  FXQ_INLINE static void bytes(__m512i code, __m512i& low, __m512i& high) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    low = FxqBytes::look_up(FXQ_FLOAT_BYTES.low, code);
    high = _mm512_ternarylogic_epi32(FxqBytes::look_up(FXQ_FLOAT_BYTES.high, code), code, sign, 0xf8);
    if (FXQ_MINUS_ZERO != 0x8000) {
      const __mmask64 special = _mm512_cmpeq_epi8_mask(code, sign);
      low = _mm512_mask_mov_epi8(low, special, _mm512_set1_epi8(static_cast<char>(FXQ_MINUS_ZERO & 0xff)));
      high = _mm512_mask_mov_epi8(high, special, _mm512_set1_epi8(static_cast<char>(FXQ_MINUS_ZERO >> 8)));
    }
  }
};
#endif

template <typename CODES>
struct FxqDecode {
  static constexpr bool SUBTRACTS = false, CORRECTS = true, IN_CACHE = false;
  static constexpr int64_t STEP = 2, PARTS = 1;
  static constexpr int64_t BYTES = 64; // of one k of a panel

  FXQ_INLINE static void columns(const uint8_t* p, int, __m512i (&out)[4]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m512i low, high;
      FxqWords<CODES>::bytes(_mm512_loadu_si512(p + half * 64), low, high);
      out[half * 2] = _mm512_unpacklo_epi8(low, high);
      out[half * 2 + 1] = _mm512_unpackhi_epi8(low, high);
    }
  }
};

template <>
struct FxqDecode<FxqNibbles> {
  static constexpr bool SUBTRACTS = false, CORRECTS = true, IN_CACHE = false;
  static constexpr int64_t STEP = 8, PARTS = 4;
  static constexpr int64_t BYTES = 32;

  FXQ_INLINE static void columns(const uint8_t* p, int part, __m512i (&out)[4]) {
    // Five bits are looked up, of which the fifth is of the next code, so it must not matter.
    alignas(64) static constexpr uint16_t table[32] = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
        0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
        0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    };
    const __m512i values = _mm512_load_si512(table);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512i word = _mm512_srli_epi16(_mm512_loadu_si512(p + j * 64), static_cast<unsigned>(part * 4));
      out[j] = _mm512_permutexvar_epi16(word, values);
    }
  }
};

} // namespace
