// What the tests give the CPU kernels, and have from them: numbers of any dtype, and one thread.
#pragma once

#include <cstring>

#include "core/half.h"
#include "cpu/kernels.h"

namespace tta {
namespace testing {

// All items in one task.
inline constexpr Parallel kSerial{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
      if (n) body(context, 0, n);
    }};

inline int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Rounds x to number i of an array.
inline void store(char* data, int dtype, int64_t i, float x) {
  char* p = data + i * bytes_of(dtype);
  if (dtype == kFloat32) {
    std::memcpy(p, &x, 4);
    return;
  }
  const uint16_t h = dtype == kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
  std::memcpy(p, &h, 2);
}

inline float load(const char* data, int dtype, int64_t i) {
  const char* p = data + i * bytes_of(dtype);
  if (dtype == kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p, 2);
  return dtype == kFloat16 ? half_to_float(h) : bfloat16_to_float(h);
}

}  // namespace testing
}  // namespace tta
