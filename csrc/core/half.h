// IEEE binary16 and bfloat16 <-> binary32, in integer arithmetic where the machine has no
// instruction for it.
#pragma once

#include <cstring>

#include "core/config.h"

namespace tta {

TTA_INLINE float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(h));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  uint32_t u;
  if (exponent == 31) {  // infinity, NaN (quietened like the hardware does)
    u = sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x00400000u : 0u);
  } else if (exponent) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa) {  // subnormal half, normal float
    uint32_t shift = 0;
    uint32_t m = mantissa;
    while (!(m & 0x400u)) {
      m <<= 1;
      ++shift;
    }
    u = sign | ((113 - shift) << 23) | ((m & 0x3ffu) << 13);
  } else {
    u = sign;
  }
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
#endif
}

// Round to nearest even; a NaN is quietened.
TTA_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((u >> 13) & 0x1ffu));
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (u >= 0x38800000u) {
    u += 0xc8000fffu + ((u >> 13) & 1u);  // rebias the exponent, round the mantissa
    return static_cast<uint16_t>(sign | (u >> 13));
  }
  if (u < 0x33000000u) return sign;  // below half of the smallest subnormal
  const uint32_t shift = 126 - (u >> 23);
  const uint32_t m = (u & 0x7fffffu) | 0x800000u;
  uint32_t q = m >> shift;
  const uint32_t rest = m & ((1u << shift) - 1);
  const uint32_t tie = 1u << (shift - 1);
  q += rest > tie || (rest == tie && (q & 1u));
  return static_cast<uint16_t>(sign | q);
}

TTA_INLINE float bfloat16_to_float(uint16_t b) {
  const uint32_t u = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

TTA_INLINE uint16_t float_to_bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  u += 0x7fffu + ((u >> 16) & 1u);
  return static_cast<uint16_t>(u >> 16);
}

}  // namespace tta
