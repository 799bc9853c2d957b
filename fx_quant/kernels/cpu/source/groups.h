// An int8 activation times a panel of a packed weight of 8 or 4 bits, with scales that vary along k.
//
// acc[rows][64] = sum_j row_scale[j] * scale[j] * sum_{k in j} (a[k] - row_zero_point) * (code[k] - zero_point[j])
//
// The products of a piece of a group, at most FXQ_PIECE k, are summed in int32, which float32 then holds exactly; the
// zero points are taken off that. Pieces are the same for any number of rows, so a row's bits do not depend on them.
// DOT is that of tile.h, with float32 of its sums: Float, and floats, all, times, plus and less of it. Codes of 4 bits
// are those of 8 k of a column in four bytes, k 0 to 3 in the low halves and 4 to 7 in the high ones: DOT::nibbles
// takes one half of a register. Few rows have them in registers; of many a part of the panel is widened for all.

#include <optional>

namespace {

constexpr int64_t FXQ_PIECE = 512;
#ifdef FXQ_AMX
constexpr int64_t FXQ_TILES_ROWS = 12; // fewer are left to registers
#endif

// How codes are packed: bytes of 128 more than the code, or halves of bytes of 8 more.
struct FxqPackedBytes {
  static constexpr bool IS_NIBBLES = false;
  static constexpr int64_t STEP = 4, BYTES = 64; // k that are packed together, and bytes of one k of a panel
  static constexpr int32_t OFFSET = 128;
};
struct FxqPackedNibbles {
  static constexpr bool IS_NIBBLES = true;
  static constexpr int64_t STEP = 8, BYTES = 32;
  static constexpr int32_t OFFSET = 8;
};
template <typename CODES>
struct FxqDecode : CODES {};

// The k from ``from`` to ``to``, all of one group.
struct FxqPiece {
  int64_t from, to, group;
};

// Rows of an activation, and for each piece what its sum starts from.
template <typename DOT, typename DECODE>
class FxqCodeRows {
 public:
  FxqCodeRows(const int8_t* a, int64_t lda, int64_t first, int64_t rows, const FxqWeight& w)
      : data(a), stride(lda), first(first), weight(w) {
#ifdef FXQ_AMX
    if (rows >= FXQ_TILES_ROWS && (w.group == 32 || w.group % 64 == 0 || w.group >= w.k)) {
      steps.emplace(a, lda, rows, (rows + 15) / 16, w.k);
    }
#endif
    for (int64_t from = 0, group = 0; from < w.k; group++) {
      const int64_t end = std::min(w.k, from + w.group);
      for (; from < end; from = pieces.back().to) {
        pieces.push_back({from, std::min(end, from + FXQ_PIECE), group});
      }
    }
    starts_.resize(rows * pieces.size());
    sums_.resize(w.zero_point.kind == FXQ_NONE ? 0 : starts_.size());
    for (int64_t r = 0, i = 0; r < rows; r++) {
      for (const FxqPiece& piece : pieces) {
        // -128 * sum_k a, which divides by any of the offsets.
        const int32_t start = DOT::row_start(a + r * lda + piece.from, piece.to - piece.from);
        starts_[i] = start / (128 / DECODE::OFFSET);
        if (!sums_.empty()) {
          const float shift = zero_point(r) * static_cast<float>(piece.to - piece.from);
          sums_[i] = static_cast<float>(start / -128) - shift;
        }
        i++;
      }
    }
  }
  const int32_t* starts(int64_t row) const {
    return starts_.data() + row * static_cast<int64_t>(pieces.size());
  }
  // sum_k (a[k] - zero_point)
  float sum(int64_t row, int64_t piece) const {
    return sums_[row * pieces.size() + piece];
  }
  float zero_point(int64_t row) const {
    const int32_t* point = weight.row_zero_point;
    return point == nullptr ? 0.0f : static_cast<float>(point[(first + row) * weight.row_zero_point_stride]);
  }
  float scale(int64_t row, int64_t group) const {
    return *fxq_row_scale(weight, first + row, group);
  }

