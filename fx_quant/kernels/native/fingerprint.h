// Digests of memory, to see that it was written to: of all of it once, of a few lines in each call.
//
// Memory is rows of bytes, and lines of 64 bytes in them. Lines are numbered down the rows first, so that a run of
// neighbours is a line of each of as many rows: a share is such a run, and the shares in turn pass over every row before
// they come to the next line of the first.

#include <algorithm>
#include <cstdint>
#include <cstring>

struct FxqWatch {
  const uint8_t* memory;
  int64_t rows, row_bytes, pitch;
  int64_t share;            // lines of a share
  int64_t shares;           // how many there are
  int64_t fixed;            // lines that are looked at in every call, beside a share
  int64_t turn;             // the share that is next
  uint64_t* digests;        // one for each share, then that of the fixed lines
};

static constexpr int64_t FXQ_LINE = 64;
static constexpr uint64_t FXQ_KEYS[8] = {
    0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3,
    0x1d8e4e27c47d124f, 0xeb44accab455d165, 0x2f9be6cc7b2c9f35, 0x9e3779b97f4a7c15};

static inline uint64_t fxq_mixed(uint64_t x, uint64_t y) {
  const unsigned __int128 product = static_cast<unsigned __int128>(x) * y;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

static inline uint64_t fxq_line(const uint8_t* line, int64_t size) {
  uint64_t words[8] = {};
  if (size >= FXQ_LINE) {
    std::memcpy(words, line, FXQ_LINE);
  } else {
    std::memcpy(words, line, size);
  }
  uint64_t digest = 0;
  for (int i = 0; i < 8; i += 2) {
    digest += fxq_mixed(words[i] ^ FXQ_KEYS[i], words[i + 1] ^ FXQ_KEYS[i + 1]);
  }
  return digest;
}

static inline int64_t fxq_lines(const FxqWatch& watch) {
  return watch.rows * ((watch.row_bytes + FXQ_LINE - 1) / FXQ_LINE);
}

template <typename Visit>
static inline void fxq_share_lines(const FxqWatch& watch, int64_t share, Visit visit) {
  const int64_t first = share * watch.share, count = std::min(watch.share, fxq_lines(watch) - first);
  int64_t row = first % watch.rows, offset = first / watch.rows * FXQ_LINE;
  for (int64_t i = 0; i < count; i++) {
    visit(watch.memory + row * watch.pitch + offset, watch.row_bytes - offset);
    if (++row == watch.rows) {
      row = 0;
      offset += FXQ_LINE;
    }
  }
}

// Multiples of the golden ratio less their whole part lie evenly, and not in one column.
template <typename Visit>
static inline void fxq_fixed_lines(const FxqWatch& watch, Visit visit) {
  const int64_t lines = fxq_lines(watch);
  uint64_t part = 0;
  for (int64_t i = 0; i < watch.fixed; i++, part += FXQ_KEYS[7]) {
    const int64_t number = static_cast<int64_t>(static_cast<unsigned __int128>(part) * lines >> 64);
    const int64_t offset = number / watch.rows * FXQ_LINE;
    visit(watch.memory + number % watch.rows * watch.pitch + offset, watch.row_bytes - offset);
  }
}

static inline uint64_t fxq_share_digest(const FxqWatch& watch, int64_t share) {
  uint64_t digest = 0;
  fxq_share_lines(watch, share, [&](const uint8_t* line, int64_t size) {
    digest = digest * FXQ_KEYS[6] + fxq_line(line, size);
  });
  return digest;
}

static inline uint64_t fxq_fixed_digest(const FxqWatch& watch) {
  uint64_t digest = 0;
  fxq_fixed_lines(watch, [&](const uint8_t* line, int64_t size) {
    digest = digest * FXQ_KEYS[6] + fxq_line(line, size);
  });
  return digest;
}

extern "C" {

__attribute__((visibility("default"))) void fxq_digest(FxqWatch* watch) {
  for (int64_t share = 0; share < watch->shares; share++) {
    watch->digests[share] = fxq_share_digest(*watch, share);
  }
  watch->digests[watch->shares] = fxq_fixed_digest(*watch);
}

// The index of the first that was seen to have changed, or -1; each looks at another share in the next call.
__attribute__((visibility("default"))) int64_t fxq_changed(FxqWatch* watches, int64_t count) {
  // All are asked for before the first is waited for: they are in no cache, and each in a page of its own.
  const auto ask = [](const uint8_t* line, int64_t) { __builtin_prefetch(line); };
  for (int64_t i = 0; i < count; i++) {
    fxq_share_lines(watches[i], watches[i].turn, ask);
    fxq_fixed_lines(watches[i], ask);
  }
  for (int64_t i = 0; i < count; i++) {
    FxqWatch& watch = watches[i];
    const int64_t turn = watch.turn;
    watch.turn = turn + 1 < watch.shares ? turn + 1 : 0;
    if (fxq_share_digest(watch, turn) != watch.digests[turn]
        || fxq_fixed_digest(watch) != watch.digests[watch.shares]) {
      return i;
    }
  }
  return -1;
}
}
