// Compiles the kernel file named by WSID_KERNEL for each instruction set; WSID_SELECT chooses one at run time.
// Include all other headers first: code compiled under a target pragma must not leak into the rest of the program.
// WSID_FUSED: whether products and sums may be fused. The environment variable WSID_ISA=baseline or avx2 limits the
// choice.
#ifndef WSID_FOR_EACH_ISA
#define WSID_FOR_EACH_ISA
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define WSID_X86 1
#endif

namespace wsid {
inline int isa() {  // 0 baseline, 1 AVX2 with FMA, 2 AVX-512
  static const int level = [] {
    int best = 0;
#ifdef WSID_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
      best = 2;
    if (const char* wish = std::getenv("WSID_ISA")) {
      if (!std::strcmp(wish, "baseline")) best = 0;
      if (!std::strcmp(wish, "avx2") && best > 1) best = 1;
    }
#endif
    return best;
  }();
  return level;
}
}  // namespace wsid
#endif

namespace baseline {
#define WSID_VECTOR_BYTES 16
#include WSID_KERNEL
#undef WSID_VECTOR_BYTES
}  // namespace baseline

#ifdef WSID_X86

#if defined(__clang__)
#if WSID_FUSED
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#endif
#else
#pragma GCC push_options
#if WSID_FUSED
#pragma GCC target("avx2,fma")
#else
#pragma GCC target("avx2")
#endif
#endif
namespace avx2 {
#define WSID_VECTOR_BYTES 32
#include WSID_KERNEL
#undef WSID_VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if WSID_FUSED  // AVX-512 implies fused operations
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif
namespace avx512 {
#define WSID_VECTOR_BYTES 64
#include WSID_KERNEL
#undef WSID_VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define WSID_SELECT(...) \
  (wsid::isa() == 2 ? avx512::__VA_ARGS__ : wsid::isa() == 1 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define WSID_SELECT(...) (wsid::isa() ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#endif

#else
#define WSID_SELECT(...) (baseline::__VA_ARGS__)
#endif
