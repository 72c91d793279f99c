// The CUDA kernels on CPU tensors, as torch operators: the operators of csrc/bind with a device
// that hands tensors to the SIMT layer. tests/simt.py defines their schemas, names the library
// (TTA_SIMT_LIBRARY) and registers the buffers; operators of several builds live side by side.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "bind/ops.h"
#include "bind/ops_prelogit.h"
#include "control.h"
#include "cuda/launch.h"

namespace tta {
namespace bind {
namespace {

class Simt : public Memory {
 public:
  Simt(const Tensor&, const char*, bool check) : check_(check) {}

  void own(const Tensor&, const char*) const {}

  // A number that the host knows if it has no dimension, else a value in device memory.
  template <class T>
  PerRow<T> one(const Tensor& x, const char*, int64_t index = 0) const {
    const T* values = static_cast<const T*>(x.const_data_ptr()) + index;
    if (x.dim() == 0) return PerRow<T>(*values);
    return {values, 0};
  }

  template <class T>
  const T* host(const T* values, int64_t) const {
    return values;
  }
  template <class T>
  const PerRow<T>& host(const PerRow<T>& values, int64_t) const {
    return values;
  }

  InvalidRow* invalid() { return check_ ? &invalid_ : nullptr; }
  const InvalidRow& found() const { return invalid_; }

  void run(const MaskArgs& a) { launch(cuda::deferral_mask, a); }
  void run(const ProbsArgs& a) { launch(cuda::deferral_probs, a); }
  void run(const StatsArgs& a) { launch(cuda::deferral_stats, a); }
  void run(const SampleArgs& a) { launch(cuda::deferral_sample, a); }
  void run(const VerifyArgs& a) { launch(cuda::deferral_verify, a); }
  void run(const CategoricalArgs& a) { launch(cuda::categorical_sample, a); }
  void run(const MixtureArgs& a) { launch(cuda::implicit_reward, a); }
  void run(const KnapsackArgs& a) { launch(cuda::greedy_knapsack, a); }
  void run(const PerturbArgs& a) { launch(cuda::prelogit_perturb, a); }
  void run(const WeightsArgs& a) { launch(cuda::importance_weights, a); }
  void run(const ControlArgs& a) { launch(cuda::control_update, a); }
  void run(const MergeArgs& a) { launch(cuda::control_merge, a); }
  void run(const NormalArgs& a) { launch(cuda::normal, a); }
  void run(const PhiloxArgs& a) { launch(cuda::philox, a); }

 private:
  // Of exactly this size, aligned as on a device, full of `poison`.
  using Buffer = std::unique_ptr<void, decltype(&std::free)>;
  static Buffer allocate(size_t bytes, int poison, const char* name) {
    void* data = nullptr;
    STD_TORCH_CHECK(!bytes || !posix_memalign(&data, 256, bytes), "no memory for ", name);
    if (bytes) std::memset(data, poison, bytes);
    simt::add_buffer(data, bytes, true, name);
    return Buffer(data, &std::free);
  }

  template <class Args>
  void launch(cudaError_t (*kernel)(const Args&, const cuda::Launch&), const Args& a) {
    const cuda::Need need = cuda::need_of(a);
    const size_t counters = static_cast<size_t>(need.arrivals);
    const Buffer scratch = allocate(need.bytes, 0xcd, "scratch");
    const Buffer arrivals = allocate(counters * sizeof(uint32_t), 0, "arrivals");
    if (check_) simt::add_buffer(&invalid_, sizeof invalid_, true, "invalid");
    uint32_t* const count = static_cast<uint32_t*>(arrivals.get());
    cuda::Launch launch{scratch.get(), count};
    // Odd orders pretend that one block fills the device: blocks then take several tiles.
    if (simt::options.seed % 2) launch.width = 1;
    const cudaError_t status = kernel(a, launch);
    const std::string error = simt::error();
    simt::clear_error();
    simt::clear_buffers();
    STD_TORCH_CHECK(error.empty(), "SIMT: ", error);
    STD_TORCH_CHECK(status == cudaSuccess, "SIMT: the launch returned ", static_cast<int>(status));
    for (size_t i = 0; i < counters; ++i)
      STD_TORCH_CHECK(!count[i], "SIMT: arrivals[", i, "] is left at ", count[i]);
  }

  bool check_;
  InvalidRow invalid_;
};

}  // namespace
}  // namespace bind
}  // namespace tta

STABLE_TORCH_LIBRARY_IMPL(TTA_SIMT_LIBRARY, CPU, m) {
  tta::bind::register_ops<tta::bind::Simt>(m);
  tta::bind::register_prelogit_ops<tta::bind::Simt>(m);
}
