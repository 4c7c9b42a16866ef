// Likeness of neighbouring pixels: l(p, p + d) = max(0, f(p) . f(p + d)) for features of unit length.
// A row of all channels lies together, so that the rows of a pair stay in the first caches while all offsets use them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../paths.h"

#define WSID_KERNEL "likeness_kernel.inl"
#define WSID_FUSED 1
#include "for_each_isa.inl"

namespace {

template <typename T>
void dot_products(const T* rows,  // [N, H, C, W]
                  int64_t n, int64_t channels, int64_t height, int64_t width, int64_t radius,
                  T* likeness) {  // [N, K, H, W]
  const auto offsets = wsid::half_plane(radius);
  const int64_t size = height * width, line = channels * width, k_count = offsets.size();
  const auto dot = WSID_SELECT(dot_rows<T>);
  at::parallel_for(0, n * height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / height, y = row % height;
      for (int64_t k = 0; k < k_count; ++k) {
        const auto d = offsets[k];
        const auto span = wsid::columns(d, y, height, width);
        T* const out = likeness + (image * k_count + k) * size + y * width;
        std::fill(out, out + span.begin, T(0));
        std::fill(out + span.end, out + width, T(0));
        if (span.begin == span.end) continue;
        const T* const here = rows + row * line + span.begin;
        dot(here, here + d.dy * line + d.dx, channels, width, span.end - span.begin, out + span.begin);
      }
    }
  });
}

at::Tensor likeness(const at::Tensor& features, int64_t radius) {
  at::Tensor result = wsid::likeness_output(features, radius);
  const at::Tensor rows = features.permute({0, 2, 1, 3}).contiguous();
  if (result.numel())
    AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "likeness", [&] {
      dot_products<scalar_t>(rows.const_data_ptr<scalar_t>(), rows.size(0), rows.size(2), rows.size(1), rows.size(3),
                             radius, result.mutable_data_ptr<scalar_t>());
    });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CPU, m) { m.impl("likeness", &likeness); }
