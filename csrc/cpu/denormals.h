// torch.set_flush_denormal(True) must not change a result: a guard that switches flush-to-zero and
// denormals-are-zero off for its lifetime, on whatever thread it lives.
#pragma once

#include <cstdint>

#include "core/config.h"

#if TTA_X86_64
#include <immintrin.h>
#endif

namespace tta {

class KeepDenormals {
#if TTA_X86_64
 public:
  KeepDenormals() : saved_(_mm_getcsr()) {
    if (saved_ & kFlush) _mm_setcsr(saved_ & ~kFlush);
  }
  ~KeepDenormals() {
    if (saved_ & kFlush) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kFlush = 0x8040;
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ & kFlush) asm volatile("msr fpcr, %0" : : "r"(saved_ & ~kFlush));
  }
  ~KeepDenormals() {
    if (saved_ & kFlush) asm volatile("msr fpcr, %0" : : "r"(saved_));
  }

 private:
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  uint64_t saved_;
#else
 public:
  KeepDenormals() {}
#endif
};

}  // namespace tta
