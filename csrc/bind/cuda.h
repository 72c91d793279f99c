// A call on CUDA tensors. Without `check` nothing here waits for the device: numbers that the host
// knows travel in the kernels' arguments, the others stay where they are, scratch memory comes from
// torch's allocator, which orders it by stream.
#pragma once

#include <vector>

#include "bind/stable.h"
#include "cuda/launch.h"

namespace tta {
namespace bind {

// Throws in one sentence if a CUDA call failed.
void check_cuda(cudaError_t status, const char* what, int device);

// Sets the current device and puts the old one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuardHandle handle_ = nullptr;
};

// What was copied from the device, for the host to read.
template <class T>
class HostCopy {
 public:
  explicit HostCopy(std::vector<T> values) : values_(std::move(values)) {}
  T operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }

 private:
  std::vector<T> values_;
};

class Cuda : public Memory {
 public:
  Cuda(const Tensor& like, const char* name, bool check);

  void own(const Tensor& x, const char* name) const;

  template <class T>
  PerRow<T> one(const Tensor& x, const char* name, int64_t index = 0) const {
    const T* values = static_cast<const T*>(x.const_data_ptr()) + index;
    if (x.is_cpu()) return PerRow<T>(*values);
    own(x, name);
    return {values, 0};
  }

  template <class T>
  HostCopy<T> host(const T* values, int64_t n, int64_t stride = 1) const {
    std::vector<T> copy(static_cast<size_t>(n));
    fetch(copy.data(), values, sizeof(T), copy.size(), static_cast<size_t>(stride) * sizeof(T));
    return HostCopy<T>(std::move(copy));
  }
  template <class T>
  HostCopy<T> host(const PerRow<T>& rows, int64_t n) const {
    if (!rows.data) return HostCopy<T>(std::vector<T>(static_cast<size_t>(n), rows.value));
    if (rows.stride) return host(rows.data, n, rows.stride);
    return host(rows.data, n < 1 ? n : 1);
  }

  // On the device; null without check.
  InvalidRow* invalid();
  InvalidRow found() const;

  void run(const MaskArgs& a) const { launch(cuda::deferral_mask, a, "deferral_mask"); }
  void run(const ProbsArgs& a) const { launch(cuda::deferral_probs, a, "deferral_probs"); }
  void run(const StatsArgs& a) const { launch(cuda::deferral_stats, a, "deferral_stats"); }
  void run(const SampleArgs& a) const {
    launch(cuda::deferral_sample, a, a.propose ? "deferral_propose" : "deferral_sample");
  }
  void run(const VerifyArgs& a) const { launch(cuda::deferral_verify, a, "deferral_verify"); }
  void run(const CategoricalArgs& a) const {
    launch(cuda::categorical_sample, a, "categorical_sample");
  }
  void run(const MixtureArgs& a) const { launch(cuda::implicit_reward, a, "implicit_reward"); }
  void run(const KnapsackArgs& a) const { launch(cuda::greedy_knapsack, a, "greedy_knapsack"); }
  void run(const PerturbArgs& a) const { launch(cuda::prelogit_perturb, a, "prelogit_perturb"); }
  void run(const WeightsArgs& a) const {
    launch(cuda::importance_weights, a, "importance_weights");
  }
  void run(const ControlArgs& a) const {
    // Also what keeps the kernel's grid within its bounds.
    STD_TORCH_CHECK(a.steps <= kWord, "mean has ", a.steps, " steps, expected at most 2**32");
    launch(cuda::control_update, a, "control_update");
  }
  void run(const MergeArgs& a) const { launch(cuda::control_merge, a, "control_merge"); }
  void run(const NormalArgs& a) const { launch(cuda::normal, a, "normal"); }
  void run(const PhiloxArgs& a) const { launch(cuda::philox, a, "philox"); }

 private:
  template <class Args>
  void launch(cudaError_t (*kernel)(const Args&, const cuda::Launch&), const Args& a,
              const char* name) const {
    const cuda::Need need = cuda::need_of(a);
    Workspace work(*this, need);
    work.finish(kernel(a, work.launch), name);
  }

  // Memory of one call, freed (in the order of the stream) when the call has been launched.
  class Workspace {
   public:
    Workspace(const Cuda& call, const cuda::Need& need);
    void finish(cudaError_t status, const char* name);
    cuda::Launch launch;

   private:
    const Cuda& call_;
    std::optional<Tensor> scratch_, arrivals_;
  };

  Tensor allocate(size_t bytes) const;
  void fetch(void* to, const void* from, size_t size, size_t count, size_t pitch) const;
  bool capturing() const;

  int device_;
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::optional<Tensor> invalid_;
};

}  // namespace bind
}  // namespace tta
