// A call on CPU tensors: pointers go to the kernels as they are, work to the process's thread pool.
#pragma once

#include "bind/stable.h"
#include "core/philox.h"
#include "cpu/kernels.h"

namespace tta {
namespace bind {

inline void run_parallel(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t),
                         void* context) {
  if (n <= grain) {
    if (n > 0) body(context, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// The thread pool, for rows of this much work: about 16384 elements are worth a task.
inline Parallel pool(int64_t elements) {
  constexpr int64_t kElementsPerTask = 1 << 14;
  return {run_parallel,
          elements >= kElementsPerTask || elements < 1 ? 1 : kElementsPerTask / elements};
}
constexpr Parallel row_pool() { return {run_parallel, 1}; }

class Cpu : public Memory {
 public:
  Cpu(const Tensor&, const char*, bool) {}

  // The dispatcher chose the CPU because no tensor lies elsewhere.
  void own(const Tensor&, const char*) const {}

  template <class T>
  PerRow<T> one(const Tensor& x, const char*, int64_t index = 0) const {
    return {static_cast<const T*>(x.const_data_ptr()) + index, 0};
  }

  template <class T>
  const T* host(const T* values, int64_t) const {
    return values;
  }
  template <class T>
  const PerRow<T>& host(const PerRow<T>& values, int64_t) const {
    return values;
  }

  InvalidRow* invalid() { return &invalid_; }
  const InvalidRow& found() const { return invalid_; }

  void run(const MaskArgs& a) const { tta::deferral_mask(a, pool(a.base.vocab)); }
  void run(const ProbsArgs& a) const { tta::deferral_probs(a, pool(a.base.vocab)); }
  void run(const StatsArgs& a) const { tta::deferral_stats(a, pool(a.base.vocab)); }
  void run(const SampleArgs& a) const { tta::deferral_sample(a, pool(a.base.vocab)); }
  void run(const VerifyArgs& a) const { tta::deferral_verify(a, row_pool()); }
  void run(const CategoricalArgs& a) const { tta::categorical_sample(a, pool(a.logits.vocab)); }
  void run(const MixtureArgs& a) const { tta::implicit_reward(a, pool(a.base.vocab)); }
  void run(const KnapsackArgs& a) const { tta::greedy_knapsack(a, pool(a.items)); }
  void run(const PerturbArgs& a) const { tta::prelogit_perturb(a, pool(a.dim)); }
  void run(const WeightsArgs& a) const { tta::importance_weights(a); }
  void run(const ControlArgs& a) const {
    tta::control_update(a, pool((a.dim < kControlTask ? a.dim : kControlTask) * a.rollouts));
  }
  void run(const MergeArgs& a) const { tta::control_merge(a, row_pool()); }
  void run(const NormalArgs& a) const { tta::normal(a, row_pool()); }
  void run(const PhiloxArgs& a) const {
    const auto low = static_cast<uint32_t>(a.key_low[0]);
    const auto high = static_cast<uint32_t>(a.key_high[0]);
    for (int64_t i = 0; i < a.blocks; ++i) {
      Philox4 block;
      for (int j = 0; j < 4; ++j) block.x[j] = static_cast<uint32_t>(a.counter[4 * i + j]);
      block = philox4x32(block, low, high);
      for (int j = 0; j < 4; ++j) a.out[4 * i + j] = block.x[j];
    }
  }

 private:
  InvalidRow invalid_;
};

}  // namespace bind
}  // namespace tta
