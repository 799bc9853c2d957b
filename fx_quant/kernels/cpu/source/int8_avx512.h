// int8 codes by the 512-bit vpmaddwd, for CPUs with AVX-512 and without VNNI; as in int8_avx2.h.

namespace {

struct FxqInt8Avx512 : FxqAvx512Int8 {
  static constexpr int PARTS = 2;

  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int part) {
    return part == 0 ? _mm512_and_si512(codes, _mm512_set1_epi16(0xff)) : _mm512_srli_epi16(codes, 8);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in int8_vnni.h: the constraints keep each accumulator in its register.
    Vec products;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(products) : "v"(row), "v"(columns));
    return acc;
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
