// Registers the CUDA kernels of adaptive importance sampling on pre-logits.

#include "bind/cuda.h"
#include "bind/ops_prelogit.h"

STABLE_TORCH_LIBRARY_IMPL(tta_ext, CUDA, m) {
  tta::bind::register_prelogit_ops<tta::bind::Cuda>(m);
}
