// p = fl32(w / Z) of many weights and one Z with the bits of the float64 division, by a reciprocal
// and two corrections (Markstein 1990), as on the CPU.
#pragma once

#include "cuda/device.cuh"

namespace tta {
namespace cuda {

// fl32(w / z) for many w and one z; z with an all-ones mantissa is the theorem's exception, for
// which callers have a second, slower loop.
struct DivideBy {
  double z, y;
#if defined(TTA_CUDA_FLOAT_DIVISION)
  float y_high, y_low;  // 1 / z to 48 bits
  __device__ __forceinline__ explicit DivideBy(double by)
      : z(by),
        y(div_rn(1.0, by)),
        y_high(static_cast<float>(y)),
        y_low(static_cast<float>(sub_rn(y, static_cast<double>(y_high)))) {}
  // The same quotient in float32, for GPUs with little float64: q to 46 bits as the sum of two
  // floats, rounded, unless what is left out could change how it rounds (one weight in 2^15).
  template <bool kException>
  __device__ __forceinline__ float quotient(float w) const {
    const float high = mul_rn(w, y_high);
    const float low = fma_rn(w, y_low, fma_rn(w, y_high, -high));
    const float slack = mul_rn(high, 0x1p-40f);
    const float q = add_rn(high, sub_rn(low, slack));
    const bool exact = high > 0x1p-100f;  // nothing above was subnormal
    if (w == 0.0f || (exact && q == add_rn(high, add_rn(low, slack)))) return q;
    return divided<kException>(w);
  }
#else
  __device__ __forceinline__ explicit DivideBy(double by) : z(by), y(div_rn(1.0, by)) {}
  template <bool kException>
  __device__ __forceinline__ float quotient(float w) const {
    return divided<kException>(w);
  }
#endif
  __device__ __forceinline__ bool exception() const {
    unsigned long long u;
    std::memcpy(&u, &z, sizeof u);
    return (u & 0xfffffffffffffull) == 0xfffffffffffffull;
  }
  template <bool kException>
  __device__ __forceinline__ float divided(float w) const {
    const double a = static_cast<double>(w);
    if (kException) return static_cast<float>(div_rn(a, z));
    double q = mul_rn(a, y);
    q = fma_rn(fma_rn(q, -z, a), y, q);
    q = fma_rn(fma_rn(q, -z, a), y, q);
    return static_cast<float>(q);
  }
};

}  // namespace cuda
}  // namespace tta
