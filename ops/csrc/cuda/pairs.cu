// Pairs of labelled pixels on CUDA; see ../pairs.h for what is computed. One thread handles all offsets of one pixel.
#include <array>

#include "../pairs.h"
#include "device.cuh"

namespace {

using wsid::launch;
using wsid::Pair;
using wsid::Pixel;
using wsid::Step;

struct Maps {
  int n, height, width, k_count;
  const Pair* pairs;  // [K + 1]
  const Step* steps;  // [S]

  explicit Maps(const wsid::Grid& grid) : n(grid.n), height(grid.height), width(grid.width) {
    const wsid::Tables& table = wsid::tables(grid.radius, grid.device);
    k_count = table.count, pairs = table.pairs, steps = table.steps;
  }

  // Index step from a pixel to its partner of offset k; 0 where that lies outside the image.
  __device__ int partner(const Pixel& at, int k) const {
    return pairs[k].inside(at.y, at.x, height, width) ? pairs[k].dy * width + pairs[k].dx : 0;
  }

  // Index step from a pixel to a position on its path of offset k.
  __device__ int path_step(int k, int position) const {
    const Step step = steps[pairs[k].path + position];
    return step.dy * width + step.dx;
  }

  // The maximum of B on the path of offset k, and the first position on the path that has it.
  template <typename T>
  __device__ T path_max(const T* boundary, int k, int& position) const {
    T best = boundary[0];
    position = 0;
    for (int i = 1; i < pairs[k + 1].path - pairs[k].path; ++i) {
      const T next = boundary[path_step(k, i)];
      if (next > best) best = next, position = i;
    }
    return best;
  }
};

template <typename T>
__device__ bool differ(T a, T b) {  // false where one of them is NaN
  return a < b || a > b;
}

template <typename T>
__device__ T sign(T value) {
  return T(value > T(0)) - T(value < T(0));
}

// The pixel of this thread and a pointer to its label; label[partner] is the label of a partner.
template <typename T>
struct LabelledPixel : wsid::Pixel {
  const T* label;

  __device__ LabelledPixel(const Maps& maps, const T* labels)
      : Pixel(maps.n, maps.height, maps.width), label(labels + thread) {}
};

template <typename T>
__global__ void count_kernel(Maps maps,
                             const T* __restrict__ labels,  // [N, H, W]
                             int* __restrict__ result) {    // [N, 2, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  int same = 0, different = 0;
  for (int k = 0; k < maps.k_count; ++k)
    if (const int partner = maps.partner(at, k)) {
      same += at.label[0] == at.label[partner];
      different += differ(at.label[0], at.label[partner]);
    }
  int* const out = result + at.entry(2);
  out[0] = same;
  out[at.size] = different;
}

template <typename T>
__global__ void boundary_loss_kernel(Maps maps,
                                     const T* __restrict__ boundary,  // [N, H, W]
                                     const T* __restrict__ labels,    // [N, H, W]
                                     T* __restrict__ result) {        // [N, 2, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  T same_sum = T(0), different_sum = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int partner = maps.partner(at, k);
    const bool same = partner && at.label[0] == at.label[partner];
    if (!same && !(partner && differ(at.label[0], at.label[partner]))) continue;
    int position;
    const T affinity = T(1) - maps.path_max(boundary + at.thread, k, position);
    if (same)
      same_sum -= log(affinity + T(wsid::kEps));
    else
      different_sum -= log(T(1 + wsid::kEps) - affinity);
  }
  T* const out = result + at.entry(2);
  out[0] = same_sum;
  out[at.size] = different_sum;
}

// The gradient of the maximum of B on the path to a partner, from the gradients of the two sums of the pixel.
template <typename T>
__device__ T slope(const T* label, int partner, T affinity, const T* grad_same, const T* grad_different) {
  return label[0] == label[partner] ? *grad_same / (affinity + T(wsid::kEps))
                                    : -*grad_different / (T(1 + wsid::kEps) - affinity);
}

template <typename T>
__global__ void boundary_loss_backward_kernel(Maps maps,
                                              const T* __restrict__ grad,      // [N, 2, H, W]
                                              const T* __restrict__ boundary,  // [N, H, W]
                                              const T* __restrict__ labels,    // [N, H, W]
                                              T* __restrict__ result) {        // [N, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const grad_same = grad + at.entry(2);
  for (int k = 0; k < maps.k_count; ++k) {
    const int partner = maps.partner(at, k);
    if (!partner || !(at.label[0] == at.label[partner] || differ(at.label[0], at.label[partner]))) continue;
    int position;
    const T affinity = T(1) - maps.path_max(boundary + at.thread, k, position);
    atomicAdd(result + at.thread + maps.path_step(k, position),
              slope(at.label, partner, affinity, grad_same, grad_same + at.size));
  }
}

// Minus the same gradients and their positions on the paths, for gather_gradients_kernel: `count` offsets from `first`
// on.
template <typename T>
__global__ void boundary_slopes_kernel(Maps maps, int first, int count,
                                       const T* __restrict__ grad,      // [N, 2, H, W]
                                       const T* __restrict__ boundary,  // [N, H, W]
                                       const T* __restrict__ labels,    // [N, H, W]
                                       T* __restrict__ slopes,          // [N, count, H, W]
                                       uint8_t* __restrict__ winner) {  // [N, count, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const grad_same = grad + at.entry(2);
  for (int k = 0; k < count; ++k) {
    const int partner = maps.partner(at, first + k);
    int position = 0;
    T value = T(0);
    if (partner && (at.label[0] == at.label[partner] || differ(at.label[0], at.label[partner]))) {
      const T affinity = T(1) - maps.path_max(boundary + at.thread, first + k, position);
      value = -slope(at.label, partner, affinity, grad_same, grad_same + at.size);
    }
    const int64_t entry = at.entry(count, k);
    slopes[entry] = value;
    winner[entry] = uint8_t(position);
  }
}

