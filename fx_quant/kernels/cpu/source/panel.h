// A float activation times a panel of a packed weight, whose codes are decoded in registers and never stored.
//
// acc[rows][64] = sum_j scale[j] * sum_{k in j} a[k] * (code[k] - zero_point[j]) over the groups j along k. In float32
// zero points are taken off the codes, which is exact. bfloat16 has no cheap way to: there they are taken off the sum,
// multiplied by sum_{k in j} a[k].

namespace {

// acc[SETS][ROWS][64] += a[ROWS][STEP] x the STEP k of a panel at codes; parts take turns with the sets.
template <typename DOT, typename DECODE, int ROWS, int SETS>
FXQ_INLINE void fxq_step(
    typename DOT::Vec (&acc)[SETS][ROWS][4],
    const typename DOT::A* a,
    int64_t lda,
    const uint8_t* codes,
    const float* zero_point) {
#pragma GCC unroll 8
  for (int part = 0; part < DECODE::PARTS; part++) {
    __m512i columns[4];
    DECODE::columns(codes, part, columns);
    if (DECODE::SUBTRACTS && zero_point != nullptr) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const __m512 less = _mm512_sub_ps(_mm512_castsi512_ps(columns[j]), _mm512_load_ps(zero_point + j * 16));
        columns[j] = _mm512_castps_si512(less);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t lane;
      std::memcpy(&lane, a + r * lda + part * DOT::GROUP, sizeof(lane));
      const __m512i row = _mm512_set1_epi32(lane);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        acc[part % SETS][r][j] = DOT::dot(acc[part % SETS][r][j], columns[j], row);
      }
    }
  }
}

// ``count`` rows from row ``first`` of an activation on, which is at a.
template <typename DOT, typename DECODE>
inline FxqRows<typename DOT::A> fxq_rows(
    const typename DOT::A* a, int64_t lda, int64_t, int64_t count, const FxqWeight& w) {
  return FxqRows<typename DOT::A>(a, lda, count, w, !DECODE::SUBTRACTS);
}

// Part of a panel: k from begin to end, at codes, and the factors of its groups, the first of which is ``group``.
struct FxqChunk {
  int64_t begin, end, group;
  const uint8_t* codes;
  alignas(64) float scales[FXQ_GROUPS][FXQ_PANEL];
  alignas(64) float zero_points[FXQ_GROUPS][FXQ_PANEL];
};

// acc[ROWS][64] of the rows from ``row`` on, which are ``first`` + row.. of the activation, and one chunk.
template <typename DOT, typename DECODE, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_chunk_rows(
    int64_t first,
    int64_t row,
    const FxqRows<typename DOT::A>& rows,
    const FxqWeight& w,
    const FxqChunk& chunk,
    const FxqAhead (&expected)[3],
    float* acc) {
  // Of few rows a sum would wait for that of the part before, unless all rows are to be summed in one order.
  constexpr int SETS = DECODE::PARTS > 1 && ROWS <= 2 ? FXQ_SETS : 1;
  const typename DOT::A* a = rows.data + row * rows.stride;
  const uint8_t* codes = chunk.codes;
  FxqAhead ahead = expected[0], scales = expected[1], zero_points = expected[2];
  int64_t k = chunk.begin, group = chunk.group;
  for (int64_t i = 0; k < chunk.end; i++, group++) {
    const int64_t end = std::min(chunk.end, (group + 1) * w.group);
    const float* zero_point = w.zero_point.kind == FXQ_NONE ? nullptr : chunk.zero_points[i];
    const bool corrects = !DECODE::SUBTRACTS && zero_point != nullptr && k == group * w.group;
    typename DOT::Vec sum[SETS][ROWS][4];
#pragma GCC unroll 2
    for (int set = 0; set < SETS; set++) {
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          sum[set][r][j] = _mm512_setzero_ps();
        }
      }
    }
    for (; k + DECODE::STEP <= end; k += DECODE::STEP) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < DECODE::STEP * DECODE::BYTES; line += 64) {
        _mm_prefetch(ahead.at, _MM_HINT_T0);
        ahead.at += ahead.step;
      }
      _mm_prefetch(scales.at, _MM_HINT_T0);
      scales.at += scales.step;
      _mm_prefetch(zero_points.at, _MM_HINT_T0);
      zero_points.at += zero_points.step;
      fxq_step<DOT, DECODE, ROWS, SETS>(sum, a + k, rows.stride, codes, zero_point);
      codes += DECODE::STEP * DECODE::BYTES;
    }
    if (k < end) {
      typename DOT::A rest[ROWS][DECODE::STEP] = {};
      for (int r = 0; r < ROWS; r++) {
        std::memcpy(rest[r], a + r * rows.stride + k, (end - k) * sizeof(typename DOT::A));
      }
      fxq_step<DOT, DECODE, ROWS, SETS>(sum, rest[0], DECODE::STEP, codes, zero_point);
      codes += DECODE::STEP * DECODE::BYTES;
      k = end;
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const float* row_scale = w.row_scale == nullptr
          ? nullptr
          : w.row_scale + (first + row + r) * w.row_scale_stride + group * w.row_scale_group_stride;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __m512 value = sum[0][r][j];
        if (SETS == 2) {
          value = _mm512_add_ps(value, sum[SETS - 1][r][j]);
        }
        if (corrects) {
          const __m512 all = _mm512_set1_ps(rows.sum(row + r, group));
          value = _mm512_fnmadd_ps(all, _mm512_load_ps(zero_point + j * 16), value);
        }
        if (row_scale != nullptr) {
          value = _mm512_mul_ps(value, _mm512_set1_ps(*row_scale));
        }
        float* out = acc + r * FXQ_PANEL + j * 16;
        if (w.scale.kind != FXQ_NONE) {
          value = _mm512_fmadd_ps(value, _mm512_load_ps(chunk.scales[i] + j * 16), _mm512_load_ps(out));
        } else {
          value = _mm512_add_ps(value, _mm512_load_ps(out));
        }
        _mm512_store_ps(out, value);
      }
    }
  }
}

