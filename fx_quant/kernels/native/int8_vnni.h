// int8 codes by vpdpbusd: the packed weight (+128) is the unsigned operand, the activation the signed one.
//
// sum_k a * w = sum_k a * (w + 128) - 128 * sum_k a, all modulo 2^32, so a row starts from -128 * sum_k a[k].

#ifndef FXQ_TARGET
#define FXQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#endif

#include <immintrin.h>

#include <cstdint>

namespace {

struct FxqInt8 {
  using A = int8_t;
  using B = uint8_t;
  using Acc = int32_t;
  using Vec = __m512i;
  using Codes = __m512i;
  struct State {};
  static constexpr int64_t GROUP = 4;
  static constexpr int LANES = 16, ROWS = 6, PARTS = 1;

  // Of 32 registers: 6 x 4 accumulators, 4 of b and 1 of a.
  static constexpr int columns(int) {
    return 4;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int) {
    return codes;
  }
  FXQ_TARGET __attribute__((always_inline)) static Codes broadcast(int32_t lane) {
    return _mm512_set1_epi32(lane);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec splat(Acc value) {
    return _mm512_set1_epi32(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // gcc copies and spills accumulators of the intrinsic; the constraint of the assembly keeps each in its register.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(row));
    return acc;
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm512_store_si512(out, acc);
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
