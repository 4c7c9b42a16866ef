// Pairs of labelled pixels on CUDA; see ../pairs.h for what is computed. A thread goes through the offsets of one
// pixel.
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

  // The way from a pixel to its partner in offset k, or 0 where that lies outside.
  __device__ int to(const Pixel& at, int k) const {
    return pairs[k].inside(at.y, at.x, height, width) ? pairs[k].dy * width + pairs[k].dx : 0;
  }

  // The way from a pixel to a place on its path of offset k.
  __device__ int way(int k, int place) const {
    const Step step = steps[pairs[k].path + place];
    return step.dy * width + step.dx;
  }

  // The highest B on the path of offset k, and the first place on it that has it.
  template <typename T>
  __device__ T highest(const T* boundary, int k, int& place) const {
    T best = boundary[0];
    place = 0;
    for (int i = 1; i < pairs[k + 1].path - pairs[k].path; ++i) {
      const T next = boundary[way(k, i)];
      if (next > best) best = next, place = i;
    }
    return best;
  }
};

template <typename T>
__device__ bool differ(T a, T b) {  // not where one of them is NaN
  return a < b || a > b;
}

template <typename T>
__device__ T sign(T value) {
  return T(value > T(0)) - T(value < T(0));
}

// The pixel of this thread, and its label, from which those of its partners are as far as they are themselves.
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
    if (const int to = maps.to(at, k)) {
      same += at.label[0] == at.label[to];
      different += differ(at.label[0], at.label[to]);
    }
  int* const out = result + at.entry(2);
  out[0] = same;
  out[at.size] = different;
}

template <typename T>
__global__ void entropy_kernel(Maps maps,
                               const T* __restrict__ boundary,  // [N, H, W]
                               const T* __restrict__ labels,    // [N, H, W]
                               T* __restrict__ result) {        // [N, 2, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  T together = T(0), apart = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    const bool same = to && at.label[0] == at.label[to];
    if (!same && !(to && differ(at.label[0], at.label[to]))) continue;
    int place;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, place);
    if (same)
      together -= log(affinity + T(wsid::kEps));
    else
      apart -= log(T(1 + wsid::kEps) - affinity);
  }
  T* const out = result + at.entry(2);
  out[0] = together;
  out[at.size] = apart;
}

// The gradient for the highest B on the path of the pair that is `to` away, from those of its pixel's two sums.
template <typename T>
__device__ T slope(const T* label, int to, T affinity, const T* together, const T* apart) {
  return label[0] == label[to] ? *together / (affinity + T(wsid::kEps)) : -*apart / (T(1 + wsid::kEps) - affinity);
}

template <typename T>
__global__ void entropy_backward_kernel(Maps maps,
                                        const T* __restrict__ grad,      // [N, 2, H, W]
                                        const T* __restrict__ boundary,  // [N, H, W]
                                        const T* __restrict__ labels,    // [N, H, W]
                                        T* __restrict__ result) {        // [N, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const given = grad + at.entry(2);
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    if (!to || !(at.label[0] == at.label[to] || differ(at.label[0], at.label[to]))) continue;
    int place;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, place);
    atomicAdd(result + at.thread + maps.way(k, place), slope(at.label, to, affinity, given, given + at.size));
  }
}

// Minus the same gradients, kept for gather_gradients_kernel with the places on the paths that they are for: of `count`
// offsets from `first` on.
template <typename T>
__global__ void entropy_slopes_kernel(Maps maps, int first, int count,
                                      const T* __restrict__ grad,      // [N, 2, H, W]
                                      const T* __restrict__ boundary,  // [N, H, W]
                                      const T* __restrict__ labels,    // [N, H, W]
                                      T* __restrict__ slopes,          // [N, count, H, W]
                                      uint8_t* __restrict__ winner) {  // [N, count, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const given = grad + at.entry(2);
  for (int k = 0; k < count; ++k) {
    const int to = maps.to(at, first + k);
    int place = 0;
    T value = T(0);
    if (to && (at.label[0] == at.label[to] || differ(at.label[0], at.label[to]))) {
      const T affinity = T(1) - maps.highest(boundary + at.thread, first + k, place);
      value = -slope(at.label, to, affinity, given, given + at.size);
    }
    const int64_t entry = at.entry(count, k);
    slopes[entry] = value;
    winner[entry] = uint8_t(place);
  }
}