// acc[count][64] of rows that are first.. of the activation; groups are multiples of DECODE::STEP. A chunk of the panel
// is multiplied by all rows before the next one, at most plan.chunk_k of it.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_panel(
    const FxqPlan& plan,
    int64_t first,
    int64_t count,
    const FxqRows<typename DOT::A>& rows,
    const FxqWeight& w,
    int64_t panel,
    float* acc) {
  const int64_t tiles = (count + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
  const int64_t groups = std::min(FXQ_GROUPS, plan.chunk_k / w.group);
  FxqChunk chunk;
  chunk.codes = w.codes + panel * ((w.k + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP) * DECODE::BYTES;
  std::memset(acc, 0, count * FXQ_PANEL * sizeof(float));
  for (chunk.begin = 0; chunk.begin < w.k; chunk.begin = chunk.end) {
    // Whole groups, or part of one.
    chunk.group = chunk.begin / w.group;
    chunk.end = groups ? (chunk.group + groups) * w.group
                       : std::min(chunk.begin + plan.chunk_k, (chunk.group + 1) * w.group);
    chunk.end = std::min(chunk.end, w.k);
    const int64_t read = (chunk.end - 1) / w.group - chunk.group + 1;
    fxq_read(w.scale, panel * FXQ_PANEL, w.n, chunk.group, read, chunk.scales);
    fxq_read(w.zero_point, panel * FXQ_PANEL, w.n, chunk.group, read, chunk.zero_points);
    const int64_t bytes = (chunk.end - chunk.begin + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP * DECODE::BYTES;
    const int64_t steps = bytes / (DECODE::STEP * DECODE::BYTES);
    const FxqAhead factors[] = {
        fxq_factors_ahead(w.scale, panel, chunk.group + read, read, steps),
        fxq_factors_ahead(w.zero_point, panel, chunk.group + read, read, steps)};
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = count * tile / tiles;
      const FxqAhead none = {reinterpret_cast<const char*>(chunk.codes), 0};
      const FxqAhead ahead[] = {
          fxq_ahead(plan, tile, tiles, chunk.codes, bytes), tile ? none : factors[0], tile ? none : factors[1]};
      float* out = acc + row * FXQ_PANEL;
      switch (count * (tile + 1) / tiles - row) {
        case 1: fxq_chunk_rows<DOT, DECODE, 1>(first, row, rows, w, chunk, ahead, out); break;
        case 2: fxq_chunk_rows<DOT, DECODE, 2>(first, row, rows, w, chunk, ahead, out); break;
        case 3: fxq_chunk_rows<DOT, DECODE, 3>(first, row, rows, w, chunk, ahead, out); break;
        case 4: fxq_chunk_rows<DOT, DECODE, 4>(first, row, rows, w, chunk, ahead, out); break;
        case 5: fxq_chunk_rows<DOT, DECODE, 5>(first, row, rows, w, chunk, ahead, out); break;
        default: fxq_chunk_rows<DOT, DECODE, 6>(first, row, rows, w, chunk, ahead, out);
      }
    }
    chunk.codes += bytes;
  }
}

} // namespace
