// A float activation times a panel of a packed weight, which is decoded block by block as it is needed.
//
// acc[rows][64] = sum_j scale[j] * sum_{k in j} a[k] * (code[k] - zero_point[j]) over the groups j along k. A block of the
// panel is decoded into the first-level cache once and multiplied by all rows that stream past it.

#include <cstdlib>

namespace {

// [n, k] weight in panels of 64 columns; factors of groups of ``group`` neighbours along k. ``row_scale`` is the
// activation's: element (r, j) for row r and group j. Without groups there is no scale here.
struct FxqWeight {
  const uint8_t* codes;
  int64_t n, k, group;
  FxqFactor scale, zero_point;
  const float* row_scale;
  int64_t row_scale_stride, row_scale_group_stride;
};

constexpr int64_t FXQ_BLOCK = 128; // k that are decoded at once for many rows: 16 or 32 KiB
constexpr int64_t FXQ_SHORT_BLOCK = 32; // and for few, which want what was decoded back at once
constexpr int64_t FXQ_AHEAD = 4096; // bytes of codes that are asked for before they are needed
constexpr int64_t FXQ_FEW_ROWS = 6; // up to here rows are read where they are

// Rows of the activation, in blocks of FXQ_BLOCK along k. Many rows are copied, block after block: rows that are a power
// of two apart would drive each other out of the caches.
template <typename A>
class FxqRows {
 public:
  FxqRows(const A* a, int64_t lda, int64_t rows, int64_t k) : data_(a), stride_(lda), block_(FXQ_BLOCK) {
    if (rows <= FXQ_FEW_ROWS) {
      return;
    }
    const int64_t blocks = (k + FXQ_BLOCK - 1) / FXQ_BLOCK;
    copy_ = static_cast<A*>(std::aligned_alloc(64, blocks * rows * FXQ_BLOCK * sizeof(A)));
    if (copy_ == nullptr) {
      return; // slower, and right
    }
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t j = 0; j < blocks; j++) {
        const int64_t count = std::min(FXQ_BLOCK, k - j * FXQ_BLOCK);
        std::memcpy(copy_ + (j * rows + r) * FXQ_BLOCK, a + r * lda + j * FXQ_BLOCK, count * sizeof(A));
      }
    }
    data_ = copy_;
    stride_ = FXQ_BLOCK;
    block_ = rows * FXQ_BLOCK;
  }
  FxqRows(const FxqRows&) = delete;
  FxqRows& operator=(const FxqRows&) = delete;
  ~FxqRows() {
    std::free(copy_);
  }
  const A* at(int64_t row, int64_t k) const {
    return data_ + k / FXQ_BLOCK * block_ + row * stride_ + k % FXQ_BLOCK;
  }
  int64_t stride() const {
    return stride_;
  }

 private:
  const A* data_;
  int64_t stride_, block_;
  A* copy_ = nullptr;
};

// acc[ROWS][64] += row_scale * scale * (a x block); without scale the sums go on in the accumulators.
template <typename DOT, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_block_rows(
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* block,
    int64_t k,
    const float* scale,
    const float* row_scale,
    int64_t row_scale_stride,
    float* acc) {
  typename DOT::Vec sum[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      sum[r][j] = scale == nullptr ? _mm512_load_ps(acc + r * FXQ_PANEL + j * 16) : _mm512_setzero_ps();
    }
  }
  fxq_products<DOT, ROWS>(sum, a, lda, block, k);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      float* out = acc + r * FXQ_PANEL + j * 16;
      __m512 value = sum[r][j];
      if (scale != nullptr) {
        if (row_scale != nullptr) {
          value = _mm512_mul_ps(value, _mm512_set1_ps(row_scale[r * row_scale_stride]));
        }
        value = _mm512_fmadd_ps(value, _mm512_load_ps(scale + j * 16), _mm512_load_ps(out));
      }
      _mm512_store_ps(out, value);
    }
  }
}

template <typename DOT>
inline void fxq_block(
    int64_t rows,
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* block,
    int64_t k,
    const float* scale,
    const float* row_scale,
    int64_t row_scale_stride,
    float* acc) {
#define FXQ_CASE(ROWS) fxq_block_rows<DOT, ROWS>(a, lda, block, k, scale, row_scale, row_scale_stride, acc)
  switch (rows) {
    case 1: return FXQ_CASE(1);
    case 2: return FXQ_CASE(2);
    case 3: return FXQ_CASE(3);
    case 4: return FXQ_CASE(4);
    case 5: return FXQ_CASE(5);
    default: return FXQ_CASE(6);
  }
#undef FXQ_CASE
}

inline float fxq_float(float value) {
  return value;
}
inline float fxq_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Clamps zero_point[64] to the codes and says whether any lay beyond; rest[64] is what was cut off.
template <typename CODES>
FXQ_TARGET inline bool fxq_clamp(float* zero_point, float* rest) {
  __mmask16 any = 0;
  for (int64_t c = 0; c < FXQ_PANEL; c += 16) {
    const __m512 whole = _mm512_load_ps(zero_point + c);
    const __m512 within =
        _mm512_min_ps(_mm512_max_ps(whole, _mm512_set1_ps(CODES::LEAST)), _mm512_set1_ps(CODES::MOST));
    any |= _mm512_cmp_ps_mask(whole, within, _CMP_NEQ_UQ);
    _mm512_store_ps(zero_point + c, within);
    _mm512_store_ps(rest + c, _mm512_sub_ps(whole, within));
  }
  return any != 0;
}

