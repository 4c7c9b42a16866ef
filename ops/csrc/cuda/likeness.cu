// Likeness of neighbouring pixels on CUDA; see ../cpu/likeness.cpp for what it is.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../checks.h"
#include "device.cuh"

namespace {

using wsid::launch;
using wsid::Pair;
using wsid::Pixel;

constexpr int kTogether = 4;  // offsets that share the loads of the pixel's own features

// Grid: pixels of all images by groups of offsets.
template <typename T>
__global__ void dot_products_kernel(const T* __restrict__ features,  // [N, C, H, W]
                                    int n, int channels, int height, int width, int k_count,
                                    const Pair* __restrict__ pairs,  // [K + 1]
                                    T* __restrict__ likeness) {      // [N, K, H, W]
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
    const T* here = features + at.entry(channels);
    for (int c = 0; c < channels; ++c, here += at.size) {
      const T own = here[0];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum[i] = fma(own, here[d[i]], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i < k_count) likeness[at.entry(k_count, first + i)] = d[i] && sum[i] > T(0) ? sum[i] : T(0);
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
    const dim3 grid(wsid::blocks(n * height * width), (k_count + kTogether - 1) / kTogether);
    launch(dot_products_kernel<scalar_t>, grid, f.const_data_ptr<scalar_t>(), n, f.size(1), height, width, k_count,
           pairs, result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsid, CUDA, m) { m.impl("likeness", &likeness); }
