// Converged centroids on CUDA; see ../cpu/centroids.cpp for the definition. Compiled with -fmad=false, they equal the
// CPU's bit by bit.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../checks.h"
#include "../pixel.h"
#include "device.cuh"

namespace {

using wsid::launch;
using wsid::Pixel;

template <typename T>
__global__ void converge_kernel(const T* __restrict__ offsets,  // [N, 2, H, W]
                                int n, int height, int width, int max_iters, T tol2,
                                T* __restrict__ points) {  // [N, 2, H, W]
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
    if (!(move_y - move_y == T(0) && move_x - move_x == T(0))) break;  // NaN or infinite moves are skipped
    const T step_y = wsid::clip(y + move_y, T(height - 1)) - y, step_x = wsid::clip(x + move_x, T(width - 1)) - x;
    y = wsid::clip(y + move_y, T(height - 1));
    x = wsid::clip(x + move_x, T(width - 1));
    if (!(step_y * step_y + step_x * step_x >= tol2)) break;
  }
  points[at.entry(2, 0)] = y;
  points[at.entry(2, 1)] = x;
}

at::Tensor converge_centroids(const at::Tensor& offsets, int64_t max_iters, double tol) {
  wsid::check_offsets(offsets);
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor field = offsets.contiguous();
  at::Tensor points = at::empty_like(field);
  if (!points.numel()) return points;
  AT_DISPATCH_FLOATING_TYPES(field.scalar_type(), "converge_centroids", [&] {
    launch(converge_kernel<scalar_t>, wsid::blocks(points.numel() / 2), field.const_data_ptr<scalar_t>(), field.size(0),
           field.size(2), field.size(3), int(std::min<int64_t>(max_iters, std::numeric_limits<int>::max())),
           scalar_t(tol * tol), points.mutable_data_ptr<scalar_t>());
  });
  return points;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { m.impl("converge_centroids", &converge_centroids); }
