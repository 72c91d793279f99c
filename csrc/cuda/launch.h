// The CUDA kernels, one entry point an operator. Nothing here allocates or waits for the device:
// the caller asks need_of() for scratch memory, hands it over and checks what comes back. The
// arguments hold device pointers, and numbers where the host knows them.
//
// Words of our own in this folder:
//   row            logits of one position: of a batch row, or of one of its K + 1 in verification
//   tile, group    4096 elements of a row, and 128 of a tile; virtual lane l: number l of all
//   groups node           the sum of virtual lanes l and l + 64: the first fold of a canonical sum
//   part           what a lane or a thread has of a tile; in turns: not all lanes at the same one
//   span, columns  how many tiles a block takes, and how many blocks so share a row
//   stage          one launch, in which the last block to arrive at a row decides for the row
//   slot           a model's row at one temperature: base or proxy, at the sampling's or the rule's
//   query          a masked sum of a row: a mass for each tile, which the last block adds up
//   cut            a set in the order of the logits (core/order.h): what comes before an element
//   band, bracket  neighbours in that order that share a counter; those with the critical item
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
  int64_t width = 400;  // blocks that fill the device
};

// Grids have a line of blocks for each row: no division tells a block what it is. More rows than a
// grid has lines take one launch after another.
constexpr int64_t kMostRows = 65535;
inline dim3 grid_of(int columns, int64_t rows_left) {
  return dim3(static_cast<unsigned>(columns),
              static_cast<unsigned>(rows_left < kMostRows ? rows_left : kMostRows));
}

// Tiles that a block takes, one after another or a warp each: one, so that a few rows spread over
// the device, or up to four where there are blocks enough without; what a block does once is then
// done less often.
constexpr int kMostSpan = 4;
inline int span_of(int tiles, int64_t rows, int64_t width) {
  const int64_t spare = tiles * rows / width;
  return spare >= kMostSpan ? kMostSpan : spare >= 2 ? 2 : 1;
}
inline int columns_of(int tiles, int span) { return (tiles + span - 1) / span; }

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
