// A float activation times a panel of a packed weight, whose codes are decoded in registers: for each tile of few rows,
// and once for all of many, which then find them in cache.
//
// acc[rows][64] = sum_j scale[j] * sum_{k in j} a[k] * (code[k] - zero_point[j]) over the groups j along k. In float32
// zero points are taken off the codes, which is exact. bfloat16 has no cheap way to: there they are taken off the sum,
// multiplied by sum_{k in j} a[k]. So multiplied, an offset of the scaled codes is added to the scaled sum.

namespace {

constexpr int64_t FXQ_WIDE_ROWS = FXQ_MANY; // from so many on a panel is decoded once
constexpr int64_t FXQ_WIDE_K = 512;         // of so many k at a time: 64 KiB of bfloat16

// One part of a step of a panel at codes, decoded, less the zero point where that is taken off the codes.
template <typename DECODE>
FXQ_INLINE void fxq_columns(const uint8_t* codes, int part, const float* zero_point, __m512i (&columns)[4]) {
  DECODE::columns(codes, part, columns);
  if (DECODE::SUBTRACTS && zero_point != nullptr) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 less = _mm512_sub_ps(_mm512_castsi512_ps(columns[j]), _mm512_loadu_ps(zero_point + j * 16));
      columns[j] = _mm512_castps_si512(less);
    }
  }
}

// Columns that ``DECODE`` has decoded, 256 bytes for each part of a step.
template <typename DECODE>
struct FxqWide {
  static constexpr bool SUBTRACTS = false, CORRECTS = DECODE::CORRECTS, IN_CACHE = true;
  static constexpr int64_t STEP = DECODE::STEP, PARTS = DECODE::PARTS;
  static constexpr int64_t BYTES = 256 * PARTS / STEP;

  FXQ_INLINE static void columns(const uint8_t* p, int part, __m512i (&out)[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      out[j] = _mm512_load_si512(p + part * 256 + j * 64);
    }
  }
};

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
    fxq_columns<DECODE>(codes, part, zero_point, columns);
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
  return FxqRows<typename DOT::A>(a, lda, count, w, DECODE::CORRECTS || w.zero_point.added);
}

// Part of a panel: k from begin to end, at codes, and the factors of its groups, the first of which is ``group``.
struct FxqChunk {
  int64_t begin, end, group;
  const uint8_t* codes;
  FxqGroupFactors<FxqScale> scales;
  FxqGroupFactors<float> zero_points;
};

// What is taken off the codes of group ``i`` of a chunk, where codes are; null where nothing is.
inline const float* fxq_zero_point(const FxqWeight& w, const FxqChunk& chunk, int64_t i) {
  return w.zero_point.kind == FXQ_NONE || w.zero_point.added ? nullptr : chunk.zero_points[i];
}

// What the zero points or offsets of a group are to its sums: null where it has none, or they are off the codes already.
struct FxqShift {
  enum Kind { NONE, ZERO_POINT, OFFSET };
  const float *zero_point, *offset;

  // ``values`` of group ``j`` and ``whether`` the sums begin with the group.
  FXQ_INLINE FxqShift(const FxqWeight& w, const float* values, bool corrects, bool whether)
      : zero_point(whether && corrects && w.zero_point.kind != FXQ_NONE && !w.zero_point.added ? values : nullptr),
        offset(whether && w.zero_point.added ? values : nullptr) {}
  FXQ_INLINE bool is_none() const {
    return zero_point == nullptr && offset == nullptr;
  }
};

// out[16] += sum, less ``all`` times the zero point, by the scales of its row and its group, and ``all`` times the
// offset, both at ``column``; null is none.
FXQ_INLINE void fxq_add(
    __m512 sum, const FxqShift& shift, int64_t column, float all, const float* row_scale, const FxqScale* scale, float* out) {
  if (shift.zero_point != nullptr) {
    sum = _mm512_fnmadd_ps(_mm512_set1_ps(all), _mm512_loadu_ps(shift.zero_point + column), sum);
  }
  if (row_scale != nullptr) {
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(*row_scale));
  }
  const __m512 before = _mm512_load_ps(out);
  sum = scale ? _mm512_fmadd_ps(sum, fxq_load(scale + column), before) : _mm512_add_ps(sum, before);
  if (shift.offset != nullptr) {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(all), _mm512_loadu_ps(shift.offset + column), sum);
  }
  _mm512_store_ps(out, sum);
}

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
    const float* zero_point = fxq_zero_point(w, chunk, i);
    const FxqScale* scale = w.scale.kind == FXQ_NONE ? nullptr : chunk.scales[i];
    const FxqShift shift(w, chunk.zero_points[i], DECODE::CORRECTS, k == group * w.group);
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
      if (!DECODE::IN_CACHE) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < DECODE::STEP * DECODE::BYTES; line += 64) {
          _mm_prefetch(ahead.at, _MM_HINT_T0);
          ahead.at += ahead.step;
        }
        _mm_prefetch(scales.at, _MM_HINT_T0);
        scales.at += scales.step;
        _mm_prefetch(zero_points.at, _MM_HINT_T0);
        zero_points.at += zero_points.step;
      }
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
      const float* row_scale = fxq_row_scale(w, first + row + r, group);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __m512 value = sum[0][r][j];
        if (SETS == 2) {
          value = _mm512_add_ps(value, sum[SETS - 1][r][j]);
        }
        const float all = shift.is_none() ? 0.0f : rows.sum(row + r, group);
        fxq_add(value, shift, j * 16, all, row_scale, scale, acc + r * FXQ_PANEL + j * 16);
      }
    }
  }
}

