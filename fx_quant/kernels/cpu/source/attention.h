// Attention of one query over keys and values that lie in memory: a few heads that share them, in one pass.
//
// out[d] = sum_l p[l] * v[l, d] / sum_l p[l],  p[l] = exp(scale * sum_d q[d] * k[l, d] + mask[l] - greatest)
//
// Keys are gone over a block at a time, with the greatest score so far: sums are scaled where a block has a greater one. A
// block that the mask leaves nothing of, minus infinity throughout, is not read. Where it leaves nothing at all, out is 0.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t FXQ_KEYS = 32; // of a block
constexpr int FXQ_WIDTH = 16;

typedef float FxqFloats __attribute__((vector_size(64)));
typedef uint32_t FxqWords __attribute__((vector_size(64)));
typedef uint16_t FxqHalves __attribute__((vector_size(32)));

__attribute__((always_inline)) inline FxqFloats fxq_floats(const float* p) {
  FxqFloats x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
// Of bfloat16.
__attribute__((always_inline)) inline FxqFloats fxq_floats(const uint16_t* p) {
  FxqHalves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const FxqWords words = __builtin_convertvector(halves, FxqWords) << 16;
  FxqFloats x;
  std::memcpy(&x, &words, sizeof(x));
  return x;
}

__attribute__((always_inline)) inline float fxq_sum(FxqFloats x) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight low, high;
  std::memcpy(&low, &x, 32);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + 32, 32);
  low += high;
  Four first, second;
  std::memcpy(&first, &low, 16);
  std::memcpy(&second, reinterpret_cast<const char*>(&low) + 16, 16);
  first += second;
  return (first[0] + first[2]) + (first[1] + first[3]);
}

// Keys or values of a head: row l is at data + l * stride.
template <typename T>
struct FxqPast {
  const T* data;
  int64_t stride;
};

// Where the mask of a query is: that of key l at data + l * stride; null where there is none.
template <typename M>
struct FxqMask {
  const M* data;
  int64_t stride;
};

// One query, with what is known after some blocks.
template <typename T, typename M, int HEAD>
struct FxqAttention {
  alignas(64) float q[HEAD], out[HEAD] = {};
  float greatest = -std::numeric_limits<float>::infinity(), sum = 0;
  FxqMask<M> mask;

  FxqAttention(const T* query, FxqMask<M> mask, float scale) : mask(mask) {
    for (int d = 0; d < HEAD; d++) {
      q[d] = fxq_float(query[d]) * scale;
    }
  }

  // The keys from ``from`` on, ``count`` of them, at most FXQ_KEYS.
  void add(const FxqPast<T>& keys, const FxqPast<T>& values, int64_t from, int64_t count) {
    constexpr int WIDE = HEAD / FXQ_WIDTH;
    alignas(64) float scores[FXQ_KEYS];
    bool any = mask.data == nullptr;
    for (int64_t l = 0; l < count; l++) {
      scores[l] = mask.data == nullptr ? 0.0f : fxq_float(mask.data[(from + l) * mask.stride]);
      any |= !(scores[l] == -std::numeric_limits<float>::infinity());
    }
    if (!any) {
      return;
    }
    float most = greatest;
    const T* key = keys.data + from * keys.stride;
    for (int64_t l = 0; l < count; l++, key += keys.stride) {
      FxqFloats products = {};
#pragma GCC unroll 16
      for (int i = 0; i < WIDE; i++) {
        products += fxq_floats(q + i * FXQ_WIDTH) * fxq_floats(key + i * FXQ_WIDTH);
      }
      scores[l] += fxq_sum(products);
      // A NaN stays.
      most = scores[l] > most || scores[l] != scores[l] ? scores[l] : most;
    }
    if (most == -std::numeric_limits<float>::infinity()) {
      return;
    }
    const float before = std::exp(greatest - most);
    greatest = most;
    sum *= before;
    FxqFloats sums[WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < WIDE; i++) {
      sums[i] = fxq_floats(out + i * FXQ_WIDTH) * before;
    }
    const T* value = values.data + from * values.stride;
    for (int64_t l = 0; l < count; l++, value += values.stride) {
      const float p = std::exp(scores[l] - most);
      sum += p;
#pragma GCC unroll 16
      for (int i = 0; i < WIDE; i++) {
        sums[i] += p * fxq_floats(value + i * FXQ_WIDTH);
      }
    }
    std::memcpy(out, sums, sizeof(out));
  }

  // The result, all blocks added.
  void store(float* to) const {
    for (int d = 0; d < HEAD; d++) {
      to[d] = sum == 0 ? 0.0f : out[d] / sum;
    }
  }
};

// ``queries`` with the same keys and values, of which there are ``count``: a block is in cache for all but the first.
template <typename T, typename M, int HEAD>
void fxq_attend(
    std::vector<FxqAttention<T, M, HEAD>>& queries, const FxqPast<T>& keys, const FxqPast<T>& values, int64_t count) {
  for (int64_t from = 0; from < count; from += FXQ_KEYS) {
    for (auto& query : queries) {
      query.add(keys, values, from, std::min(FXQ_KEYS, count - from));
    }
  }
}

} // namespace
