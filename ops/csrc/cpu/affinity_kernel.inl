// Maximum of b over the path at `count` neighbouring first pixels, and (kWinner) the first position on the path that
// has it.

template <typename T, bool kWinner, int U>
inline void path_max_block(const T* b, const int64_t* steps, int length, T* out, uint8_t* winner) {
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(WSID_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef I M __attribute__((vector_size(WSID_VECTOR_BYTES)));
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T);
  typedef uint8_t B __attribute__((vector_size(lanes), aligned(1), may_alias));
  V best[U];
  M index[U];
  for (int u = 0; u < U; ++u) {
    best[u] = *reinterpret_cast<const V*>(b + u * lanes);
    index[u] = M{};
  }
  for (int i = 1; i < length; ++i) {
    const T* const source = b + steps[i];
    const M position = M{} + I(i);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const V value = *reinterpret_cast<const V*>(source + u * lanes);
      if (kWinner) index[u] = value > best[u] ? position : index[u];
      best[u] = value > best[u] ? value : best[u];
    }
  }
  for (int u = 0; u < U; ++u) {
    *reinterpret_cast<V*>(out + u * lanes) = T(1) - best[u];
    if (kWinner) *reinterpret_cast<B*>(winner + u * lanes) = __builtin_convertvector(index[u], B);
  }
}

template <typename T, bool kWinner>
void path_max(const T* b,            // at the first of these pixels
              const int64_t* steps,  // [length]
              int length, int64_t count,
              T* out,             // [count]
              uint8_t* winner) {  // [count] with kWinner
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T), U = 4;
  int64_t x = 0;
  for (; x + U * lanes <= count; x += U * lanes)
    path_max_block<T, kWinner, U>(b + x, steps, length, out + x, kWinner ? winner + x : winner);
  for (; x + lanes <= count; x += lanes)
    path_max_block<T, kWinner, 1>(b + x, steps, length, out + x, kWinner ? winner + x : winner);
  if (x < count && count >= lanes) {  // the rest, overlapping with pixels already computed
    x = count - lanes;
    path_max_block<T, kWinner, 1>(b + x, steps, length, out + x, kWinner ? winner + x : winner);
    x = count;
  }
  for (; x < count; ++x) {
    T best = b[x];
    int index = 0;
    for (int i = 1; i < length; ++i) {
      const T value = b[x + steps[i]];
      if (value > best) best = value, index = i;
    }
    out[x] = T(1) - best;
    if (kWinner) winner[x] = uint8_t(index);
  }
}
