// How the codes of a weight are stored, and 32 bytes of them as float32.

#include <immintrin.h>

#include <cstdint>

namespace {

struct FxqSigned {
  FXQ_INLINE static void floats(const uint8_t* p, __m512& low, __m512& high) {
    low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16))));
  }
};

struct FxqUnsigned {
  FXQ_INLINE static void floats(const uint8_t* p, __m512& low, __m512& high) {
    low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16))));
  }
};

#ifdef FXQ_TABLE
// FXQ_TABLE lists the 128 codes without a sign as bfloat16, in which each is exact; FXQ_MINUS_ZERO is the code 0x80.
struct FxqFloat8 {
  FXQ_INLINE static __m512i words(const uint8_t* p) {
    alignas(64) static constexpr uint16_t table[128] = {FXQ_TABLE};
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const auto look_up = [&](const uint16_t* half) {
      return _mm512_permutex2var_epi16(_mm512_load_si512(half), code, _mm512_load_si512(half + 32));
    };
    const __mmask32 is_large = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_mov_epi16(look_up(table), is_large, look_up(table + 64));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(static_cast<short>(0x8000)));
    const __m512i value = _mm512_or_si512(magnitude, sign);
    if (FXQ_MINUS_ZERO == 0x8000) {
      return value;
    }
    const __mmask32 special = _mm512_cmpeq_epi16_mask(code, _mm512_set1_epi16(0x80));
    return _mm512_mask_mov_epi16(value, special, _mm512_set1_epi16(static_cast<short>(FXQ_MINUS_ZERO)));
  }
  FXQ_INLINE static void floats(const uint8_t* p, __m512& low, __m512& high) {
    const __m512i w = words(p);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(w)), 16));
    high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1)), 16));
  }
};
#endif

// code + 8 in half a byte: eight k of a column are the nibbles of one 32-bit word, even k from bit 0 on, odd from 16.
struct FxqNibbles {};

} // namespace
