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
  __device__ __forceinline__ explicit DivideBy(double by) : z(by), y(div_rn(1.0, by)) {}
  __device__ __forceinline__ bool exception() const {
    unsigned long long u;
    std::memcpy(&u, &z, sizeof u);
    return (u & 0xfffffffffffffull) == 0xfffffffffffffull;
  }
  template <bool kException>
  __device__ __forceinline__ float quotient(float w) const {
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
