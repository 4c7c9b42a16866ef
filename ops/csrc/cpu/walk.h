// Memory layout and series of the random walk on the CPU.
//
// A plane holds one map: `guard` zeros, then rows of `stride` values of which the first `width` are pixels and the rest
// zeros, then `guard` zeros, so that every neighbour is at a constant distance, inside the image or not. H^power has
// one plane per offset of the half plane: the entry at p belongs to the pair (p, p + d) in both directions.
#pragma once

#include <cstdint>
#include <vector>

namespace wsid {

// A neighbour at distance v; its weight lies at distance w from the pixel.
struct Tap {
  int64_t v, w;
};

// A common neighbour of two pixels, one above the other: one load of the map for two products.
struct SharedTap {
  int64_t v, upper, lower;
};

struct Stencil {
  int64_t height, width, radius;
  int64_t rows;  // height, rounded up to an even number: two rows are computed at a time
  int64_t stride, guard, plane;
  std::vector<Tap> taps;          // all neighbours of one pixel
  std::vector<SharedTap> shared;  // neighbours of a pixel and of the pixel below it, seen from the upper one
  std::vector<Tap> upper, lower;  // neighbours of only one of the two, also seen from the upper one
  int64_t weights_per_column;     // packed for two rows: every tap of both, and their diagonals
};

}  // namespace wsid
