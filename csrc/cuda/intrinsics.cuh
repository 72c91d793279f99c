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

#else

__device__ __forceinline__ float add_flush(float a, float b) {
  constexpr float kSmallest = std::numeric_limits<float>::min();
  const auto flushed = [](float x) { return fabsf(x) < kSmallest ? copysignf(0.0f, x) : x; };
  return flushed(add_rn(flushed(a), flushed(b)));
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : a > b ? a : b;
}

template <int kType>
__device__ __forceinline__ uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t raw[2] = {static_cast<uint16_t>(a >> shift), static_cast<uint16_t>(b >> shift)};
    float x[2];
    for (int k = 0; k < 2; ++k)
      x[k] = kType == kFloat16 ? half_to_float(raw[k]) : bfloat16_to_float(raw[k]);
    const uint16_t chosen = x[0] != x[0] || x[1] != x[1] ? 0x7fff : x[0] > x[1] ? raw[0] : raw[1];
    larger |= static_cast<uint32_t>(chosen) << shift;
  }
  return larger;
}

#endif

}  // namespace cuda
}  // namespace tta
