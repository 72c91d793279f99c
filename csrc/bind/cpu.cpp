// Registers the CPU kernels: for every op `X`, `X.out` under the CPU key. Schemas, fakes, autograd
// and the functional forms are Python's (tta_ext/schemas.py).

#include "bind/cpu.h"
#include "bind/ops.h"
#include "cpu/isa.h"

namespace tta {
namespace bind {
namespace {

int64_t cpu_isa(int64_t level) { return set_isa(static_cast<int>(level)); }
int64_t native_version() { return kNativeVersion; }

}  // namespace
}  // namespace bind
}  // namespace tta

STABLE_TORCH_LIBRARY_IMPL(tta_ext, CPU, m) { tta::bind::register_ops<tta::bind::Cpu>(m); }

// No tensor says which device these are for.
STABLE_TORCH_LIBRARY_IMPL(tta_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&tta::bind::cpu_isa));
  m.impl("native_version", TORCH_BOX(&tta::bind::native_version));
}
