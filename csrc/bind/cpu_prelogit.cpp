// Registers the CPU kernels of adaptive importance sampling on pre-logits.

#include "bind/cpu.h"
#include "bind/ops_prelogit.h"

STABLE_TORCH_LIBRARY_IMPL(tta_ext, CPU, m) { tta::bind::register_prelogit_ops<tta::bind::Cpu>(m); }
