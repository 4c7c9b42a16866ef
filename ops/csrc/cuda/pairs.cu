// Pairs of labelled pixels on CUDA; see ../pairs.h for what is computed. A thread goes through the offsets of one pixel.
#include <array>

#include "device.cuh"
#include "../pairs.h"

namespace {

using wsid::Pair;
using wsid::Pixel;
using wsid::Step;

struct Maps {
  int n, height, width, k_count;
  const Pair* pairs;
  const Step* steps;

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

template <typename T>
__global__ void count(Maps maps, const T* __restrict__ labels, int* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  int same = 0, different = 0;
  for (int k = 0; k < maps.k_count; ++k)
    if (const int to = maps.to(at, k)) {
      same += label[0] == label[to];
      different += differ(label[0], label[to]);
    }
  int* const out = result + 2 * at.map * at.size + at.p;
  out[0] = same;
  out[at.size] = different;
}

template <typename T>
__global__ void entropy(Maps maps, const T* __restrict__ boundary, const T* __restrict__ labels,
                        T* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  T together = T(0), apart = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    const bool same = to && label[0] == label[to];
    if (!same && !(to && differ(label[0], label[to]))) continue;
    int place;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, place);
    if (same)
      together -= log(affinity + T(wsid::kEps));
    else
      apart -= log(T(1 + wsid::kEps) - affinity);
  }
  T* const out = result + 2 * at.map * at.size + at.p;
  out[0] = together;
  out[at.size] = apart;
}

// The gradient for the highest B on the path of the pair that is `to` away, from those of its pixel's two sums.
template <typename T>
__device__ T slope(const T* label, int to, T affinity, const T* together, const T* apart) {
  return label[0] == label[to] ? *together / (affinity + T(wsid::kEps)) : -*apart / (T(1 + wsid::kEps) - affinity);
}

template <typename T>
__global__ void entropy_backward(Maps maps, const T* __restrict__ grad, const T* __restrict__ boundary,
                                 const T* __restrict__ labels, T* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  const T* const given = grad + 2 * at.map * at.size + at.p;
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    if (!to || !(label[0] == label[to] || differ(label[0], label[to]))) continue;
    int place;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, place);
    atomicAdd(result + at.thread + maps.way(k, place), slope(label, to, affinity, given, given + at.size));
  }
}

// Minus the same gradients, kept for gather_gradients with the places on the paths that they are for: of `count` offsets
// from `first` on.
template <typename T>
__global__ void entropy_slopes(Maps maps, int first, int count, const T* __restrict__ grad,
                               const T* __restrict__ boundary, const T* __restrict__ labels, T* __restrict__ slopes,
                               uint8_t* __restrict__ winner) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  const T* const given = grad + 2 * at.map * at.size + at.p;
  for (int k = 0; k < count; ++k) {
    const int to = maps.to(at, first + k);
    int place = 0;
    T value = T(0);
    if (to && (label[0] == label[to] || differ(label[0], label[to]))) {
      const T affinity = T(1) - maps.highest(boundary + at.thread, first + k, place);
      value = -slope(label, to, affinity, given, given + at.size);
    }
    const int64_t entry = (at.map * count + k) * at.size + at.p;
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
__global__ void error(Maps maps, const T* __restrict__ field, const T* __restrict__ labels, T* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  const T* const y = field + 2 * at.map * at.size + at.p;
  const T* const x = y + at.size;
  const bool thing = label[0] > T(0);
  T sum = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    if (to && label[0] == label[to])
      sum += abs(lack(y, to, maps.pairs[k].dy, thing)) + abs(lack(x, to, maps.pairs[k].dx, thing));
  }
  result[at.thread] = sum;
}

// A pixel gathers from the pairs that it begins and from those that it ends.
template <typename T>
__global__ void error_backward(Maps maps, const T* __restrict__ grad, const T* __restrict__ field,
                               const T* __restrict__ labels, T* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  const T* const y = field + 2 * at.map * at.size + at.p;
  const T* const x = y + at.size;
  const bool thing = label[0] > T(0);
  T sum_y = T(0), sum_x = T(0);
  for (int k = 0; k < maps.k_count; ++k) {
    const Pair d = maps.pairs[k];
    const int to = d.dy * maps.width + d.dx;
    if (d.inside(at.y, at.x, maps.height, maps.width) && label[0] == label[to]) {
      const T g = grad[at.thread];
      sum_y += g * sign(lack(y, to, d.dy, thing));
      sum_x += g * sign(lack(x, to, d.dx, thing));
    }
    if (at.y >= d.dy && at.x >= d.dx && at.x - d.dx < maps.width && label[0] == label[-to]) {
      const T g = grad[at.thread - to];
      sum_y -= g * sign(lack(y - to, to, d.dy, thing));
      sum_x -= g * sign(lack(x - to, to, d.dx, thing));
    }
  }
  T* const out = result + 2 * at.map * at.size + at.p;
  out[0] = sum_y;
  out[at.size] = sum_x;
}

template <typename T>
struct Cuda {
  template <typename... Parameters, typename... Arguments>
  static void launch(void (*kernel)(Maps, Parameters...), const wsid::Grid& grid, Arguments... arguments) {
    const wsid::Tables& table = wsid::tables(grid.radius, grid.device);
    const Maps maps{int(grid.n), int(grid.height), int(grid.width), table.count, table.pairs, table.steps};
    kernel<<<wsid::blocks(grid.n * grid.size()), wsid::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        maps, arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void counts(const T* labels, const wsid::Grid& grid, int* result) { launch(&::count<T>, grid, labels, result); }

  static void entropy(const T* boundary, const T* labels, const wsid::Grid& grid, T* result) {
    launch(&::entropy<T>, grid, boundary, labels, result);
  }

  static void entropy_backward(const T* grad, const T* boundary, const T* labels, const wsid::Grid& grid, T* result) {
    if (!wsid::deterministic()) return launch(&::entropy_backward<T>, grid, grad, boundary, labels, result);
    constexpr int together = 64;  // offsets: some that are kept, never those of all pairs
    const auto options = at::TensorOptions().device(grid.device);
    const std::array<int64_t, 4> shape = {grid.n, together, grid.height, grid.width};
    const at::Tensor slopes = at::empty(shape, options.dtype(c10::CppTypeToScalarType<T>::value));
    const at::Tensor winner = at::empty(shape, options.dtype(at::kByte));
    const wsid::Tables& table = wsid::tables(grid.radius, grid.device);
    for (int first = 0; first < table.count; first += together) {
      const int count = std::min(together, table.count - first);
      launch(&entropy_slopes<T>, grid, first, count, grad, boundary, labels, slopes.template mutable_data_ptr<T>(),
             winner.mutable_data_ptr<uint8_t>());
      wsid::gather_gradients<T>
          <<<wsid::blocks(grid.n * grid.size()), wsid::kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              slopes.template const_data_ptr<T>(), winner.const_data_ptr<uint8_t>(), int(grid.n), int(grid.height),
              int(grid.width), first, count, table.pairs, table.steps, result);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  static void error(const T* field, const T* labels, const wsid::Grid& grid, T* result) {
    launch(&::error<T>, grid, field, labels, result);
  }

  static void error_backward(const T* grad, const T* field, const T* labels, const wsid::Grid& grid, T* result) {
    launch(&::error_backward<T>, grid, grad, field, labels, result);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { wsid::PairOperators<Cuda>::implement(m); }
