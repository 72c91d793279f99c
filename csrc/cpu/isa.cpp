#include "cpu/isa.h"

#include <strings.h>

#include <atomic>
#include <cstdlib>

#include "core/config.h"
#if TTA_X86_64
#include <cpuid.h>
#endif

namespace tta {
namespace {

#if TTA_X86_64
// Not by __builtin_cpu_supports, to which Clang 14 has no such name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int machine_isa() {
#if TTA_X86_64
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kScalar;
#else
  return kScalar;
#endif
}

int initial_isa() {
  const int machine = machine_isa();
  const char* wish = std::getenv("TTA_EXT_CPU_ISA");
  if (!wish) return machine;
  // In any case of letters; tta_ext/build/library.py refuses other words.
  const int level = !strcasecmp(wish, "scalar") ? kScalar
                    : !strcasecmp(wish, "avx2") ? kAvx2
                                                : kAvx512;
  return level < machine ? level : machine;
}

std::atomic<int>& level() {
  static std::atomic<int> value{initial_isa()};
  return value;
}

}  // namespace

int active_isa() { return level().load(std::memory_order_relaxed); }

int set_isa(int wish) {
  const int machine = machine_isa();
  if (wish >= 0) level().store(wish < machine ? wish : machine, std::memory_order_relaxed);
  return active_isa();
}

}  // namespace tta
