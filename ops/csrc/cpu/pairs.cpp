// Pairs of labelled pixels on the CPU; see ../pairs.h for what is computed. The forward pass is parallel over rows, as
// a pair is added to its first pixel only; the backward pass over images, as a pair adds to both of its ends.
#include "../pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../paths.h"

#define WSID_KERNEL "pairs_kernel.inl"
#define WSID_FUSED 1
#include "for_each_isa.inl"

namespace {

using wsid::Grid;

// The pairs of offset k in one row: `count` neighbouring pixels from index p (column x) on; `partner` is the index step
// from a pixel to its partner.
struct Row {
  size_t k;
  int64_t p, x, partner, count;
};

// body(Row) for every offset that has pairs in row y.
template <typename Body>
void for_each_offset(const std::vector<wsid::Offset>& offsets, const Grid& grid, int64_t y, Body body) {
  for (size_t k = 0; k < offsets.size(); ++k) {
    const wsid::Offset d = offsets[k];
    const auto span = wsid::columns(d, y, grid.height, grid.width);
    if (span.begin < span.end)
      body(Row{k, y * grid.width + span.begin, span.begin, d.dy * grid.width + d.dx, span.end - span.begin});
  }
}

// How many factors are multiplied before a logarithm is taken. For B in 0..1 each factor lies in kEps..1 + kEps, so a
// double holds the product of 48; other values may be of any size.
template <typename T>
int max_factors(const T* boundary, int64_t count) {
  return std::all_of(boundary, boundary + count, [](T b) { return b >= T(0) && b <= T(1); }) ? 48 : 1;
}

template <typename T>
struct Cpu {
  static void counts(const T* labels, const Grid& grid, int32_t* result) {
    const auto offsets = wsid::half_plane(grid.radius);
    const auto add = WSID_SELECT(count_row<T>);
    at::parallel_for(0, grid.n * grid.height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / grid.height * grid.size();
        for_each_offset(offsets, grid, row % grid.height, [&](const Row& r) {
          int32_t* const same = result + 2 * first + r.p;
          add(labels + first + r.p, r.partner, r.count, same, same + grid.size());
        });
      }
    });
  }

  static void boundary_loss(const T* boundary, const T* labels, const Grid& grid, T* result) {
    const auto offsets = wsid::half_plane(grid.radius);
    const auto steps = wsid::path_steps(offsets, grid.width);
    const auto path = WSID_SELECT(path_max<T, false>);
    const auto multiply = WSID_SELECT(multiply_row<T>);
    const int limit = max_factors(boundary, grid.n * grid.size());
    at::parallel_for(0, grid.n * grid.height, 4, [&](int64_t begin, int64_t end) {
      std::vector<T> affinity(grid.width);
      std::vector<double> same(grid.width, 1.0), different(grid.width, 1.0);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / grid.height * grid.size(), y = row % grid.height;
        T* const sums = result + 2 * first + y * grid.width;
        int factors = 0;  // counted per call: on a narrow map many offsets have no pairs
        const auto take_logarithms = [&] {
          for (int64_t x = 0; x < grid.width; ++x) {
            sums[x] -= T(std::log(same[x]));
            sums[grid.size() + x] -= T(std::log(different[x]));
            same[x] = different[x] = 1;
          }
          factors = 0;
        };
        for_each_offset(offsets, grid, y, [&](const Row& r) {
          path(boundary + first + r.p, steps[r.k].data(), steps[r.k].size(), r.count, affinity.data(), nullptr);
          multiply(labels + first + r.p, r.partner, affinity.data(), r.count, &same[r.x], &different[r.x]);
          if (++factors == limit) take_logarithms();
        });
        take_logarithms();
      }
    });
  }

  static void boundary_loss_backward(const T* grad, const T* boundary, const T* labels, const Grid& grid, T* result) {
    const auto offsets = wsid::half_plane(grid.radius);
    const auto steps = wsid::path_steps(offsets, grid.width);
    const auto path = WSID_SELECT(path_max<T, true>);
    const auto slope_of = WSID_SELECT(slope_row<T>);
    at::parallel_for(0, grid.n, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> affinity(grid.width), slope(grid.width);
      std::vector<uint8_t> winner(grid.width);
      for (int64_t row = begin * grid.height; row < end * grid.height; ++row) {
        const int64_t first = row / grid.height * grid.size();
        for_each_offset(offsets, grid, row % grid.height, [&](const Row& r) {
          const T* const grad_same = grad + 2 * first + r.p;
          const int64_t* const step = steps[r.k].data();
          path(boundary + first + r.p, step, steps[r.k].size(), r.count, affinity.data(), winner.data());
          slope_of(labels + first + r.p, r.partner, affinity.data(), grad_same, grad_same + grid.size(), r.count,
                   slope.data());
          for (int64_t i = 0; i < r.count; ++i) result[first + r.p + i + step[winner[i]]] += slope[i];
        });
      }
    });
  }

  static void displacement_loss(const T* field, const T* labels, const Grid& grid, T* result) {
    const auto offsets = wsid::half_plane(grid.radius);
    const auto add = WSID_SELECT(displacement_row<T>);
    at::parallel_for(0, grid.n * grid.height, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / grid.height * grid.size();
        for_each_offset(offsets, grid, row % grid.height, [&](const Row& r) {
          const T* const y = field + 2 * first + r.p;
          add(labels + first + r.p, r.partner, y, y + grid.size(), T(offsets[r.k].dy), T(offsets[r.k].dx), r.count,
              result + first + r.p);
        });
      }
    });
  }

  static void displacement_loss_backward(const T* grad, const T* field, const T* labels, const Grid& grid, T* result) {
    const auto offsets = wsid::half_plane(grid.radius);
    const auto sign = WSID_SELECT(sign_row<T>);
    const auto add = WSID_SELECT(add_row<T>);
    at::parallel_for(0, grid.n, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> signs(2 * grid.width);
      for (int64_t row = begin * grid.height; row < end * grid.height; ++row) {
        const int64_t first = row / grid.height * grid.size();
        for_each_offset(offsets, grid, row % grid.height, [&](const Row& r) {
          const T* const y = field + 2 * first + r.p;
          T* const into = result + 2 * first + r.p;
          sign(labels + first + r.p, r.partner, y, y + grid.size(), T(offsets[r.k].dy), T(offsets[r.k].dx),
               grad + first + r.p, r.count, signs.data(), &signs[grid.width]);
          for (int c = 0; c < 2; ++c) {  // one after the other: for dy = 0 both ends lie in the same row
            add(&signs[c * grid.width], T(1), r.count, into + c * grid.size());
            add(&signs[c * grid.width], T(-1), r.count, into + c * grid.size() + r.partner);
          }
        });
      }
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CPU, m) { wsid::PairOperators<Cpu>::implement(m); }