#ifndef FXQ_AMX
// acc[ROWS][64] of the rows from ``row`` on, and one chunk that is decoded: fxq_chunk_rows to its bits. Three rows have room
// for their results beside the sums of a group: nothing is stored from group to group, for which six would wait.
template <typename DOT, typename WIDE, FxqShift::Kind KIND, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_kept_rows(
    int64_t row, const FxqRows<typename DOT::A>& rows, const FxqWeight& w, const FxqChunk& chunk, float* acc) {
  const typename DOT::A* a = rows.data + row * rows.stride;
  const uint8_t* codes = chunk.codes;
  int64_t k = chunk.begin, group = chunk.group;
  __m512 kept[ROWS][4];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      kept[r][j] = _mm512_load_ps(acc + r * FXQ_PANEL + j * 16);
    }
  }
  for (int64_t i = 0; k < chunk.end; i++, group++) {
    const int64_t end = std::min(chunk.end, (group + 1) * w.group);
    const bool shifts = KIND != FxqShift::NONE && k == group * w.group;
    typename DOT::Vec sum[1][ROWS][4];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        sum[0][r][j] = _mm512_setzero_ps();
      }
    }
    for (; k + WIDE::STEP <= end; k += WIDE::STEP, codes += WIDE::STEP * WIDE::BYTES) {
      fxq_step<DOT, WIDE, ROWS, 1>(sum, a + k, rows.stride, codes, nullptr);
    }
    if (k < end) {
      typename DOT::A rest[ROWS][WIDE::STEP] = {};
      for (int r = 0; r < ROWS; r++) {
        std::memcpy(rest[r], a + r * rows.stride + k, (end - k) * sizeof(typename DOT::A));
      }
      fxq_step<DOT, WIDE, ROWS, 1>(sum, rest[0], WIDE::STEP, codes, nullptr);
      codes += WIDE::STEP * WIDE::BYTES;
      k = end;
    }
    const FxqScale* scale = chunk.scales[i];
    const float* shift = chunk.zero_points[i];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; r++) {
      const __m512 all = _mm512_set1_ps(shifts ? rows.sum(row + r, group) : 0.0f);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __m512 value = sum[0][r][j];
        if (KIND == FxqShift::ZERO_POINT && shifts) {
          value = _mm512_fnmadd_ps(all, _mm512_loadu_ps(shift + j * 16), value);
        }
        kept[r][j] = _mm512_fmadd_ps(value, fxq_load(scale + j * 16), kept[r][j]);
        if (KIND == FxqShift::OFFSET && shifts) {
          kept[r][j] = _mm512_fmadd_ps(all, _mm512_loadu_ps(shift + j * 16), kept[r][j]);
        }
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      _mm512_store_ps(acc + r * FXQ_PANEL + j * 16, kept[r][j]);
    }
  }
}

// acc[count][64] of a chunk that is decoded, three rows at a time or two.
template <typename DOT, typename WIDE, FxqShift::Kind KIND>
FXQ_TARGET inline void fxq_kept_chunk(
    int64_t count, const FxqRows<typename DOT::A>& rows, const FxqWeight& w, const FxqChunk& chunk, float* acc) {
  const int64_t tiles = (count + 2) / 3;
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t row = count * tile / tiles;
    const auto multiply = count * (tile + 1) / tiles - row == 2 ? fxq_kept_rows<DOT, WIDE, KIND, 2>
                                                                 : fxq_kept_rows<DOT, WIDE, KIND, 3>;
    multiply(row, rows, w, chunk, acc + row * FXQ_PANEL);
  }
}
#endif