  const int8_t* const data;
  const int64_t stride, first;
  const FxqWeight& weight;
  std::vector<FxqPiece> pieces;
#ifdef FXQ_AMX
  std::optional<FxqSteps<int8_t>> steps; // in blocks of 16 rows at most, where tiles multiply them
#endif

 private:
  std::vector<int32_t> starts_;
  std::vector<float> sums_;
};

template <typename DOT, typename DECODE>
inline FxqCodeRows<DOT, DECODE> fxq_rows(
    const int8_t* a, int64_t lda, int64_t first, int64_t count, const FxqWeight& w) {
  return FxqCodeRows<DOT, DECODE>(a, lda, first, count, w);
}

// One half of the bytes of each of some registers.
template <typename DOT>
struct FxqHalf {
  const typename DOT::Codes* bytes;
  int half;

  FXQ_TARGET __attribute__((always_inline)) typename DOT::Codes operator()(int j) const {
    return DOT::nibbles(bytes[j], half);
  }
};

// acc[ROWS][COLUMNS] += rows x columns of a panel of nibbles at b, ``count`` k of them
template <typename DOT, int ROWS, int COLUMNS, bool ASKS = (ROWS > 2)>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_nibble_products(
    typename DOT::Vec (&acc)[ROWS][COLUMNS], FxqLanes a, const char* b, int64_t count, FxqAhead& ahead) {
  constexpr int LINES = COLUMNS * sizeof(typename DOT::Codes) / 64;
  for (int64_t k = 0; k < count; k += 8, b += 256) {
    // For one row or two the hardware asks in time.
    if (ASKS) {
#pragma GCC unroll 4
      for (int line = 0; line < LINES; line++) {
        __builtin_prefetch(ahead.at);
        ahead.at += ahead.step;
      }
    }
    typename DOT::Codes bytes[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
      bytes[j] = FxqColumns<DOT>{b}(j);
    }
    // Lanes that were widened have zeros behind them.
    if (DOT::PARTS > 1 || k + 8 <= count) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        fxq_group<DOT, ROWS, COLUMNS>(acc, FxqHalf<DOT>{bytes, half}, [&](int r, int part) {
          int32_t lane;
          std::memcpy(&lane, a.data + r * a.row + part * a.part + k + half * 4, sizeof(lane));
          return lane;
        });
      }
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        fxq_group<DOT, ROWS, COLUMNS>(acc, FxqHalf<DOT>{bytes, half}, [&](int r, int) {
          int32_t lane = 0;
          const int64_t at = k + half * 4;
          std::memcpy(&lane, a.data + r * a.row + at, std::min<int64_t>(4, std::max<int64_t>(0, count - at)));
          return lane;
        });
      }
    }
  }
}

// Pieces of a panel, ``count`` from ``first`` on, and the factors of their groups, the first of which is ``group``.
struct FxqPieces {
  int64_t first, count, group;
  const uint8_t* codes; // of the first piece: packed, or widened to bytes
  FxqGroupFactors<FxqScale> scales;
  FxqGroupFactors<float> zero_points, code_sums;
};

// Those of one group, from one column on.
struct FxqPieceFactors {
  const FxqScale* scale;
  const float *zero_point, *code_sum;
};

// The scales of some columns.
template <typename DOT, typename T>
FXQ_TARGET __attribute__((always_inline)) inline typename DOT::Float fxq_scales(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    typename DOT::Float scales;
    std::memcpy(&scales, p, sizeof(scales));
    return scales;
  } else {
    return fxq_load(p);
  }
}

// What is done to a sum beside multiplying it by the scale of the weight.
enum class FxqShift { NONE, ROWS, ANY };

