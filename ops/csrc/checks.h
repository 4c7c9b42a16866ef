// Argument checks, the same on CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>

#include <limits>
#include <tuple>

#include "paths.h"

namespace wsid {

constexpr double kEps = 1e-5;  // added to the affinity before the logarithm

inline void check_radius(int64_t radius) { TORCH_CHECK(radius >= 1 && radius <= 64, "radius must be in 1..64"); }

// Pixel indices are 32-bit on CUDA, and coordinates must be exact in float32.
inline void check_size(const at::Tensor& map) {
  constexpr int64_t side = int64_t(1) << 24, pixels = int64_t(1) << 30;
  TORCH_CHECK(map.size(-2) <= side && map.size(-1) <= side && map.size(-2) * map.size(-1) <= pixels,
              "a map has at most 2^24 rows, 2^24 columns and 2^30 pixels");
}

inline void check_offsets(const at::Tensor& offsets) {
  TORCH_CHECK(offsets.dim() == 4 && offsets.size(1) == 2, "offsets must be [N, 2, H, W]");
  check_size(offsets);
}

// The boundary map [N, H, W], contiguous, with NaN replaced by +infinity: NaN would be lost in comparisons.
inline at::Tensor checked_boundary(const at::Tensor& boundary, int64_t radius) {
  TORCH_CHECK(boundary.dim() == 3, "boundary must be [N, H, W]");
  check_size(boundary);
  check_radius(radius);
  return at::where(boundary.isnan(), std::numeric_limits<double>::infinity(), boundary)
      .to(boundary.scalar_type())
      .contiguous();
}

// Uninitialised outputs of boundary_affinity: affinity [N, K, H, W], and winner of the same shape, or [0] without it.
inline std::tuple<at::Tensor, at::Tensor> affinity_outputs(const at::Tensor& b, int64_t radius, bool with_winner) {
  const int64_t k_count = half_plane(radius).size();
  at::Tensor affinity = at::empty({b.size(0), k_count, b.size(1), b.size(2)}, b.options());
  at::Tensor winner = with_winner ? at::empty(affinity.sizes(), b.options().dtype(at::kByte))
                                  : at::empty({0}, b.options().dtype(at::kByte));
  return {affinity, winner};
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& winner, int64_t radius) {
  check_radius(radius);
  TORCH_CHECK(grad.dim() == 4 && grad.size(1) == int64_t(half_plane(radius).size()) && grad.sizes() == winner.sizes() &&
                  winner.scalar_type() == at::kByte && grad.device() == winner.device(),
              "grad and winner must both be [N, K, H, W] for this radius, on one device, winner uint8");
  check_size(grad);
}

inline void check_labels(const at::Tensor& labels, int64_t radius) {
  check_radius(radius);
  TORCH_CHECK(labels.dim() == 3, "labels must be [N, H, W]");
  check_size(labels);
}

// A map [N, H, W] (dims 3) or [N, 2, H, W] (dims 4), and labels [N, H, W] of its pixels.
inline void check_pairs(const at::Tensor& map, const at::Tensor& labels, int64_t radius, int64_t dims) {
  check_labels(labels, radius);
  TORCH_CHECK(map.dim() == dims && (dims == 3 || map.size(1) == 2) && map.size(0) == labels.size(0) &&
                  map.size(-2) == labels.size(1) && map.size(-1) == labels.size(2) &&
                  map.scalar_type() == labels.scalar_type() && map.device() == labels.device(),
              "the map and its labels must agree in images, height, width, precision and device");
}

inline void check_like(const at::Tensor& grad, at::IntArrayRef sizes, const at::Tensor& map) {
  TORCH_CHECK(grad.sizes() == sizes && grad.scalar_type() == map.scalar_type() && grad.device() == map.device(),
              "grad must be of the result's shape, precision and device");
}

inline void check_walk(const at::Tensor& x, const at::Tensor& affinity, int64_t radius, int64_t steps) {
  check_radius(radius);
  TORCH_CHECK(steps >= 0, "steps must be 0 or more");
  TORCH_CHECK(x.dim() == 4 && affinity.dim() == 4 && affinity.scalar_type() == x.scalar_type() &&
                  affinity.device() == x.device() && affinity.size(0) == x.size(0) && affinity.size(2) == x.size(2) &&
                  affinity.size(3) == x.size(3) && affinity.size(1) == int64_t(half_plane(radius).size()),
              "x must be [N, C, H, W] and affinity [N, K, H, W], of one precision and device and for this radius");
  check_size(x);
}

}  // namespace wsid