#ifdef FXQ_AMX
constexpr int64_t FXQ_TILE_K = 32; // of bfloat16, in one tile

// Adds 32 k at b, 256 bytes from one pair to the next, to the sums of one or two tiles of rows of a.
template <bool TWO>
FXQ_INLINE void fxq_bf16_step(const uint16_t* a, int64_t bytes, const uint8_t* b) {
  _tile_loadd(4, a, bytes);
  _tile_loadd(6, b, 256);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + 64, 256);
  _tile_dpbf16ps(1, 4, 7);
  if (TWO) {
    _tile_loadd(5, a + 16 * (bytes / 2), bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// sums[32 rows][32 columns] = a x the ``count`` k at b; ``rest`` are the rows of a of what is left of k, and zeros.
template <bool TWO>
FXQ_TARGET __attribute__((noinline)) void fxq_bf16_tiles(
    const uint16_t* a, int64_t bytes, const uint16_t* rest, const uint8_t* b, int64_t count, float* sums) {
  fxq_zero_sums<TWO>();
  int64_t k = 0;
  for (; k + FXQ_TILE_K <= count; k += FXQ_TILE_K) {
    fxq_bf16_step<TWO>(a + k, bytes, b + k * 128);
  }
  if (k < count) {
    fxq_bf16_step<TWO>(rest, FXQ_TILE_K * sizeof(*rest), b + k * 128);
  }
  fxq_store_sums<TWO>(sums, 32);
}

// out[height][32 of 64] += sums[height][32] of ``rows`` from ``row`` on, by the scales of their group, and with its zero
// points or offsets at ``shift``. These are in registers: adding up takes longer than the tiles of a small group.
template <FxqShift::Kind KIND>
FXQ_TARGET __attribute__((noinline)) void fxq_add_tile(
    const float* sums,
    int64_t height,
    const FxqScale* scale,
    const float* shift,
    const FxqRows<uint16_t>& rows,
    int64_t row,
    int64_t group,
    float* out) {
  const __m512 scales[] = {fxq_load(scale), fxq_load(scale + 16)};
  const __m512 shifts[] = {_mm512_loadu_ps(shift), _mm512_loadu_ps(shift + 16)};
#pragma GCC unroll 4
  for (int64_t r = 0; r < height; r++) {
    const __m512 all = _mm512_set1_ps(KIND == FxqShift::NONE ? 0.0f : rows.sum(row + r, group));
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; half++) {
      float* const at = out + r * FXQ_PANEL + half * 16;
      __m512 sum = _mm512_load_ps(sums + r * 32 + half * 16);
      if (KIND == FxqShift::ZERO_POINT) {
        sum = _mm512_fnmadd_ps(all, shifts[half], sum);
      }
      sum = _mm512_fmadd_ps(sum, scales[half], _mm512_load_ps(at));
      _mm512_store_ps(at, KIND == FxqShift::OFFSET ? _mm512_fmadd_ps(all, shifts[half], sum) : sum);
    }
  }
}

// acc[count][64] of a chunk that is decoded at ``wide``; its groups are multiples of 32 k, or one.
template <typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_chunk_tiles(
    int64_t first,
    int64_t count,
    const FxqRows<uint16_t>& rows,
    const FxqWeight& w,
    const FxqChunk& chunk,
    const uint8_t* wide,
    float* acc) {
  constexpr int64_t ROWS = 32;
  FxqTiles tiles;
  alignas(64) float sums[ROWS * 32];
  alignas(64) uint16_t rest[ROWS * FXQ_TILE_K] = {};
  const int64_t blocks = (count + ROWS - 1) / ROWS, left = (chunk.end - chunk.begin) % FXQ_TILE_K;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t row = count * block / blocks, height = count * (block + 1) / blocks - row;
    const uint16_t* const a = rows.data + row * rows.stride;
    tiles.configure(height);
    for (int64_t r = 0; left && r < height; r++) {
      std::memcpy(rest + r * FXQ_TILE_K, a + r * rows.stride + chunk.end - left, left * sizeof(*a));
    }
    int64_t k = chunk.begin, group = chunk.group;
    for (int64_t i = 0; k < chunk.end; i++, group++) {
      const int64_t end = std::min(chunk.end, (group + 1) * w.group);
      const FxqShift shift(w, chunk.zero_points[i], true, k == group * w.group);
      for (int64_t column = 0; column < FXQ_PANEL; column += 32) {
        const uint8_t* const b = wide + (k - chunk.begin) * 128 + column * 4;
        const auto multiply = height > 16 ? fxq_bf16_tiles<true> : fxq_bf16_tiles<false>;
        multiply(a + k, rows.stride * sizeof(*a), rest, b, end - k, sums);
        const FxqScale* const scale = w.scale.kind == FXQ_NONE ? nullptr : chunk.scales[i];
        float* const out = acc + row * FXQ_PANEL + column;
        if (w.row_scale == nullptr && scale != nullptr) {
          const auto add = shift.is_none()  ? fxq_add_tile<FxqShift::NONE>
              : shift.offset != nullptr ? fxq_add_tile<FxqShift::OFFSET>
                                        : fxq_add_tile<FxqShift::ZERO_POINT>;
          add(sums, height, scale + column, chunk.zero_points[i] + column, rows, row, group, out);
          continue;
        }
        for (int64_t r = 0; r < height; r++) {
          const float* row_scale = fxq_row_scale(w, first + row + r, group);
          const float all = shift.is_none() ? 0.0f : rows.sum(row + r, group);
#pragma GCC unroll 2
          for (int64_t c = 0; c < 32; c += 16) {
            const __m512 sum = _mm512_load_ps(sums + r * 32 + c);
            fxq_add(sum, shift, column + c, all, row_scale, scale, out + r * FXQ_PANEL + c);
          }
        }
      }
      k = end;
    }
  }
}
#endif

