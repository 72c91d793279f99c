// Registers the CUDA kernels: for every op `X`, `X.out` under the CUDA key.

#include "bind/cuda.h"

#include <map>
#include <mutex>
#include <utility>

#include "bind/ops.h"

namespace tta {
namespace bind {
namespace {

// Arrival counters, zero between the calls of a stream. Kernels of one stream run one after
// another and leave them as they found them, so one tensor a stream serves all calls. At most
// kMostStreams of them are kept, 4 KiB each or more where a call has more rows.
class Counters {
 public:
  // Whoever holds the tensor keeps it alive, also when another thread puts a larger one in its
  // place.
  template <class Make>
  Tensor get(int device, cudaStream_t stream, int64_t count, const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = tensors_.find({device, stream});
    if (found != tensors_.end() && found->second.numel() >= bytes(count)) return found->second;
    int64_t room = 1024;
    while (room < count) room *= 2;
    Tensor made = make(bytes(room));
    // Streams come and go: nobody says which of them still live. What is let go returns to torch's
    // allocator, which gives it to later work of the same stream only.
    if (tensors_.size() >= kMostStreams) tensors_.clear();
    tensors_.insert_or_assign({device, stream}, made);
    return made;
  }
  void drop(int device, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tensors_.erase({device, stream});
  }
  static int64_t bytes(int64_t count) { return count * static_cast<int64_t>(sizeof(uint32_t)); }

 private:
  static constexpr size_t kMostStreams = 256;
  std::mutex mutex_;
  std::map<std::pair<int, cudaStream_t>, Tensor> tensors_;
};

// Never destroyed: at exit the CUDA runtime may be gone first.
Counters& counters() {
  static Counters& made = *new Counters;
  return made;
}

int device_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), name,
                  " is not on a CUDA device, but another argument is; move it there");
  return x.get_device_index();
}

int64_t cuda_version() { return kNativeVersion; }

// Three blocks of 128 threads for each multiprocessor keep its memory busy.
int64_t width_of(int device) {
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "counting multiprocessors", device);
  return 3 * static_cast<int64_t>(processors);
}

}  // namespace

void check_cuda(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  const bool no_image =
      status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, what, " failed on cuda:", device, " with ", cudaGetErrorName(status), ": ",
                  cudaGetErrorString(status),
                  no_image ? "; mend it with: export TORCH_CUDA_ARCH_LIST=<the compute capability "
                             "that tta doctor names>"
                           : "");
}

DeviceGuard::DeviceGuard(int device) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &handle_));
}
DeviceGuard::~DeviceGuard() { aoti_torch_delete_device_guard(handle_); }

Cuda::Cuda(const Tensor& like, const char* name, bool check)
    : device_(device_of(like, name)), guard_(device_) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  if (!check) return;
  STD_TORCH_CHECK(!capturing(),
                  "check is True, which waits for the device and so cannot be captured in a CUDA "
                  "graph; pass check=False");
  const int64_t none = InvalidRow::kNone;
  invalid_ = allocate(sizeof(InvalidRow));
  check_cuda(cudaMemcpyAsync(invalid_->mutable_data_ptr(), &none, sizeof(none),
                             cudaMemcpyHostToDevice, stream_),
             "copying to the device", device_);
}

void Cuda::own(const Tensor& x, const char* name) const {
  STD_TORCH_CHECK(x.is_cuda(), name, " is on another device than cuda:", device_,
                  ", that of the first argument; move it there");
  const int index = x.get_device_index();
  STD_TORCH_CHECK(index == device_, name, " is on cuda:", index, ", expected cuda:", device_,
                  ", the device of the first argument");
}

InvalidRow* Cuda::invalid() {
  static_assert(sizeof(InvalidRow) == sizeof(int64_t), "one number on the device");
  return invalid_ ? static_cast<InvalidRow*>(invalid_->mutable_data_ptr()) : nullptr;
}

InvalidRow Cuda::found() const {
  InvalidRow row;
  if (invalid_) fetch(row.code(), invalid_->const_data_ptr(), sizeof(int64_t), 1, sizeof(int64_t));
  return row;
}

Tensor Cuda::allocate(size_t bytes) const {
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), device_, &made));
  return Tensor(made);
}

// Elements of `size` bytes that lie `pitch` bytes apart.
void Cuda::fetch(void* to, const void* from, size_t size, size_t count, size_t pitch) const {
  if (count == 0) return;
  check_cuda(
      pitch == size
          ? cudaMemcpyAsync(to, from, size * count, cudaMemcpyDeviceToHost, stream_)
          : cudaMemcpy2DAsync(to, size, from, pitch, size, count, cudaMemcpyDeviceToHost, stream_),
      "copying from the device", device_);
  check_cuda(cudaStreamSynchronize(stream_), "waiting for the device", device_);
}

bool Cuda::capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream_, &status), "asking about graph capture", device_);
  return status != cudaStreamCaptureStatusNone;
}

Cuda::Workspace::Workspace(const Cuda& call, const cuda::Need& need) : call_(call) {
  launch.stream = call.stream_;
  launch.width = width_of(call.device_);
  if (need.bytes > 0) {
    scratch_ = call.allocate(need.bytes);
    launch.scratch = scratch_->mutable_data_ptr();
  }
  if (need.arrivals < 1) return;
  const auto zeros = [&](int64_t bytes) {
    Tensor made = call.allocate(static_cast<size_t>(bytes));
    check_cuda(
        cudaMemsetAsync(made.mutable_data_ptr(), 0, static_cast<size_t>(bytes), call.stream_),
        "clearing counters", call.device_);
    return made;
  };
  // A graph may be replayed on any stream, also beside calls of this one: it gets counters of its
  // own. The handle of the per-thread stream stands for a stream of each thread.
  const bool own = call.capturing() || call.stream_ == cudaStreamPerThread;
  arrivals_ = own ? zeros(Counters::bytes(need.arrivals))
                  : counters().get(call.device_, call.stream_, need.arrivals, zeros);
  launch.arrivals = static_cast<uint32_t*>(arrivals_->mutable_data_ptr());
}

void Cuda::Workspace::finish(cudaError_t status, const char* name) {
  // A call that failed half-way may have left counts behind.
  if (status != cudaSuccess) counters().drop(call_.device_, call_.stream_);
  check_cuda(status, name, call_.device_);
}

}  // namespace bind
}  // namespace tta

STABLE_TORCH_LIBRARY_IMPL(tta_ext, CUDA, m) { tta::bind::register_ops<tta::bind::Cuda>(m); }

// No tensor says which device this is for.
STABLE_TORCH_LIBRARY_IMPL(tta_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&tta::bind::cuda_version));
}