// acc[rows][64] -= row_scale * scale * rest * sum_k a[k]: rare, as zero points are codes almost always.
template <typename A>
FXQ_TARGET __attribute__((noinline)) void fxq_take_off(
    int64_t rows,
    const A* a,
    int64_t lda,
    int64_t k,
    const float* rest,
    const float* scale,
    const float* row_scale,
    int64_t row_scale_stride,
    float* acc) {
  for (int64_t r = 0; r < rows; r++) {
    float sum = 0.0f;
    for (int64_t i = 0; i < k; i++) {
      sum += fxq_float(a[r * lda + i]);
    }
    sum *= row_scale == nullptr ? 1.0f : row_scale[r * row_scale_stride];
    for (int64_t c = 0; c < FXQ_PANEL; c++) {
      acc[r * FXQ_PANEL + c] -= sum * rest[c] * (scale == nullptr ? 1.0f : scale[c]);
    }
  }
}

// acc[rows][64] of the rows ``a``, which are first.. of the activation; groups are multiples of DECODE::STEP.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_panel(
    int64_t first, int64_t rows, const FxqRows<typename DOT::A>& a, const FxqWeight& w, int64_t panel, float* acc) {
  alignas(64) typename DOT::B block[FXQ_BLOCK * FXQ_PANEL];
  alignas(64) float scales[FXQ_GROUPS][FXQ_PANEL], zero_points[FXQ_GROUPS][FXQ_PANEL];
  alignas(64) float rests[FXQ_GROUPS][FXQ_PANEL];
  bool has_rest[FXQ_GROUPS] = {};
  const bool has_scale = w.scale.kind != FXQ_NONE, has_zero_point = w.zero_point.kind != FXQ_NONE;
  // float32 holds a decoded value times its scale as well as the reference does: one rounding, and groups join.
  const bool folds = sizeof(typename DOT::B) == sizeof(float) && w.row_scale == nullptr;
  const int64_t groups = (w.k + w.group - 1) / w.group;
  const int64_t depth = rows <= FXQ_FEW_ROWS ? FXQ_SHORT_BLOCK : FXQ_BLOCK;
  const int64_t tiles = (rows + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
  const uint8_t* codes = w.codes + panel * ((w.k + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP) * DECODE::BYTES;
  std::memset(acc, 0, rows * FXQ_PANEL * sizeof(float));
  int64_t known = 0; // groups whose factors were read
  for (int64_t begin = 0; begin < w.k;) {
    const int64_t limit = std::min(w.k, (begin / depth + 1) * depth);
    const int64_t group = begin / w.group;
    const float* scale = nullptr;
    int64_t end = begin;
    do {
      const int64_t j = end / w.group;
      if (j >= known) {
        const int64_t count = std::min(FXQ_GROUPS, groups - j);
        fxq_read(w.scale, panel * FXQ_PANEL, w.n, j, count, scales);
        fxq_read(w.zero_point, panel * FXQ_PANEL, w.n, j, count, zero_points);
        for (int64_t i = 0; DECODE::ROUNDS && has_zero_point && i < count; i++) {
          has_rest[i] = fxq_clamp<typename DECODE::CODES>(zero_points[i], rests[i]);
        }
        known = j + count;
      }
      const int64_t count = std::min((j + 1) * w.group, limit) - end;
      const float* of_group = has_scale ? scales[j % FXQ_GROUPS] : nullptr;
      // Few rows wait for memory: decoding and multiplying take turns, which the hardware's prefetcher does not follow.
      for (int64_t i = 0; i < count * DECODE::BYTES; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + end * DECODE::BYTES + FXQ_AHEAD + i), _MM_HINT_T0);
      }
      DECODE::decode(
          codes + end * DECODE::BYTES,
          count,
          has_zero_point ? zero_points[j % FXQ_GROUPS] : nullptr,
          folds ? of_group : nullptr,
          block + (end - begin) * FXQ_PANEL);
      scale = folds ? nullptr : of_group;
      end += count;
    } while (scale == nullptr && end < limit);
    const float* row_scales = w.row_scale == nullptr
        ? nullptr
        : w.row_scale + first * w.row_scale_stride + group * w.row_scale_group_stride;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t r = rows * tile / tiles;
      const float* row_scale = row_scales == nullptr ? nullptr : row_scales + r * w.row_scale_stride;
      fxq_block<DOT>(
          rows * (tile + 1) / tiles - r,
          a.at(r, begin),
          a.stride(),
          block,
          end - begin,
          scale,
          row_scale,
          w.row_scale_stride,
          acc + r * FXQ_PANEL);
    }
    if (has_rest[group % FXQ_GROUPS]) {
      fxq_take_off(
          rows,
          a.at(0, begin),
          a.stride(),
          end - begin,
          rests[group % FXQ_GROUPS],
          scale,
          row_scales,
          w.row_scale_stride,
          acc);
    }
    begin = end;
  }
}

} // namespace
