// The random walk on CUDA; see ../cpu/walk.cpp for what it computes.
//
// A step is a stencil with different weights at every pixel. The values of C maps are interleaved, so that one aligned
// load fetches all of a neighbour's values. The weights of both directions of a pair are stored, 4 of a pixel per load:
// twice the memory, but every read is coalesced. On the grids of the networks a step takes less time than its launch:
// all steps are then one kernel, whose blocks wait for each other. On other grids each step is a kernel.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "../checks.h"
#include "device.cuh"
#include "walk_terms.cuh"

namespace {

using wsid::blocks;
using wsid::launch;
using wsid::Pack;
using wsid::Pair;
using wsid::Pixel;

// Tile of pixels computed by a block.
constexpr int kColumns = 32, kRows = 4, kTile = kColumns * kRows;

// Memory layout of the maps: rows of `stride` packs of which the first `width` are pixels and the rest zeros, with
// `guard` zeros before the first row and after the last.
struct Layout {
  int height, width, maps, groups;  // groups: of C maps each
  int64_t stride, guard, plane;

  __device__ int64_t at(int64_t group, int y, int x) const { return group * plane + guard + y * stride + x; }

  // Index of one map's value in packs of C; p is a pixel of [N, maps, H, W].
  template <int C>
  __device__ int64_t value(const Pixel& p) const {
    const int64_t image = p.map / maps, map = p.map % maps;
    return at(image * groups + map / C, p.y, p.x) * C + map % C;
  }
};

// ---- weights of the symmetric matrix S = D^-1/2 H^power D^-1/2 ----

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
__global__ void row_sums_kernel(const T* __restrict__ affinity,  // [N, K, H, W]
                                int n, int height, int width, int k_count,
                                const Pair* __restrict__ pairs,  // [K + 1]
                                double power, int whole,
                                double* __restrict__ root) {  // [N, H, W]
  const Pixel at(n, height, width);
  if (!at.exists) return;
  const T* plane = affinity + at.map * k_count * at.size + at.p;
  double sum = 1;
  for (int k = 0; k < k_count; ++k, plane += at.size) {
    const int dy = pairs[k].dy, dx = pairs[k].dx;
    if (pairs[k].inside(at.y, at.x, height, width)) sum += double(T(raised(plane[0], power, whole)));
    if (at.y >= dy && at.x >= dx && at.x - dx < width)
      sum += double(T(raised(plane[-(dy * width + dx)], power, whole)));
  }
  root[at.thread] = sqrt(sum);
}

// Weights of the pairs 2 g and 2 g + 1, to p + d and to p - d; K is even, as a disc is symmetric under quarter turns.
// The diagonal of S absorbs the rounding of the other weights, so that constant maps stay constant.
template <typename T>
__global__ void symmetric_weights_kernel(const T* __restrict__ affinity,   // [N, K, H, W]
                                         const double* __restrict__ root,  // [N, H, W]
                                         int n, int height, int width, int k_count,
                                         const Pair* __restrict__ pairs,  // [K + 1]
                                         double power, int whole,
                                         Pack<T, 4>* __restrict__ weights,  // [N, K / 2, H, W] x 4
                                         T* __restrict__ centre) {          // [N, H, W]
  const Pixel at(n, height, width);
  if (!at.exists) return;
  const T* plane = affinity + at.map * k_count * at.size + at.p;
  Pack<T, 4>* packed = weights + at.entry(k_count / 2);
  const double* const here = root + at.thread;
  double sum = 0;
  for (int k = 0; k < k_count; packed += at.size) {
    Pack<T, 4> w = {};
#pragma unroll
    for (int i = 0; i < 4; i += 2, ++k, plane += at.size) {
      const int dy = pairs[k].dy, dx = pairs[k].dx;
      const auto weigh = [&](T value, int d) {
        const T weight = T(double(T(raised(value, power, whole))) / (here[0] * here[d]));
        sum += double(weight) * here[d];
        return weight;
      };
      const bool ahead = pairs[k].inside(at.y, at.x, height, width);
      const bool behind = at.y >= dy && at.x >= dx && at.x - dx < width;
      if (ahead) w.v[i] = weigh(plane[0], dy * width + dx);
      if (behind) w.v[i + 1] = weigh(plane[-(dy * width + dx)], -(dy * width + dx));
    }
    *packed = w;
  }
  centre[at.thread] = T((here[0] - sum) / here[0]);
}

// ---- steps ----

// before <- alpha S now - beta before and, with a total, total += coefficient before. `before` is not read for beta 0.
// One block computes a tile of one group of maps.
template <typename T, int C>
__global__ void __launch_bounds__(kTile)
    walk_step_kernel(const Pack<T, 4>* __restrict__ weights,  // [N, K / 2, H, W] x 4
                     const T* __restrict__ centre,            // [N, H, W]
                     const Pack<T, C>* __restrict__ now,      // [N, groups, plane] x C
                     Pack<T, C>* __restrict__ before,         // [N, groups, plane] x C
                     Pack<T, C>* __restrict__ total,          // [N, groups, plane] x C or nullptr
                     Layout layout, int k_count,
                     const Pair* __restrict__ pairs,  // [K + 1]
                     T alpha, T beta, T coefficient) {
  const unsigned across = (layout.width + kColumns - 1) / kColumns, down = (layout.height + kRows - 1) / kRows;
  const unsigned group = blockIdx.x / across / down;
  const int y = int(blockIdx.x / across % down) * kRows + int(threadIdx.x / kColumns);
  const int x = int(blockIdx.x % across) * kColumns + int(threadIdx.x % kColumns);
  if (y >= layout.height || x >= layout.width) return;
  const int64_t size = int64_t(layout.height) * layout.width, image = group / layout.groups;
  const int64_t p = int64_t(y) * layout.width + x, i = layout.at(group, y, x), stride = layout.stride;
  const Pack<T, 4>* w = weights + image * (k_count / 2) * size + p;
  const Pack<T, C>* const here = now + i;
  Pack<T, C> sum = {}, behind = {};  // two partial sums: one long sum rounds more
  const auto add = [](T weight, Pack<T, C> value, Pack<T, C>& to) {
#pragma unroll
    for (int c = 0; c < C; ++c) to.v[c] = fma(weight, value.v[c], to.v[c]);
  };
#pragma unroll 4
  for (int k = 0; k < k_count; k += 2, w += size) {
    const Pack<T, 4> four = *w;
    const int64_t one = pairs[k].dy * stride + pairs[k].dx, two = pairs[k + 1].dy * stride + pairs[k + 1].dx;
    add(four.v[0], here[one], sum);
    add(four.v[1], here[-one], behind);
    add(four.v[2], here[two], sum);
    add(four.v[3], here[-two], behind);
  }
  // The diagonal, often close to 1, is added last: small terms added to it one by one would be lost.
  add(T(1), behind, sum);
  add(centre[image * size + p], *here, sum);
  const Pack<T, C> last = beta != T(0) ? before[i] : Pack<T, C>{};
#pragma unroll
  for (int c = 0; c < C; ++c) sum.v[c] = alpha * sum.v[c] - beta * last.v[c];
  before[i] = sum;
  if (total) {
    Pack<T, C> with_it = total[i];
    add(coefficient, sum, with_it);
    total[i] = with_it;
  }
}

// now <- x D^1/2, total <- coefficient now
template <typename T, int C>
__global__ void arrange_kernel(const T* __restrict__ x,          // [N, maps, H, W]
                               const double* __restrict__ root,  // [N, H, W]
                               int64_t n, Layout layout, T coefficient,
                               T* __restrict__ now,      // [N, groups, plane, C]
                               T* __restrict__ total) {  // [N, groups, plane, C] or nullptr
  const Pixel at(n * layout.maps, layout.height, layout.width);
  if (!at.exists) return;
  const int64_t i = layout.value<C>(at);
  now[i] = T(double(x[at.thread]) * root[at.map / layout.maps * at.size + at.p]);
  if (total) total[i] = coefficient * now[i];
}

// result <- last D^-1/2
template <typename T, int C>
__global__ void collect_kernel(const T* __restrict__ last,       // [N, groups, plane, C]
                               const double* __restrict__ root,  // [N, H, W]
                               int64_t n, Layout layout,
                               T* __restrict__ result) {  // [N, maps, H, W]
  const Pixel at(n * layout.maps, layout.height, layout.width);
  if (!at.exists) return;
  result[at.thread] = T(double(last[layout.value<C>(at)]) / root[at.map / layout.maps * at.size + at.p]);
}

template <typename T, int C>
void walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, double power, int64_t steps,
          at::ArrayRef<double> coefficients, at::Tensor& result) {
  const int64_t n = x.size(0), maps = x.size(1), height = x.size(2), width = x.size(3);
  const int64_t k_count = affinity.size(1), pixels = n * height * width;
  const int whole = power == std::floor(power) && power <= 1024 ? int(power) : -1;
  const Pair* const pairs = wsid::tables(radius, x.device()).pairs;

  const at::Tensor root = at::empty({pixels}, x.options().dtype(at::kDouble));
  const at::Tensor packed = at::empty({2 * affinity.numel()}, x.options()), centre = at::empty({pixels}, x.options());
  double* const root_data = root.mutable_data_ptr<double>();
  auto* const weights = reinterpret_cast<Pack<T, 4>*>(packed.mutable_data_ptr<T>());
  T* const centre_data = centre.mutable_data_ptr<T>();
  launch(row_sums_kernel<T>, blocks(pixels), affinity.const_data_ptr<T>(), n, height, width, k_count, pairs, power,
         whole, root_data);
  launch(symmetric_weights_kernel<T>, blocks(pixels), affinity.const_data_ptr<T>(), root_data, n, height, width,
         k_count, pairs, power, whole, weights, centre_data);

  const bool series = !coefficients.empty();
  if (series) steps = int64_t(coefficients.size()) - 1;
  if (wsid::walk_in_one_launch<T, C>(x, weights, centre_data, root_data, radius, steps, coefficients, result)) return;

  Layout layout = {int(height), int(width), int(maps), int((maps + C - 1) / C)};
  layout.stride = width + radius - 1;
  layout.guard = (radius - 1) * (layout.stride + 1);
  layout.plane = height * layout.stride + 2 * layout.guard;
  const int64_t values = n * layout.groups * layout.plane * C;
  const at::Tensor both = at::zeros({2, values}, x.options());
  const at::Tensor total = at::empty({series ? values : 0}, x.options());
  T* const data[2] = {both.mutable_data_ptr<T>(), both.mutable_data_ptr<T>() + values};
  T* const total_data = series ? total.mutable_data_ptr<T>() : nullptr;
  launch(arrange_kernel<T, C>, blocks(x.numel()), x.const_data_ptr<T>(), root_data, n, layout,
         series ? T(coefficients[0]) : T(0), data[0], total_data);
  const dim3 grid((width + kColumns - 1) / kColumns * ((height + kRows - 1) / kRows) * n * layout.groups);
  for (int64_t k = 1; k <= steps; ++k) {
    T* const sum = series && coefficients[k] != 0 ? total_data : nullptr;
    walk_step_kernel<T, C><<<grid, kTile, 0, c10::cuda::getCurrentCUDAStream()>>>(
        weights, centre_data, reinterpret_cast<const Pack<T, C>*>(data[(k - 1) % 2]),
        reinterpret_cast<Pack<T, C>*>(data[k % 2]), reinterpret_cast<Pack<T, C>*>(sum), layout, int(k_count), pairs,
        T(k == 1 || !series ? 1 : 2), T(k == 1 || !series ? 0 : 1), series ? T(coefficients[k]) : T(0));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  launch(collect_kernel<T, C>, blocks(x.numel()), series ? total_data : data[steps % 2], root_data, n, layout,
         result.mutable_data_ptr<T>());
}

at::Tensor random_walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, double power, int64_t steps,
                       at::ArrayRef<double> coefficients) {
  wsid::check_walk(x, affinity, radius, steps);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor in = x.contiguous(), a = affinity.contiguous();
  at::Tensor result = at::empty_like(in);
  if (!in.numel()) return result;
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "random_walk", [&] {
    const auto run = in.size(1) == 1 ? walk<scalar_t, 1> : in.size(1) == 2 ? walk<scalar_t, 2> : walk<scalar_t, 4>;
    run(in, a, radius, power, steps, coefficients, result);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { m.impl("random_walk", &random_walk); }
