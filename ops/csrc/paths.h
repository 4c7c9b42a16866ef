// Pairs of pixels within a radius and the straight paths between them, in the order of reference.path_offsets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace wsid {

struct Offset {
  int64_t dy, dx;
};

// Half plane {(0, 1..R-1)} + {(1..R-1, -(R-1)..R-1) : dy^2 + dx^2 < R^2}, row by row.
inline std::vector<Offset> half_plane(int64_t radius) {
  std::vector<Offset> offsets;
  for (int64_t dx = 1; dx < radius; ++dx) offsets.push_back({0, dx});
  for (int64_t dy = 1; dy < radius; ++dy)
    for (int64_t dx = 1 - radius; dx < radius; ++dx)
      if (dy * dy + dx * dx < radius * radius) offsets.push_back({dy, dx});
  return offsets;
}

// Integer points of the rectangle spanned by 0 and d that lie less than one pixel off the line, ordered from 0 to d.
inline std::vector<Offset> path(Offset d) {
  std::vector<Offset> points;
  for (int64_t y = 0; y <= d.dy; ++y)
    for (int64_t x = std::min<int64_t>(d.dx, 0); x <= std::max<int64_t>(d.dx, 0); ++x) {
      const int64_t cross = d.dy * x - d.dx * y;
      if (cross * cross < d.dy * d.dy + d.dx * d.dx) points.push_back({y, x});
    }
  std::stable_sort(points.begin(), points.end(),
                   [d](Offset a, Offset b) { return a.dy * d.dy + a.dx * d.dx < b.dy * d.dy + b.dx * d.dx; });
  return points;
}

// The path of each offset as index steps in a map of this width.
inline std::vector<std::vector<int64_t>> path_steps(const std::vector<Offset>& offsets, int64_t width) {
  std::vector<std::vector<int64_t>> steps;
  for (const Offset d : offsets) {
    steps.emplace_back();
    for (const Offset p : path(d)) steps.back().push_back(p.dy * width + p.dx);
  }
  return steps;
}

// Columns [begin, end) of the pixels p of row y for which p + d is inside the image; begin == end where there are none.
struct Span {
  int64_t begin, end;
};

inline Span columns(Offset d, int64_t y, int64_t height, int64_t width) {
  const int64_t begin = std::min(std::max<int64_t>(-d.dx, 0), width);
  const int64_t end = y + d.dy < height ? width - std::max<int64_t>(d.dx, 0) : 0;
  return {begin, std::max(begin, end)};
}

}  // namespace wsid
