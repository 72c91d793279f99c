// The CUDA kernels, one entry point an operator. Nothing here allocates or waits for the device:
// the caller asks need_of() for scratch memory, hands it over and checks what comes back. The
// arguments hold device pointers, and numbers where the host knows them.
#pragma once

#include <cstddef>

#if defined(TTA_SIMT)
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "core/params.h"

namespace tta {
namespace cuda {

// Scratch memory of one call: `bytes` of any content, 256-byte aligned, and `arrivals` counters
// that are zero before the call and again after it.
struct Need {
  size_t bytes = 0;
  int64_t arrivals = 0;
};

struct Launch {
  void* scratch = nullptr;
  uint32_t* arrivals = nullptr;
  cudaStream_t stream = nullptr;
};

Need need_of(const MaskArgs&);
Need need_of(const ProbsArgs&);
Need need_of(const StatsArgs&);
Need need_of(const SampleArgs&);
Need need_of(const VerifyArgs&);
Need need_of(const CategoricalArgs&);
Need need_of(const MixtureArgs&);
Need need_of(const KnapsackArgs&);
Need need_of(const PerturbArgs&);
Need need_of(const WeightsArgs&);
Need need_of(const ControlArgs&);
Need need_of(const MergeArgs&);
Need need_of(const NormalArgs&);
Need need_of(const PhiloxArgs&);

// Each returns what the launches returned; faults of the kernels themselves appear later, at the
// caller's next synchronisation.
cudaError_t deferral_mask(const MaskArgs&, const Launch&);
cudaError_t deferral_probs(const ProbsArgs&, const Launch&);
cudaError_t deferral_stats(const StatsArgs&, const Launch&);
cudaError_t deferral_sample(const SampleArgs&, const Launch&);
cudaError_t deferral_verify(const VerifyArgs&, const Launch&);
cudaError_t categorical_sample(const CategoricalArgs&, const Launch&);
cudaError_t implicit_reward(const MixtureArgs&, const Launch&);
cudaError_t greedy_knapsack(const KnapsackArgs&, const Launch&);
cudaError_t prelogit_perturb(const PerturbArgs&, const Launch&);
cudaError_t importance_weights(const WeightsArgs&, const Launch&);
cudaError_t control_update(const ControlArgs&, const Launch&);
cudaError_t control_merge(const MergeArgs&, const Launch&);
cudaError_t normal(const NormalArgs&, const Launch&);
cudaError_t philox(const PhiloxArgs&, const Launch&);

}  // namespace cuda
}  // namespace tta
