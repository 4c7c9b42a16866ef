// Random walk: M^steps x with M = D^-1 H^power, H the symmetric affinity with 1 on its diagonal, D its row sums.
// M = D^-1/2 S D^1/2 with S symmetric, so half of the weights are stored, and S^steps is applied either step by step or
// as a Chebyshev series sum_k c_k T_k(S), T_k+1 = 2 S T_k - T_k-1. Parallel over images and maps, not within a step.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../paths.h"
#include "walk.h"

// Keeps a value in a register where the compiler would load it twice.
#if defined(__x86_64__) && defined(__GNUC__)
#define WSID_KEEP(value) asm("" : "+v"(value))
#else
#define WSID_KEEP(value)
#endif

#define WSID_KERNEL "walk_kernel.inl"
#define WSID_FUSED 1
#include "for_each_isa.inl"

namespace {

using wsid::Offset;
using wsid::Stencil;

Stencil make_stencil(int64_t height, int64_t width, int64_t radius) {
  constexpr int64_t widest = 64 / sizeof(float);  // lanes of the widest vector
  Stencil s;
  s.height = height, s.width = width, s.radius = radius;
  s.rows = (height + 1) / 2 * 2;
  s.stride = (width + radius - 1 + widest - 1) / widest * widest;
  s.guard = (radius * s.stride + radius + widest) / widest * widest;
  s.plane = s.rows * s.stride + 2 * s.guard;
  const auto offsets = wsid::half_plane(radius);
  // Index of the weight of the neighbour at (dy, dx), relative to the pixel.
  const auto inside = [&](int64_t dy, int64_t dx) { return (dy || dx) && dy * dy + dx * dx < radius * radius; };
  const auto weight = [&](int64_t dy, int64_t dx) {
    const bool ahead = dy > 0 || (dy == 0 && dx > 0);
    const auto same = [&](Offset d) { return ahead ? d.dy == dy && d.dx == dx : d.dy == -dy && d.dx == -dx; };
    const int64_t k = std::find_if(offsets.begin(), offsets.end(), same) - offsets.begin();
    return k * s.plane + (ahead ? 0 : dy * s.stride + dx);
  };
  for (int64_t dy = 1 - radius; dy <= radius; ++dy)
    for (int64_t dx = 1 - radius; dx < radius; ++dx) {
      const int64_t v = dy * s.stride + dx;
      const bool upper = inside(dy, dx), lower = inside(dy - 1, dx);
      if (upper) s.taps.push_back({v, weight(dy, dx)});
      if (upper && lower)
        s.shared.push_back({v, weight(dy, dx), weight(dy - 1, dx) + s.stride});
      else if (upper)
        s.upper.push_back({v, weight(dy, dx)});
      else if (lower)
        s.lower.push_back({v, weight(dy - 1, dx) + s.stride});
    }
  s.weights_per_column = 2 * s.taps.size() + 2;
  return s;
}

// S of one image: its weights, packed for the step, and D^-1/2.
template <typename T>
struct Matrix {
  std::vector<T> packed;
  int64_t pair_size;  // from one pair of rows to the next
  std::vector<double> inverse_root;
};

template <typename T>
Matrix<T> make_matrix(const Stencil& s,
                      const T* affinity,  // [K, H, W]
                      double power) {
  const auto offsets = wsid::half_plane(s.radius);
  const auto raise_row = WSID_SELECT(raise<T>);
  const auto add_row = WSID_SELECT(add<T>);
  const auto pack_rows = WSID_SELECT(pack<T>);
  const int64_t lanes = WSID_SELECT(vector_bytes)() / sizeof(T);
  Matrix<T> m;
  m.pair_size = (s.width + lanes - 1) / lanes * lanes * s.weights_per_column;
  m.packed.resize(s.rows / 2 * m.pair_size);
  m.inverse_root.resize(s.plane);
  std::vector<double> root(s.plane);
  std::vector<T> raised(offsets.size() * s.plane);
  at::parallel_for(0, s.height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      for (int64_t k = 0; k < int64_t(offsets.size()); ++k) {
        const auto span = wsid::columns(offsets[k], y, s.height, s.width);
        raise_row(affinity + (k * s.height + y) * s.width + span.begin, power, span.end - span.begin,
                  raised.data() + k * s.plane + s.guard + y * s.stride + span.begin);
      }
  });
  at::parallel_for(0, s.height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = s.guard + begin * s.stride; row < s.guard + end * s.stride; row += s.stride) {
      double* const degree = &root[row];
      std::fill(degree, degree + s.width, 1.0);
      for (const auto& tap : s.taps) add_row(&raised[row + tap.w], s.width, degree);
      for (int64_t x = 0; x < s.width; ++x) {
        degree[x] = std::sqrt(degree[x]);
        m.inverse_root[row + x] = 1 / degree[x];
      }
    }
  });
  at::parallel_for(0, s.rows / 2, 8, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair)
      pack_rows(s, raised.data(), root.data(), m.inverse_root.data(), 2 * pair, &m.packed[pair * m.pair_size]);
  });
  return m;
}

