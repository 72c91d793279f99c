// Kernels that test the SIMT layer itself, by name. Each is right with bug 0 and has planted bugs
// from 1 up; tests/test_simt.py says what each must report.

#include "simt.h"

#include <map>
#include <string>

namespace simt {
namespace {

struct Arguments {
  const float* input = nullptr;  // read-only
  int64_t inputs = 0;
  float* output = nullptr;
  unsigned* words = nullptr;  // counters, scratch and integer results
  int bug = 0;
};

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

// Sum of a block by halves in shared memory.
template <class T>
__device__ T block_sum(T value, int bug) {
  TTA_SHARED_ARRAY(T, partial, kThreads);
  const int t = threadIdx.x;
  if (bug != 1 || t % 2 == 0) partial[t] = value;  // 1: half of them stay uninitialised
  if (bug != 2) __syncthreads();                   // 2: the tree may start too early
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (bug == 3 && half < kThreads / 2) {  // 3: nobody waits between the levels
      if (t < half) partial[t] += partial[t + half];
      continue;
    }
    if (bug == 4) {  // 4: a part of the block at the barrier
      if (t < half) {
        partial[t] += partial[t + half];
        __syncthreads();
      }
      continue;
    }
    if (t < half) partial[bug == 5 ? t + 1 : t] += partial[t + half];  // 5: into a neighbour's
    __syncthreads();
  }
  return partial[bug == 6 && t == 0 ? kThreads : 0];  // 6: one element beyond the end
}

__global__ void sum_kernel(const float* input, int64_t n, float* output, int bug) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (bug == 10 && i >= n) return;                                // 10: missing at the barriers
  const float x = i < n + (bug == 11) ? input[i] : 0;             // 11: off by one
  if (bug == 12 && i == 0) const_cast<float*>(input)[i] = x + 1;  // 12: not ours to write
  const float total = block_sum(x, bug);
  __syncthreads();
  const int count = block_sum(static_cast<int>(i < n), 0);
  if (threadIdx.x == 0) output[2 * blockIdx.x] = total;
  if (threadIdx.x == (bug == 13 ? 1u : 0u)) output[2 * blockIdx.x + (bug != 13)] = count;
}

void sum(const Arguments& a) {
  TTA_LAUNCH((sum_kernel), blocks_for(a.inputs), kThreads, 0, nullptr, a.input, a.inputs, a.output,
             a.bug);
}

// Each block writes a partial sum; the last one to arrive adds them, in their order.
__global__ void last_block_kernel(const float* input, int64_t n, float* output, unsigned* words,
                                  int bug) {
  TTA_SHARED(bool, last);
  float* const partial = output + 1;
  unsigned* const arrivals = words;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const float total = block_sum(i < n ? input[i] : 0, 0);
  const unsigned writer = bug == 5 ? 1 : 0;  // 5: thread 0's fence comes before thread 1's write
  if (threadIdx.x == writer && bug != 4) partial[blockIdx.x] = total;
  if (threadIdx.x == 0) {
    if (bug != 1) __threadfence();                    // 1: the writer's is missing
    if (bug == 4) partial[blockIdx.x] = total;        // 4: written after it
    const unsigned before = bug == 3 ? (*arrivals)++  // 3: not atomic
                                     : atomicInc(arrivals, gridDim.x - 1);
    last = before == gridDim.x - 1;
    if (last && bug != 2) __threadfence();  // 2: the reader's is missing
  }
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b)
      sum += bug == 6 ? __ldg(partial + b) : __ldcg(partial + b);  // 6: a stale cache
    output[0] = sum;
  }
}

void last_block(const Arguments& a) {
  TTA_LAUNCH((last_block_kernel), blocks_for(a.inputs), kThreads, 0, nullptr, a.input, a.inputs,
             a.output, a.words, a.bug);
}