inline FxqShift fxq_shift(const FxqWeight& w) {
  if (w.scale.kind == FXQ_NONE || w.zero_point.kind != FXQ_NONE || w.row_scale != nullptr) {
    return FxqShift::ANY;
  }
  return w.code_sum.kind == FXQ_NONE ? FxqShift::NONE : FxqShift::ROWS;
}

// acc[r][j] += row_scale * scale * (sum - zero points) of piece ``i``.
template <typename DOT, FxqShift SHIFT, typename DECODE, int ROWS, int COLUMNS>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_add_scaled(
    const typename DOT::Vec (&sum)[ROWS][COLUMNS],
    const FxqCodeRows<DOT, DECODE>& rows,
    int64_t row,
    int64_t i,
    const FxqPieceFactors& factors,
    float* acc) {
  using Float = typename DOT::Float;
  const FxqWeight& w = rows.weight;
  const FxqPiece piece = rows.pieces[i];
  // Once for all pieces of a group.
  constexpr bool ANY = SHIFT == FxqShift::ANY;
  const bool shifts_rows = SHIFT != FxqShift::NONE && (!ANY || w.code_sum.kind != FXQ_NONE);
  const bool shifts_columns = ANY && w.zero_point.kind != FXQ_NONE;
  const bool scales_rows = ANY && w.row_scale != nullptr;
  const float once = piece.from == piece.group * w.group ? 1.0f : 0.0f;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
      const int64_t c = j * DOT::LANES;
      Float value = DOT::floats(sum[r][j]), factor, out;
      if (shifts_rows) {
        std::memcpy(&factor, factors.code_sum + c, sizeof(factor));
        value = DOT::less(value, DOT::all(once * rows.zero_point(row + r)), factor);
      }
      if (shifts_columns) {
        std::memcpy(&factor, factors.zero_point + c, sizeof(factor));
        value = DOT::less(value, DOT::all(rows.sum(row + r, i)), factor);
      }
      if (scales_rows) {
        value = DOT::times(value, DOT::all(rows.scale(row + r, piece.group)));
      }
      factor = DOT::all(1.0f);
      if (!ANY || w.scale.kind != FXQ_NONE) {
        factor = fxq_scales<DOT>(factors.scale + c);
      }
      std::memcpy(&out, acc + r * FXQ_PANEL + c, sizeof(out));
      out = DOT::plus(out, value, factor);
      std::memcpy(acc + r * FXQ_PANEL + c, &out, sizeof(out));
    }
  }
}

template <typename DOT, FxqShift SHIFT, typename DECODE, int ROWS, int COLUMNS>
FXQ_TARGET __attribute__((noinline)) void fxq_add_shifted(
    const typename DOT::Vec (&sum)[ROWS][COLUMNS],
    const FxqCodeRows<DOT, DECODE>& rows,
    int64_t row,
    int64_t i,
    const FxqPieceFactors& factors,
    float* acc) {
  fxq_add_scaled<DOT, SHIFT>(sum, rows, row, i, factors, acc);
}

