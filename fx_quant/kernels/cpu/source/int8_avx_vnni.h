// int8 codes by the 256-bit vpdpbusd of AVX-VNNI, for CPUs without AVX-512.

namespace {

struct FxqInt8AvxVnni : FxqInt8Avx2 {
  static constexpr int PARTS = 1;

  FXQ_TARGET __attribute__((always_inline)) static Codes part(Codes codes, int) {
    return codes;
  }
  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in int8_vnni.h: the constraint keeps each accumulator in its register.
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(columns), "x"(row));
    return acc;
  }
};

} // namespace