// C maps of one image. `coefficients` is empty for plain power iteration.
template <typename T, int C>
void walk_maps(const Stencil& s, const Matrix<T>& m,
               const T* x,  // [C, H, W]
               int64_t steps, at::ArrayRef<double> coefficients,
               T* result) {  // [C, H, W]
  const bool series = !coefficients.empty();
  const auto step = series ? WSID_SELECT(walk_rows<T, C, true>) : WSID_SELECT(walk_rows<T, C, false>);
  if (series) steps = coefficients.size() - 1;
  std::vector<T> even(C * s.plane), odd(C * s.plane), total(series ? C * s.plane : 0);
  const auto each_pixel = [&](auto work) {
    for (int64_t c = 0; c < C; ++c)
      for (int64_t y = 0; y < s.height; ++y)
        for (int64_t i = 0; i < s.width; ++i)
          work((c * s.height + y) * s.width + i, c * s.plane + s.guard + y * s.stride + i, s.guard + y * s.stride + i);
  };
  each_pixel([&](int64_t from, int64_t to, int64_t pixel) {
    even[to] = T(double(x[from]) / m.inverse_root[pixel]);
    if (series) total[to] = T(coefficients[0]) * even[to];
  });
  // Several steps sweep the image together, each `lag` rows behind the previous one, where its inputs are complete: the
  // weights are then read from the L2 cache, not from memory once per step.
  const int64_t lag = std::max<int64_t>(2, s.radius / 2 * 2);             // even and at least radius - 1
  const int64_t near = (int64_t(384) << 10) / (m.pair_size * sizeof(T));  // pairs of rows that stay in the cache
  const int64_t together = std::clamp<int64_t>(1 + 2 * near / lag, 1, 8);
  for (int64_t first = 1; first <= steps; first += together) {
    const int64_t count = std::min(together, steps - first + 1);
    for (int64_t front = 0; front < s.rows + (count - 1) * lag; front += 2)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = front - i * lag, k = first + i;
        if (row < 0 || row >= s.rows) continue;
        step(s, m.packed.data() + row / 2 * m.pair_size, (k % 2 ? even : odd).data(), (k % 2 ? odd : even).data(),
             total.data(), T(k == 1 ? 1 : 2), T(k == 1 ? 0 : 1), series ? T(coefficients[k]) : T(0), row);
      }
  }
  const auto& last = series ? total : steps % 2 ? odd : even;
  each_pixel(
      [&](int64_t to, int64_t from, int64_t pixel) { result[to] = T(double(last[from]) * m.inverse_root[pixel]); });
}

template <typename T>
void walk(const T* x,         // [N, maps, H, W]
          const T* affinity,  // [N, K, H, W]
          int64_t n, int64_t maps, int64_t height, int64_t width, int64_t radius, double power, int64_t steps,
          at::ArrayRef<double> coefficients,
          T* result) {  // [N, maps, H, W]
  const Stencil s = make_stencil(height, width, radius);
  const int64_t size = height * width, k_count = s.taps.size() / 2, threads = at::get_num_threads();
  // Up to 4 maps share each loaded weight, fewer where threads would be idle.
  const int64_t block = n >= threads ? 4 : std::clamp<int64_t>((maps + threads - 1) / threads, 1, 4);
  const auto image = [&](int64_t i) {
    const Matrix<T> m = make_matrix(s, affinity + i * k_count * size, power);
    at::parallel_for(0, (maps + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t count = std::min(block, maps - b * block), at = (i * maps + b * block) * size;
        const auto run = count == 1   ? walk_maps<T, 1>
                         : count == 2 ? walk_maps<T, 2>
                         : count == 3 ? walk_maps<T, 3>
                                      : walk_maps<T, 4>;
        run(s, m, x + at, steps, coefficients, result + at);
      }
    });
  };
  if (n >= threads)
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) image(i);
    });
  else
    for (int64_t i = 0; i < n; ++i) image(i);
}

at::Tensor random_walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, double power, int64_t steps,
                       at::ArrayRef<double> coefficients) {
  wsid::check_walk(x, affinity, radius, steps);
  const at::Tensor in = x.contiguous(), a = affinity.contiguous();
  at::Tensor result = at::empty_like(in);
  if (in.numel())
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "random_walk", [&] {
      walk<scalar_t>(in.const_data_ptr<scalar_t>(), a.const_data_ptr<scalar_t>(), in.size(0), in.size(1), in.size(2),
                     in.size(3), radius, power, steps, coefficients, result.mutable_data_ptr<scalar_t>());
    });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CPU, m) { m.impl("random_walk", &random_walk); }
