// Which of the compiled instruction sets runs. Chosen once from the processor, lowered by
// TTA_EXT_CPU_ISA=scalar|avx2|avx512 or by set_isa; never raised above what the machine has.
#pragma once

namespace tta {

enum IsaLevel : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

int active_isa();
int set_isa(int level);  // clamps, returns the level now active

}  // namespace tta

// Calls NAME of the active instruction set with the arguments given.
#if TTA_X86_64
#define TTA_DISPATCH(NAME, ...)                \
  switch (::tta::active_isa()) {               \
    case ::tta::kAvx512:                       \
      return ::tta::avx512::NAME(__VA_ARGS__); \
    case ::tta::kAvx2:                         \
      return ::tta::avx2::NAME(__VA_ARGS__);   \
    default:                                   \
      return ::tta::scalar::NAME(__VA_ARGS__); \
  }
#else
#define TTA_DISPATCH(NAME, ...) return ::tta::scalar::NAME(__VA_ARGS__);
#endif
