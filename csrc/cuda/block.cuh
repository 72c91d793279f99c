// A thread block as one worker: reductions, broadcasts, and the last block of a row.
#pragma once

#include "cuda/device.cuh"

namespace tta {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// `combine` of one value a thread, known to every thread. Any order: for exact operations only.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op combine) {
  for (int n = 16; n >= 1; n /= 2) value = combine(value, __shfl_xor_sync(kFullWarp, value, n));
  return value;
}
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, Op combine) {
  TTA_SHARED_ARRAY(T, part, kWarps);
  value = warp_reduce(value, combine);
  if (lane_id() == 0) part[warp_id()] = value;
  __syncthreads();
  value = part[0];
  for (int w = 1; w < kWarps; ++w) value = combine(value, part[w]);
  __syncthreads();
  return value;
}

// The sum of the values of the lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_scan(T value) {
#pragma unroll
  for (int n = 1; n < 32; n *= 2) {
    const T other = __shfl_up_sync(kFullWarp, value, n);
    if (lane_id() >= n) value += other;
  }
  return value;
}

// The sum of the values of the threads before this one; without a difference, which would cancel.
// `all`: of all threads.
template <class T>
__device__ __forceinline__ T block_scan(T value, T* all = nullptr) {
  TTA_SHARED_ARRAY(T, part, kWarps);
  const T sum = warp_scan(value);
  if (lane_id() == 31) part[warp_id()] = sum;
  __syncthreads();
  T before = __shfl_up_sync(kFullWarp, sum, 1);
  if (lane_id() == 0) before = T(0);
  T total = T(0);
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) before += part[w];
    total += part[w];
  }
  if (all) *all = total;
  __syncthreads();
  return before;
}

// Counts this block in; true in the block that arrives last of `expected`, which then sees
// everything the others wrote. Leaves the counter at zero for the next launch.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t expected) {
  int last = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) + 1 == expected;
    if (last) {
      atomicExch(counter, 0u);
      __threadfence();
    }
  }
  return __syncthreads_or(last);
}

// An invalid row is reported by the lowest code; nothing is, where nobody asks.
__device__ __forceinline__ void report(InvalidRow* invalid, int64_t row, int64_t tensor) {
  if (threadIdx.x == 0 && invalid)
    atomicMin(reinterpret_cast<long long*>(invalid->code()),
              static_cast<long long>(InvalidRow::encode(row, tensor)));
}

}  // namespace cuda
}  // namespace tta
