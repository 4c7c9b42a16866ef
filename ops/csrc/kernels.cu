// The same operators on CUDA; see centroids.cpp, affinity.cpp, likeness.cpp and walk.cpp for what they compute.
//
// One thread works on one pixel. Threads of a warp lie side by side in a row, so every load and store is coalesced; maps
// of one image fit the L2 cache, so the traffic that counts is the affinity's: written once, read once per step.
// Compile with -fmad=false: centroids then agree with the CPU to the last bit; where fusing is wanted, fma() says so.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "paths.h"
#include "pixel.h"

namespace {

constexpr int kThreads = 256;

int blocks(int64_t work) { return int((work + kThreads - 1) / kThreads); }

// A small table for the device, copied on the current stream.
at::Tensor to_device(const std::vector<int32_t>& table, const at::Tensor& like) {
  at::Tensor host = at::empty({int64_t(table.size())}, at::TensorOptions().dtype(at::kInt));
  std::copy(table.begin(), table.end(), host.mutable_data_ptr<int32_t>());
  return host.to(like.device());
}

// ---- centroids ----

template <typename T>
__global__ void follow(const T* __restrict__ offsets, int n, int height, int width, int max_iters, T tol2,
                       T* __restrict__ points) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  const T* const field_y = offsets + 2 * image * size;
  const T* const field_x = field_y + size;
  T y = T(p / width), x = T(p % width);
  for (int i = 0; i < max_iters; ++i) {
    const int row = int(y), column = int(x);  // never negative
    const int64_t a = int64_t(row) * width + column;
    const int64_t b = a + (column < width - 1), down = row < height - 1 ? width : 0;
    const T wy = y - T(row), wx = x - T(column);
    const T move_y = wsid::bilinear(field_y[a], field_y[b], field_y[a + down], field_y[b + down], wy, wx);
    const T move_x = wsid::bilinear(field_x[a], field_x[b], field_x[a + down], field_x[b + down], wy, wx);
    if (!(move_y - move_y == T(0) && move_x - move_x == T(0))) break;  // NaN or infinite: not made
    const T step_y = wsid::clip(y + move_y, T(height - 1)) - y, step_x = wsid::clip(x + move_x, T(width - 1)) - x;
    y = wsid::clip(y + move_y, T(height - 1));
    x = wsid::clip(x + move_x, T(width - 1));
    if (!(step_y * step_y + step_x * step_x >= tol2)) break;
  }
  points[2 * image * size + p] = y;
  points[(2 * image + 1) * size + p] = x;
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

// Of each offset: dy, dx, and where its path begins in the table of steps; one more entry ends the last path.
struct PathTable {
  at::Tensor offsets, steps;
};

PathTable path_table(int64_t radius, int64_t width, const at::Tensor& like) {
  std::vector<int32_t> offsets, steps;
  for (const auto d : wsid::half_plane(radius)) {
    offsets.insert(offsets.end(), {int32_t(d.dy), int32_t(d.dx), int32_t(steps.size())});
    for (const auto p : wsid::path(d)) steps.push_back(int32_t(p.dy * width + p.dx));
  }
  offsets.insert(offsets.end(), {0, 0, int32_t(steps.size())});
  return {to_device(offsets, like), to_device(steps, like)};
}

__device__ bool pair_inside(const int32_t* offset, int y, int x, int height, int width) {
  return y + offset[0] < height && x + offset[1] >= 0 && x + offset[1] < width;
}

// Grid: pixels of all images by offsets.
template <typename T>
__global__ void path_max(const T* __restrict__ boundary, int n, int height, int width, int k_count,
                         const int32_t* __restrict__ offsets, const int32_t* __restrict__ steps,
                         T* __restrict__ affinity, uint8_t* __restrict__ winner) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int32_t* const offset = offsets + 3 * k;
    const int64_t entry = (image * k_count + k) * size + p;
    T value = T(0);
    int index = 0;
    if (pair_inside(offset, int(p / width), int(p % width), height, width)) {
      const T* const here = boundary + thread;
      T best = here[0];
      for (int i = offset[2] + 1; i < offset[5]; ++i) {
        const T next = here[steps[i]];
        if (next > best) best = next, index = i - offset[2];
      }
      value = T(1) - best;
    }
    affinity[entry] = value;
    if (winner) winner[entry] = uint8_t(index);
  }
}

