// Elements of an activation, a key or a factor as float32.

#include <cstdint>
#include <cstring>

namespace {

inline float fxq_float(float value) {
  return value;
}
inline float fxq_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

} // namespace
