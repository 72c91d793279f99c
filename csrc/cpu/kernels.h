// The CPU kernels.
#pragma once

#include "core/params.h"

namespace tta {

// Runs body(context, begin, end) over chunks of [0, n), none of them shorter than `grain` (but for
// the last); injected by the binding so that the kernels use the caller's thread pool.
struct Parallel {
  void (*run)(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
  int64_t grain = 1;  // fewest rows worth a task
};

// control_update is cut into tasks of one step and at most this many dimensions.
constexpr int64_t kControlTask = 1 << 11;

// Implemented by cpu/NAME.cpp; each runs the active instruction set.
void deferral_mask(const MaskArgs&, const Parallel&);
void deferral_probs(const ProbsArgs&, const Parallel&);
void deferral_stats(const StatsArgs&, const Parallel&);
void deferral_sample(const SampleArgs&, const Parallel&);
void deferral_verify(const VerifyArgs&, const Parallel&);
void categorical_sample(const CategoricalArgs&, const Parallel&);
void implicit_reward(const MixtureArgs&, const Parallel&);
void greedy_knapsack(const KnapsackArgs&, const Parallel&);
void prelogit_perturb(const PerturbArgs&, const Parallel&);
void importance_weights(const WeightsArgs&);
void control_update(const ControlArgs&, const Parallel&);
void control_merge(const MergeArgs&, const Parallel&);
void normal(const NormalArgs&, const Parallel&);

}  // namespace tta
