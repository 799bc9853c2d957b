// float32 by fused multiply-add.

namespace {

struct FxqFloat32 : FxqAvx512Float {
  using A = float;
  using B = float;
  static constexpr int64_t GROUP = 1;

  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // As in bf16.h: the constraint keeps each accumulator in its register.
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(row));
    return acc;
  }
};

} // namespace
