// Iterates one vector of pixels at a time; a converged pixel stays where it is until the whole vector has converged.

template <typename T>
void converge(const T* field,  // [2, H, W]
              int64_t height, int64_t width, int64_t begin, int64_t end, int64_t max_iters, T tol2,
              T* points) {  // [2, H, W]
  using I = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T V __attribute__((vector_size(WSID_VECTOR_BYTES)));
  typedef I M __attribute__((vector_size(WSID_VECTOR_BYTES)));
  constexpr int lanes = WSID_VECTOR_BYTES / sizeof(T);
  const int64_t size = height * width;
  const T* const field_x = field + size;
  const V limit_y = V{} + T(height - 1), limit_x = V{} + T(width - 1);

  for (int64_t first = begin; first < end; first += lanes) {
    V y, x;
    M active;
    for (int i = 0; i < lanes; ++i) {
      const int64_t p = std::min(first + i, end - 1);
      y[i] = T(p / width);
      x[i] = T(p % width);
      active[i] = -1;
    }
    for (int64_t iteration = 0; iteration < max_iters; ++iteration) {
      const M row = __builtin_convertvector(y, M), column = __builtin_convertvector(x, M);  // never negative
      const V wy = y - __builtin_convertvector(row, V), wx = x - __builtin_convertvector(column, V);
      const M a = row * I(width) + column;
      const M right = a - (column < I(width - 1));  // a true comparison is -1
      const M down = (row < I(height - 1)) & I(width);
      const M c = a + down, d = right + down;
      V ay, by, cy, dy, ax, bx, cx, dx;
      for (int i = 0; i < lanes; ++i) {
        ay[i] = field[a[i]], by[i] = field[right[i]], cy[i] = field[c[i]], dy[i] = field[d[i]];
        ax[i] = field_x[a[i]], bx[i] = field_x[right[i]], cx[i] = field_x[c[i]], dx[i] = field_x[d[i]];
      }
      const V move_y = wsid::bilinear(ay, by, cy, dy, wy, wx), move_x = wsid::bilinear(ax, bx, cx, dx, wy, wx);
      // Infinite and NaN moves minus themselves are NaN: they are skipped.
      const M go = active & (move_y - move_y == V{}) & (move_x - move_x == V{});
      const V next_y = go ? wsid::clip(y + move_y, limit_y) : y, next_x = go ? wsid::clip(x + move_x, limit_x) : x;
      const V step_y = next_y - y, step_x = next_x - x;
      y = next_y, x = next_x;
      active = go & (step_y * step_y + step_x * step_x >= tol2);
      I any = 0;
      for (int i = 0; i < lanes; ++i) any |= active[i];
      if (!any) break;
    }
    for (int i = 0; i < lanes && first + i < end; ++i) {
      points[first + i] = y[i];
      points[size + first + i] = x[i];
    }
  }
}
