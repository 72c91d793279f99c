// One IEEE operation each, rounded to nearest even. On the device they are intrinsics, which nvcc
// never contracts; on the host plain operators, compiled with -ffp-contract=off.
#pragma once

#include <cmath>

#include "core/config.h"

namespace tta {

#if defined(__CUDA_ARCH__)
TTA_INLINE float add_rn(float a, float b) { return __fadd_rn(a, b); }
TTA_INLINE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
TTA_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
TTA_INLINE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
TTA_INLINE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
TTA_INLINE float sqrt_rn(float a) { return __fsqrt_rn(a); }
TTA_INLINE double add_rn(double a, double b) { return __dadd_rn(a, b); }
TTA_INLINE double sub_rn(double a, double b) { return __dsub_rn(a, b); }
TTA_INLINE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
TTA_INLINE double div_rn(double a, double b) { return __ddiv_rn(a, b); }
TTA_INLINE double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
TTA_INLINE float add_rn(float a, float b) { return a + b; }
TTA_INLINE float sub_rn(float a, float b) { return a - b; }
TTA_INLINE float mul_rn(float a, float b) { return a * b; }
TTA_INLINE float div_rn(float a, float b) { return a / b; }
TTA_INLINE float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
TTA_INLINE float sqrt_rn(float a) { return std::sqrt(a); }
TTA_INLINE double add_rn(double a, double b) { return a + b; }
TTA_INLINE double sub_rn(double a, double b) { return a - b; }
TTA_INLINE double mul_rn(double a, double b) { return a * b; }
TTA_INLINE double div_rn(double a, double b) { return a / b; }
TTA_INLINE double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
#endif

}  // namespace tta
