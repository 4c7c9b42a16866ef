// All terms of the walk's series in one launch, for radius 5 in float32.
//
// A term of a small grid takes less time than a launch, and its weights, which stay the same, most of its reads. So
// every block keeps one tile of one group of maps for all terms: the weights of its pixels and their last two values
// in registers, the values of the tile and of a rim around it in shared memory. After each term it writes its values
// and then the number of the term; it waits until the tiles around it have done so too.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <type_traits>

namespace wsid {

// Values that are loaded and stored together.
template <typename T, int C>
struct alignas(C * sizeof(T) < 16 ? C * sizeof(T) : 16) Pack {
  T v[C];
};

constexpr int kRadius = 5, kRim = kRadius - 1;
constexpr int kTileColumns = 16, kTileRows = 8, kPitch = kTileColumns + 2 * kRim;
constexpr int kEach = 2;  // pixels of a thread, one below the other: most of their neighbours are the same
constexpr int kTileThreads = kTileColumns * kTileRows / kEach;
constexpr size_t kMostTerms = 512;  // they are passed by value

// Number of a pair by its offset, in the order of half_plane(kRadius); -1 outside the disc.
struct Disc {
  int number[kRadius][2 * kRadius - 1], count;

  constexpr Disc() : number(), count(0) {
    for (int dy = 0; dy < kRadius; ++dy)
      for (int dx = -kRim; dx <= kRim; ++dx)
        number[dy][dx + kRim] = (dy || dx > 0) && dy * dy + dx * dx < kRadius * kRadius ? count++ : -1;
  }
};

struct Terms {
  int last;     // number of steps, or of the last coefficient
  bool series;  // whether there are coefficients
  float coefficients[kMostTerms];
};

// A value that another block has written: not from the cache of this multiprocessor.
template <typename T, int C>
__device__ Pack<T, C> from_l2(const Pack<T, C>* p) {
  Pack<T, C> value;
  if constexpr (C == 4) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(p));
    value.v[0] = four.x, value.v[1] = four.y, value.v[2] = four.z, value.v[3] = four.w;
  } else if constexpr (C == 2) {
    const float2 two = __ldcg(reinterpret_cast<const float2*>(p));
    value.v[0] = two.x, value.v[1] = two.y;
  } else {
    value.v[0] = __ldcg(reinterpret_cast<const float*>(p));
  }
  return value;
}