// One component of V(p) - V(q) - (q - p) in the foreground, of V(p) - V(q) in the background; q = p + partner, and d is
// that component of q - p.
template <typename T>
__device__ T displacement_error(const T* field, int partner, int d, bool foreground) {
  return field[0] - field[partner] - T(foreground ? d : 0);
}

template <typename T>
__global__ void displacement_loss_kernel(Maps maps,
                                         const T* __restrict__ field,   // [N, 2, H, W]
                                         const T* __restrict__ labels,  // [N, H, W]
                                         T* __restrict__ result) {      // [N, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const y = field + at.entry(2);
  const T* const x = y + at.size;
  const bool foreground = at.label[0] > T(0);
  T sum = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int partner = maps.partner(at, k);
    if (partner && at.label[0] == at.label[partner])
      sum += abs(displacement_error(y, partner, maps.pairs[k].dy, foreground)) +
             abs(displacement_error(x, partner, maps.pairs[k].dx, foreground));
  }
  result[at.thread] = sum;
}

// Each pixel sums over the pairs of which it is the first pixel and those of which it is the second.
template <typename T>
__global__ void displacement_loss_backward_kernel(Maps maps,
                                                  const T* __restrict__ grad,    // [N, H, W]
                                                  const T* __restrict__ field,   // [N, 2, H, W]
                                                  const T* __restrict__ labels,  // [N, H, W]
                                                  T* __restrict__ result) {      // [N, 2, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const y = field + at.entry(2);
  const T* const x = y + at.size;
  const bool foreground = at.label[0] > T(0);
  T sum_y = T(0), sum_x = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const Pair d = maps.pairs[k];
    const int partner = d.dy * maps.width + d.dx;
    if (d.inside(at.y, at.x, maps.height, maps.width) && at.label[0] == at.label[partner]) {
      const T g = grad[at.thread];
      sum_y += g * sign(displacement_error(y, partner, d.dy, foreground));
      sum_x += g * sign(displacement_error(x, partner, d.dx, foreground));
    }
    if (at.y >= d.dy && at.x >= d.dx && at.x - d.dx < maps.width && at.label[0] == at.label[-partner]) {
      const T g = grad[at.thread - partner];
      sum_y -= g * sign(displacement_error(y - partner, partner, d.dy, foreground));
      sum_x -= g * sign(displacement_error(x - partner, partner, d.dx, foreground));
    }
  }
  T* const out = result + at.entry(2);
  out[0] = sum_y;
  out[at.size] = sum_x;
}

template <typename T>
struct Cuda {
  static unsigned blocks(const wsid::Grid& grid) { return wsid::blocks(grid.n * grid.size()); }

  static void counts(const T* labels, const wsid::Grid& grid, int* result) {
    launch(count_kernel<T>, blocks(grid), Maps(grid), labels, result);
  }

  static void boundary_loss(const T* boundary, const T* labels, const wsid::Grid& grid, T* result) {
    launch(boundary_loss_kernel<T>, blocks(grid), Maps(grid), boundary, labels, result);
  }

  static void boundary_loss_backward(const T* grad, const T* boundary, const T* labels, const wsid::Grid& grid,
                                     T* result) {
    const Maps maps(grid);
    if (!wsid::deterministic()) {
      launch(boundary_loss_backward_kernel<T>, blocks(grid), maps, grad, boundary, labels, result);
      return;
    }
    constexpr int chunk = 64;  // offsets whose gradients are stored at a time
    const auto options = at::TensorOptions().device(grid.device);
    const std::array<int64_t, 4> shape = {grid.n, chunk, grid.height, grid.width};
    const at::Tensor slopes = at::empty(shape, options.dtype(c10::CppTypeToScalarType<T>::value));
    const at::Tensor winner = at::empty(shape, options.dtype(at::kByte));
    for (int first = 0; first < maps.k_count; first += chunk) {
      const int count = std::min(chunk, maps.k_count - first);
      launch(boundary_slopes_kernel<T>, blocks(grid), maps, first, count, grad, boundary, labels,
             slopes.template mutable_data_ptr<T>(), winner.mutable_data_ptr<uint8_t>());
      launch(wsid::gather_gradients_kernel<T>, blocks(grid), slopes.template const_data_ptr<T>(),
             winner.const_data_ptr<uint8_t>(), maps.n, maps.height, maps.width, first, count, maps.pairs, maps.steps,
             result);
    }
  }

  static void displacement_loss(const T* field, const T* labels, const wsid::Grid& grid, T* result) {
    launch(displacement_loss_kernel<T>, blocks(grid), Maps(grid), field, labels, result);
  }

  static void displacement_loss_backward(const T* grad, const T* field, const T* labels, const wsid::Grid& grid,
                                         T* result) {
    launch(displacement_loss_backward_kernel<T>, blocks(grid), Maps(grid), grad, field, labels, result);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { wsid::PairOperators<Cuda>::implement(m); }
