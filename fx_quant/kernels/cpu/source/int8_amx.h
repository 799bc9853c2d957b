// int8 codes by the tiles of AMX: up to 32 rows x 32 columns at a time, or 16 x 64.
//
// The packed weight is [ceil(n/64)][ceil(k/64)][4][16][16][4]: a tile of 64 k and 16 columns is one piece of memory, as are
// the tiles of the activation. Both are signed, so sums start from 0.

namespace {

struct FxqInt8Amx {
  using A = int8_t;
  using B = int8_t;
  using Acc = int32_t;
  using State = FxqTiles;
  static constexpr int ROWS = 32;
  static constexpr int64_t GROUP = 64; // k of a tile
};

template <>
struct FxqTileRows<FxqInt8Amx> : FxqSteps<int8_t> {
  using FxqSteps::FxqSteps;
};

constexpr int64_t FXQ_B_TILE = 16 * 64;        // bytes
constexpr int64_t FXQ_B_STEP = FXQ_PANEL * 64; // those of all columns
constexpr int64_t FXQ_SUMS = FXQ_PANEL * 4;    // those of a row of sums

// out[rows][64] += a[rows][steps * 64] x panel, of up to 16 rows.
FXQ_TARGET __attribute__((noinline)) void fxq_amx_line(
    const int8_t* a, int64_t rows, const int8_t* b, int64_t steps, bool first, FxqTilesAhead ahead, int32_t* out) {
  if (first) {
    fxq_zero_sums<true>();
  } else {
    _tile_loadd(0, out, FXQ_SUMS);
    _tile_loadd(1, out + 16, FXQ_SUMS);
    _tile_loadd(2, out + 32, FXQ_SUMS);
    _tile_loadd(3, out + 48, FXQ_SUMS);
  }
  for (int64_t i = 0; i < steps; i++, a += rows * 64, b += FXQ_B_STEP) {
    ahead.ask();
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + FXQ_B_TILE, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(6, b + 2 * FXQ_B_TILE, 64);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(7, b + 3 * FXQ_B_TILE, 64);
    _tile_dpbssd(3, 4, 7);
  }
  _tile_stored(0, out, FXQ_SUMS);
  _tile_stored(1, out + 16, FXQ_SUMS);
  _tile_stored(2, out + 32, FXQ_SUMS);
  _tile_stored(3, out + 48, FXQ_SUMS);
}

// The same of 17 to 32 rows, for one half of the columns after the other.
FXQ_TARGET __attribute__((noinline)) void fxq_amx_square(
    const int8_t* a, int64_t rows, const int8_t* panel, int64_t steps, bool first, FxqTilesAhead ahead, int32_t* out) {
  for (int64_t half = 0; half < 2; half++, out += 32) {
    if (first) {
      fxq_zero_sums<true>();
    } else {
      _tile_loadd(0, out, FXQ_SUMS);
      _tile_loadd(1, out + 16, FXQ_SUMS);
      _tile_loadd(2, out + 16 * FXQ_PANEL, FXQ_SUMS);
      _tile_loadd(3, out + 16 * FXQ_PANEL + 16, FXQ_SUMS);
    }
    const int8_t *at = a, *b = panel + half * 2 * FXQ_B_TILE;
    for (int64_t i = 0; i < steps; i++, at += rows * 64, b += FXQ_B_STEP) {
      ahead.ask();
      _tile_loadd(4, at, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, b + FXQ_B_TILE, 64);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(5, at + FXQ_B_TILE, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    fxq_store_sums<true>(out, FXQ_PANEL);
  }
}

// out[rows of the block][64] += they x part of a panel; the first part starts from nothing
template <typename DOT>
FXQ_TARGET inline void fxq_tile(
    FxqTiles& tiles,
    const FxqPlan& plan,
    const FxqTileRows<DOT>& rows,
    const FxqBlock& block,
    int64_t,
    const int8_t* panel,
    const FxqPart& part,
    int32_t* out) {
  const bool square = block.rows > 16;
  const int64_t steps = (part.to - part.from + 63) / 64, bytes = steps * FXQ_B_STEP;
  const int8_t* const b = panel + part.from * FXQ_PANEL;
  FxqTilesAhead ahead{reinterpret_cast<const char*>(b), nullptr, FXQ_B_STEP};
  if (block.blocks == 1) {
    ahead.at += plan.ahead;
    ahead.end = ahead.at + bytes;
  } else if (plan.next_panel) {
    // What comes next is asked for evenly, as only so many lines can be waited for at a time.
    ahead.at += bytes + bytes * block.index / block.blocks / 64 * 64;
    ahead.end = ahead.at + bytes / block.blocks;
    ahead.step = (bytes / block.blocks / (square ? 2 * steps : steps) + 63) / 64 * 64;
  }
  tiles.configure(block.rows);
  const auto multiply = square ? fxq_amx_square : fxq_amx_line;
  multiply(rows.from(block.row) + part.from * block.rows, block.rows, b, steps, part.from == 0, ahead, out);
}

} // namespace
