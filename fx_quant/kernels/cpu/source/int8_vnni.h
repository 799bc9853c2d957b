// int8 codes by vpdpbusd: the packed weight (+128) is the unsigned operand, the activation the signed one.
//
// sum_k a * w = sum_k a * (w + 128) - 128 * sum_k a, all modulo 2^32, so a row starts from -128 * sum_k a[k].

namespace {

struct FxqInt8 : FxqAvx512Int8 {
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // gcc copies and spills accumulators of the intrinsic; the constraint of the assembly keeps each in its register.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(row));
    return acc;
  }

  FXQ_TARGET __attribute__((noinline)) static Acc row_start(const A* a, int64_t k) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(a + i));
    }
    if (i < k) {
      const __mmask64 rest = ~uint64_t{0} >> (64 - (k - i));
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(rest, a + i));
    }
    return static_cast<Acc>(-128 * static_cast<int64_t>(_mm512_reduce_add_epi32(sum)));
  }
};

} // namespace
