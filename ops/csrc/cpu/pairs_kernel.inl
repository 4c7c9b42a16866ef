// Contributions of the pairs (p, p + partner) of one row and one offset. Undecided labels are NaN: neither equal nor
// different. Plain loops, which compilers vectorise.
#include "affinity_kernel.inl"

template <typename T>
void count_row(const T* label, int64_t partner, int64_t count, int32_t* __restrict__ same,
               int32_t* __restrict__ different) {
  for (int64_t i = 0; i < count; ++i) {
    same[i] += label[i] == label[i + partner];
    different[i] += (label[i] < label[i + partner]) | (label[i] > label[i + partner]);
  }
}

// Products instead of sums of logarithms: one logarithm costs more than the rest of a pair. Factors that have no
// logarithm become NaN.
template <typename T>
void multiply_row(const T* label, int64_t partner, const T* affinity, int64_t count, double* __restrict__ same_product,
                  double* __restrict__ different_product) {
  const T none = std::numeric_limits<T>::quiet_NaN();
  for (int64_t i = 0; i < count; ++i) {
    const T a = affinity[i] + T(wsid::kEps), b = T(1 + wsid::kEps) - affinity[i];
    const bool same = label[i] == label[i + partner],
               different = (label[i] < label[i + partner]) | (label[i] > label[i + partner]);
    same_product[i] *= double(same ? (a > T(0) ? a : none) : T(1));
    different_product[i] *= double(different ? (b > T(0) ? b : none) : T(1));
  }
}

// The gradient of the maximum of B on each path.
template <typename T>
void slope_row(const T* label, int64_t partner, const T* affinity, const T* grad_same, const T* grad_different,
               int64_t count, T* __restrict__ slope) {
  for (int64_t i = 0; i < count; ++i) {
    const bool same = label[i] == label[i + partner],
               different = (label[i] < label[i + partner]) | (label[i] > label[i + partner]);
    const T a = grad_same[i] / (affinity[i] + T(wsid::kEps)), b = grad_different[i] / (T(1 + wsid::kEps) - affinity[i]);
    slope[i] = same ? a : different ? -b : T(0);
  }
}

template <typename T>
void displacement_row(const T* label, int64_t partner, const T* y, const T* x, T dy, T dx, int64_t count,
                      T* __restrict__ loss) {
  for (int64_t i = 0; i < count; ++i) {
    const T foreground = label[i] > T(0) ? T(1) : T(0);
    const T e = std::abs(y[i] - y[i + partner] - foreground * dy) + std::abs(x[i] - x[i + partner] - foreground * dx);
    loss[i] += label[i] == label[i + partner] ? e : T(0);
  }
}

template <typename T>
void sign_row(const T* label, int64_t partner, const T* y, const T* x, T dy, T dx, const T* grad, int64_t count,
              T* __restrict__ sign_y, T* __restrict__ sign_x) {
  for (int64_t i = 0; i < count; ++i) {
    const T foreground = label[i] > T(0) ? T(1) : T(0), g = label[i] == label[i + partner] ? grad[i] : T(0);
    const T ey = y[i] - y[i + partner] - foreground * dy, ex = x[i] - x[i + partner] - foreground * dx;
    sign_y[i] = ey > T(0) ? g : ey < T(0) ? -g : T(0);
    sign_x[i] = ex > T(0) ? g : ex < T(0) ? -g : T(0);
  }
}

template <typename T>
void add_row(const T* values, T factor, int64_t count, T* __restrict__ into) {
  for (int64_t i = 0; i < count; ++i) into[i] += factor * values[i];
}
