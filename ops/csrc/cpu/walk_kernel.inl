// ---- set-up: weights of the symmetric matrix S = D^-1/2 H^power D^-1/2 ----

// weights[k] = affinity[k]^power for the pairs inside the image; whole powers by repeated squaring.
template <typename T>
void raise(const T* affinity, double power, int64_t count, T* weights) {
  const int64_t whole = power <= 1024 ? int64_t(power) : 0;
  if (double(whole) != power) {
    for (int64_t i = 0; i < count; ++i) weights[i] = T(std::pow(double(affinity[i]), power));
    return;
  }
  int64_t i = 0;
  for (; i < count; i += 64) {
    const int64_t block = count - i < 64 ? count - i : 64;
    double base[64], result[64];
    for (int j = 0; j < block; ++j) base[j] = double(affinity[i + j]), result[j] = 1;
    for (int64_t exponent = whole; exponent; exponent >>= 1) {
      if (exponent & 1)
        for (int j = 0; j < block; ++j) result[j] *= base[j];
      for (int j = 0; j < block; ++j) base[j] *= base[j];
    }
    for (int j = 0; j < block; ++j) weights[i + j] = T(result[j]);
  }
}

// degree[x] += weights[x]
template <typename T>
void add(const T* weights, int64_t count, double* degree) {
  for (int64_t x = 0; x < count; ++x) degree[x] += double(weights[x]);
}

// The weights of two rows of pixels in the order in which a step reads them, for each vector of columns: of the common
// neighbours (upper and lower pixel in turn), of the upper pixel's own, of the lower pixel's own, the two diagonals.
template <typename T>
void pack(const wsid::Stencil& s, const T* raised, const double* root, const double* inverse_root, int64_t row,
          T* packed) {
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T);
  for (int64_t x = 0; x < s.width; x += lanes) {
    const int64_t upper = s.guard + row * s.stride + x, lower = upper + s.stride;
    double sums[2][lanes] = {};
    const auto put = [&](int64_t here, int64_t there, int64_t w, double* sum) {
      for (int i = 0; i < lanes; ++i) {
        packed[i] = T(double(raised[w + i]) * inverse_root[here + i] * inverse_root[there + i]);
        sum[i] += double(packed[i]) * root[there + i];
      }
      packed += lanes;
    };
    for (const auto& tap : s.shared) {
      put(upper, upper + tap.v, upper + tap.upper, sums[0]);
      put(lower, upper + tap.v, upper + tap.lower, sums[1]);
    }
    for (const auto& tap : s.upper) put(upper, upper + tap.v, upper + tap.w, sums[0]);
    for (const auto& tap : s.lower) put(lower, upper + tap.v, upper + tap.w, sums[1]);
    // The diagonal absorbs the rounding of the other weights, so that constant maps stay constant.
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < lanes; ++i) {
        const int64_t p = half ? lower + i : upper + i;
        *packed++ = T((root[p] - sums[half][i]) * inverse_root[p]);
      }
  }
}

// ---- one step on two rows of C maps ----

// kSeries: before <- alpha S now - beta before, total += coefficient before (a term of the Chebyshev series).
// Otherwise: before <- S now. X vectors of pixels at a time; the maps are `plane` values apart.
template <typename T, int C, int X, bool kSeries>
inline int64_t walk_columns(const wsid::Stencil& s, const T* packed, const T* now, T* before, T* total, T alpha, T beta,
                            T coefficient, int64_t row, int64_t x) {
  typedef T V __attribute__((vector_size(WSID_VECTOR_BYTES), aligned(alignof(T)), may_alias));
#define WSID_AT(p) (*reinterpret_cast<V*>(p))
#define WSID_LOAD(p) (*reinterpret_cast<const V*>(p))
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T);
  const int64_t plane = s.plane, next = s.weights_per_column * lanes;  // from one vector's weights to the next one's
  for (; x + (X - 1) * lanes < s.width; x += X * lanes) {
    const int64_t p = s.guard + row * s.stride + x;
    const T* const v = now + p;
    const T* w = packed + x * s.weights_per_column;
    V up[C][X] = {}, low[C][X] = {};
    for (const auto& tap : s.shared) {
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) {
        V wu = WSID_LOAD(w + j * next), wl = WSID_LOAD(w + j * next + lanes);
        WSID_KEEP(wu);
        WSID_KEEP(wl);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          V value = WSID_LOAD(v + c * plane + tap.v + j * lanes);
          WSID_KEEP(value);
          up[c][j] += wu * value;
          low[c][j] += wl * value;
        }
      }
      w += 2 * lanes;
    }
    for (const auto& tap : s.upper) {
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) up[c][j] += WSID_LOAD(w + j * next) * WSID_LOAD(v + c * plane + tap.v + j * lanes);
      w += lanes;
    }
    for (const auto& tap : s.lower) {
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) low[c][j] += WSID_LOAD(w + j * next) * WSID_LOAD(v + c * plane + tap.v + j * lanes);
      w += lanes;
    }
    // The diagonal, often close to 1, is added last: small terms added to it one by one would be lost.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
        for (int j = 0; j < X; ++j) {
          const int64_t here = c * plane + half * s.stride + j * lanes;
          V sum = (half ? low : up)[c][j] + WSID_LOAD(w + j * next + half * lanes) * WSID_LOAD(v + here);
          if (kSeries) {
            sum = alpha * sum - beta * WSID_LOAD(before + p + here);
            WSID_AT(total + p + here) += coefficient * sum;
          }
          WSID_AT(before + p + here) = sum;
        }
  }
#undef WSID_AT
#undef WSID_LOAD
  return x;
}

template <typename T, int C, bool kSeries>
void walk_rows(const wsid::Stencil& s, const T* packed, const T* now, T* before, T* total, T alpha, T beta,
               T coefficient, int64_t row) {
  const int64_t x = walk_columns<T, C, 4 / C, kSeries>(s, packed, now, before, total, alpha, beta, coefficient, row, 0);
  if (C < 3) walk_columns<T, C, 1, kSeries>(s, packed, now, before, total, alpha, beta, coefficient, row, x);
  // The padding beside and below the image was written, too. It is set back to 0, as it is a neighbour of the next row
  // and a weight of 0 does not stop NaN.
  constexpr int64_t lanes = WSID_VECTOR_BYTES / sizeof(T);
  const int64_t end = (s.width + lanes - 1) / lanes * lanes;
  for (int64_t c = 0; c < C; ++c)
    for (int64_t y = row; y < row + 2; ++y) {
      T* const line = before + c * s.plane + s.guard + y * s.stride;
      for (int64_t x = y < s.height ? s.width : 0; x < end; ++x) line[x] = T(0);
    }
}

constexpr int64_t vector_bytes() { return WSID_VECTOR_BYTES; }
