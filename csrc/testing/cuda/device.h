// Memory on the device beside memory on the host, and calls on both, for the tests of the CUDA
// kernels. Under the SIMT layer (TTA_SIMT) the device is the host and memory plain memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/launch.h"
#include "testing/check.h"
#include "testing/host.h"

#if defined(TTA_SIMT)
#include "control.h"
#endif

namespace tta {
namespace testing {

enum Side : int { kHost = 0, kDevice = 1 };

#if defined(TTA_SIMT)

inline bool has_device() { return true; }
inline void* device_allocate(size_t bytes) {
  return std::aligned_alloc(256, (bytes / 256 + 1) * 256);
}
inline void device_free(void* p) { std::free(p); }
inline void to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void to_host(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline std::string device_fault() { return simt::error(); }

#else

inline void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
inline void* device_allocate(size_t bytes) {
  void* p = nullptr;
  require(cudaMalloc(&p, bytes ? bytes : 1));
  return p;
}
inline void device_free(void* p) { require(cudaFree(p)); }
inline void to_device(void* to, const void* from, size_t bytes) {
  if (bytes) require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
inline void to_host(void* to, const void* from, size_t bytes) {
  if (bytes) require(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
inline std::string device_fault() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

#endif

// `count` elements on both sides, exactly as long as they must be, `skip` elements behind an
// address aligned to 256 bytes. Unwritten elements are the same on both sides and unlikely.
template <class T>
class Twin {
 public:
  explicit Twin(int64_t count, int64_t skip = 0)
      : count_(static_cast<size_t>(count)),
        skip_(static_cast<size_t>(skip)),
        host_(std::malloc(bytes() ? bytes() : 1), std::free),
        device_(device_allocate((count_ + skip_) * sizeof(T)), device_free) {
    std::memset(host_.get(), 0xcd, bytes());
    upload();
  }
  T* at(Side side) const {
    return side == kHost ? static_cast<T*>(host_.get()) : static_cast<T*>(device_.get()) + skip_;
  }
  T& operator[](int64_t i) const { return at(kHost)[i]; }
  int64_t count() const { return static_cast<int64_t>(count_); }
  // Makes the device's copy the host's.
  void upload() const { to_device(at(kDevice), at(kHost), bytes()); }
  std::vector<char> download() const {
    std::vector<char> data(bytes());
    to_host(data.data(), at(kDevice), bytes());
    return data;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  size_t count_, skip_;
  std::unique_ptr<void, void (*)(void*)> host_, device_;
};

template <class T>
Twin<T> twin_of(const std::vector<T>& values, int64_t skip = 0) {
  Twin<T> twin(static_cast<int64_t>(values.size()), skip);
  for (int64_t i = 0; i < twin.count(); ++i) twin[i] = values[static_cast<size_t>(i)];
  twin.upload();
  return twin;
}

// The cell that invalid rows are reported in.
class InvalidTwin {
 public:
  InvalidTwin() : cell(1) {
    cell[0] = InvalidRow::kNone;
    cell.upload();
  }
  InvalidRow* at(Side side) const { return reinterpret_cast<InvalidRow*>(cell.at(side)); }
  Twin<int64_t> cell;
};

template <class T>
bool same_number(T a, T b) {
  return !std::memcmp(&a, &b, sizeof(T)) || (a != a && b != b);  // NaNs' payloads do not matter
}

// What both sides wrote must be the same, bit for bit. `what` names the output, `where` the case.
template <class T>
void compare(const char* what, const std::string& where, const Twin<T>& twin) {
  const std::vector<char> data = twin.download();
  for (int64_t i = 0; i < twin.count(); ++i) {
    T device;
    std::memcpy(&device, data.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    const bool equal = same_number(twin[i], device);
    CHECK(equal, "%s[%" PRId64 "]: cpu %.17g, cuda %.17g (%s)", what, i,
          static_cast<double>(twin[i]), static_cast<double>(device), where.c_str());
    if (!equal) return;
  }
}
inline void compare(const char* what, const std::string& where, const InvalidTwin& twin) {
  compare(what, where, twin.cell);
}

// Launch::width of the calls that follow.
inline int64_t& device_width() {
  static int64_t width = cuda::Launch().width;
  return width;
}

// A CUDA entry point with scratch memory of any content and counters that must come back zero.
template <class Args>
void call_cuda(cudaError_t (*entry)(const Args&, const cuda::Launch&), const Args& a,
               const std::string& where) {
  const cuda::Need need = cuda::need_of(a);
  const Twin<char> scratch(static_cast<int64_t>(need.bytes));
  const Twin<uint32_t> arrivals =
      twin_of(std::vector<uint32_t>(static_cast<size_t>(need.arrivals), 0));
  cuda::Launch launch;
  launch.scratch = scratch.at(kDevice);
  launch.arrivals = arrivals.at(kDevice);
  launch.width = device_width();
  const cudaError_t error = entry(a, launch);
  CHECK(error == cudaSuccess, "launch failed with code %d (%s)", static_cast<int>(error),
        where.c_str());
  const std::string fault = device_fault();
  CHECK(fault.empty(), "%s (%s)", fault.c_str(), where.c_str());
  if (!fault.empty()) std::exit(finish("kernels_test"));  // the device may be lost
  compare("arrivals", where, arrivals);
}

// Both sides on the arguments that `make(side)` gives.
template <class Args, class Make>
void call_both(void (*cpu)(const Args&, const Parallel&),
               cudaError_t (*entry)(const Args&, const cuda::Launch&), const Make& make,
               const std::string& where) {
  cpu(make(kHost), kSerial);
  call_cuda(entry, make(kDevice), where);
}

}  // namespace testing
}  // namespace tta
