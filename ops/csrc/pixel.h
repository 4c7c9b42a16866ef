// The step of Eq. 1 for one pixel, or for one vector of pixels: c <- clip(c + V(c)), shared by CPU and CUDA.
// V is float, double or a GCC vector of them. No product may be fused with a sum here: the results then agree to the
// last bit with plain PyTorch, whatever the processor.
#pragma once

#ifdef __CUDACC__
#define WSID_INLINE __host__ __device__ __forceinline__
#else
#define WSID_INLINE inline __attribute__((always_inline))
#endif

#ifndef __CUDACC__
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#endif

namespace wsid {

template <typename V>
WSID_INLINE V bilinear(V top_left, V top_right, V bottom_left, V bottom_right, V wy, V wx) {
  const V top = top_left + wx * (top_right - top_left);
  const V bottom = bottom_left + wx * (bottom_right - bottom_left);
  return top + wy * (bottom - top);
}

template <typename V>
WSID_INLINE V clip(V value, V limit) {
  value = value > V{} ? value : V{};
  return value < limit ? value : limit;
}

}  // namespace wsid