// Of up to six rows.
template <typename DOT, typename DECODE>
inline void fxq_chunk_tile(
    int64_t count,
    int64_t first,
    int64_t row,
    const FxqRows<typename DOT::A>& rows,
    const FxqWeight& w,
    const FxqChunk& chunk,
    const FxqAhead (&ahead)[3],
    float* out) {
  switch (count) {
    case 1: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(1)>(first, row, rows, w, chunk, ahead, out);
    case 2: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(2)>(first, row, rows, w, chunk, ahead, out);
    case 3: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(3)>(first, row, rows, w, chunk, ahead, out);
    case 4: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(4)>(first, row, rows, w, chunk, ahead, out);
    case 5: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(5)>(first, row, rows, w, chunk, ahead, out);
    default: return fxq_chunk_rows<DOT, DECODE, fxq_rows_of(6)>(first, row, rows, w, chunk, ahead, out);
  }
}

// Goes from one chunk to the next: whole groups, or part of one, of at most ``most`` k; false behind the last. Groups are
// multiples of DECODE::STEP.
template <typename DECODE>
FXQ_TARGET inline bool fxq_next(const FxqWeight& w, int64_t panel, int64_t most, FxqChunk& chunk) {
  if (chunk.end == w.k) {
    return false;
  }
  chunk.codes += (chunk.end - chunk.begin + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP * DECODE::BYTES;
  chunk.begin = chunk.end;
  const int64_t groups = std::min(FXQ_GROUPS, most / w.group);
  chunk.group = chunk.begin / w.group;
  chunk.end = groups ? (chunk.group + groups) * w.group : std::min(chunk.begin + most, (chunk.group + 1) * w.group);
  chunk.end = std::min(chunk.end, w.k);
  const int64_t read = (chunk.end - 1) / w.group - chunk.group + 1;
  chunk.scales.find(w.scale, panel, w.n, chunk.group, read);
  chunk.zero_points.find(w.zero_point, panel, w.n, chunk.group, read);
  return true;
}

// The columns of a chunk, decoded, to ``out``, where zeros follow up to a multiple of 32 k.
template <typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_widen(
    const FxqPlan& plan, const FxqWeight& w, const FxqChunk& chunk, uint8_t* out) {
  const uint8_t* codes = chunk.codes;
  int64_t k = chunk.begin, group = chunk.group;
  for (int64_t i = 0; k < chunk.end; i++, group++) {
    const int64_t end = std::min(chunk.end, (group + 1) * w.group);
    const float* zero_point = fxq_zero_point(w, chunk, i);
    for (; k < end; k += DECODE::STEP) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < DECODE::STEP * DECODE::BYTES; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes) + plan.ahead + line, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int part = 0; part < DECODE::PARTS; part++, out += 256) {
        __m512i columns[4];
        fxq_columns<DECODE>(codes, part, zero_point, columns);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          _mm512_store_si512(out + j * 64, columns[j]);
        }
      }
      codes += DECODE::STEP * DECODE::BYTES;
    }
    k = end;
  }
  const int64_t steps = (k - chunk.begin + DECODE::STEP - 1) / DECODE::STEP, all = (k - chunk.begin + 31) / 32 * 32;
  std::memset(out, 0, std::max<int64_t>(0, all / DECODE::STEP - steps) * DECODE::PARTS * 256);
}