// Sum of a warp by shuffles.
__global__ void warp_kernel(const float* input, float* output, int bug) {
  const unsigned lane = threadIdx.x % 32;
  float x = input[threadIdx.x];
  if (bug == 1 && lane >= 16) return;  // 1: exited lanes in the mask
  unsigned mask = kAll;
  if (bug == 2) mask = 0xffffu;  // 2: half of the callers are not in the mask
  if (bug == 3) mask = lane < 16 ? 0xffffu : 0xffff0000u;  // 3: reads beyond the mask
  if (bug == 4 && lane < 16) {                             // 4: two places
    x += __shfl_xor_sync(mask, x, 16);
  } else if (bug == 5 && lane < 16) {  // 5: the others never come
    __syncthreads();
  } else {
    x += __shfl_xor_sync(mask, x, 16);
  }
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
  output[threadIdx.x] = x;
}

void warp(const Arguments& a) {
  TTA_LAUNCH((warp_kernel), 1, 64, 0, nullptr, a.input, a.output, a.bug);
}

// A warp hands values on through shared memory.
__global__ void warp_memory_kernel(const float* input, float* output, int bug) {
  TTA_DYNAMIC_SHARED(float, box);
  const unsigned t = threadIdx.x, lane = t % 32;
  box[t] = input[t];
  if (bug == 1) __shfl_sync(kAll, 0, 0);                        // 1: orders no memory
  if (bug == 0 || bug > 3) __syncwarp();                        // 2: nothing at all
  if (bug == 3) __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);  // 3: not with the neighbour
  const float x = box[bug == 4 ? (t + 32) % 64 : t - lane + (lane + 1) % 32];  // 4: other warp's
  if (bug == 5 && t == 63) box[t + 1] = x;                                     // 5: past the end
  __syncwarp();
  box[t] = x;
  output[t] = box[t];
}

void warp_memory(const Arguments& a) {
  TTA_LAUNCH((warp_memory_kernel), 1, 64, 64 * sizeof(float), nullptr, a.input, a.output, a.bug);
}

// Copies with vectors. input + 1 is not aligned to 16 bytes.
__global__ void copy_kernel(const float* input, int64_t n, float* output, int bug) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (4 * i + 3 >= n) return;
  float4 x;
  if (bug == 1) {
    x = __ldg(reinterpret_cast<const float4*>(input + 1) + i);
  } else if (bug == 2) {
    x = reinterpret_cast<const float4*>(input + 1)[i];
  } else {
    x = reinterpret_cast<const float4*>(input)[i];
  }
  reinterpret_cast<float4*>(output)[i] = x;
}

void copy(const Arguments& a) {
  TTA_LAUNCH((copy_kernel), blocks_for(a.inputs / 4), kThreads, 0, nullptr, a.input,
             a.inputs - 2 * 4, a.output, a.bug);
}

// Everybody says the same, or not.
__global__ void same_value_kernel(float* output, int bug) {
  TTA_SHARED(int, flag);
  flag = 7;
  output[0] = bug == 1 ? static_cast<float>(blockIdx.x) : 1;
  if (bug == 2) flag = static_cast<int>(threadIdx.x);
  if (bug == 3) (&flag)[1] = 7;  // beside it
  __syncthreads();
  if (threadIdx.x == 0) output[1 + blockIdx.x] = static_cast<float>(flag);
}

void same_value(const Arguments& a) {
  TTA_LAUNCH((same_value_kernel), 3, kThreads, 0, nullptr, a.output, a.bug);
}

// The order in which threads and blocks come: output[i] is the i-th thread's number.
__global__ void order_kernel(float* output, unsigned* words) {
  const unsigned ticket = atomicAdd(words, 1u);
  output[ticket] = static_cast<float>(blockIdx.x * blockDim.x + threadIdx.x);
}

void order(const Arguments& a) { TTA_LAUNCH((order_kernel), 4, 64, 0, nullptr, a.output, a.words); }