// acc[ROWS][64] of the rows from ``row`` on, and some pieces.
template <typename DOT, typename DECODE, bool NIBBLES, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_piece_rows(
    int64_t row, const FxqCodeRows<DOT, DECODE>& rows, const FxqPieces& chunk, const FxqAhead (&asked)[4], float* acc) {
  using Vec = typename DOT::Vec;
  constexpr int COLUMNS = DOT::columns(ROWS);
  constexpr int PASSES = FXQ_PANEL / (COLUMNS * DOT::LANES);
  const FxqShift shift = fxq_shift(rows.weight);
  FxqAhead ahead = asked[0], more[3] = {asked[1], asked[2], asked[3]};
  const int64_t begin = rows.pieces[chunk.first].from, all = rows.pieces.size();
  const int32_t* starts = rows.starts(row);
  for (int64_t i = chunk.first; i < chunk.first + chunk.count; i++) {
    const FxqPiece piece = rows.pieces[i];
    const int64_t count = piece.to - piece.from, group = piece.group - chunk.group;
    const int8_t* a = rows.data + row * rows.stride + piece.from;
    for (FxqAhead& factor : more) {
      for (int64_t line = 0; line < factor.step; line += 64, factor.at += 64) {
        __builtin_prefetch(factor.at);
      }
    }
    FxqLanes lanes{reinterpret_cast<const char*>(a), rows.stride, 0};
    [[maybe_unused]] alignas(64) int32_t wide[DOT::PARTS > 1 ? ROWS : 1][DOT::PARTS][FXQ_PIECE / DOT::GROUP];
    int64_t groups = count / DOT::GROUP, rest = count % DOT::GROUP;
    if constexpr (DOT::PARTS > 1) {
      groups += rest > 0;
      rest = 0;
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        DOT::widen(a + r * rows.stride, count, wide[r]);
      }
      lanes = {reinterpret_cast<const char*>(wide), sizeof(wide[0]), sizeof(wide[0][0])};
    }
    const int64_t bytes = NIBBLES ? DECODE::BYTES : FXQ_PANEL;
    const char* b = reinterpret_cast<const char*>(chunk.codes + (piece.from - begin) * bytes);
#pragma GCC unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      const int64_t column = pass * COLUMNS * DOT::LANES;
      Vec sum[ROWS][COLUMNS];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
          sum[r][j] = DOT::splat(starts[r * all + i]);
        }
      }
      if constexpr (NIBBLES) {
        fxq_nibble_products<DOT, ROWS, COLUMNS>(sum, lanes, b + column * 4, count, ahead);
      } else {
        fxq_products<DOT, ROWS, COLUMNS>(sum, lanes, b + column * 4, groups, rest, ahead);
      }
      const FxqPieceFactors factors{chunk.scales[group] + column, chunk.zero_points[group] + column,
                                    chunk.code_sums[group] + column};
      if (shift == FxqShift::NONE) {
        fxq_add_scaled<DOT, FxqShift::NONE>(sum, rows, row, i, factors, acc + column);
      } else {
        Vec copy[ROWS][COLUMNS]; // what a function is given the address of is not in registers
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
          for (int j = 0; j < COLUMNS; j++) {
            copy[r][j] = sum[r][j];
          }
        }
        if (shift == FxqShift::ROWS) {
          fxq_add_shifted<DOT, FxqShift::ROWS>(copy, rows, row, i, factors, acc + column);
        } else {
          fxq_add_shifted<DOT, FxqShift::ANY>(copy, rows, row, i, factors, acc + column);
        }
      }
      // gcc would carry sums from piece to piece beside those that it stores, and has no registers for them.
      __asm__ volatile("" ::: "memory");
    }
  }
}

