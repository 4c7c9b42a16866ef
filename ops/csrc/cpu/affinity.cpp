// Affinity of neighbouring pixels: a(p, p + d) = 1 - max of B over the path from p to p + d (Sec. 3.2).
// Backward: -da(p, p + d) goes to the pixel that holds the maximum, the first on the path where several do. Only the
// position of that pixel on the path is stored, one byte per entry.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../paths.h"

#define WSID_KERNEL "affinity_kernel.inl"
#define WSID_FUSED 1
#include "for_each_isa.inl"

namespace {

template <typename T>
void forward(const T* boundary,  // [N, H, W]
             int64_t n, int64_t height, int64_t width, int64_t radius,
             T* affinity,        // [N, K, H, W]
             uint8_t* winner) {  // [N, K, H, W] or nullptr
  const auto offsets = wsid::half_plane(radius);
  const auto steps = wsid::path_steps(offsets, width);
  const int64_t size = height * width, k_count = offsets.size();
  const auto with_winner = WSID_SELECT(path_max<T, true>);
  const auto without_winner = WSID_SELECT(path_max<T, false>);
  at::parallel_for(0, n * height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      for (int64_t k = 0; k < k_count; ++k) {
        const auto span = wsid::columns(offsets[k], y, height, width);
        const int64_t at = (image * k_count + k) * size + y * width;
        std::fill(affinity + at, affinity + at + span.begin, T(0));
        std::fill(affinity + at + span.end, affinity + at + width, T(0));
        if (winner) std::fill(winner + at, winner + at + width, uint8_t(0));
        if (span.begin == span.end) continue;
        const int64_t p = at + span.begin;
        (winner ? with_winner : without_winner)(boundary + row * width + span.begin, steps[k].data(), steps[k].size(),
                                                span.end - span.begin, affinity + p, winner ? winner + p : nullptr);
      }
    }
  });
}

template <typename T>
void backward(const T* grad,          // [N, K, H, W]
              const uint8_t* winner,  // [N, K, H, W]
              int64_t n, int64_t height, int64_t width, int64_t radius,
              T* result) {  // [N, H, W]
  const auto offsets = wsid::half_plane(radius);
  auto steps = wsid::path_steps(offsets, width);
  for (auto& step : steps) step.resize(256, 0);  // any byte in winner is then a valid index
  const int64_t size = height * width, k_count = offsets.size();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    // Neighbours often share their maximum: alternating between two sums avoids waiting for the previous addition.
    std::vector<T> second(size);
    for (int64_t image = begin; image < end; ++image) {
      T* const first = result + image * size;
      std::fill(second.begin(), second.end(), T(0));
      for (int64_t y = 0; y < height; ++y)
        for (int64_t k = 0; k < k_count; ++k) {
          const auto span = wsid::columns(offsets[k], y, height, width);
          const int64_t at = (image * k_count + k) * size + y * width, row = y * width;
          const int64_t* const step = steps[k].data();
          int64_t x = span.begin;
          for (; x + 1 < span.end; x += 2) {
            first[row + x + step[winner[at + x]]] -= grad[at + x];
            second[row + x + 1 + step[winner[at + x + 1]]] -= grad[at + x + 1];
          }
          if (x < span.end) first[row + x + step[winner[at + x]]] -= grad[at + x];
        }
      for (int64_t i = 0; i < size; ++i) first[i] += second[i];
    }
  });
}

std::tuple<at::Tensor, at::Tensor> boundary_affinity(const at::Tensor& boundary, int64_t radius, bool with_winner) {
  const at::Tensor b = wsid::checked_boundary(boundary, radius);
  const int64_t n = b.size(0), height = b.size(1), width = b.size(2);
  at::Tensor affinity, winner;
  std::tie(affinity, winner) = wsid::affinity_outputs(b, radius, with_winner);
  if (affinity.numel())
    AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "boundary_affinity", [&] {
      forward<scalar_t>(b.const_data_ptr<scalar_t>(), n, height, width, radius, affinity.mutable_data_ptr<scalar_t>(),
                        with_winner ? winner.mutable_data_ptr<uint8_t>() : nullptr);
    });
  return {affinity, winner};
}

at::Tensor boundary_affinity_backward(const at::Tensor& grad, const at::Tensor& winner, int64_t radius) {
  wsid::check_gradient(grad, winner, radius);
  const int64_t n = grad.size(0), height = grad.size(2), width = grad.size(3);
  at::Tensor result = at::zeros({n, height, width}, grad.options());
  const at::Tensor g = grad.contiguous(), w = winner.contiguous();
  if (g.numel())
    AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "boundary_affinity_backward", [&] {
      backward<scalar_t>(g.const_data_ptr<scalar_t>(), w.const_data_ptr<uint8_t>(), n, height, width, radius,
                         result.mutable_data_ptr<scalar_t>());
    });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CPU, m) {
  m.impl("boundary_affinity", &boundary_affinity);
  m.impl("boundary_affinity_backward", &boundary_affinity_backward);
}
