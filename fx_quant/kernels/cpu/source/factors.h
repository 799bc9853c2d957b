// Factors of factor.h as the columns of a panel want them, by the registers of AVX-512.

#include <immintrin.h>

namespace {

FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const int8_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const uint8_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const int16_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(mask, p)));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const int32_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, p));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const FxqBfloat16* p, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const FxqFloat16* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const int64_t* p, __mmask16 mask) {
  const __m256 low = _mm512_cvtepi64_ps(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), p));
  const __m256 high = _mm512_cvtepi64_ps(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), p + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const float* p) {
  return _mm512_loadu_ps(p);
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const FxqBfloat16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
FXQ_TARGET __attribute__((always_inline)) inline __m512 fxq_load(const FxqFloat16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

FXQ_TARGET __attribute__((always_inline)) inline void fxq_transpose(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const auto pair = [&](int j) { return _mm512_castps_pd(t[4 * i + j]); };
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

// out[j][c] = factor of column + c and group first + j, as float; beyond the last column: of the last one.
template <typename T>
FXQ_TARGET __attribute__((noinline)) void fxq_read(
    const FxqFactor& f, int64_t column, int64_t n, int64_t first, int64_t count, float (*out)[64]) {
  const T* data = static_cast<const T*>(f.data) + first * f.group_stride;
  const auto row = [&](int64_t c) { return fxq_row(f, std::min(column + c, n - 1)); };
  if (f.panel_stride || f.group_stride != 1 || count == 1) {
    const bool adjacent = f.rows == 1 && f.row_stride == 1 && column + 64 <= n;
    const int64_t start = f.panel_stride ? column / 64 * f.panel_stride : column;
    for (int64_t j = 0; j < count; j++) {
      const T* group = data + j * f.group_stride;
      if (adjacent || f.panel_stride) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < 64; c += 16) {
          _mm512_store_ps(out[j] + c, fxq_load(group + start + c, 0xffff));
        }
      } else {
        for (int64_t c = 0; c < 64; c++) {
          out[j][c] = _mm512_cvtss_f32(fxq_load(group + row(c), 1));
        }
      }
    }
    return;
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  for (int64_t c = 0; c < 64; c += 16) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++) {
      r[i] = fxq_load(data + row(c + i), mask);
    }
    fxq_transpose(r);
#pragma GCC unroll 16
    for (int64_t j = 0; j < 16; j++) {
      _mm512_store_ps(out[j] + c, r[j]);
    }
  }
}

} // namespace