// acc[ROWS][64] of the rows from ``row`` on, and some pieces of bytes, to the bits that fxq_piece_rows gives. Three rows
// have room for their floats beside their integers: nothing is stored from piece to piece, for which six would wait.
template <typename DOT, FxqShift SHIFT, typename DECODE, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_kept_rows(
    int64_t row, const FxqCodeRows<DOT, DECODE>& rows, const FxqPieces& chunk, FxqAhead ahead, float* acc) {
  using Vec = typename DOT::Vec;
  using Float = typename DOT::Float;
  constexpr int COLUMNS = FXQ_PANEL / DOT::LANES;
  const int64_t begin = rows.pieces[chunk.first].from, all = rows.pieces.size(), per_group = rows.weight.group;
  const int32_t* starts = rows.starts(row);
  const int8_t* const a = rows.data + row * rows.stride;
  [[maybe_unused]] float points[ROWS];
  Float kept[ROWS][COLUMNS];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) {
    points[r] = SHIFT == FxqShift::ROWS ? rows.zero_point(row + r) : 0.0f;
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) {
      std::memcpy(&kept[r][j], acc + r * FXQ_PANEL + j * DOT::LANES, sizeof(Float));
    }
  }
  for (int64_t i = chunk.first; i < chunk.first + chunk.count; i++) {
    const FxqPiece piece = rows.pieces[i];
    const int64_t count = piece.to - piece.from, group = piece.group - chunk.group;
    const FxqLanes lanes{reinterpret_cast<const char*>(a + piece.from), rows.stride, 0};
    const char* b = reinterpret_cast<const char*>(chunk.codes + (piece.from - begin) * FXQ_PANEL);
    Vec sum[ROWS][COLUMNS];
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; j++) {
        sum[r][j] = DOT::splat(starts[r * all + i]);
      }
    }
    fxq_products<DOT, ROWS, COLUMNS, true>(sum, lanes, b, count / DOT::GROUP, count % DOT::GROUP, ahead);
    const FxqScale* const scale = chunk.scales[group];
    const float* const code_sum = chunk.code_sums[group];
    const bool shifts = SHIFT == FxqShift::ROWS && piece.from == piece.group * per_group;
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; j++) {
        Float value = DOT::floats(sum[r][j]), factor;
        if (shifts) {
          std::memcpy(&factor, code_sum + j * DOT::LANES, sizeof(factor));
          value = DOT::less(value, DOT::all(points[r]), factor);
        }
        kept[r][j] = DOT::plus(kept[r][j], value, fxq_scales<DOT>(scale + j * DOT::LANES));
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; j++) {
      std::memcpy(acc + r * FXQ_PANEL + j * DOT::LANES, &kept[r][j], sizeof(Float));
    }
  }
}

// Two rows or three.
template <typename DOT, FxqShift SHIFT, typename DECODE>
inline void fxq_few_kept_rows(
    int64_t count, int64_t row, const FxqCodeRows<DOT, DECODE>& rows, const FxqPieces& chunk, FxqAhead ahead, float* acc) {
  return count == 2 ? fxq_kept_rows<DOT, SHIFT, DECODE, 2>(row, rows, chunk, ahead, acc)
                    : fxq_kept_rows<DOT, SHIFT, DECODE, 3>(row, rows, chunk, ahead, acc);
}

template <typename DOT, typename DECODE, bool NIBBLES>
inline void fxq_some_rows(
    int64_t count,
    int64_t row,
    const FxqCodeRows<DOT, DECODE>& rows,
    const FxqPieces& chunk,
    const FxqAhead (&asked)[4],
    float* acc) {
  static_assert(DOT::ROWS == 6);
  if constexpr (NIBBLES || !DECODE::IS_NIBBLES) {
    if (count <= 2) {
      return count == 1 ? fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(1)>(row, rows, chunk, asked, acc)
                        : fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(2)>(row, rows, chunk, asked, acc);
    }
  }
  // Several tiles have three rows at least.
  switch (count) {
    case 3: return fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(3)>(row, rows, chunk, asked, acc);
    case 4: return fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(4)>(row, rows, chunk, asked, acc);
    case 5: return fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(5)>(row, rows, chunk, asked, acc);
    default: return fxq_piece_rows<DOT, DECODE, NIBBLES, fxq_rows_of(6)>(row, rows, chunk, asked, acc);
  }
}

// ``count`` k of a panel of nibbles as one of bytes.
template <typename DOT>
FXQ_TARGET __attribute__((noinline)) void fxq_widen(const uint8_t* nibbles, int64_t count, uint8_t* bytes) {
  using Codes = typename DOT::Codes;
  for (int64_t k = 0; k < count; k += 8, nibbles += 256, bytes += 512) {
#pragma GCC unroll 8
    for (int64_t at = 0; at < 256; at += sizeof(Codes)) {
      Codes both;
      std::memcpy(&both, nibbles + at, sizeof(both));
      const Codes low = DOT::nibbles(both, 0), high = DOT::nibbles(both, 1);
      std::memcpy(bytes + at, &low, sizeof(low));
      std::memcpy(bytes + 256 + at, &high, sizeof(high));
    }
  }
}

