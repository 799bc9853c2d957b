// A tile of accumulators in registers over packed panels of 64 columns.
//
// DOT, defined by the header of one kind of codes and one instruction set, says what one instruction does:
//   A, B, Acc   element types of the activation, the packed weight and the accumulator
//   GROUP       elements along k that one 32-bit lane holds
//   LANES, Vec  a register of LANES accumulators, with splat, dot and store
//   Codes       a register of LANES groups
//   ROWS        rows of a tile at most
//   columns     registers of columns that a tile of so many rows goes over at a time
//   PARTS       instructions that a group takes: Codes come in so many parts, split off by part
//   widen       where PARTS is 2: the parts of a row of a, each as lanes
//   row_start   what the accumulators of a row start from
//   State       what a thread keeps from tile to tile
//
// The packed weight is [ceil(n/64)][ceil(k/GROUP)][64][GROUP]; the tile never reads past the end of a row of a.

namespace {

constexpr int64_t FXQ_BLOCK = 64; // groups along k that a tile in several passes goes over before the next: 16 KiB

// Rows of a as lanes: lane g of part p of row r is at data + r * row + p * part + g * 4 bytes.
struct FxqLanes {
  const char* data;
  int64_t row, part;
};

// Registers of columns at ``at``.
template <typename DOT>
struct FxqColumns {
  const char* at;

  FXQ_TARGET __attribute__((always_inline)) typename DOT::Codes operator()(int j) const {
    typename DOT::Codes codes;
    std::memcpy(&codes, at + j * sizeof(codes), sizeof(codes));
    return codes;
  }
};

// acc[r][j] += row r x register j of columns, for one group whose lanes are at ``lane(r, part)`` and columns ``b(j)``
template <typename DOT, int ROWS, int COLUMNS, typename B, typename LANE>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_group(
    typename DOT::Vec (&acc)[ROWS][COLUMNS], B b, LANE lane) {
#pragma GCC unroll 2
  for (int part = 0; part < DOT::PARTS; part++) {
    typename DOT::Codes columns[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
      columns[j] = DOT::part(b(j), part);
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const typename DOT::Codes row = DOT::broadcast(lane(r, part));
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++) {
        acc[r][j] = DOT::dot(acc[r][j], columns[j], row);
      }
    }
  }
}

// acc[ROWS][COLUMNS] += ``groups`` groups of rows x columns of a panel at b, then ``rest`` elements of a last group
template <typename DOT, int ROWS, int COLUMNS, bool ASKS = (ROWS > 2)>
FXQ_TARGET __attribute__((always_inline)) inline void fxq_products(
    typename DOT::Vec (&acc)[ROWS][COLUMNS],
    FxqLanes a,
    const char* b,
    int64_t groups,
    int64_t rest,
    FxqAhead& ahead) {
  constexpr int LINES = COLUMNS * sizeof(typename DOT::Codes) / 64;
  for (int64_t g = 0; g < groups; g++, b += 256) {
    // For one row or two the hardware asks in time.
    if (ASKS) {
#pragma GCC unroll 4
      for (int line = 0; line < LINES; line++) {
        __builtin_prefetch(ahead.at);
        ahead.at += ahead.step;
      }
    }
    fxq_group<DOT, ROWS, COLUMNS>(acc, FxqColumns<DOT>{b}, [&](int r, int part) {
      int32_t lane;
      std::memcpy(&lane, a.data + r * a.row + part * a.part + g * 4, sizeof(lane));
      return lane;
    });
  }
  if (rest) {
    fxq_group<DOT, ROWS, COLUMNS>(acc, FxqColumns<DOT>{b}, [&](int r, int part) {
      int32_t lane = 0;
      std::memcpy(&lane, a.data + r * a.row + part * a.part + groups * 4, rest * sizeof(typename DOT::A));
      return lane;
    });
  }
}

