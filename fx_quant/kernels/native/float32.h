// float32 by fused multiply-add.

#define FXQ_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

#include <immintrin.h>

#include <cstdint>

namespace {

struct FxqFloat32 {
  using A = float;
  using B = float;
  using Acc = float;
  using Vec = __m512;
  using Codes = __m512i;
  struct State {};
  static constexpr int64_t GROUP = 1;
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
    return _mm512_set1_ps(value);
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in bf16.h: the constraint keeps each accumulator in its register.
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(row));
    return acc;
  }
  FXQ_TARGET __attribute__((always_inline)) static void store(Acc* out, Vec acc) {
    _mm512_store_ps(out, acc);
  }

  static Acc row_start(const A*, int64_t) {
    return 0.0f;
  }
};

} // namespace