#ifdef FXQ_AMX
// ``count`` k of a packed panel as tiles of signed bytes: of 64 k four of 16 columns, one after the other.
template <typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_widen_to_tiles(const uint8_t* packed, int64_t count, int8_t* tiles) {
  const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(DECODE::OFFSET);
  for (int64_t k = 0; k < count; k += DECODE::STEP) {
    int8_t* const to = tiles + k / 64 * (64 * FXQ_PANEL) + k % 64 / 4 * 64;
    for (int tile = 0; tile < 4; tile++, packed += 64) {
      const __m512i codes = _mm512_loadu_si512(packed);
      if constexpr (DECODE::IS_NIBBLES) {
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        _mm512_store_si512(to + tile * 1024, _mm512_sub_epi8(_mm512_and_si512(codes, low), offset));
        _mm512_store_si512(to + tile * 1024 + 64, _mm512_sub_epi8(second, offset));
      } else {
        _mm512_store_si512(to + tile * 1024, _mm512_sub_epi8(codes, offset));
      }
    }
  }
}

// sums[height][16] = rows x 16 columns, ``steps`` tiles of each from a and from b on, in one tile or the other.
template <bool OTHER>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_piece_sums(
    const int8_t* a, const int8_t* b, int64_t steps, int64_t next_a, int64_t next_b, int32_t* sums) {
  if (OTHER) {
    _tile_zero(1);
  } else {
    _tile_zero(0);
  }
  for (; steps > 0; steps--, a += next_a, b += next_b) {
    if (OTHER) {
      _tile_loadd(5, a, 64);
      _tile_loadd(7, b, 64);
      _tile_dpbssd(1, 5, 7);
    } else {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbssd(0, 4, 6);
    }
  }
  if (OTHER) {
    _tile_stored(1, sums, 64);
  } else {
    _tile_stored(0, sums, 64);
  }
}

// acc[height][16 columns] of some pieces, whose codes are ``b``. What tiles give of one is taken up while they multiply
// the next.
template <typename DOT, FxqShift SHIFT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_pieces_of_tile(
    const FxqCodeRows<DOT, DECODE>& rows,
    int64_t row,
    int64_t height,
    const FxqPieces& chunk,
    const int8_t* b,
    int64_t deep,
    int64_t column,
    FxqTilesAhead& ahead,
    float* acc) {
  using Float = typename DOT::Float;
  alignas(64) int32_t sums[2][16 * 16];
  const int64_t count = chunk.count;
  const FxqPiece* const pieces = rows.pieces.data() + chunk.first;
  const int8_t* const a = rows.steps->from(row);
  // Pieces begin at a step of 64 k, or at half of one.
  const auto multiply = [&](int64_t i) FXQ_TARGET __attribute__((always_inline)) {
    const uint64_t from = pieces[i].from, at = from - pieces[0].from;
    const int64_t steps = (pieces[i].to - from + deep - 1) >> (deep == 64 ? 6 : 5);
    const int8_t* const rows_of_a = a + from / 64 * 64 * height + from % 64;
    const int8_t* const columns = b + column * 64 + at / 64 * 64 * FXQ_PANEL + at % 64 * 16;
    if (i % 2) {
      fxq_piece_sums<true>(rows_of_a, columns, steps, height * 64, 64 * FXQ_PANEL, sums[1]);
    } else {
      fxq_piece_sums<false>(rows_of_a, columns, steps, height * 64, 64 * FXQ_PANEL, sums[0]);
    }
  };
  Float kept[16];
  [[maybe_unused]] float points[16] = {};
#pragma GCC unroll 16
  for (int r = 0; SHIFT != FxqShift::ANY && r < 16; r++) {
    kept[r] = r < height ? _mm512_load_ps(acc + r * FXQ_PANEL) : DOT::all(0.0f);
    points[r] = r < height ? rows.zero_point(row + r) : 0.0f;
  }
  multiply(0);
  for (int64_t i = 0; i < count; i++) {
    if (i + 1 < count) {
      multiply(i + 1);
    }
    ahead.ask();
    const int64_t group = pieces[i].group - chunk.group;
    const FxqPieceFactors factors{
        chunk.scales[group] + column, chunk.zero_points[group] + column, chunk.code_sums[group] + column};
    const int32_t* const from = sums[i % 2];
    if constexpr (SHIFT == FxqShift::ANY) {
      for (int64_t r = 0; r < height; r++) {
        const typename DOT::Vec sum[1][1] = {{_mm512_load_si512(from + r * 16)}};
        fxq_add_scaled<DOT, SHIFT, DECODE, 1, 1>(sum, rows, row + r, chunk.first + i, factors, acc + r * FXQ_PANEL);
      }
      continue;
    }
    const Float scale = fxq_scales<DOT>(factors.scale);
    [[maybe_unused]] const Float code_sum = _mm512_loadu_ps(factors.code_sum);
    const bool shifts = SHIFT == FxqShift::ROWS && pieces[i].from == pieces[i].group * rows.weight.group;
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
      Float value = DOT::floats(_mm512_load_si512(from + r * 16));
      if (shifts) {
        value = DOT::less(value, DOT::all(points[r]), code_sum);
      }
      kept[r] = DOT::plus(kept[r], value, scale);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; SHIFT != FxqShift::ANY && r < 16; r++) {
    if (r < height) {
      _mm512_store_ps(acc + r * FXQ_PANEL, kept[r]);
    }
  }
}

