// Common to the CUDA operators: the pixel of a thread, and the tables of pairs and paths on the device.
//
// One thread computes one pixel. Threads of a warp lie side by side in a row, so every load and store is coalesced.
// Compile with -fmad=false; products and sums are fused only by explicit fma().
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../paths.h"

namespace wsid {

constexpr int kThreads = 256;

inline unsigned blocks(int64_t work) { return unsigned((work + kThreads - 1) / kThreads); }

// The pixel of this thread among those of n maps, one map after another. A map has at most 2^30 pixels, all maps may
// have more than 2^32; a 64-bit division is slow and rarely needed.
struct Pixel {
  int64_t size, thread, map;
  int p, y, x;
  bool exists;

  __device__ Pixel(int64_t n, int height, int width)
      : size(int64_t(height) * width), thread(int64_t(blockIdx.x) * kThreads + threadIdx.x) {
    exists = thread < n * size;
    map = n * size >> 31 ? thread / size : uint32_t(thread) / uint32_t(size);
    p = int(thread - map * size);
    y = int(uint32_t(p) / uint32_t(width));
    x = p - y * width;
  }

  // Index of this pixel's value in [N, channels, H, W].
  __device__ int64_t entry(int64_t channels, int64_t channel = 0) const {
    return (map * channels + channel) * size + p;
  }
};

// Launches a kernel on the current stream with kThreads threads per block.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
  kernel<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct alignas(4) Step {
  int16_t dy, dx;
};

// The table has one more entry than there are offsets: the end of the last path.
struct Pair {
  int32_t dy, dx, path;  // path: index of its first step in the table of steps

  __device__ bool inside(int y, int x, int height, int width) const {
    return y + dy < height && x + dx >= 0 && x + dx < width;
  }
};

// result -= the gradients of the entries whose path has its maximum at this pixel, for `count` offsets from `first` on.
// Each pixel sums them in a fixed order, so that repeated runs are equal bit by bit, as
// torch.use_deterministic_algorithms requires; atomicAdd is faster, but sums in any order.
template <typename T>
__global__ void gather_gradients_kernel(const T* __restrict__ grad,          // [N, count, H, W]
                                        const uint8_t* __restrict__ winner,  // [N, count, H, W]
                                        int n, int height, int width, int first, int count,
                                        const Pair* __restrict__ pairs,  // [K + 1]
                                        const Step* __restrict__ steps,  // [S]
                                        T* __restrict__ result) {        // [N, H, W]
  const Pixel at(n, height, width);
  if (!at.exists) return;
  T sum = result[at.thread];
  for (int k = 0; k < count; ++k) {
    const Pair d = pairs[first + k];
    const int64_t plane = (at.map * count + k) * at.size;
    for (int i = d.path; i < pairs[first + k + 1].path; ++i) {
      // The first pixel of the pair whose path has this pixel at position i.
      const int y = at.y - steps[i].dy, x = at.x - steps[i].dx;
      if (y < 0 || x < 0 || x >= width || !d.inside(y, x, height, width)) continue;
      const int64_t entry = plane + int64_t(y) * width + x;
      if (winner[entry] == i - d.path) sum -= grad[entry];
    }
  }
  result[at.thread] = sum;
}

inline bool deterministic() { return at::globalContext().deterministicAlgorithms(); }

struct Tables {
  int count;  // number of offsets
  at::Tensor pair_data, step_data;
  const Pair* pairs;  // [count + 1]
  const Step* steps;  // [S], all paths one after another
};

template <typename Entry>
const Entry* to_device(const std::vector<Entry>& table, c10::Device device, at::Tensor& storage) {
  const at::Tensor host = at::empty({int64_t(table.size() * sizeof(Entry))}, at::TensorOptions().dtype(at::kByte));
  if (!table.empty()) std::copy(table.begin(), table.end(), reinterpret_cast<Entry*>(host.mutable_data_ptr<uint8_t>()));
  storage = host.to(device);
  return reinterpret_cast<const Entry*>(storage.const_data_ptr<uint8_t>());
}

// Copied once per device and radius; the copy is complete on return, so any stream may read it. Never freed: at process
// exit the device may be shut down before static objects are destroyed.
inline const Tables& tables(int64_t radius, c10::Device device) {
  static std::mutex mutex;
  static auto& cache = *new std::map<std::pair<int, int64_t>, Tables>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find({device.index(), radius});
  if (found != cache.end()) return found->second;
  std::vector<Pair> pairs;
  std::vector<Step> steps;
  for (const auto d : half_plane(radius)) {
    pairs.push_back({int32_t(d.dy), int32_t(d.dx), int32_t(steps.size())});
    for (const auto p : path(d)) steps.push_back({int16_t(p.dy), int16_t(p.dx)});
  }
  Tables tables;
  tables.count = int(pairs.size());
  pairs.push_back({0, 0, int32_t(steps.size())});
  tables.pairs = to_device(pairs, device, tables.pair_data);
  tables.steps = to_device(steps, device, tables.step_data);
  return cache.emplace(std::make_pair(int(device.index()), radius), tables).first->second;
}

}  // namespace wsid
