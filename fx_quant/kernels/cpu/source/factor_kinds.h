// Factors of any kind, read by ``fxq_read<T>`` of factors.h or factors_plain.h.

namespace {

inline void fxq_read(
    const FxqFactor& f, int64_t column, int64_t n, int64_t first, int64_t count, float (*out)[FXQ_PANEL]) {
  switch (f.kind) {
    case FXQ_NONE: return;
    case FXQ_FLOAT: return fxq_read<float>(f, column, n, first, count, out);
    case FXQ_INT8: return fxq_read<int8_t>(f, column, n, first, count, out);
    case FXQ_UINT8: return fxq_read<uint8_t>(f, column, n, first, count, out);
    case FXQ_INT32: return fxq_read<int32_t>(f, column, n, first, count, out);
    case FXQ_INT64: return fxq_read<int64_t>(f, column, n, first, count, out);
    case FXQ_BFLOAT16: return fxq_read<FxqBfloat16>(f, column, n, first, count, out);
    case FXQ_FLOAT16: return fxq_read<FxqFloat16>(f, column, n, first, count, out);
    case FXQ_INT16: return fxq_read<int16_t>(f, column, n, first, count, out);
  }
}

} // namespace
