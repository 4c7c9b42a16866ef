// One step of Eq. 1, c <- clip(c + V(c)), for one pixel or one vector of pixels; shared by CPU and CUDA.
// V is float, double or a GCC vector of them. Products and sums must not be fused here: the results are then equal to
// plain PyTorch's bit by bit on every processor.
#pragma once

#ifdef __CUDACC__
#define WSID_INLINE __host__ __device__ __forceinline__
#else
#define WSID_INLINE inline __attribute__((always_inline))
#endif

#ifndef __CUDACC__
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to inlined functions
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
