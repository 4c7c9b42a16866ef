// Converged centroids, Eq. 1: c_0 = p, c <- clip(c + V(c)), V bilinear and fixed, until |move| < tol or max_iters.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "../checks.h"
#include "../pixel.h"

#pragma GCC optimize("fp-contract=off")
#define WSID_KERNEL "centroids_kernel.inl"
#define WSID_FUSED 0
#include "for_each_isa.inl"

namespace {

at::Tensor converge_centroids(const at::Tensor& offsets, int64_t max_iters, double tol) {
  wsid::check_offsets(offsets);
  const at::Tensor field = offsets.contiguous();
  at::Tensor points = at::empty_like(field);
  const int64_t height = field.size(2), width = field.size(3), size = height * width;
  if (points.numel() == 0) return points;
  AT_DISPATCH_FLOATING_TYPES(field.scalar_type(), "converge_centroids", [&] {
    const auto kernel = WSID_SELECT(converge<scalar_t>);
    const scalar_t* const in = field.const_data_ptr<scalar_t>();
    scalar_t* const out = points.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, field.size(0) * height, 16, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // rows of one image at a time
        const int64_t image = begin / height, stop = std::min(end, (image + 1) * height);
        kernel(in + 2 * image * size, height, width, (begin - image * height) * width, (stop - image * height) * width,
               max_iters, scalar_t(tol * tol), out + 2 * image * size);
        begin = stop;
      }
    });
  });
  return points;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CPU, m) { m.impl("converge_centroids", &converge_centroids); }
