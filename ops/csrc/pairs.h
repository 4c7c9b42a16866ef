// What the losses L_B and L_V sum over the pairs (p, p + d) of labelled pixels, at each pixel p (Sec. 3.1, 4.2):
// how many pairs there are, the cross entropy of their affinity, the error of their displacement.
// Nothing is kept for every pair; backward computes paths and differences again.
//
// Labels have the maps' precision: 0 background, above it things, NaN undecided. Backend<T> does the sums, on the CPU
// in cpu/pairs.cpp and on CUDA in cuda/pairs.cu, from labels [N, H, W], boundary [N, H, W] and field [N, 2, H, W] to
// counts and entropy [N, 2, H, W] and error [N, H, W]; results come to it filled with 0.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "checks.h"

namespace wsid {

struct Grid {
  int64_t n, height, width, radius;
  c10::Device device;

  Grid(const at::Tensor& labels, int64_t radius)
      : n(labels.size(0)), height(labels.size(1)), width(labels.size(2)), radius(radius), device(labels.device()) {}
  int64_t size() const { return height * width; }
};

template <template <typename> class Backend>
struct PairOperators {
  static at::Tensor counts(const at::Tensor& labels, int64_t radius) {
    check_labels(labels, radius);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    const at::Tensor l = labels.contiguous();
    at::Tensor result = at::zeros({grid.n, 2, grid.height, grid.width}, l.options().dtype(at::kInt));
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "pair_counts", [&] {
        Backend<scalar_t>::counts(l.const_data_ptr<scalar_t>(), grid, result.mutable_data_ptr<int32_t>());
      });
    return result;
  }

  static at::Tensor entropy(const at::Tensor& boundary, const at::Tensor& labels, int64_t radius) {
    check_pairs(boundary, labels, radius, 3);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    const at::Tensor b = checked_boundary(boundary, radius), l = labels.contiguous();
    at::Tensor result = at::zeros({grid.n, 2, grid.height, grid.width}, b.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "boundary_pair_loss", [&] {
        Backend<scalar_t>::entropy(b.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), grid,
                                   result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor entropy_backward(const at::Tensor& grad, const at::Tensor& boundary, const at::Tensor& labels,
                                     int64_t radius) {
    check_pairs(boundary, labels, radius, 3);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    check_like(grad, {grid.n, 2, grid.height, grid.width}, boundary);
    const at::Tensor b = checked_boundary(boundary, radius), l = labels.contiguous(), g = grad.contiguous();
    at::Tensor result = at::zeros(b.sizes(), b.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "boundary_pair_loss_backward", [&] {
        Backend<scalar_t>::entropy_backward(g.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(),
                                            l.const_data_ptr<scalar_t>(), grid, result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor error(const at::Tensor& offsets, const at::Tensor& labels, int64_t radius) {
    check_pairs(offsets, labels, radius, 4);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    const at::Tensor v = offsets.contiguous(), l = labels.contiguous();
    at::Tensor result = at::zeros(l.sizes(), l.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "displacement_pair_loss", [&] {
        Backend<scalar_t>::error(v.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), grid,
                                 result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor error_backward(const at::Tensor& grad, const at::Tensor& offsets, const at::Tensor& labels,
                                   int64_t radius) {
    check_pairs(offsets, labels, radius, 4);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    check_like(grad, labels.sizes(), offsets);
    const at::Tensor v = offsets.contiguous(), l = labels.contiguous(), g = grad.contiguous();
    at::Tensor result = at::zeros(v.sizes(), v.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "displacement_pair_loss_backward", [&] {
        Backend<scalar_t>::error_backward(g.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(),
                                          l.const_data_ptr<scalar_t>(), grid, result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static void implement(torch::Library& m) {
    m.impl("pair_counts", &counts);
    m.impl("boundary_pair_loss", &entropy);
    m.impl("boundary_pair_loss_backward", &entropy_backward);
    m.impl("displacement_pair_loss", &error);
    m.impl("displacement_pair_loss_backward", &error_backward);
  }
};

}  // namespace wsid
