// Gaussian noise of the AISP family: `normal` writes one step's noise out.

#define TTA_TARGET_FILE "cpu/prelogit.cpp"
#include "cpu/denormals.h"
#include "cpu/foreach_isa.h"
#include "cpu/noise.h"

namespace tta {
namespace TTA_ISA {

constexpr int64_t kNormalTask = 1 << 14;  // floats a task, a multiple of 4

static void normal_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const NormalArgs& a = *static_cast<const NormalArgs*>(context);
  const NoiseKey key{static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32), a.step,
                     a.sequence, a.word3};
  const int64_t last = end * kNormalTask;
  noise_range(key, begin * kNormalTask, last < a.count ? last : a.count,
              a.out + begin * kNormalTask);
}

void normal(const NormalArgs& a) {
  a.parallel.run((a.count + kNormalTask - 1) / kNormalTask, 1, normal_body,
                 const_cast<NormalArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void normal(const NormalArgs& a) { TTA_DISPATCH(normal, a) }
#endif

}  // namespace tta
