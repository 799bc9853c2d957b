// The AMX tile intrinsics in plain C++, for machines without them. Their arguments and rules are Intel's: a tile has as
// many rows and bytes as it was configured with, and a product reads its sizes from them.

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  uint8_t data[16][64];
};

inline thread_local Config config;
inline thread_local Tile tiles[8];

inline void check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "AMX emulation: %s\n", what);
    std::abort();
  }
}

inline void loadconfig(const void* from) {
  std::memcpy(&config, from, sizeof(config));
  check(config.palette == 1 && config.start_row == 0, "palette 1 and start row 0");
  for (int t = 0; t < 8; t++) {
    check(config.rows[t] <= 16 && config.bytes[t] <= 64 && !config.rows[t] == !config.bytes[t], "sizes of a tile");
  }
  std::memset(tiles, 0, sizeof(tiles));
}

inline void release() {
  config = {};
}

inline void zeroed(int t) {
  std::memset(&tiles[t], 0, sizeof(Tile));
}

inline void load(int t, const void* base, int64_t stride) {
  check(config.rows[t] > 0, "a load into a tile that is not configured");
  zeroed(t);
  for (int r = 0; r < config.rows[t]; r++) {
    std::memcpy(tiles[t].data[r], static_cast<const uint8_t*>(base) + r * stride, config.bytes[t]);
  }
}

inline void store(int t, void* base, int64_t stride) {
  check(config.rows[t] > 0, "a store of a tile that is not configured");
  for (int r = 0; r < config.rows[t]; r++) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles[t].data[r], config.bytes[t]);
  }
}

// dst[m][n] += sum_k, i signed a[m][k][i] * b[k][n][i] of the type B, modulo 2^32
template <typename B>
inline void product(int dst, int a, int b) {
  check(
      config.rows[dst] == config.rows[a] && config.bytes[dst] == config.bytes[b] &&
          config.bytes[a] / 4 == config.rows[b],
      "sizes of a product");
  for (int m = 0; m < config.rows[dst]; m++) {
    for (int n = 0; n < config.bytes[dst] / 4; n++) {
      uint32_t sum;
      std::memcpy(&sum, tiles[dst].data[m] + n * 4, 4);
      for (int k = 0; k < config.rows[b]; k++) {
        for (int i = 0; i < 4; i++) {
          sum += static_cast<uint32_t>(
              static_cast<int8_t>(tiles[a].data[m][k * 4 + i]) * static_cast<B>(tiles[b].data[k][n * 4 + i]));
        }
      }
      std::memcpy(tiles[dst].data[m] + n * 4, &sum, 4);
    }
  }
}

} // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbssd
#define _tile_loadconfig amx_emulation::loadconfig
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zeroed
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbsud amx_emulation::product<uint8_t>
#define _tile_dpbssd amx_emulation::product<int8_t>