// out[ROWS][64] += a[ROWS] x part of a panel; the first part starts from start[r]
template <typename DOT, int ROWS>
FXQ_TARGET __attribute__((noinline)) void fxq_tile_rows(
    const typename DOT::A* a,
    int64_t lda,
    const typename DOT::B* panel,
    const FxqPart& part,
    const typename DOT::Acc* start,
    FxqAhead ahead,
    typename DOT::Acc* out) {
  using Vec = typename DOT::Vec;
  constexpr int COLUMNS = DOT::columns(ROWS);
  constexpr int PASSES = FXQ_PANEL / (COLUMNS * DOT::LANES);
  const int64_t step = PASSES == 1 && DOT::PARTS == 1 ? part.to - part.from : FXQ_BLOCK * DOT::GROUP;
  int64_t from = part.from;
  do {
    const int64_t count = std::min(step, part.to - from);
    int64_t groups = count / DOT::GROUP, rest = count % DOT::GROUP;
    FxqLanes lanes{reinterpret_cast<const char*>(a + from), int64_t(lda * sizeof(*a)), 0};
    [[maybe_unused]] alignas(64) int32_t wide[DOT::PARTS > 1 ? ROWS : 1][DOT::PARTS][FXQ_BLOCK];
    if constexpr (DOT::PARTS > 1) {
      groups += rest > 0;
      rest = 0;
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
        DOT::widen(a + from + r * lda, count, wide[r]);
      }
      lanes = {reinterpret_cast<const char*>(wide), sizeof(wide[0]), sizeof(wide[0][0])};
    }
    const char* b = reinterpret_cast<const char*>(panel + from * FXQ_PANEL);
#pragma GCC unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
      typename DOT::Acc* const columns = out + pass * COLUMNS * DOT::LANES;
      Vec acc[ROWS][COLUMNS];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
          if (from == 0) {
            acc[r][j] = DOT::splat(start[r]);
          } else {
            std::memcpy(&acc[r][j], columns + r * FXQ_PANEL + j * DOT::LANES, sizeof(Vec));
          }
        }
      }
      fxq_products<DOT, ROWS, COLUMNS>(acc, lanes, b + pass * COLUMNS * DOT::LANES * 4, groups, rest, ahead);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
          DOT::store(columns + r * FXQ_PANEL + j * DOT::LANES, acc[r][j]);
        }
      }
    }
    from += count;
  } while (from < part.to);
}

// out[rows of the block][64] += they x part of a panel; the first part starts from start[r]
template <typename DOT>
inline void fxq_tile(
    typename DOT::State&,
    const FxqPlan& plan,
    const FxqTileRows<DOT>& rows,
    const FxqBlock& block,
    int64_t,
    const typename DOT::B* panel,
    const FxqPart& part,
    typename DOT::Acc* out) {
  static_assert(DOT::ROWS == 6);
  const auto a = rows.a + block.row * rows.lda;
  const auto start = rows.start + block.row;
  const int64_t bytes = (part.to - part.from) * FXQ_PANEL * sizeof(*panel);
  const FxqAhead ahead = fxq_ahead(plan, block.index, block.blocks, panel + part.from * FXQ_PANEL, bytes);
  switch (block.rows) {
    case 1: return fxq_tile_rows<DOT, fxq_rows_of(1)>(a, rows.lda, panel, part, start, ahead, out);
    case 2: return fxq_tile_rows<DOT, fxq_rows_of(2)>(a, rows.lda, panel, part, start, ahead, out);
    case 3: return fxq_tile_rows<DOT, fxq_rows_of(3)>(a, rows.lda, panel, part, start, ahead, out);
    case 4: return fxq_tile_rows<DOT, fxq_rows_of(4)>(a, rows.lda, panel, part, start, ahead, out);
    case 5: return fxq_tile_rows<DOT, fxq_rows_of(5)>(a, rows.lda, panel, part, start, ahead, out);
    default: return fxq_tile_rows<DOT, fxq_rows_of(6)>(a, rows.lda, panel, part, start, ahead, out);
  }
}

} // namespace