// acc[count][64] of some pieces, to the bits that registers give. The ``bytes`` at ``next``, which are packed, are asked
// for meanwhile.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_pieces_in_tiles(
    FxqTiles& amx,
    int64_t count,
    const FxqCodeRows<DOT, DECODE>& rows,
    const FxqPieces& chunk,
    const int8_t* tiles,
    const char* next,
    int64_t bytes,
    float* acc) {
  const FxqWeight& w = rows.weight;
  const int64_t blocks = (count + 15) / 16, deep = w.group % 64 == 0 || w.group >= w.k ? 64 : 32;
  const FxqShift shift = fxq_shift(w);
  const auto multiply = shift == FxqShift::ANY ? fxq_pieces_of_tile<DOT, FxqShift::ANY, DECODE>
      : shift == FxqShift::ROWS                ? fxq_pieces_of_tile<DOT, FxqShift::ROWS, DECODE>
                                               : fxq_pieces_of_tile<DOT, FxqShift::NONE, DECODE>;
  FxqTilesAhead ahead{next, next + bytes, (bytes / (blocks * 4 * chunk.count) + 63) / 64 * 64};
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t row = count * block / blocks, height = count * (block + 1) / blocks - row;
    amx.configure(height, deep);
    for (int64_t column = 0; column < FXQ_PANEL; column += 16) {
      multiply(rows, row, height, chunk, tiles, deep, column, ahead, acc + row * FXQ_PANEL + column);
    }
  }
}
#endif

