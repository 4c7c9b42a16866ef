// One row of pixels p and one offset: what each pair (p, p + to) adds. Undecided labels are NaN, so they equal nothing
// and differ from nothing. Plain loops: compilers make vectors of them.
#include "affinity_kernel.inl"

template <typename T>
void count_row(const T* label, int64_t to, int64_t count, int32_t* __restrict__ same, int32_t* __restrict__ different) {
  for (int64_t i = 0; i < count; ++i) {
    same[i] += label[i] == label[i + to];
    different[i] += (label[i] < label[i + to]) | (label[i] > label[i + to]);
  }
}

// Products in place of sums of logarithms: a logarithm costs more than all the rest of a pair. What has no logarithm
// becomes NaN.
template <typename T>
void multiply_row(const T* label, int64_t to, const T* affinity, int64_t count, double* __restrict__ together,
                  double* __restrict__ apart) {
  const T none = std::numeric_limits<T>::quiet_NaN();
  for (int64_t i = 0; i < count; ++i) {
    const T a = affinity[i] + T(wsid::kEps), b = T(1 + wsid::kEps) - affinity[i];
    const bool same = label[i] == label[i + to], different = (label[i] < label[i + to]) | (label[i] > label[i + to]);
    together[i] *= double(same ? (a > T(0) ? a : none) : T(1));
    apart[i] *= double(different ? (b > T(0) ? b : none) : T(1));
  }
}

// The gradient for the highest B on each path.
template <typename T>
void slope_row(const T* label, int64_t to, const T* affinity, const T* together, const T* apart, int64_t count,
               T* __restrict__ slope) {
  for (int64_t i = 0; i < count; ++i) {
    const bool same = label[i] == label[i + to], different = (label[i] < label[i + to]) | (label[i] > label[i + to]);
    const T a = together[i] / (affinity[i] + T(wsid::kEps)), b = apart[i] / (T(1 + wsid::kEps) - affinity[i]);
    slope[i] = same ? a : different ? -b : T(0);
  }
}

template <typename T>
void error_row(const T* label, int64_t to, const T* y, const T* x, T dy, T dx, int64_t count, T* __restrict__ error) {
  for (int64_t i = 0; i < count; ++i) {
    const T thing = label[i] > T(0) ? T(1) : T(0);
    const T e = std::abs(y[i] - y[i + to] - thing * dy) + std::abs(x[i] - x[i + to] - thing * dx);
    error[i] += label[i] == label[i + to] ? e : T(0);
  }
}

template <typename T>
void sign_row(const T* label, int64_t to, const T* y, const T* x, T dy, T dx, const T* grad, int64_t count,
              T* __restrict__ sign_y, T* __restrict__ sign_x) {
  for (int64_t i = 0; i < count; ++i) {
    const T thing = label[i] > T(0) ? T(1) : T(0), g = label[i] == label[i + to] ? grad[i] : T(0);
    const T ey = y[i] - y[i + to] - thing * dy, ex = x[i] - x[i + to] - thing * dx;
    sign_y[i] = ey > T(0) ? g : ey < T(0) ? -g : T(0);
    sign_x[i] = ex > T(0) ? g : ex < T(0) ? -g : T(0);
  }
}

template <typename T>
void add_row(const T* values, T factor, int64_t count, T* __restrict__ into) {
  for (int64_t i = 0; i < count; ++i) into[i] += factor * values[i];
}
