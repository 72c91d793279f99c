// Operations of one machine instruction for which CUDA C++ has no function of its own, and the same
// in C++ for the SIMT build.
#pragma once

#include "cuda/device.cuh"

namespace tta {
namespace cuda {

#if defined(__CUDA_ARCH__)

// a + b, subnormals on either side taken for 0.
__device__ __forceinline__ float add_flush(float a, float b) {
  float sum;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// The same number, about which the compiler knows nothing: what is made of it stays in its loop.
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// The larger number; NaN if there is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The same of two pairs of 16-bit numbers.
template <int kType>
__device__ __forceinline__ uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
  uint32_t larger;
  if constexpr (kType == kFloat16)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Two floats rounded to a 16-bit type, the first in the low half. The device's own conversions
// round like core/half.h; only what is left of a NaN's payload differs, as in any operation on one.
template <int kType>
__device__ __forceinline__ uint32_t narrowed(float low, float high) {
  uint32_t both;
  if constexpr (kType == kFloat16)
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  else
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(low), "f"(high));
  return both;
}

// The smaller ones of two pairs of 16-bit numbers without NaN.
template <int kType>
__device__ __forceinline__ uint32_t min_of_pairs(uint32_t a, uint32_t b) {
  uint32_t smaller;
  if constexpr (kType == kFloat16)
    asm("min.f16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  else
    asm("min.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  return smaller;
}

#else

__device__ __forceinline__ float add_flush(float a, float b) {
  constexpr float kSmallest = std::numeric_limits<float>::min();
  const auto flushed = [](float x) { return fabsf(x) < kSmallest ? copysignf(0.0f, x) : x; };
  return flushed(add_rn(flushed(a), flushed(b)));
}

__device__ __forceinline__ float opaque(float x) { return x; }

__device__ __forceinline__ float max_or_nan(float a, float b) {
  return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : a > b ? a : b;
}

// Of both numbers of two pairs, the first's where choose(first's, second's), else the second's;
// NaN if there is one.
template <int kType, class Choose>
__device__ __forceinline__ uint32_t choose_of_pairs(uint32_t a, uint32_t b, Choose choose) {
  uint32_t chosen = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t raw[2] = {static_cast<uint16_t>(a >> shift), static_cast<uint16_t>(b >> shift)};
    float x[2];
    for (int k = 0; k < 2; ++k)
      x[k] = kType == kFloat16 ? half_to_float(raw[k]) : bfloat16_to_float(raw[k]);
    const bool nan = x[0] != x[0] || x[1] != x[1];
    const uint16_t one = nan ? 0x7fff : choose(x[0], x[1]) ? raw[0] : raw[1];
    chosen |= static_cast<uint32_t>(one) << shift;
  }
  return chosen;
}

template <int kType>
__device__ __forceinline__ uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
  return choose_of_pairs<kType>(a, b, [](float x, float y) { return x > y; });
}

template <int kType>
__device__ __forceinline__ uint32_t min_of_pairs(uint32_t a, uint32_t b) {
  return choose_of_pairs<kType>(a, b, [](float x, float y) { return x < y; });
}

template <int kType>
__device__ __forceinline__ uint32_t narrowed(float low, float high) {
  if (kType == kFloat16)
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}

#endif

}  // namespace cuda
}  // namespace tta
