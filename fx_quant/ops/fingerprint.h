// Digests of memory, to see that it was written to: of all of it once, of a few lines in each call.
//
// Memory is rows of bytes, and lines of 64 bytes in them, of which the last of a row, and of the memory, is moved back
// where it would end behind it. A share is the same line of a run of neighbouring rows: the shares in turn pass over
// every row before they come to the next line of the first.

#include <algorithm>
#include <cstdint>
#include <cstring>

static constexpr int FXQ_FIXED = 2;  // lines that are looked at in every call, beside a share

// Fills two lines of a cache: in each call all of it is read, and no more is but the lines that it leads to.
struct FxqWatch {
  const uint8_t* memory;
  int64_t rows, row_bytes, pitch;
  int64_t size;             // from the first byte to behind the last
  int64_t share, shares;    // rows of a share, and how many shares there are
  int64_t every;            // in how many calls one share is looked at
  int64_t wait;             // calls until the next is
  int64_t turn;             // which one it is
  uint64_t expected;        // its digest
  const uint64_t* digests;  // one for each share, then that of the fixed lines
  const uint8_t* fixed[FXQ_FIXED];
  uint64_t fixed_digest;
  int64_t line;             // bytes of a line, less than 64 where all rows together have no more
};

static_assert(sizeof(FxqWatch) == 128);

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
  if (size == FXQ_LINE) {
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

template <typename Visit>
static inline void fxq_share_lines(const FxqWatch& watch, int64_t share, Visit visit) {
  const int64_t of_column = (watch.rows + watch.share - 1) / watch.share;
  const int64_t row = share % of_column * watch.share;
  const int64_t offset = std::min(share / of_column * FXQ_LINE, watch.row_bytes - watch.line);
  const int64_t count = std::min(watch.share, watch.rows - row);
  const uint8_t* const last = watch.memory + watch.size - watch.line;
  const uint8_t* line = watch.memory + row * watch.pitch + offset;
  for (int64_t i = 0; i < count; i++, line += watch.pitch) {
    visit(std::min(line, last));
  }
}

static inline uint64_t fxq_share_digest(const FxqWatch& watch, int64_t share) {
  uint64_t digest = 0;
  fxq_share_lines(watch, share, [&](const uint8_t* line) {
    digest = digest * FXQ_KEYS[6] + fxq_line(line, watch.line);
  });
  return digest;
}

static inline uint64_t fxq_fixed_digest(const FxqWatch& watch) {
  uint64_t digest = 0;
  for (const uint8_t* line : watch.fixed) {
    digest = digest * FXQ_KEYS[6] + fxq_line(line, watch.line);
  }
  return digest;
}

static inline void fxq_ask(const FxqWatch& watch) {
  for (const uint8_t* line : watch.fixed) {
    __builtin_prefetch(line);
  }
  if (watch.wait == 0) {
    fxq_share_lines(watch, watch.turn, [](const uint8_t* line) { __builtin_prefetch(line); });
  }
}

static inline bool fxq_has_changed(FxqWatch& watch) {
  if (fxq_fixed_digest(watch) != watch.fixed_digest) {
    return true;
  }
  if (watch.wait > 0) {
    watch.wait--;
    return false;
  }
  if (fxq_share_digest(watch, watch.turn) != watch.expected) {
    return true;
  }
  watch.wait = watch.every - 1;
  watch.turn = watch.turn + 1 < watch.shares ? watch.turn + 1 : 0;
  watch.expected = watch.digests[watch.turn];
  return false;
}

static inline bool fxq_any_changed(FxqWatch* watches, int64_t count) {
  // Asked for long before they are waited for: they are in no cache, and each is in a page of its own.
  constexpr int64_t AHEAD = 16;
  for (int64_t i = 0; i < std::min(AHEAD, count); i++) {
    fxq_ask(watches[i]);
  }
  for (int64_t i = 0; i < count; i++) {
    if (i + AHEAD < count) {
      fxq_ask(watches[i + AHEAD]);
    }
    if (fxq_has_changed(watches[i])) {
      return true;
    }
  }
  return false;
}

// Of Python's stable ABI, as its headers may be missing. A call through ctypes takes longer than the look itself.
extern "C" {
typedef struct _object PyObject;
struct FxqMethod {
  const char* name;
  PyObject* (*call)(PyObject*, PyObject*);
  int flags;
  const char* doc;
};
PyObject* PyCFunction_NewEx(FxqMethod*, PyObject*, PyObject*);
PyObject* PyCapsule_New(void*, const char*, void (*)(PyObject*));
void* PyCapsule_GetPointer(PyObject*, const char*);
void* PyCapsule_GetContext(PyObject*);
int PyCapsule_SetContext(PyObject*, void*);
PyObject* PyBool_FromLong(long);
void Py_DecRef(PyObject*);

static PyObject* fxq_call(PyObject* capsule, PyObject*) {
  const auto watches = static_cast<FxqWatch*>(PyCapsule_GetPointer(capsule, nullptr));
  const auto count = reinterpret_cast<int64_t>(PyCapsule_GetContext(capsule));
  return PyBool_FromLong(fxq_any_changed(watches, count));
}

static FxqMethod fxq_method = {"changed", fxq_call, 4 /* METH_NOARGS */, nullptr};

// A Python function: whether any of `watches`, which must outlive it, was seen to have changed.
__attribute__((visibility("default"))) PyObject* fxq_changed(FxqWatch* watches, int64_t count) {
  PyObject* const capsule = PyCapsule_New(watches, nullptr, nullptr);
  if (capsule == nullptr) {
    return nullptr;
  }
  PyCapsule_SetContext(capsule, reinterpret_cast<void*>(count));
  PyObject* const function = PyCFunction_NewEx(&fxq_method, capsule, nullptr);
  Py_DecRef(capsule);
  return function;
}

__attribute__((visibility("default"))) void fxq_digest(const FxqWatch* watch, uint64_t* digests) {
  for (int64_t share = 0; share < watch->shares; share++) {
    digests[share] = fxq_share_digest(*watch, share);
  }
  digests[watch->shares] = fxq_fixed_digest(*watch);
}
}
