// bfloat16 by vdpbf16ps: pairs along k, summed in float32. Codes of eight bits are exact in it.

namespace {

struct FxqBf16 : FxqAvx512Float {
  using A = uint16_t; // bit patterns: only moved, never computed with
  using B = uint16_t;
  static constexpr int64_t GROUP = 2;

  FXQ_TARGET __attribute__((always_inline)) static Vec dot(Vec acc, Codes columns, Codes row) {
    // gcc copies and spills accumulators of the intrinsic; the constraint of the assembly keeps each in its register.
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(row));
    return acc;
  }
};

} // namespace