// Whether many rows are multiplied by a panel that is decoded once for them.
inline bool fxq_is_wide(int64_t count, [[maybe_unused]] const FxqWeight& w) {
#ifdef FXQ_AMX
  return count >= FXQ_WIDE_ROWS && (w.group % FXQ_TILE_K == 0 || w.group >= w.k);
#else
  return count >= FXQ_WIDE_ROWS;
#endif
}

// fxq_panel of many rows.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_wide_panel(
    const FxqPlan& plan,
    int64_t first,
    int64_t count,
    const FxqRows<typename DOT::A>& rows,
    const FxqWeight& w,
    int64_t panel,
    FxqChunk& chunk,
    float* acc) {
  using Wide = FxqWide<DECODE>;
  alignas(64) uint8_t wide[FXQ_WIDE_K * Wide::BYTES];
  while (fxq_next<DECODE>(w, panel, std::min(plan.chunk_k, FXQ_WIDE_K), chunk)) {
    fxq_widen<DECODE>(plan, w, chunk, wide);
#ifdef FXQ_AMX
    fxq_chunk_tiles<DECODE>(first, count, rows, w, chunk, wide, acc);
#else
    FxqChunk decoded = chunk;
    decoded.codes = wide;
    if (w.row_scale == nullptr && w.scale.kind != FXQ_NONE) {
      const bool corrects = DECODE::CORRECTS && w.zero_point.kind != FXQ_NONE;
      const auto multiply = w.zero_point.added ? fxq_kept_chunk<DOT, Wide, FxqShift::OFFSET>
          : corrects                           ? fxq_kept_chunk<DOT, Wide, FxqShift::ZERO_POINT>
                                               : fxq_kept_chunk<DOT, Wide, FxqShift::NONE>;
      multiply(count, rows, w, decoded, acc);
      continue;
    }
    const FxqAhead none = {reinterpret_cast<const char*>(wide), 0}, ahead[] = {none, none, none};
    const int64_t tiles = (count + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
    static_assert(FXQ_WIDE_ROWS >= 4 * FXQ_TILE_ROWS); // so that no tile has less than five rows
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = count * tile / tiles;
      const auto multiply = count * (tile + 1) / tiles - row == 5 ? fxq_chunk_rows<DOT, Wide, 5>
                                                                   : fxq_chunk_rows<DOT, Wide, 6>;
      multiply(first, row, rows, w, decoded, ahead, acc + row * FXQ_PANEL);
    }
#endif
  }
}

// acc[count][64] of rows that are first.. of the activation. A chunk of the panel is multiplied by all rows before the
// next one, at most plan.chunk_k of it.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_panel(
    const FxqPlan& plan,
    int64_t first,
    int64_t count,
    const FxqRows<typename DOT::A>& rows,
    const FxqWeight& w,
    int64_t panel,
    float* acc) {
  FxqChunk chunk;
  chunk.begin = chunk.end = 0;
  chunk.codes = w.codes + panel * ((w.k + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP) * DECODE::BYTES;
  std::memset(acc, 0, count * FXQ_PANEL * sizeof(float));
  if constexpr (FXQ_WIDE_ROWS != INT64_MAX && FXQ_ROWS_AT_MOST == FXQ_TILE_ROWS) {
    if (fxq_is_wide(count, w)) {
      return fxq_wide_panel<DOT, DECODE>(plan, first, count, rows, w, panel, chunk, acc);
    }
  }
  const int64_t tiles = (count + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
  while (fxq_next<DECODE>(w, panel, plan.chunk_k, chunk)) {
    const int64_t read = (chunk.end - 1) / w.group - chunk.group + 1;
    const int64_t bytes = (chunk.end - chunk.begin + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP * DECODE::BYTES;
    const int64_t steps = bytes / (DECODE::STEP * DECODE::BYTES);
    const FxqAhead factors[] = {
        chunk.scales.ahead(w.scale, panel, chunk.group + read, read, steps),
        chunk.zero_points.ahead(w.zero_point, panel, chunk.group + read, read, steps)};
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = count * tile / tiles;
      const FxqAhead none = {reinterpret_cast<const char*>(chunk.codes), 0};
      const FxqAhead ahead[] = {
          fxq_ahead(plan, tile, tiles, chunk.codes, bytes), tile ? none : factors[0], tile ? none : factors[1]};
      fxq_chunk_tile<DOT, DECODE>(
          count * (tile + 1) / tiles - row, first, row, rows, w, chunk, ahead, acc + row * FXQ_PANEL);
    }
  }
}

} // namespace
