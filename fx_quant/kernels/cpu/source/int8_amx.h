// int8 codes by the tiles of AMX: 32 rows x 32 columns at a time, over the panels of int8_vnni.h.
//
// A panel is what a tile of b wants, 16 groups of 16 columns, with 256 bytes from group to group. The sums start from
// -128 * sum_k a[k] here too, as the packed weight is unsigned. Few rows wait for memory and keep to vpdpbusd.

namespace {

struct FxqInt8Amx : FxqInt8 {
  static constexpr int ROWS = 32;
  static constexpr int64_t DEEP = 64;    // k of one tile
  static constexpr int64_t FEW_ROWS = 4; // fewer are left to registers

  using State = FxqTiles;
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

// What is left of k, in whole tiles.
struct FxqAmxRest {
  alignas(64) int8_t a[FxqInt8Amx::ROWS * FxqInt8Amx::DEEP];
  alignas(64) uint8_t b[FxqInt8Amx::DEEP * FXQ_PANEL];
};

// out[rows][64] += a[rows][k] x panel
template <bool TWO>
FXQ_TARGET __attribute__((noinline)) void fxq_amx_rows(
    const int8_t* a, int64_t lda, const uint8_t* panel, int64_t k, const FxqAmxRest* rest, int32_t* out) {
  constexpr int64_t DEEP = FxqInt8Amx::DEEP;
  for (int64_t column = 0; column < FXQ_PANEL; column += 32) {
    int32_t* const at = out + column;
    _tile_loadd(0, at, 256);
    _tile_loadd(1, at + 16, 256);
    if (TWO) {
      _tile_loadd(2, at + 16 * FXQ_PANEL, 256);
      _tile_loadd(3, at + 16 * FXQ_PANEL + 16, 256);
    }
    int64_t i = 0;
    for (; i + DEEP <= k; i += DEEP) {
      fxq_amx_step<TWO>(a + i, lda, panel + i * FXQ_PANEL + column * 4);
    }
    if (i < k) {
      fxq_amx_step<TWO>(rest->a, DEEP, rest->b + column * 4);
    }
    fxq_store_sums<TWO>(at, FXQ_PANEL);
  }
}

template <>
inline FXQ_TARGET void fxq_tile<FxqInt8Amx>(
    FxqInt8Amx::State& tiles,
    int64_t rows,
    int64_t width,
    const int8_t* a,
    int64_t lda,
    const uint8_t* panel,
    const FxqPart& part,
    const int32_t* start,
    FxqAhead ahead,
    int32_t* out) {
  if (rows < FxqInt8Amx::FEW_ROWS) {
    FxqInt8::State none;
    return fxq_tile<FxqInt8>(none, rows, width, a, lda, panel, part, start, ahead, out);
  }
  tiles.configure(rows);
  for (int64_t r = 0; part.from == 0 && r < rows; r++) {
    std::fill_n(out + r * FXQ_PANEL, FXQ_PANEL, start[r]);
  }
  constexpr int64_t DEEP = FxqInt8Amx::DEEP;
  const int64_t k = part.to - part.from, count = k % DEEP, from = part.to - count;
  FxqAmxRest rest;
  if (count) {
    std::memset(&rest, 0, sizeof(rest));
    for (int64_t r = 0; r < rows; r++) {
      std::memcpy(rest.a + r * DEEP, a + r * lda + from, count);
    }
    std::memcpy(rest.b, panel + from * FXQ_PANEL, (count + 3) / 4 * 256);
  }
  a += part.from;
  panel += part.from * FXQ_PANEL;
  if (rows > 16) {
    fxq_amx_rows<true>(a, lda, panel, k, &rest, out);
  } else {
    fxq_amx_rows<false>(a, lda, panel, k, &rest, out);
  }
}

} // namespace