// One component of V(p) - V(q) - (q - p) in things, of V(p) - V(q) in the background; q = p + to, d away.
template <typename T>
__device__ T lack(const T* field, int to, int d, bool thing) {
  return field[0] - field[to] - T(thing ? d : 0);
}

template <typename T>
__global__ void error_kernel(Maps maps,
                             const T* __restrict__ field,   // [N, 2, H, W]
                             const T* __restrict__ labels,  // [N, H, W]
                             T* __restrict__ result) {      // [N, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const y = field + at.entry(2);
  const T* const x = y + at.size;
  const bool thing = at.label[0] > T(0);
  T sum = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    if (to && at.label[0] == at.label[to])
      sum += abs(lack(y, to, maps.pairs[k].dy, thing)) + abs(lack(x, to, maps.pairs[k].dx, thing));
  }
  result[at.thread] = sum;
}

// A pixel gathers from the pairs that it begins and from those that it ends.
template <typename T>
__global__ void error_backward_kernel(Maps maps,
                                      const T* __restrict__ grad,    // [N, H, W]
                                      const T* __restrict__ field,   // [N, 2, H, W]
                                      const T* __restrict__ labels,  // [N, H, W]
                                      T* __restrict__ result) {      // [N, 2, H, W]
  const LabelledPixel<T> at(maps, labels);
  if (!at.exists) return;
  const T* const y = field + at.entry(2);
  const T* const x = y + at.size;
  const bool thing = at.label[0] > T(0);
  T sum_y = T(0), sum_x = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const Pair d = maps.pairs[k];
    const int to = d.dy * maps.width + d.dx;
    if (d.inside(at.y, at.x, maps.height, maps.width) && at.label[0] == at.label[to]) {
      const T g = grad[at.thread];
      sum_y += g * sign(lack(y, to, d.dy, thing));
      sum_x += g * sign(lack(x, to, d.dx, thing));
    }
    if (at.y >= d.dy && at.x >= d.dx && at.x - d.dx < maps.width && at.label[0] == at.label[-to]) {
      const T g = grad[at.thread - to];
      sum_y -= g * sign(lack(y - to, to, d.dy, thing));
      sum_x -= g * sign(lack(x - to, to, d.dx, thing));
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

  static void entropy(const T* boundary, const T* labels, const wsid::Grid& grid, T* result) {
    launch(entropy_kernel<T>, blocks(grid), Maps(grid), boundary, labels, result);
  }

  static void entropy_backward(const T* grad, const T* boundary, const T* labels, const wsid::Grid& grid, T* result) {
    const Maps maps(grid);
    if (!wsid::deterministic()) {
      launch(entropy_backward_kernel<T>, blocks(grid), maps, grad, boundary, labels, result);
      return;
    }
    constexpr int together = 64;  // offsets: some that are kept, never those of all pairs
    const auto options = at::TensorOptions().device(grid.device);
    const std::array<int64_t, 4> shape = {grid.n, together, grid.height, grid.width};
    const at::Tensor slopes = at::empty(shape, options.dtype(c10::CppTypeToScalarType<T>::value));
    const at::Tensor winner = at::empty(shape, options.dtype(at::kByte));
    for (int first = 0; first < maps.k_count; first += together) {
      const int count = std::min(together, maps.k_count - first);
      launch(entropy_slopes_kernel<T>, blocks(grid), maps, first, count, grad, boundary, labels,
             slopes.template mutable_data_ptr<T>(), winner.mutable_data_ptr<uint8_t>());
      launch(wsid::gather_gradients_kernel<T>, blocks(grid), slopes.template const_data_ptr<T>(),
             winner.const_data_ptr<uint8_t>(), maps.n, maps.height, maps.width, first, count, maps.pairs, maps.steps,
             result);
    }
  }

  static void error(const T* field, const T* labels, const wsid::Grid& grid, T* result) {
    launch(error_kernel<T>, blocks(grid), Maps(grid), field, labels, result);
  }

  static void error_backward(const T* grad, const T* field, const T* labels, const wsid::Grid& grid, T* result) {
    launch(error_backward_kernel<T>, blocks(grid), Maps(grid), grad, field, labels, result);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { wsid::PairOperators<Cuda>::implement(m); }
