// An int8 activation times a panel of a packed weight of 8 or 4 bits, with scales that vary along k.
//
// acc[rows][64] = sum_j row_scale[j] * scale[j] * sum_{k in j} (a[k] - row_zero_point) * (code[k] - zero_point[j])
//
// The products of a piece of a group, at most FXQ_PIECE k, are summed in int32, which float32 then holds exactly; the
// zero points are taken off that. Pieces are the same for any number of rows, so a row's bits do not depend on them.
// DOT is that of tile.h, with float32 of its sums: Float, and floats, all, times, plus and less of it. Codes of 4 bits
// are those of 8 k of a column in four bytes, k 0 to 3 in the low halves and 4 to 7 in the high ones: DOT::nibbles
// takes one half of a register. Few rows have them in registers; of many a part of the panel is widened for all.

namespace {

constexpr int64_t FXQ_PIECE = 512;

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
  FxqSpread<int8_t> spread_;

 public:
  FxqCodeRows(const int8_t* a, int64_t lda, int64_t first, int64_t rows, const FxqWeight& w)
      : spread_(a, lda, rows, w.k), data(spread_.data), stride(spread_.stride), first(first), weight(w) {
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
template <typename DOT, int ROWS, int COLUMNS>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_nibble_products(
    typename DOT::Vec (&acc)[ROWS][COLUMNS], FxqLanes a, const char* b, int64_t count, FxqAhead& ahead) {
  constexpr int LINES = COLUMNS * sizeof(typename DOT::Codes) / 64;
  for (int64_t k = 0; k < count; k += 8, b += 256) {
#pragma GCC unroll 4
    for (int line = 0; line < LINES; line++) {
      __builtin_prefetch(ahead.at);
      ahead.at += ahead.step;
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
  alignas(64) float scales[FXQ_GROUPS][FXQ_PANEL];
  alignas(64) float zero_points[FXQ_GROUPS][FXQ_PANEL];
  alignas(64) float code_sums[FXQ_GROUPS][FXQ_PANEL];
};

// Those of one group, from one column on.
struct FxqPieceFactors {
  const float *scale, *zero_point, *code_sum;
};

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
        std::memcpy(&factor, factors.scale + c, sizeof(factor));
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
        fxq_products<DOT, ROWS, COLUMNS, true>(sum, lanes, b + column * 4, groups, rest, ahead);
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
      return count == 1 ? fxq_piece_rows<DOT, DECODE, NIBBLES, 1>(row, rows, chunk, asked, acc)
                        : fxq_piece_rows<DOT, DECODE, NIBBLES, 2>(row, rows, chunk, asked, acc);
    }
  }
  // Several tiles have three rows at least.
  switch (count) {
    case 3: return fxq_piece_rows<DOT, DECODE, NIBBLES, 3>(row, rows, chunk, asked, acc);
    case 4: return fxq_piece_rows<DOT, DECODE, NIBBLES, 4>(row, rows, chunk, asked, acc);
    case 5: return fxq_piece_rows<DOT, DECODE, NIBBLES, 5>(row, rows, chunk, asked, acc);
    default: return fxq_piece_rows<DOT, DECODE, NIBBLES, 6>(row, rows, chunk, asked, acc);
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
constexpr int64_t FXQ_TILES_ROWS = 12; // fewer are left to registers

// What is left of k, in whole tiles.
struct FxqTilesRest {
  alignas(64) int8_t a[32 * 64];
  alignas(64) uint8_t b[64 * FXQ_PANEL];
};

// Adds 16 groups at b, 256 bytes from one to the next, to the sums of one or two tiles of rows of a.
template <bool TWO>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_amx_step(const int8_t* a, int64_t lda, const uint8_t* b) {
  _tile_loadd(4, a, lda);
  _tile_loadd(6, b, 256);
  _tile_dpbsud(0, 4, 6);
  _tile_loadd(7, b + 64, 256);
  _tile_dpbsud(1, 4, 7);
  if (TWO) {
    _tile_loadd(5, a + 16 * lda, lda);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
}

// sums[32 rows][32 columns] = a x the ``count`` k at b, ``deep`` at a time.
template <bool TWO>
FXQ_TARGET __attribute__((noinline)) void fxq_piece_sums(
    const int8_t* a,
    int64_t lda,
    const uint8_t* b,
    int64_t count,
    int64_t deep,
    const int8_t* rest_a,
    const uint8_t* rest_b,
    int32_t* sums) {
  fxq_zero_sums<TWO>();
  int64_t k = 0;
  for (; k + deep <= count; k += deep) {
    fxq_amx_step<TWO>(a + k, lda, b + k * FXQ_PANEL);
  }
  if (k < count) {
    fxq_amx_step<TWO>(rest_a, 64, rest_b);
  }
  fxq_store_sums<TWO>(sums, 32);
}

// acc[height][32 columns] of one piece.
template <typename DOT, FxqShift SHIFT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_add_piece(
    const int32_t* sums,
    int64_t height,
    const FxqCodeRows<DOT, DECODE>& rows,
    int64_t row,
    int64_t i,
    const FxqPieceFactors& factors,
    float* acc) {
  const int32_t* const starts = rows.starts(row) + i;
  const int64_t all = rows.pieces.size();
  for (int64_t r = 0; r < height; r++) {
    typename DOT::Vec sum[1][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      sum[0][j] = _mm512_add_epi32(_mm512_load_si512(sums + r * 32 + j * 16), _mm512_set1_epi32(starts[r * all]));
    }
    fxq_add_scaled<DOT, SHIFT, DECODE, 1, 2>(sum, rows, row + r, i, factors, acc + r * FXQ_PANEL);
  }
}

// acc[count][64] of some pieces, whose codes are bytes. Their sums are those of registers, and so is what is done to them.
// The ``bytes`` at ``next``, which are packed, are asked for meanwhile.
template <typename DOT, typename DECODE>
FXQ_TARGET __attribute__((noinline)) void fxq_pieces_in_tiles(
    FxqTiles& tiles,
    int64_t count,
    const FxqCodeRows<DOT, DECODE>& rows,
    const FxqPieces& chunk,
    const char* next,
    int64_t bytes,
    float* acc) {
  const FxqWeight& w = rows.weight;
  const int64_t blocks = (count + 31) / 32, deep = w.group % 64 == 0 || w.group >= w.k ? 64 : 32;
  const FxqShift shift = fxq_shift(w);
  const int64_t begin = rows.pieces[chunk.first].from;
  // What tiles give is taken up while they compute what comes next.
  alignas(64) int32_t sums[2][32 * 32];
  FxqTilesRest rest;
  const int64_t step = (bytes / (blocks * 2 * chunk.count) + 63) / 64 * 64;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t row = count * block / blocks, height = count * (block + 1) / blocks - row;
    const auto add = [&](int64_t half) {
      const int64_t i = chunk.first + half / 2, column = half % 2 * 32, group = rows.pieces[i].group - chunk.group;
      const FxqPieceFactors factors{
          chunk.scales[group] + column, chunk.zero_points[group] + column, chunk.code_sums[group] + column};
      const int32_t* const from = sums[half % 2];
      float* const out = acc + row * FXQ_PANEL + column;
      if (shift == FxqShift::ANY) {
        fxq_add_piece<DOT, FxqShift::ANY>(from, height, rows, row, i, factors, out);
      } else if (shift == FxqShift::ROWS) {
        fxq_add_piece<DOT, FxqShift::ROWS>(from, height, rows, row, i, factors, out);
      } else {
        fxq_add_piece<DOT, FxqShift::NONE>(from, height, rows, row, i, factors, out);
      }
    };
    tiles.configure(height, deep);
    for (int64_t half = 0; half < 2 * chunk.count; half++) {
      const FxqPiece piece = rows.pieces[chunk.first + half / 2];
      const int8_t* const a = rows.data + row * rows.stride + piece.from;
      const uint8_t* const b = chunk.codes + (piece.from - begin) * FXQ_PANEL;
      const int64_t all = piece.to - piece.from, left = all % deep, column = half % 2 * 32;
      if (left && column == 0) {
        std::memset(&rest, 0, sizeof(rest));
        for (int64_t r = 0; r < height; r++) {
          std::memcpy(rest.a + r * 64, a + r * rows.stride + all - left, left);
        }
        std::memcpy(rest.b, b + (all - left) * FXQ_PANEL, (left + 3) / 4 * 256);
      }
      const auto multiply = height > 16 ? fxq_piece_sums<true> : fxq_piece_sums<false>;
      multiply(a, rows.stride, b + column * 4, all, deep, rest.a, rest.b + column * 4, sums[half % 2]);
      for (const char* end = next + step; next < end; next += 64) {
        __builtin_prefetch(next, 0, 2);
      }
      if (half > 0) {
        add(half - 1);
      }
    }
    add(2 * chunk.count - 1);
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
  const int64_t tiles = (count + FXQ_TILE_ROWS - 1) / FXQ_TILE_ROWS;
  const bool widens = DECODE::IS_NIBBLES && tiles > 1;
  alignas(64) uint8_t bytes[DECODE::IS_NIBBLES ? FXQ_PIECE * FXQ_PANEL : 1];
  const int64_t most = widens ? std::min(FXQ_PIECE, plan.chunk_k) : plan.chunk_k;
  const uint8_t* codes = w.codes + panel * ((w.k + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP) * DECODE::BYTES;
  const int64_t all = rows.pieces.size();
  FxqPieces chunk;
#ifdef FXQ_AMX
  FxqTiles amx;
#endif
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
    fxq_read(w.scale, panel * FXQ_PANEL, w.n, begin.group, read, chunk.scales);
    fxq_read(w.zero_point, panel * FXQ_PANEL, w.n, begin.group, read, chunk.zero_points);
    fxq_read(w.code_sum, panel * FXQ_PANEL, w.n, begin.group, read, chunk.code_sums);
    const int64_t deep = (end.to - begin.from + DECODE::STEP - 1) / DECODE::STEP * DECODE::STEP;
    chunk.codes = codes;
    if (widens) {
      fxq_widen<DOT>(codes, deep, bytes);
      chunk.codes = bytes;
    }
#ifdef FXQ_AMX
    if (count >= FXQ_TILES_ROWS) {
      const int64_t size = deep * DECODE::BYTES;
      fxq_pieces_in_tiles(amx, count, rows, chunk, reinterpret_cast<const char*>(codes) + size, size, acc);
      codes += deep * DECODE::BYTES;
      continue;
    }
#endif
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
      FxqAhead asked[4] = {fxq_ahead(plan, tile, tiles, codes, deep * DECODE::BYTES), {}, {}, {}};
      if (tile == 0) {
        asked[1] = fxq_factors_ahead(w.scale, panel, begin.group + read, read, chunk.count);
        asked[2] = fxq_factors_ahead(w.zero_point, panel, begin.group + read, read, chunk.count);
        asked[3] = fxq_factors_ahead(w.code_sum, panel, begin.group + read, read, chunk.count);
      }
      float* out = acc + row * FXQ_PANEL;
      if (DECODE::IS_NIBBLES && !widens) {
        fxq_some_rows<DOT, DECODE, DECODE::IS_NIBBLES>(height, row, rows, chunk, asked, out);
      } else {
        asked[0].step = asked[0].step * DECODE::BYTES / FXQ_PANEL;
        fxq_some_rows<DOT, DECODE, false>(height, row, rows, chunk, asked, out);
      }
    }
    codes += deep * DECODE::BYTES;
  }
}

} // namespace
