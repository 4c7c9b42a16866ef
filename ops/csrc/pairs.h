// Sums over the pairs (p, p + d) of labelled pixels, accumulated at p (Sec. 3.1, 4.2): the number of pairs, the cross
// entropy of their affinity (L_B) and the error of their displacement (L_V). Nothing is stored per pair: the backward
// pass recomputes paths and differences.
//
// Labels have the precision of the maps: 0 background, above 0 foreground, NaN undecided. PairOperators checks
// arguments and allocates results; Backend<T> computes them, on the CPU in cpu/pairs.cpp and on CUDA in cuda/pairs.cu.
// Its results are passed in filled with 0: counts and boundary loss [N, 2, H, W] (same label, different label),
// displacement loss [N, H, W].
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

  static at::Tensor boundary_loss(const at::Tensor& boundary, const at::Tensor& labels, int64_t radius) {
    check_pairs(boundary, labels, radius, 3);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    const at::Tensor b = checked_boundary(boundary, radius), l = labels.contiguous();
    at::Tensor result = at::zeros({grid.n, 2, grid.height, grid.width}, b.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "boundary_pair_loss", [&] {
        Backend<scalar_t>::boundary_loss(b.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), grid,
                                         result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor boundary_loss_backward(const at::Tensor& grad, const at::Tensor& boundary, const at::Tensor& labels,
                                           int64_t radius) {
    check_pairs(boundary, labels, radius, 3);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    check_like(grad, {grid.n, 2, grid.height, grid.width}, boundary);
    const at::Tensor b = checked_boundary(boundary, radius), l = labels.contiguous(), g = grad.contiguous();
    at::Tensor result = at::zeros(b.sizes(), b.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "boundary_pair_loss_backward", [&] {
        Backend<scalar_t>::boundary_loss_backward(g.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(),
                                                  l.const_data_ptr<scalar_t>(), grid,
                                                  result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor displacement_loss(const at::Tensor& offsets, const at::Tensor& labels, int64_t radius) {
    check_pairs(offsets, labels, radius, 4);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    const at::Tensor v = offsets.contiguous(), l = labels.contiguous();
    at::Tensor result = at::zeros(l.sizes(), l.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "displacement_pair_loss", [&] {
        Backend<scalar_t>::displacement_loss(v.const_data_ptr<scalar_t>(), l.const_data_ptr<scalar_t>(), grid,
                                             result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static at::Tensor displacement_loss_backward(const at::Tensor& grad, const at::Tensor& offsets,
                                               const at::Tensor& labels, int64_t radius) {
    check_pairs(offsets, labels, radius, 4);
    const c10::DeviceGuard guard(labels.device());
    const Grid grid(labels, radius);
    check_like(grad, labels.sizes(), offsets);
    const at::Tensor v = offsets.contiguous(), l = labels.contiguous(), g = grad.contiguous();
    at::Tensor result = at::zeros(v.sizes(), v.options());
    if (l.numel())
      AT_DISPATCH_FLOATING_TYPES(l.scalar_type(), "displacement_pair_loss_backward", [&] {
        Backend<scalar_t>::displacement_loss_backward(g.const_data_ptr<scalar_t>(), v.const_data_ptr<scalar_t>(),
                                                      l.const_data_ptr<scalar_t>(), grid,
                                                      result.mutable_data_ptr<scalar_t>());
      });
    return result;
  }

  static void implement(torch::Library& m) {
    m.impl("pair_counts", &counts);
    m.impl("boundary_pair_loss", &boundary_loss);
    m.impl("boundary_pair_loss_backward", &boundary_loss_backward);
    m.impl("displacement_pair_loss", &displacement_loss);
    m.impl("displacement_pair_loss_backward", &displacement_loss_backward);
  }
};

}  // namespace wsid
