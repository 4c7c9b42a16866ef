// Pairs of labelled pixels on CUDA; see pairs.h for what is computed. A thread goes through the offsets of one pixel.
#include "device.h"
#include "pairs.h"

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

  // The highest B on the path of offset k, and the way to the pixel that has it first.
  template <typename T>
  __device__ T highest(const T* boundary, int k, int& way) const {
    T best = boundary[0];
    way = 0;
    for (int i = pairs[k].path + 1; i < pairs[k + 1].path; ++i) {
      const int next = steps[i].dy * width + steps[i].dx;
      if (boundary[next] > best) best = boundary[next], way = next;
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
    int way;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, way);
    if (same)
      together -= log(affinity + T(wsid::kEps));
    else
      apart -= log(T(1 + wsid::kEps) - affinity);
  }
  T* const out = result + 2 * at.map * at.size + at.p;
  out[0] = together;
  out[at.size] = apart;
}

template <typename T>
__global__ void entropy_backward(Maps maps, const T* __restrict__ grad, const T* __restrict__ boundary,
                                 const T* __restrict__ labels, T* __restrict__ result) {
  const Pixel at(maps.n, maps.height, maps.width);
  if (!at.exists) return;
  const T* const label = labels + at.thread;
  const T* const given = grad + 2 * at.map * at.size + at.p;
  const T together = given[0], apart = given[at.size];
  for (int k = 0; k < maps.k_count; ++k) {
    const int to = maps.to(at, k);
    const bool same = to && label[0] == label[to];
    if (!same && !(to && differ(label[0], label[to]))) continue;
    int way;
    const T affinity = T(1) - maps.highest(boundary + at.thread, k, way);
    atomicAdd(result + at.thread + way,
              same ? together / (affinity + T(wsid::kEps)) : -apart / (T(1 + wsid::kEps) - affinity));
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
    launch(&::entropy_backward<T>, grid, grad, boundary, labels, result);
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
