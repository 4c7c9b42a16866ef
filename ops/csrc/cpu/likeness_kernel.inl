// Products of two rows of feature vectors, each stored as one line of `stride` values per channel: out[x] is the sum
// over channels of a[x] b[x], and 0 where that is negative or no number.

template <typename T, int U>
inline void dot_block(const T* a, const T* b, int64_t channels, int64_t stride, T* out) {
  typedef T V __attribute__((vector_size(WSID_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T);
  V sum[U];
  for (int u = 0; u < U; ++u) sum[u] = V{};
  for (int64_t c = 0; c < channels; ++c, a += stride, b += stride)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
      sum[u] += *reinterpret_cast<const V*>(a + u * lanes) * *reinterpret_cast<const V*>(b + u * lanes);
  for (int u = 0; u < U; ++u) *reinterpret_cast<V*>(out + u * lanes) = sum[u] > V{} ? sum[u] : V{};
}

template <typename T>
void dot_rows(const T* a, const T* b, int64_t channels, int64_t stride, int64_t count, T* out) {
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T), U = 4;
  int64_t x = 0;
  for (; x + U * lanes <= count; x += U * lanes) dot_block<T, U>(a + x, b + x, channels, stride, out + x);
  for (; x + lanes <= count; x += lanes) dot_block<T, 1>(a + x, b + x, channels, stride, out + x);
  if (x < count && count >= lanes) {  // the last ones once more, together with neighbours already done
    x = count - lanes;
    dot_block<T, 1>(a + x, b + x, channels, stride, out + x);
    x = count;
  }
  for (; x < count; ++x) {
    T sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += a[c * stride + x] * b[c * stride + x];
    out[x] = sum > T(0) ? sum : T(0);
  }
}
