// Centroids, affinity and likeness on CUDA; see centroids.cpp, affinity.cpp and likeness.cpp for what they compute.
//
// One thread works on one pixel. Threads of a warp lie side by side in a row, so every load and store is coalesced.
// Compile with -fmad=false: centroids then agree with the CPU to the last bit; where fusing is wanted, fma() says so.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "checks.h"
#include "device.h"
#include "pixel.h"

namespace {

using wsid::blocks;
using wsid::kThreads;
using wsid::Pair;
using wsid::Pixel;
using wsid::Step;

// ---- centroids ----

template <typename T>
__global__ void follow(const T* __restrict__ offsets, int n, int height, int width, int max_iters, T tol2,
                       T* __restrict__ points) {
  const Pixel at(n, height, width);
  if (!at.exists) return;
  const T* const field_y = offsets + 2 * at.map * at.size;
  const T* const field_x = field_y + at.size;
  T y = T(at.y), x = T(at.x);
  for (int i = 0; i < max_iters; ++i) {
    const int row = int(y), column = int(x);  // never negative
    const int a = row * width + column;
    const int b = a + (column < width - 1), down = row < height - 1 ? width : 0;
    const T wy = y - T(row), wx = x - T(column);
    const T move_y = wsid::bilinear(field_y[a], field_y[b], field_y[a + down], field_y[b + down], wy, wx);
    const T move_x = wsid::bilinear(field_x[a], field_x[b], field_x[a + down], field_x[b + down], wy, wx);
    if (!(move_y - move_y == T(0) && move_x - move_x == T(0))) break;  // NaN or infinite: not made
    const T step_y = wsid::clip(y + move_y, T(height - 1)) - y, step_x = wsid::clip(x + move_x, T(width - 1)) - x;
    y = wsid::clip(y + move_y, T(height - 1));
    x = wsid::clip(x + move_x, T(width - 1));
    if (!(step_y * step_y + step_x * step_x >= tol2)) break;
  }
  points[2 * at.map * at.size + at.p] = y;
  points[(2 * at.map + 1) * at.size + at.p] = x;
}

at::Tensor converge_centroids(const at::Tensor& offsets, int64_t max_iters, double tol) {
  wsid::check_offsets(offsets);
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor field = offsets.contiguous();
  at::Tensor points = at::empty_like(field);
  if (!points.numel()) return points;
  AT_DISPATCH_FLOATING_TYPES(field.scalar_type(), "converge_centroids", [&] {
    follow<scalar_t><<<blocks(points.numel() / 2), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        field.const_data_ptr<scalar_t>(), field.size(0), field.size(2), field.size(3),
        int(std::min<int64_t>(max_iters, std::numeric_limits<int>::max())), scalar_t(tol * tol),
        points.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return points;
}

// ---- affinity ----

// Grid: pixels of all images by offsets.
template <typename T>
__global__ void path_max(const T* __restrict__ boundary, int n, int height, int width, int k_count,
                         const Pair* __restrict__ pairs, const Step* __restrict__ steps, T* __restrict__ affinity,
                         uint8_t* __restrict__ winner) {
  const Pixel at(n, height, width);
  if (!at.exists) return;
  const T* const here = boundary + at.thread;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int64_t entry = (at.map * k_count + k) * at.size + at.p;
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
__global__ void path_max_backward(const T* __restrict__ grad, const uint8_t* __restrict__ winner, int n, int height,
                                  int width, int k_count, const Pair* __restrict__ pairs,
                                  const Step* __restrict__ steps, T* __restrict__ result) {
  const Pixel at(n, height, width);
  if (!at.exists) return;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    if (!pairs[k].inside(at.y, at.x, height, width)) continue;
    const int64_t entry = (at.map * k_count + k) * at.size + at.p;
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
    path_max<scalar_t><<<dim3(blocks(b.numel()), k_count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        b.const_data_ptr<scalar_t>(), n, height, width, k_count, table.pairs, table.steps,
        affinity.mutable_data_ptr<scalar_t>(), with_winner ? winner.mutable_data_ptr<uint8_t>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
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
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "boundary_affinity_backward", [&] {
    if (wsid::deterministic())
      wsid::gather_gradients<scalar_t><<<blocks(result.numel()), kThreads, 0, stream>>>(
          g.const_data_ptr<scalar_t>(), w.const_data_ptr<uint8_t>(), n, height, width, 0, k_count, table.pairs,
          table.steps, result.mutable_data_ptr<scalar_t>());
    else
      path_max_backward<scalar_t><<<dim3(blocks(result.numel()), k_count), kThreads, 0, stream>>>(
          g.const_data_ptr<scalar_t>(), w.const_data_ptr<uint8_t>(), n, height, width, k_count, table.pairs,
          table.steps, result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

// ---- likeness ----

constexpr int kTogether = 4;  // offsets that share the loads of the pixel's own features

// Grid: pixels of all images by groups of offsets.
template <typename T>
__global__ void dot_products(const T* __restrict__ features, int n, int channels, int height, int width, int k_count,
                             const Pair* __restrict__ pairs, T* __restrict__ likeness) {
  const Pixel at(n, height, width);
  if (!at.exists) return;
  for (int first = blockIdx.y * kTogether; first < k_count; first += gridDim.y * kTogether) {
    T sum[kTogether] = {};
    int d[kTogether];  // 0, the pixel itself, where there is no other
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const Pair pair = pairs[min(first + i, k_count)];
      d[i] = pair.inside(at.y, at.x, height, width) ? pair.dy * width + pair.dx : 0;
    }
    const T* here = features + at.map * channels * at.size + at.p;
    for (int c = 0; c < channels; ++c, here += at.size) {
      const T own = here[0];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum[i] = fma(own, here[d[i]], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < k_count)
        likeness[(at.map * k_count + first + i) * at.size + at.p] = d[i] && sum[i] > T(0) ? sum[i] : T(0);
  }
}

at::Tensor likeness(const at::Tensor& features, int64_t radius) {
  at::Tensor result = wsid::likeness_output(features, radius);
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor f = features.contiguous();
  const int64_t n = f.size(0), height = f.size(2), width = f.size(3), k_count = result.size(1);
  if (!result.numel()) return result;
  const Pair* const pairs = wsid::tables(radius, f.device()).pairs;
  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "likeness", [&] {
    dot_products<scalar_t>
        <<<dim3(blocks(n * height * width), (k_count + kTogether - 1) / kTogether), kThreads, 0,
           c10::cuda::getCurrentCUDAStream()>>>(
            f.const_data_ptr<scalar_t>(), n, f.size(1), height, width, k_count, pairs,
            result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) {
  m.impl("converge_centroids", &converge_centroids);
  m.impl("boundary_affinity", &boundary_affinity);
  m.impl("boundary_affinity_backward", &boundary_affinity_backward);
  m.impl("likeness", &likeness);
}