template <typename T>
__global__ void path_max_backward(const T* __restrict__ grad, const uint8_t* __restrict__ winner, int n, int height,
                                  int width, int k_count, const int32_t* __restrict__ offsets,
                                  const int32_t* __restrict__ steps, T* __restrict__ result) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int32_t* const offset = offsets + 3 * k;
    if (!pair_inside(offset, int(p / width), int(p % width), height, width)) continue;
    const int64_t entry = (image * k_count + k) * size + p;
    const int i = offset[2] + winner[entry];
    if (i < offset[5]) atomicAdd(result + thread + steps[i], -grad[entry]);
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
  const PathTable table = path_table(radius, width, b);
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "boundary_affinity", [&] {
    path_max<scalar_t><<<dim3(blocks(b.numel()), k_count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        b.const_data_ptr<scalar_t>(), n, height, width, k_count, table.offsets.const_data_ptr<int32_t>(),
        table.steps.const_data_ptr<int32_t>(), affinity.mutable_data_ptr<scalar_t>(),
        with_winner ? winner.mutable_data_ptr<uint8_t>() : nullptr);
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
  const PathTable table = path_table(radius, width, g);
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "boundary_affinity_backward", [&] {
    path_max_backward<scalar_t>
        <<<dim3(blocks(result.numel()), k_count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            g.const_data_ptr<scalar_t>(), w.const_data_ptr<uint8_t>(), n, height, width, k_count,
            table.offsets.const_data_ptr<int32_t>(), table.steps.const_data_ptr<int32_t>(),
            result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

// ---- likeness ----

// Grid: pixels of all images by offsets.
template <typename T>
__global__ void dot_products(const T* __restrict__ features, int n, int channels, int height, int width, int k_count,
                             const int32_t* __restrict__ offsets, T* __restrict__ likeness) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int32_t* const offset = offsets + 3 * k;
    T sum = T(0);
    if (pair_inside(offset, int(p / width), int(p % width), height, width)) {
      const T* here = features + image * channels * size + p;
      const int64_t d = int64_t(offset[0]) * width + offset[1];
      for (int c = 0; c < channels; ++c, here += size) sum = fma(here[0], here[d], sum);
    }
    likeness[(image * k_count + k) * size + p] = sum > T(0) ? sum : T(0);
  }
}

at::Tensor likeness(const at::Tensor& features, int64_t radius) {
  at::Tensor result = wsid::likeness_output(features, radius);
  const c10::cuda::CUDAGuard guard(features.device());
  const at::Tensor f = features.contiguous();
  const int64_t n = f.size(0), height = f.size(2), width = f.size(3), k_count = result.size(1);
  if (!result.numel()) return result;
  const at::Tensor offsets = path_table(radius, width, f).offsets;
  AT_DISPATCH_FLOATING_TYPES(f.scalar_type(), "likeness", [&] {
    dot_products<scalar_t>
        <<<dim3(blocks(n * height * width), k_count), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            f.const_data_ptr<scalar_t>(), n, f.size(1), height, width, k_count, offsets.const_data_ptr<int32_t>(),
            result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

// ---- random walk ----

template <typename T>
__device__ double raised(T affinity, double power, int whole) {
  if (whole < 0) return pow(double(affinity), power);
  double base = double(affinity), result = 1;
  for (int exponent = whole; exponent; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// root = D^1/2; D is 1 plus the weights of both directions of every pair.
template <typename T>
__global__ void row_sums(const T* __restrict__ affinity, int n, int height, int width, int k_count,
                         const int32_t* __restrict__ offsets, double power, int whole, double* __restrict__ root) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  const int y = int(p / width), x = int(p % width);
  double sum = 1;
  for (int k = 0; k < k_count; ++k) {
    const int dy = offsets[3 * k], dx = offsets[3 * k + 1];
    const T* const plane = affinity + (image * k_count + k) * size + p;
    if (y + dy < height && x + dx >= 0 && x + dx < width) sum += double(T(raised(plane[0], power, whole)));
    if (y - dy >= 0 && x - dx >= 0 && x - dx < width)
      sum += double(T(raised(plane[-(int64_t(dy) * width + dx)], power, whole)));
  }
  root[thread] = sqrt(sum);
}

// weights = S of every pair, [N, K, H, W].
template <typename T>
__global__ void symmetric_weights(const T* __restrict__ affinity, const double* __restrict__ root, int n, int height,
                                  int width, int k_count, const int32_t* __restrict__ offsets, double power, int whole,
                                  T* __restrict__ weights) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  for (int k = blockIdx.y; k < k_count; k += gridDim.y) {
    const int32_t* const offset = offsets + 3 * k;
    const int64_t entry = (image * k_count + k) * size + p;
    T weight = T(0);
    if (pair_inside(offset, int(p / width), int(p % width), height, width))
      weight = T(double(T(raised(affinity[entry], power, whole))) /
                 (root[thread] * root[thread + int64_t(offset[0]) * width + offset[1]]));
    weights[entry] = weight;
  }
}

// The diagonal of S makes up for the rounding of the other weights, so that constants keep their value.
template <typename T>
__global__ void diagonal(const T* __restrict__ weights, const double* __restrict__ root, int n, int height, int width,
                         int k_count, const int32_t* __restrict__ offsets, T* __restrict__ centre) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  const int y = int(p / width), x = int(p % width);
  double sum = 0;
  for (int k = 0; k < k_count; ++k) {
    const int dy = offsets[3 * k], dx = offsets[3 * k + 1];
    const int64_t d = int64_t(dy) * width + dx;
    const T* const plane = weights + (image * k_count + k) * size + p;
    if (y + dy < height && x + dx >= 0 && x + dx < width) sum += double(plane[0]) * root[thread + d];
    if (y - dy >= 0 && x - dx >= 0 && x - dx < width) sum += double(plane[-d]) * root[thread - d];
  }
  centre[thread] = T((root[thread] - sum) / root[thread]);
}

// before <- alpha S now - beta before and total += coefficient before; with total == nullptr only before <- S now.
// C maps at a time share each weight that is loaded; grid: pixels of all images by groups of C maps.
template <typename T, int C>
__global__ void walk_step(const T* __restrict__ weights, const T* __restrict__ centre, const T* __restrict__ now,
                          T* __restrict__ before, T* __restrict__ total, int n, int maps, int height, int width,
                          int k_count, const int32_t* __restrict__ offsets, T alpha, T beta, T coefficient) {
  const int64_t size = int64_t(height) * width, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= n * size) return;
  const int64_t image = thread / size, p = thread % size;
  const int y = int(p / width), x = int(p % width), first = blockIdx.y * C;
  const int64_t map = (image * maps + first) * size + p;
  T sum[C] = {};
  for (int k = 0; k < k_count; ++k) {
    const int dy = offsets[3 * k], dx = offsets[3 * k + 1];
    const int64_t d = int64_t(dy) * width + dx;
    const T* const plane = weights + (image * k_count + k) * size + p;
    const bool ahead = y + dy < height && x + dx >= 0 && x + dx < width;
    const bool behind = y - dy >= 0 && x - dx >= 0 && x - dx < width;
    const T w_ahead = ahead ? plane[0] : T(0), w_behind = behind ? plane[-d] : T(0);
#pragma unroll
    for (int c = 0; c < C; ++c)
      if (first + c < maps) {
        if (ahead) sum[c] = fma(w_ahead, now[map + c * size + d], sum[c]);
        if (behind) sum[c] = fma(w_behind, now[map + c * size - d], sum[c]);
      }
  }
#pragma unroll
  for (int c = 0; c < C; ++c)
    if (first + c < maps) {
      const int64_t i = map + c * size;
      T value = fma(centre[thread], now[i], sum[c]);
      if (total) {
        value = alpha * value - beta * before[i];
        total[i] = fma(coefficient, value, total[i]);
      }
      before[i] = value;
    }
}

// into <- from x D^1/2 or, inverse, from x D^-1/2
template <typename T>
__global__ void weigh(const T* __restrict__ from, const double* __restrict__ root, int64_t count, int64_t maps,
                      int64_t size, bool inverse, T* __restrict__ into) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const double r = root[i / (maps * size) * size + i % size];
  into[i] = T(inverse ? double(from[i]) / r : double(from[i]) * r);
}

template <typename T>
void walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, double power, int64_t steps,
          at::ArrayRef<double> coefficients, at::Tensor& result) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = x.size(0), maps = x.size(1), height = x.size(2), width = x.size(3), size = height * width;
  const int64_t k_count = affinity.size(1), pixels = n * size;
  const int whole = power == std::floor(power) && power <= 1024 ? int(power) : -1;
  const at::Tensor offsets = path_table(radius, width, x).offsets;
  const int32_t* const table = offsets.const_data_ptr<int32_t>();
  const at::Tensor root = at::empty({n, height, width}, x.options().dtype(at::kDouble));
  const at::Tensor weights = at::empty_like(affinity), centre = at::empty({n, height, width}, x.options());
  double* const root_data = root.mutable_data_ptr<double>();
  T* const weight_data = weights.mutable_data_ptr<T>();
  T* const centre_data = centre.mutable_data_ptr<T>();
  row_sums<T><<<blocks(pixels), kThreads, 0, stream>>>(affinity.const_data_ptr<T>(), n, height, width, k_count, table,
                                                       power, whole, root_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (k_count) {
    symmetric_weights<T><<<dim3(blocks(pixels), k_count), kThreads, 0, stream>>>(
        affinity.const_data_ptr<T>(), root_data, n, height, width, k_count, table, power, whole, weight_data);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  diagonal<T><<<blocks(pixels), kThreads, 0, stream>>>(weight_data, root_data, n, height, width, k_count, table,
                                                       centre_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  const bool series = !coefficients.empty();
  if (series) steps = int64_t(coefficients.size()) - 1;
  const at::Tensor even = at::empty_like(x), odd = at::zeros(x.sizes(), x.options());
  weigh<T><<<blocks(x.numel()), kThreads, 0, stream>>>(x.const_data_ptr<T>(), root_data, x.numel(), maps, size, false,
                                                       even.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  at::Tensor total;
  if (series) total = even.mul(coefficients[0]);
  T* const data[2] = {even.mutable_data_ptr<T>(), odd.mutable_data_ptr<T>()};
  constexpr int C = 4;
  for (int64_t k = 1; k <= steps; ++k) {
    const dim3 grid(blocks(pixels), (maps + C - 1) / C);
    walk_step<T, C><<<grid, kThreads, 0, stream>>>(
        weight_data, centre_data, data[(k - 1) % 2], data[k % 2], series ? total.mutable_data_ptr<T>() : nullptr, n,
        maps, height, width, k_count, table, T(k == 1 ? 1 : 2), T(k == 1 ? 0 : 1),
        series ? T(coefficients[k]) : T(0));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const at::Tensor& last = series ? total : steps % 2 ? odd : even;
  weigh<T><<<blocks(x.numel()), kThreads, 0, stream>>>(last.const_data_ptr<T>(), root_data, x.numel(), maps, size,
                                                       true, result.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor random_walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, double power, int64_t steps,
                       at::ArrayRef<double> coefficients) {
  wsid::check_walk(x, affinity, radius, steps);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), a = affinity.contiguous();
  at::Tensor result = at::empty_like(in);
  if (in.numel())
    AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "random_walk",
                               [&] { walk<scalar_t>(in, a, radius, power, steps, coefficients, result); });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) {
  m.impl("converge_centroids", &converge_centroids);
  m.impl("boundary_affinity", &boundary_affinity);
  m.impl("boundary_affinity_backward", &boundary_affinity_backward);
  m.impl("likeness", &likeness);
  m.impl("random_walk", &random_walk);
}