__device__ int acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ void release(int* at, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

template <int C>
__global__ void __launch_bounds__(kTileThreads)
    terms_kernel(const Pack<float, 4>* __restrict__ weights,  // [N, K / 2, H, W] x 4
                 const float* __restrict__ centre,            // [N, H, W]
                 const double* __restrict__ root,             // [N, H, W]
                 const float* __restrict__ x,                 // [N, maps, H, W]
                 int maps, int groups, int units, int height, int width, const __grid_constant__ Terms terms,
                 Pack<float, C>* values,        // [units, 2, H, W] x C
                 int* written,                  // [units, tiles]: 1 + the last term of each tile
                 float* __restrict__ result) {  // [N, maps, H, W]
  constexpr Disc disc;
  constexpr int kCells = kPitch * (kTileRows + 2 * kRim);
  __shared__ Pack<float, C> tile[kCells];
  const int across = (width + kTileColumns - 1) / kTileColumns, down = (height + kTileRows - 1) / kTileRows;
  const int own = int(blockIdx.x) % (across * down), left = own % across, top = own / across;
  const int column = int(threadIdx.x) % kTileColumns, row = int(threadIdx.x) / kTileColumns * kEach;
  const int size = height * width;
  const int px = left * kTileColumns + column, py = top * kTileRows + row;
  const int slots = int(gridDim.x) / (across * down);
  for (int unit = int(blockIdx.x) / (across * down); unit < units; unit += slots) {
    const int image = unit / groups, first = unit % groups * C;
    Pack<float, 4> kept[kEach][disc.count / 2];
    Pack<float, C> now[kEach], before[kEach], total[kEach];
    float diagonal[kEach];
#pragma unroll
    for (int p = 0; p < kEach; ++p) {
      const bool exists = px < width && py + p < height;
      const int at = exists ? (py + p) * width + px : 0;
      diagonal[p] = exists ? centre[int64_t(image) * size + at] : 0;
#pragma unroll
      for (int g = 0; g < disc.count / 2; ++g) {
        kept[p][g] = {};
        if (exists) kept[p][g] = weights[(int64_t(image) * (disc.count / 2) + g) * size + at];
      }
      now[p] = before[p] = total[p] = {};
      if (exists)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (first + c < maps)
            now[p].v[c] =
                float(double(x[(int64_t(image) * maps + first + c) * size + at]) * root[int64_t(image) * size + at]);
    }
    int* const done = written + int64_t(unit) * across * down;
    Pack<float, C>* const planes = values + int64_t(unit) * 2 * size;
    for (int term = 0;; ++term) {
      const float coefficient = terms.series ? terms.coefficients[term] : 0.f;
      if (coefficient != 0)
#pragma unroll
        for (int p = 0; p < kEach; ++p)
#pragma unroll
          for (int c = 0; c < C; ++c) total[p].v[c] = fma(coefficient, now[p].v[c], total[p].v[c]);
      if (term == terms.last) break;
      Pack<float, C>* const plane = planes + term % 2 * size;
#pragma unroll
      for (int p = 0; p < kEach; ++p)
        if (px < width && py + p < height) plane[(py + p) * width + px] = now[p];
      __syncthreads();
      if (threadIdx.x == 0) release(done + own, term + 1);
      if (threadIdx.x < 9) {
        const int y = top + int(threadIdx.x) / 3 - 1, x = left + int(threadIdx.x) % 3 - 1;
        if (y >= 0 && x >= 0 && y < down && x < across)
          while (acquire(done + y * across + x) <= term) {
          }
      }
      __syncthreads();
#pragma unroll
      for (int i = int(threadIdx.x); i < kCells; i += kTileThreads) {
        const int y = top * kTileRows + i / kPitch - kRim, x = left * kTileColumns + i % kPitch - kRim;
        Pack<float, C> value = {};
        if (y >= 0 && x >= 0 && y < height && x < width) value = from_l2(plane + y * width + x);
        tile[i] = value;
      }
      __syncthreads();
      Pack<float, C> sum[kEach] = {}, behind[kEach] = {};  // two partial sums: one long sum rounds more
      const Pack<float, C>* const here = tile + (row + kRim) * kPitch + column + kRim;
#pragma unroll
      for (int dy = -kRim; dy < kRadius - 1 + kEach; ++dy)
#pragma unroll
        for (int dx = -kRim; dx <= kRim; ++dx) {
          bool used = false;
#pragma unroll
          for (int p = 0; p < kEach; ++p) {
            const int d = dy - p;
            used |= d > -kRadius && d < kRadius && (d || dx) && d * d + dx * dx < kRadius * kRadius;
          }
          if (!used) continue;
          const Pack<float, C> value = here[dy * kPitch + dx];
#pragma unroll
          for (int p = 0; p < kEach; ++p) {
            const int d = dy - p;
            if (d <= -kRadius || d >= kRadius) continue;
            const bool ahead = d > 0 || (d == 0 && dx > 0);
            const int k = ahead ? disc.number[d][dx + kRim] : disc.number[-d][kRim - dx];
            if (k < 0) continue;
            const float weight = kept[p][k / 2].v[k % 2 * 2 + !ahead];
#pragma unroll
            for (int c = 0; c < C; ++c) {
              float& to = ahead ? sum[p].v[c] : behind[p].v[c];
              to = fma(weight, value.v[c], to);
            }
          }
        }
      const float alpha = term && terms.series ? 2 : 1, beta = term && terms.series ? 1 : 0;
#pragma unroll
      for (int p = 0; p < kEach; ++p)
#pragma unroll
        for (int c = 0; c < C; ++c) {
          // The diagonal, often close to 1, is added last: small terms added to it one by one would be lost.
          const float next = fma(diagonal[p], now[p].v[c], sum[p].v[c] + behind[p].v[c]);
          const float last = before[p].v[c];
          before[p].v[c] = now[p].v[c];
          now[p].v[c] = alpha * next - beta * last;
        }
    }
#pragma unroll
    for (int p = 0; p < kEach; ++p)
      if (px < width && py + p < height)
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (first + c < maps) {
            const int at = (py + p) * width + px;
            result[(int64_t(image) * maps + first + c) * size + at] =
                float(double(terms.series ? total[p].v[c] : now[p].v[c]) / root[int64_t(image) * size + at]);
          }
  }
}

// Whether all terms were computed, to `result`, in one launch; false where the blocks of one group of maps do not all
// fit on the device at once, or for another radius or precision.
template <typename T, int C>
bool walk_in_one_launch(const at::Tensor& x, const Pack<T, 4>* weights, const T* centre, const double* root,
                        int64_t radius, int64_t steps, at::ArrayRef<double> coefficients, at::Tensor& result) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t maps = x.size(1), height = x.size(2), width = x.size(3), groups = (maps + C - 1) / C;
    const int64_t units = x.size(0) * groups;
    const int64_t tiles = (width + kTileColumns - 1) / kTileColumns * ((height + kTileRows - 1) / kTileRows);
    if (radius != kRadius || coefficients.size() > kMostTerms) return false;
    int blocks_each = 0, processors = 0, cooperative = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, terms_kernel<C>, kTileThreads, 0));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.device().index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, x.device().index()));
    const int64_t slots = std::min(units, int64_t(blocks_each) * processors / tiles);
    if (!slots || !cooperative) return false;
    Terms terms = {int(steps), !coefficients.empty(), {}};
    std::copy(coefficients.begin(), coefficients.end(), terms.coefficients);
    const at::Tensor values = at::empty({units * 2 * height * width * C}, x.options());
    const at::Tensor written = at::zeros({units * tiles}, x.options().dtype(at::kInt));
    cudaLaunchAttribute together = {};  // an error, instead of endless waiting, where they do not fit
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(slots * tiles));
    config.blockDim = dim3(kTileThreads);
    config.stream = c10::cuda::getCurrentCUDAStream();
    config.attrs = &together;
    config.numAttrs = 1;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, terms_kernel<C>, weights, centre, root, x.const_data_ptr<T>(), int(maps),
                                      int(groups), int(units), int(height), int(width), terms,
                                      reinterpret_cast<Pack<T, C>*>(values.mutable_data_ptr<T>()),
                                      written.mutable_data_ptr<int>(), result.mutable_data_ptr<T>()));
    return true;
  } else {
    return false;
  }
}

}  // namespace wsid
