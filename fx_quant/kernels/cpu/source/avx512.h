// What the tiles of 512-bit registers share; see tile.h for the names.

#include <immintrin.h>

#include <cstdint>

namespace {

struct FxqAvx512 {
  using Codes = __m512i;
  struct State {};
  static constexpr int LANES = 16, ROWS = 6, PARTS = 1;

  // Of 32 registers: 6 x 4 accumulators, 4 of b, and the others for a and for products.
  static constexpr int columns(int) {
    return 4;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int) {
    return codes;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes broadcast(int32_t lane) {
    return _mm512_set1_epi32(lane);
  }
};

struct FxqAvx512Float : FxqAvx512 {
  using Acc = float;
  using Vec = __m512;

  FXQ_TARGET __attribute__((always_inline)) static Vec splat(Acc value) {
    return _mm512_set1_ps(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm512_store_ps(out, acc);
  }
  static Acc row_start(const void*, int64_t) {
    return 0.0f;
  }
};

struct FxqAvx512Int8 : FxqAvx512 {
  using A = int8_t;
  using B = uint8_t;
  using Acc = int32_t;
  using Vec = __m512i;
  static constexpr int64_t GROUP = 4;

  FXQ_TARGET __attribute__((always_inline)) static Vec splat(Acc value) {
    return _mm512_set1_epi32(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm512_store_si512(out, acc);
  }

  // For groups.h: codes of 4 bits, and float32 of sums.
  using Float = __m512;

  FXQ_TARGET __attribute__((always_inline)) static Codes nibbles(Codes bytes, int half) {
    return _mm512_and_si512(half ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
  }
  FXQ_TARGET __attribute__((always_inline)) static Float floats(Vec acc) {
    return _mm512_cvtepi32_ps(acc);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float all(float value) {
    return _mm512_set1_ps(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float times(Float x, Float y) {
    return _mm512_mul_ps(x, y);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float plus(Float sum, Float x, Float y) {
    return _mm512_fmadd_ps(x, y, sum);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float less(Float sum, Float x, Float y) {
    return _mm512_fnmadd_ps(x, y, sum);
  }
};

} // namespace
