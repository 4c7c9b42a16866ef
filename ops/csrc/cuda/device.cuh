// What the CUDA operators share: which pixel a thread works on, and the tables of pairs and paths on the device.
//
// One thread works on one pixel. Threads of a warp lie side by side in a row, so every load and store is coalesced.
// Compile with -fmad=false; where a product and a sum are to be fused, fma() says so.
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

// The pixel of this thread, where the pixels of n maps follow one another. A map has at most 2^30 of them, all maps may
// have more than 2^32; but a division of 64 bits is slow and rarely needed.
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

  // Where the value of this pixel lies in [N, channels, H, W].
  __device__ int64_t entry(int64_t channels, int64_t channel = 0) const {
    return (map * channels + channel) * size + p;
  }
};

// Launches a kernel on the current stream, kThreads threads to a block.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, Arguments... arguments) {
  kernel<<<grid, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

struct alignas(4) Step {
  int16_t dy, dx;
};

// One more entry than there are offsets ends the last path.
struct Pair {
  int32_t dy, dx, path;  // path: where it begins in the table of steps

  __device__ bool inside(int y, int x, int height, int width) const {
    return y + dy < height && x + dx >= 0 && x + dx < width;
  }
};

// result -= the gradients of the entries whose path has its maximum at this pixel, for `count` offsets from `first` on.
// Every pixel looks for them in one order, so that sums are the same to the last bit every time, as with
// torch.use_deterministic_algorithms they must be; atomicAdd, which takes them as they come, is faster.
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
      const int y = at.y - steps[i].dy, x = at.x - steps[i].dx;  // the pair that has this pixel i steps from its begin
      if (y < 0 || x < 0 || x >= width || !d.inside(y, x, height, width)) continue;
      const int64_t entry = plane + int64_t(y) * width + x;
      if (winner[entry] == i - d.path) sum -= grad[entry];
    }
  }
  result[at.thread] = sum;
}

inline bool deterministic() { return at::globalContext().deterministicAlgorithms(); }

struct Tables {
  int count;  // of offsets
  at::Tensor pair_data, step_data;
  const Pair* pairs;  // [count + 1]
  const Step* steps;  // [S], of all paths, one after another
};

template <typename Entry>
const Entry* to_device(const std::vector<Entry>& table, c10::Device device, at::Tensor& kept) {
  const at::Tensor host = at::empty({int64_t(table.size() * sizeof(Entry))}, at::TensorOptions().dtype(at::kByte));
  if (!table.empty()) std::copy(table.begin(), table.end(), reinterpret_cast<Entry*>(host.mutable_data_ptr<uint8_t>()));
  kept = host.to(device);
  return reinterpret_cast<const Entry*>(kept.const_data_ptr<uint8_t>());
}

// Copied once per device and radius; the copy has ended when it returns, so any stream may read it. Kept for good: at
// the end of the process the device may be gone before a static object is.
inline const Tables& tables(int64_t radius, c10::Device device) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<int, int64_t>, Tables>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device.index(), radius});
  if (found != known.end()) return found->second;
  std::vector<Pair> pairs;
  std::vector<Step> steps;
  for (const auto d : half_plane(radius)) {
    pairs.push_back({int32_t(d.dy), int32_t(d.dx), int32_t(steps.size())});
    for (const auto p : path(d)) steps.push_back({int16_t(p.dy), int16_t(p.dx)});
  }
  Tables made;
  made.count = int(pairs.size());
  pairs.push_back({0, 0, int32_t(steps.size())});
  made.pairs = to_device(pairs, device, made.pair_data);
  made.steps = to_device(steps, device, made.step_data);
  return known.emplace(std::make_pair(int(device.index()), radius), made).first->second;
}

}  // namespace wsid