// What stops.
__global__ void stop_kernel(const float* input, float* output, unsigned* words, int bug) {
  TTA_SHARED(int, go);
  if (bug == 1) assert(input[threadIdx.x] < 0);
  if (bug == 2 && threadIdx.x == 3) __trap();
  if (bug == 3)
    while (atomicAdd(words, 0u) == 0) {
    }  // waits for a block that has not started
  if (bug == 4) {
    if (threadIdx.x == 0) go = 0;
    __syncthreads();
    volatile int* const flag = &go;
    while (*flag == 0) {
    }
  }
  if (bug == 5) {
    TTA_SHARED_ARRAY(char, much, 50000);
    much[threadIdx.x] = 0;
  }
  if (bug == 6) {  // two barriers that look alike
    if (threadIdx.x % 2)
      __syncthreads();
    else
      __syncthreads();
  }
  if (bug == 7) {
    float mine = input[threadIdx.x];
    TTA_SHARED(float*, other);
    if (threadIdx.x == 0) other = &mine;
    __syncthreads();
    *other += 1;  // of another thread
  }
  output[threadIdx.x] = 1;
}

void stop(const Arguments& a) {
  if (a.bug == 8)
    return TTA_LAUNCH((stop_kernel), 0, 64, 0, nullptr, a.input, a.output, a.words, 0);
  if (a.bug == 9) {
    return TTA_LAUNCH((stop_kernel), 1, 1025, 0, nullptr, a.input, a.output, a.words, 0);
  }
  if (a.bug == 10) return TTA_LAUNCH((order_kernel), 1, 64, 50 << 10, nullptr, a.output, a.words);
  if (a.bug == 11) {
    cudaMemsetAsync(a.output, 0, sizeof(float) * 100000000);
    return;
  }
  if (a.bug == 0) {
    cudaFuncSetAttribute(stop_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    return TTA_LAUNCH((stop_kernel), 1, 64, 50 << 10, nullptr, a.input, a.output, a.words, 0);
  }
  TTA_LAUNCH((stop_kernel), 1, 64, 0, nullptr, a.input, a.output, a.words, a.bug);
}

// A thread waits for another one of its block; any fair order lets it go on.
__global__ void handshake_kernel(float* output, int bug) {
  TTA_SHARED(unsigned, turn);
  TTA_SHARED(float, gift);
  if (threadIdx.x == 0) turn = 0;
  __syncthreads();
  if (threadIdx.x == 63) {
    gift = 5;
    if (bug != 1) __threadfence_block();  // 1: nothing orders the gift
    atomicExch(&turn, 1u);
  }
  if (threadIdx.x == 0) {
    while (atomicAdd(&turn, 0u) == 0) {
    }
    __threadfence_block();
    output[0] = gift;
  }
}

void handshake(const Arguments& a) {
  TTA_LAUNCH((handshake_kernel), 1, 64, 0, nullptr, a.output, a.bug);
}

// One word for each function and thread: words[64 k + t] of function k. x = t * 2654435761.
__global__ void functions_kernel(const float* input, float* output, unsigned* words) {
  const unsigned t = threadIdx.x, x = t * 2654435761u;
  const int s = static_cast<int>(x);
  unsigned* out = words + t;
  const auto put = [&](unsigned value) {
    *out = value;
    out += 64;
  };
  const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  put(__shfl_sync(kAll, x, 5));
  put(__shfl_sync(kAll, x, static_cast<int>(t) + 3, 8));
  put(__shfl_up_sync(kAll, x, 3));
  put(__shfl_up_sync(kAll, x, 1, 8));
  put(__shfl_down_sync(kAll, x, 5));
  put(__shfl_down_sync(kAll, x, 2, 16));
  put(__shfl_xor_sync(kAll, x, 21));
  put(__shfl_xor_sync(kAll, x, 9, 8));
  put(__ballot_sync(kAll, s > 0));
  put(__ballot_sync(half, s > 0));
  put(static_cast<unsigned>(__any_sync(half, t % 16 == 11)));
  put(static_cast<unsigned>(__all_sync(half, t < 40)));
  put(__reduce_add_sync(kAll, x));
  put(__reduce_min_sync(half, x));
  put(static_cast<unsigned>(__reduce_min_sync(half, s)));
  put(__reduce_max_sync(kAll, x));
  put(static_cast<unsigned>(__reduce_max_sync(kAll, s)));
  put(static_cast<unsigned>(__syncthreads_or(t == 17)));
  put(static_cast<unsigned>(__syncthreads_and(t != 17)));
  put(static_cast<unsigned>(__syncthreads_count(s > 0)));
  put(static_cast<unsigned>(__popc(x)));
  put(static_cast<unsigned>(__clz(s)));
  put(static_cast<unsigned>(__ffs(s)));
  put(__brev(x));
  put(__umulhi(x, 3000000019u));
  put(static_cast<unsigned>(__clzll(static_cast<long long>(x))));
  put(static_cast<unsigned>(__popcll(x * 4294967297ull)));
  put(__float_as_uint(__fmaf_rn(input[t], input[t], -1.0f)));
  put(__float_as_uint(__fdiv_rn(1.0f, input[t])));
  put(__float_as_uint(__fsqrt_rn(input[t])));
  put(min(x, 7u) + max(t, 9u));
  put(atomicMin(words + 64 * 40, 0u));  // nobody changes it: it is 0
  if (t == 0) {
    long long* const wide = reinterpret_cast<long long*>(words + 64 * 41);
    *wide = 3;
    atomicMin(wide, -5ll);
    unsigned* const w = words + 64 * 42;
    *w = 10;
    w[1] = atomicAdd(w, 5u);        // 10, then 15
    w[2] = atomicCAS(w, 15u, 20u);  // 15, then 20
    w[3] = atomicCAS(w, 15u, 30u);  // 20
    w[4] = atomicExch(w, 6u);       // 20, then 6
    w[5] = atomicInc(w, 6u);        // 6, then 0
    w[6] = atomicInc(w, 6u);        // 0, then 1
    w[7] = atomicOr(w, 12u);        // 1, then 13
    w[8] = atomicAnd(w, 7u);        // 13, then 5
    w[9] = atomicMax(w, 9u);        // 5, then 9
  }
  output[t] = static_cast<float>(__activemask() >> t % 32 & 1);
}

void functions(const Arguments& a) {
  TTA_LAUNCH((functions_kernel), 1, 64, 0, nullptr, a.input, a.output, a.words);
}

// Work for a stopwatch: `inputs` steps of a thread, 256 threads, 16 blocks.
__global__ void work_kernel(const float* input, int64_t n, float* output) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum = __fmaf_rn(input[i], 0.5f, sum);
  output[static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x] = sum;
}

void work(const Arguments& a) {
  TTA_LAUNCH((work_kernel), 16, 256, 0, nullptr, a.input, a.inputs, a.output);
}

const std::map<std::string, void (*)(const Arguments&)>& table() {
  static const std::map<std::string, void (*)(const Arguments&)> entries = {
      {"sum", sum},
      {"last_block", last_block},
      {"warp", warp},
      {"copy", copy},
      {"warp_memory", warp_memory},
      {"same_value", same_value},
      {"order", order},
      {"stop", stop},
      {"handshake", handshake},
      {"functions", functions},
      {"work", work},
  };
  return entries;
}

}  // namespace
}  // namespace simt

// Names separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* simt_selftest_names() {
  static const std::string names = [] {
    std::string all;
    for (const auto& entry : simt::table()) all += (all.empty() ? "" : " ") + entry.first;
    return all;
  }();
  return names.c_str();
}

extern "C" __attribute__((visibility("default"))) void simt_selftest_run(
    const char* name, const float* input, int64_t inputs, float* output, unsigned* words, int bug) {
  simt::table().at(name)({input, inputs, output, words, bug});
}
