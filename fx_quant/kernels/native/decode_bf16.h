// Codes of a packed panel as pairs of bfloat16: [k / 2][64][2], what bf16.h multiplies.
//
// decode() writes ``count`` k, rounded up to STEP, less the zero points of the 64 columns (null is 0), which lie between
// CODES::LEAST and CODES::MOST. Bytes are packed as [k / 2][64][2] too.

namespace {

template <typename CODES>
FXQ_INLINE __m512i fxq_pairs(const uint8_t* p, __m512 zero_low, __m512 zero_high) {
  __m512 low, high;
  CODES::floats(p, low, high);
  // The low half of the result is the second operand.
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(_mm512_sub_ps(high, zero_high), _mm512_sub_ps(low, zero_low)));
}

template <typename CODES_>
struct FxqDecode {
  using CODES = CODES_;
  static constexpr bool ROUNDS = true; // differences beyond 256
  static constexpr int64_t STEP = 2;
  static constexpr int64_t BYTES = 64; // of one k of a panel

  FXQ_TARGET static void decode(const uint8_t* p, int64_t count, const float* zero_point, const float*, uint16_t* out) {
    __m512 zero[8];
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++) {
      const __m512i lanes = _mm512_add_epi32(twice, _mm512_set1_epi32(q % 2 * 8));
      zero[q] = _mm512_permutexvar_ps(lanes, fxq_or(zero_point, q / 2 * 16, 0.0f));
    }
    for (int64_t k = 0; k < count; k += 2, p += 128, out += 128) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        _mm512_store_si512(out + q * 32, fxq_pairs<CODES>(p + q * 32, zero[2 * q], zero[2 * q + 1]));
      }
    }
  }
};

#ifdef FXQ_TABLE
template <>
FXQ_INLINE __m512i fxq_pairs<FxqFloat8>(const uint8_t* p, __m512, __m512) {
  return FxqFloat8::words(p);
}
#endif

template <>
struct FxqDecode<FxqNibbles> {
  using CODES = FxqNibbles;
  static constexpr bool ROUNDS = true;
  static constexpr int64_t STEP = 8;
  static constexpr int64_t BYTES = 32;

  // Codes and zero points are 0..15 here, so differences have five bits, by which a table of their values is indexed.
  FXQ_TARGET static void decode(const uint8_t* p, int64_t count, const float* zero_point, const float*, uint16_t* out) {
    alignas(64) static constexpr uint16_t table[32] = {
        // 0 .. 15, then -16 .. -1
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
        0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
    };
    const __m512i values = _mm512_load_si512(table), nibble = _mm512_set1_epi16(15);
    __m512i less[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      const __m512i z = _mm512_cvtps_epi32(_mm512_add_ps(fxq_or(zero_point, q * 16, 0.0f), _mm512_set1_ps(8.0f)));
      less[q] = _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
    }
    for (int64_t k = 0; k < count; k += 8, p += 256, out += 512) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        const __m512i word = _mm512_loadu_si512(p + q * 64);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m512i code = _mm512_and_si512(_mm512_srli_epi16(word, i * 4), nibble);
          _mm512_store_si512(
              out + i * 128 + q * 32, _mm512_permutexvar_epi16(_mm512_sub_epi16(code, less[q]), values));
        }
      }
    }
  }
};

} // namespace
