// int8 codes by vpmaddwd: even and odd bytes as 16-bit lanes, whose products are summed in pairs in 32 bits.
//
// The packed weight (+128) is unsigned and the activation signed, as for vpdpbusd, so a row starts from
// -128 * sum_k a[k]. vpmaddubsw, which would take both as they are, saturates.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

struct FxqInt8Avx2 {
  using A = int8_t;
  using B = uint8_t;
  using Acc = int32_t;
  using Vec = __m256i;
  using Codes = __m256i;
  struct State {};
  static constexpr int64_t GROUP = 4;
  static constexpr int LANES = 8, ROWS = 6, PARTS = 2;

  // Of 16 registers: 6 x 2 accumulators, 2 of b, 1 of a and 1 of products.
  static constexpr int columns(int rows) {
    return rows == 1 ? 8 : rows == 2 ? 4 : 2;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int part) {
    return part == 0 ? _mm256_and_si256(codes, _mm256_set1_epi16(0xff)) : _mm256_srli_epi16(codes, 8);
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes broadcast(int32_t lane) {
    return _mm256_set1_epi32(lane);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec splat(Acc value) {
    return _mm256_set1_epi32(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in int8_vnni.h: the constraints keep each accumulator in its register.
    Vec products;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(row), "x"(columns));
    return acc;
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), acc);
  }

  // For groups.h: codes of 4 bits, and float32 of sums.
  using Float = __m256;

  FXQ_TARGET __attribute__((always_inline)) static Codes nibbles(Codes bytes, int half) {
    return _mm256_and_si256(half ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
  }
  FXQ_TARGET __attribute__((always_inline)) static Float floats(Vec acc) {
    return _mm256_cvtepi32_ps(acc);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float all(float value) {
    return _mm256_set1_ps(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float times(Float x, Float y) {
    return _mm256_mul_ps(x, y);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float plus(Float sum, Float x, Float y) {
    return _mm256_fmadd_ps(x, y, sum);
  }
  FXQ_TARGET __attribute__((always_inline)) static Float less(Float sum, Float x, Float y) {
    return _mm256_fnmadd_ps(x, y, sum);
  }

  // Even and odd bytes of ``count`` codes, with their signs, as pairs of 16-bit lanes; zeros up to a whole register.
  template <int64_t N>
  FXQ_TARGET static void widen(const A* a, int64_t count, int32_t (&out)[2][N]) {
    for (int64_t i = 0; i < count; i += 32) {
      __m256i codes = _mm256_setzero_si256();
      std::memcpy(&codes, a + i, std::min<int64_t>(32, count - i));
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[0] + i / 4), even);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[1] + i / 4), _mm256_srai_epi16(codes, 8));
    }
  }

  FXQ_TARGET __attribute__((noinline)) static Acc row_start(const A* a, int64_t k) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < k; i += 32) {
      __m256i codes = _mm256_setzero_si256();
      std::memcpy(&codes, a + i, std::min<int64_t>(32, k - i));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, codes), _mm256_set1_epi16(1)));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    int64_t total = 0;
    for (int32_t lane : lanes) {
      total += lane;
    }
    return static_cast<Acc>(-128 * total);
  }
};

} // namespace