// acc[count][64] of ``rows``. Some pieces of the panel are multiplied by all rows before the next, at most
// plan.chunk_k of it.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_panel(
    const FxqPlan& plan,
    int64_t,
    int64_t count,
    const FxqCodeRows<DOT, DECODE>& rows,
    const FxqWeight& w,
    int64_t panel,
    float* acc) {
  const FxqShift shift = fxq_shift(w);
  // Of 32 registers; a tile has two rows at least.
  const bool keeps = DOT::LANES == 16 && DOT::PARTS == 1 && shift != FxqShift::ANY && count > FXQ_TILE_ROWS;
  const int64_t most_rows = keeps ? FXQ_TILE_ROWS / 2 : FXQ_TILE_ROWS;
  const int64_t tiles = (count + most_rows - 1) / most_rows;
#ifdef FXQ_AMX
  FxqTiles amx;
  const bool in_tiles = rows.steps.has_value();
#else
  const bool in_tiles = false;
#endif
  const bool widens = in_tiles || (DECODE::IS_NIBBLES && tiles > 1);
  alignas(64) uint8_t bytes[FXQ_PIECE * FXQ_PANEL];
  // Tiles are stored beside what they multiply, and both stay in the first cache.
  const int64_t most = in_tiles ? FXQ_PIECE / 2 : widens ? std::min(FXQ_PIECE, plan.chunk_k) : plan.chunk_k;
  const uint8_t* codes = w.codes + panel * ((w.k + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP) * DECODE::BYTES;
  const int64_t all = rows.pieces.size();
  FxqPieces chunk;
  std::memset(acc, 0, count * FXQ_PANEL * sizeof(float));
  for (chunk.first = 0; chunk.first < all; chunk.first += chunk.count) {
    const FxqPiece begin = rows.pieces[chunk.first];
    FxqPiece end = begin;
    for (chunk.count = 1; chunk.first + chunk.count < all; chunk.count++) {
      const FxqPiece next = rows.pieces[chunk.first + chunk.count];
      if (next.to - begin.from > most || next.group - begin.group >= FXQ_GROUPS) {
        break;
      }
      end = next;
    }
    chunk.group = begin.group;
    const int64_t read = end.group - begin.group + 1;
    chunk.scales.find(w.scale, panel, w.n, begin.group, read);
    chunk.zero_points.find(w.zero_point, panel, w.n, begin.group, read);
    chunk.code_sums.find(w.code_sum, panel, w.n, begin.group, read);
    const int64_t deep = (end.to - begin.from + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP;
    chunk.codes = codes;
#ifdef FXQ_AMX
    if (in_tiles) {
      const auto signed_bytes = reinterpret_cast<int8_t*>(bytes);
      const int64_t size = deep * DECODE::BYTES;
      fxq_widen_to_tiles<DECODE>(codes, deep, signed_bytes);
      codes += size;
      fxq_pieces_in_tiles(amx, count, rows, chunk, signed_bytes, reinterpret_cast<const char*>(codes), size, acc);
      continue;
    }
#endif
    if (widens) {
      fxq_widen<DOT>(codes, deep, bytes);
      chunk.codes = bytes;
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
      FxqAhead asked[4] = {fxq_ahead(plan, tile, tiles, codes, deep * DECODE::BYTES), {}, {}, {}};
      if (tile == 0) {
        asked[1] = chunk.scales.ahead(w.scale, panel, begin.group + read, read, chunk.count);
        asked[2] = chunk.zero_points.ahead(w.zero_point, panel, begin.group + read, read, chunk.count);
        asked[3] = chunk.code_sums.ahead(w.code_sum, panel, begin.group + read, read, chunk.count);
      }
      float* out = acc + row * FXQ_PANEL;
      if (DECODE::IS_NIBBLES && !widens) {
        fxq_some_rows<DOT, DECODE, DECODE::IS_NIBBLES>(height, row, rows, chunk, asked, out);
        continue;
      }
      asked[0].step = asked[0].step * DECODE::BYTES / FXQ_PANEL;
      if constexpr (DOT::LANES == 16 && DOT::PARTS == 1 && FXQ_ROWS_AT_MOST == FXQ_TILE_ROWS) {
        if (keeps) {
          const auto multiply = shift == FxqShift::NONE ? fxq_few_kept_rows<DOT, FxqShift::NONE, DECODE>
                                                        : fxq_few_kept_rows<DOT, FxqShift::ROWS, DECODE>;
          multiply(height, row, rows, chunk, asked[0], out);
          continue;
        }
      }
      if constexpr (!DECODE::IS_NIBBLES || FXQ_ROWS_AT_MOST == FXQ_TILE_ROWS) {
        fxq_some_rows<DOT, DECODE, false>(height, row, rows, chunk, asked, out);
      }
    }
    codes += deep * DECODE::BYTES;
  }
}

} // namespace
