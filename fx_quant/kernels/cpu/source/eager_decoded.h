// The epilogue of an eager call of a decoded matmul.
//
// out = cast(acc * a_scale * b_scale + bias), each step in float32.

namespace {

enum FxqOut : int64_t { FXQ_OUT_FLOAT32 = 0, FXQ_OUT_BFLOAT16 = 1, FXQ_OUT_FLOAT16 = 2 };

struct FxqEpilogue {
  const float *a_scale, *b_scale, *bias; // null is 1, 1 and 0
  int64_t a_scale_stride, b_scale_stride;
  FxqOut kind;
  void* out;
};

// To nearest even, as everywhere in PyTorch; the instruction of AVX512-BF16 would flush what is subnormal.
FXQ_INLINE __m256i fxq_to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i top = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(top);
}

// out[rows][width] of the panel at ``column`` from row ``first`` on.
FXQ_TARGET inline void fxq_finish(
    const FxqEpilogue& e, const float* acc, int64_t first, int64_t rows, int64_t column, int64_t width, int64_t n) {
  alignas(64) float scale[FXQ_PANEL], bias[FXQ_PANEL] = {};
  for (int64_t c = 0; c < FXQ_PANEL; c++) {
    scale[c] = e.b_scale != nullptr && c < width ? e.b_scale[(column + c) * e.b_scale_stride] : 1.0f;
    bias[c] = e.bias != nullptr && c < width ? e.bias[column + c] : 0.0f;
  }
  for (int64_t r = 0; r < rows; r++) {
    const __m512 row_scale = _mm512_set1_ps(e.a_scale != nullptr ? e.a_scale[(first + r) * e.a_scale_stride] : 1.0f);
    for (int64_t c = 0; c < width; c += 16) {
      const __mmask16 mask = width - c >= 16 ? 0xffff : static_cast<__mmask16>((1u << (width - c)) - 1);
      __m512 y = _mm512_mul_ps(_mm512_load_ps(acc + r * FXQ_PANEL + c), row_scale);
      y = _mm512_mul_ps(y, _mm512_load_ps(scale + c));
      if (e.bias != nullptr) {
        y = _mm512_add_ps(y, _mm512_load_ps(bias + c));
      }
      const int64_t at = (first + r) * n + column + c;
      if (e.kind == FXQ_OUT_FLOAT32) {
        _mm512_mask_storeu_ps(static_cast<float*>(e.out) + at, mask, y);
      } else {
        const __m256i half = e.kind == FXQ_OUT_BFLOAT16
            ? fxq_to_bfloat16(y)
            : _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(e.out) + at, mask, half);
      }
    }
  }
}

} // namespace
