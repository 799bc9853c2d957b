// int8 codes by the 512-bit vpmaddwd, for CPUs with AVX-512 and without VNNI; as in int8_avx2.h.

#define FXQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

#include <immintrin.h>

#include <cstdint>

namespace {

struct FxqInt8Avx512 {
  using A = int8_t;
  using B = uint8_t;
  using Acc = int32_t;
  using Vec = __m512i;
  using Codes = __m512i;
  struct State {};
  static constexpr int64_t GROUP = 4;
  static constexpr int LANES = 16, ROWS = 6, PARTS = 2;

  // Of 32 registers: 6 x 4 accumulators, 4 of b, 1 of a and 1 of products.
  static constexpr int columns(int) {
    return 4;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int part) {
    return part == 0 ? _mm512_and_si512(codes, _mm512_set1_epi16(0xff)) : _mm512_srli_epi16(codes, 8);
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes broadcast(int32_t lane) {
    return _mm512_set1_epi32(lane);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec splat(Acc value) {
    return _mm512_set1_epi32(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in int8_vnni.h: the constraints keep each accumulator in its register.
    Vec products;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(products) : "v"(row), "v"(columns));
    return acc;
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm512_store_si512(out, acc);
  }

  FXQ_TARGET __attribute__((always_inline)) static __m512i codes(const A* a, int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(a) : _mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - count), a);
  }

  // Even and odd bytes of ``count`` codes, with their signs, as pairs of 16-bit lanes; zeros up to a whole register.
  template <int64_t N>
  FXQ_TARGET static void widen(const A* a, int64_t count, int32_t (&out)[2][N]) {
    for (int64_t i = 0; i < count; i += 64) {
      const __m512i all = codes(a + i, count - i);
      _mm512_store_si512(out[0] + i / 4, _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8));
      _mm512_store_si512(out[1] + i / 4, _mm512_srai_epi16(all, 8));
    }
  }

  FXQ_TARGET __attribute__((noinline)) static Acc row_start(const A* a, int64_t k) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 64) {
      const __m512i pairs = _mm512_maddubs_epi16(ones, codes(a + i, k - i));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
    return static_cast<Acc>(-128 * static_cast<int64_t>(_mm512_reduce_add_epi32(sum)));
  }
};

} // namespace
