// What the native code does for a range of rows. The values come from fx_quant/kernels/cpu/plans.py: defaults, or measured.

#include <cstdint>

namespace {

struct FxqPlan {
  int64_t rows;       // holds for up to so many
  int64_t ahead;      // bytes that one block of rows asks for ahead of what it multiplies
  int64_t next_panel; // whether several blocks ask for what they multiply next
  int64_t chunk_k;    // k of a panel that all rows are multiplied by before the next; a multiple of 64
  int64_t alone;      // multiply-adds up to which the calling thread computes alone
};

// The first of ``plans`` that holds for m rows; the last one holds for any.
inline const FxqPlan& fxq_plan(const FxqPlan* plans, int64_t m) {
  while (plans->rows < m) {
    plans++;
  }
  return *plans;
}

// One thread or all: OpenMP ends and restarts threads where the size of a team changes otherwise.
inline int fxq_threads(const FxqPlan& plan, int64_t m, int64_t n, int64_t k, int64_t all) {
  return static_cast<int>(m * n * k <= plan.alone ? 1 : all);
}

} // namespace
