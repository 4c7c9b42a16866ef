// Affinity of neighbouring pixels on CUDA; see ../cpu/affinity.cpp for the definition.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "device.cuh"

namespace {

using wsid::blocks;
using wsid::launch;
using wsid::Pair;
using wsid::Pixel;
using wsid::Step;

// Grid: pixels of all images by offsets.
template <typename T>
__global__ void path_max_kernel(const T* __restrict__ boundary,  // [N, H, W]
                                int n, int height, int width, int k_count,
                                const Pair* __restrict__ pairs,  // [K + 1]
                                const Step* __restrict__ steps,  // [S]
                                T* __restrict__ affinity,        // [N, K, H, W]
                                uint8_t* __restrict__ winner) {  // [N, K, H, W] or nullptr
  const Pixel at(n, height, width);
  if (!at.exists) return;
  const T* const here = boundary + at.thread;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int64_t entry = at.entry(k_count, k);
    T value = T(0);
    int index = 0;
    if (pairs[k].inside(at.y, at.x, height, width)) {
      const int begin = pairs[k].path, end = pairs[k + 1].path;
      T best = here[0];
      for (int i = begin + 1; i < end; ++i) {
        const Step step = steps[i];
        const T next = here[step.dy * width + step.dx];
        if (next > best) best = next, index = i - begin;
      }
      value = T(1) - best;
    }
    affinity[entry] = value;
    if (winner) winner[entry] = uint8_t(index);
  }
}

template <typename T>
__global__ void path_max_backward_kernel(const T* __restrict__ grad,          // [N, K, H, W]
                                         const uint8_t* __restrict__ winner,  // [N, K, H, W]
                                         int n, int height, int width, int k_count,
                                         const Pair* __restrict__ pairs,  // [K + 1]
                                         const Step* __restrict__ steps,  // [S]
                                         T* __restrict__ result) {        // [N, H, W]
  const Pixel at(n, height, width);
  if (!at.exists) return;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    if (!pairs[k].inside(at.y, at.x, height, width)) continue;
    const int64_t entry = at.entry(k_count, k);
    const int i = pairs[k].path + winner[entry];
    if (i < pairs[k + 1].path) atomicAdd(result + at.thread + (steps[i].dy * width + steps[i].dx), -grad[entry]);
  }
}

std::tuple<at::Tensor, at::Tensor> boundary_affinity(const at::Tensor& boundary, int64_t radius, bool with_winner) {
  const c10::cuda::CUDAGuard guard(boundary.device());
  const at::Tensor b = wsid::checked_boundary(boundary, radius);
  const int64_t n = b.size(0), height = b.size(1), width = b.size(2);
  at::Tensor affinity, winner;
  std::tie(affinity, winner) = wsid::affinity_outputs(b, radius, with_winner);
  const int64_t k_count = affinity.size(1);
  if (!affinity.numel()) return {affinity, winner};
  const wsid::Tables& table = wsid::tables(radius, b.device());
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "boundary_affinity", [&] {
    launch(path_max_kernel<scalar_t>, dim3(blocks(b.numel()), k_count), b.const_data_ptr<scalar_t>(), n, height, width,
           k_count, table.pairs, table.steps, affinity.mutable_data_ptr<scalar_t>(),
           with_winner ? winner.mutable_data_ptr<uint8_t>() : nullptr);
  });
  return {affinity, winner};
}

at::Tensor boundary_affinity_backward(const at::Tensor& grad, const at::Tensor& winner, int64_t radius) {
  wsid::check_gradient(grad, winner, radius);
  const int64_t k_count = grad.size(1);
  const c10::cuda::CUDAGuard guard(grad.device());
  const int64_t n = grad.size(0), height = grad.size(2), width = grad.size(3);
  at::Tensor result = at::zeros({n, height, width}, grad.options());
  const at::Tensor g = grad.contiguous(), w = winner.contiguous();
  if (!g.numel()) return result;
  const wsid::Tables& table = wsid::tables(radius, g.device());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "boundary_affinity_backward", [&] {
    if (wsid::deterministic())
      launch(wsid::gather_gradients_kernel<scalar_t>, blocks(result.numel()), g.const_data_ptr<scalar_t>(),
             w.const_data_ptr<uint8_t>(), n, height, width, 0, k_count, table.pairs, table.steps,
             result.mutable_data_ptr<scalar_t>());
    else
      launch(path_max_backward_kernel<scalar_t>, dim3(blocks(result.numel()), k_count), g.const_data_ptr<scalar_t>(),
             w.const_data_ptr<uint8_t>(), n, height, width, k_count, table.pairs, table.steps,
             result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) {
  m.impl("boundary_affinity", &boundary_affinity);
  m.impl("boundary_affinity_backward", &boundary_affinity_backward);
}
