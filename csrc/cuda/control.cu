// Adaptive importance sampling on pre-logits, after the rewards are known: `importance_weights`,
// `control_update` (u + sigma sum_i w_i eps^i, with eps made anew) and `control_merge`. The bits
// are those of csrc/cpu/control.cpp.
//
// Order of summation. A sum over rollouts is the pairwise tree over the rollout index, padded to a
// power of two. Whether a missing leaf is skipped or added as a zero changes at most the sign of a
// zero somewhere inside: x + (+-0) = x for x != 0, and a zero's sign is lost in every sum but one
// of zeros. What leaves the tree has +0 added to it, which ends that too. So each kernel is free to
// skip or to pad, and neither threads nor blocks can change a bit; no atomics are used but for the
// lowest invalid row.
//
// importance_weights: one block of 128 threads a prompt, scores and sums in float64. Four passes
//   over the prompt's rollouts, which stay in L1: checks and max r, max s, exp, w. Bytes: 16 P n.
//   The tree: 32 neighbours by shuffles, then a warp's aligned run of such groups as a binary
//   counter, level l in lane l, then the warps.
//
// control_update: bound by arithmetic: P tau d n normals, four from a Philox block. Thread map: a
//   warp has 128 dimensions of one (prompt, step), a lane 4 of them, and an aligned slice of the
//   rollouts; 1, 2 or 4 warps of a block share the rollouts of one such task, the more the fewer
//   tasks there are. A prompt has a line of blocks. A warp looks at 32 rollouts at a time: each
//   lane reads one weight and length and works out which finished subtrees that leaf closes; the
//   leaves that count are written out in order, so that rollouts of weight 0 or already ended cost
//   nothing. Finished subtrees wait in shared memory, 16 bytes a thread each, at most 17 of them
//   (2 + log2 of the slice places); nothing grows with n tau d. Registers hold the round keys and
//   all products that no rollout changes. Bytes: 8 P tau d.
//
// control_merge: a thread an element (or four), all shards. Bytes: 4 count (shards + 2). Shards go
//   eight at a time as a tree in registers; runs of eight wait in shared memory like the above.

#include "cuda/block.cuh"
#include "cuda/launch.h"
#include "cuda/noise.cuh"

namespace tta {
namespace cuda {
namespace {

__device__ __forceinline__ bool finite(float x) { return sub_rn(x, x) == 0.0f; }

int log2_of(int64_t power_of_two) {
  int n = 0;
  for (; power_of_two > 1; power_of_two >>= 1) ++n;
  return n;
}

int64_t padded_count(int64_t n) {
  int64_t padded = 1;
  while (padded < n) padded *= 2;
  return padded;
}

// ---- importance_weights ------------------------------------------------------------------------

// The pairwise tree over leaf(0) .. leaf(n - 1), known to every thread. A warp has an aligned run
// of `groups` times 32 leaves, a power of two; its subtrees of 2^l groups wait in lane l.
template <class Leaf>
__device__ __forceinline__ double tree_sum(int64_t n, int64_t groups, Leaf leaf) {
  TTA_SHARED_ARRAY(double, part, kWarps);
  const int lane = lane_id();
  double waiting = 0.0, x = 0.0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t i = (warp_id() * groups + group) * 32 + lane;
    x = i < n ? leaf(i) : 0.0;
    for (int m = 1; m < 32; m *= 2) x = add_rn(x, __shfl_xor_sync(kFullWarp, x, m));
    int level = 0;
    for (int64_t index = group; index & 1; index >>= 1)
      x = add_rn(__shfl_sync(kFullWarp, waiting, level++), x);
    if (lane == level) waiting = x;
  }
  if (lane == 0) part[warp_id()] = x;
  __syncthreads();
  double node[kWarps];
  for (int w = 0; w < kWarps; ++w) node[w] = part[w];
  for (int m = 1; m < kWarps; m *= 2)
    for (int w = 0; w < kWarps; w += 2 * m) node[w] = add_rn(node[w], node[w + m]);
  __syncthreads();
  return node[0];
}

// s_i in float64.
struct Score {
  double top, inv_lambda, slack;  // max r, 1 / lambda, (1 - alpha) / sigma
  __device__ __forceinline__ double operator()(float reward, float dot, float norm2) const {
    const double gain = mul_rn(sub_rn(static_cast<double>(reward), top), inv_lambda);
    const double drift = mul_rn(slack, static_cast<double>(dot));
    const double cost = mul_rn(mul_rn(mul_rn(0.5, slack), slack), static_cast<double>(norm2));
    return sub_rn(sub_rn(gain, drift), cost);
  }
};

// Larger for the larger reward, and for the lower index among equals.
__device__ __forceinline__ unsigned long long rank(float reward, int64_t i) {
  const uint32_t u = device::scalar_bits(add_rn(reward, 0.0f));  // -0 is +0
  const uint32_t ordered = u >> 31 ? ~u : u | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(i));
}

struct Prompt {
  const float *reward, *dot, *norm2;
  float *weights, *ess;
  int64_t rollouts, groups;  // groups: runs of 32 rollouts a warp
};

// Weights and ESS of one prompt; false, for all threads, if no score is a number to go by.
__device__ __forceinline__ bool weights_row(const Prompt& p, int64_t best, double inv_lambda,
                                            double slack) {
  const Score score{static_cast<double>(p.reward[best]), inv_lambda, slack};
  double top = -static_cast<double>(kInfinity);
  bool numbers = true;
  for (int64_t i = threadIdx.x; i < p.rollouts; i += kThreads) {
    const double s = score(p.reward[i], p.dot[i], p.norm2[i]);
    numbers = numbers && s == s;
    top = s > top ? s : top;
  }
  top = block_reduce(top, Max());
  if (__syncthreads_or(!numbers) || sub_rn(top, top) != 0.0) return false;
  const double total = tree_sum(p.rollouts, p.groups, [&](int64_t i) {
    const double s = score(p.reward[i], p.dot[i], p.norm2[i]);
    const float w = device::exp(device::F{__double2float_rn(sub_rn(s, top))}).v;
    p.weights[i] = w;
    return static_cast<double>(w);
  });
  // The tree gives a rollout to the same thread again: it reads what it wrote itself.
  const double squares = tree_sum(p.rollouts, p.groups, [&](int64_t i) {
    const double w = div_rn(static_cast<double>(p.weights[i]), total);
    const float rounded = __double2float_rn(w);
    p.weights[i] = rounded;
    return mul_rn(static_cast<double>(rounded), static_cast<double>(rounded));
  });
  if (threadIdx.x == 0) *p.ess = __double2float_rn(div_rn(1.0, squares));
  return true;
}

__global__ void __launch_bounds__(kThreads)
    importance_weights_kernel(WeightsArgs a, int64_t first, int64_t groups, double inv_lambda,
                              double slack) {
  const int64_t row = first + blockIdx.y, n = a.rollouts;
  const Prompt p{a.reward + row * a.reward_stride,
                 a.dot + row * a.dot_stride,
                 a.norm2 + row * a.norm2_stride,
                 a.weights + row * n,
                 a.ess + row,
                 n,
                 groups};
  int bad = kScores;  // the first input that cannot be used; kScores: none
  unsigned long long best = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float r = p.reward[i];
    if (!finite(r) && r != -kInfinity) bad = bad < kRewardInput ? bad : kRewardInput;
    if (!finite(p.dot[i])) bad = bad < kDotInput ? bad : kDotInput;
    if (!finite(p.norm2[i])) bad = bad < kNorm2Input ? bad : kNorm2Input;
    const unsigned long long mine = rank(r, i);
    best = r != -kInfinity && mine > best ? mine : best;
  }
  best = block_reduce(best, Max());
  bad = block_reduce(bad, Min());
  if (best == 0) bad = kRewardInput;
  const int64_t winner = 0xffffffffu - static_cast<uint32_t>(best);
  if (bad == kScores && a.lambda == 0.0) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) p.weights[i] = i == winner ? 1.0f : 0.0f;
    if (threadIdx.x == 0) *p.ess = 1.0f;
    return;
  }
  if (bad == kScores && weights_row(p, winner, inv_lambda, slack)) return;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) p.weights[i] = kNaN;
  if (threadIdx.x != 0) return;
  *p.ess = kNaN;
  report(a.invalid, row, bad);
}

// ---- control_update ----------------------------------------------------------------------------

constexpr int kUpdateThreads = 128;
constexpr int kUpdateWarps = kUpdateThreads / 32;
constexpr int kChunk = 32;         // rollouts a warp looks at together: one a lane
constexpr int kChunkLevels = 5;    // of the tree inside a chunk
constexpr int64_t kSpan = 4 * 32;  // dimensions of a warp

// How the work is cut. A task is kSpan dimensions of one step of a prompt; 2^slices warps of a
// block share its rollouts, `slice` of them each, of `rollouts` in [start, stop).
struct UpdateShape {
  int64_t tasks;   // of a prompt: the caller sees to it that 32 bits number them
  uint32_t spans;  // tasks of a step
  int slices;
  int start, slice, stop;
  int places;  // in shared memory, for each thread
};

UpdateShape update_shape(const ControlArgs& a) {
  // Three warps for each scheduler of the largest GPUs, if the rollouts give as much; more slices
  // than that only add prologues and unevenness.
  constexpr int64_t kEnoughWarps = 3 * 528;
  UpdateShape s;
  s.spans = static_cast<uint32_t>((a.dim + kSpan - 1) / kSpan);
  s.tasks = a.steps * s.spans;
  s.stop = static_cast<int>(a.stop < a.rollouts ? a.stop : a.rollouts);
  s.start = static_cast<int>(a.start < s.stop ? a.start : s.stop);
  const int64_t padded = padded_count(s.stop - s.start);
  s.slices = 0;
  while ((1 << s.slices) < kUpdateWarps && (a.prompts * s.tasks) << s.slices < kEnoughWarps &&
         padded >> s.slices >= 4)
    ++s.slices;
  s.slice = static_cast<int>(padded >> s.slices);
  s.places = 2 + log2_of(s.slice);
  return s;
}

// A thread's places in the block's [place][thread]: the sum of its latest chunk with what that has
// closed, then the open subtrees inside a chunk, then those of whole chunks.
struct Places {
  float4* first;
  __device__ __forceinline__ float4& operator[](int k) const { return first[k * kUpdateThreads]; }
};

// Leaf `i` of a chunk whose leaves are `mask`: it closes its meetings with subtrees to the left
// that are lower than its meeting with the next leaf, or all of them if it is the last one.
__device__ __forceinline__ int merges_of(uint32_t mask, int i) {
  if ((mask & (mask + 1u)) == 0)  // none is missing before the last one, as is usual
    return mask >> i == 1u ? __popc(static_cast<unsigned>(i)) : __ffs(~i) - 1;
  const uint32_t later = mask & ~((2u << i) - 1u);
  const int levels = later ? 31 - __clz(i ^ (__ffs(static_cast<int>(later)) - 1)) : kChunkLevels;
  int merges = 0;
  for (int level = 0; level < kChunkLevels; ++level) {
    const uint32_t width = 1u << level;
    const uint32_t left = mask >> ((static_cast<uint32_t>(i) & ~(width - 1u)) ^ width);
    merges += level < levels && (i & width) && (left & ((1u << width) - 1u));
  }
  return merges;
}

constexpr int kChunkPlaces = 1;
constexpr int kUpperPlaces = kChunkPlaces + kChunkLevels + 1;

// The sum over the `count` leaves of one chunk. The rightmost subtree is in registers: a leaf joins
// it, or lays it down and takes its place.
__device__ __forceinline__ float4 chunk_sum(const NoiseStream& stream, uint32_t block,
                                            const int4* leaf, int count, const Places& place) {
  float4* top = &place[kChunkPlaces];
  float4 sum = same<float4>(0.0f);  // laid down too, by the first leaf
#pragma unroll 1
  for (const int4* end = leaf + count; leaf != end; ++leaf) {
    const int4 raw = *leaf;
    const float4 x = mul(__int_as_float(raw.x), noise(stream, block, static_cast<uint32_t>(raw.y)));
    if (raw.z == 0) {
      *top = sum;
      top += kUpdateThreads;
      sum = x;
      continue;
    }
    sum = add(sum, x);
#pragma unroll 1
    for (int merges = raw.z; merges != 1; --merges) {
      top -= kUpdateThreads;
      sum = add(*top, sum);
    }
  }
  return sum;
}

// place[0] and the subtrees of chunks at `levels`, which all lie to its left, from the lowest up.
__device__ __forceinline__ float4 closed(const Places& place, uint32_t levels) {
  float4 sum = place[0];
#pragma unroll 1
  for (; levels; levels &= levels - 1u)
    sum = add(place[kUpperPlaces + __ffs(static_cast<int>(levels)) - 1], sum);
  return sum;
}

// The sum over rollouts begin .. end - 1 of one prompt, for four dimensions, into place[0].
__device__ __forceinline__ void slice_sum(const ControlArgs& a, const NoiseStream& stream,
                                          uint32_t block, int64_t prompt, int begin, int end,
                                          int4* leaves, const Places& place) {
  uint32_t open = 0;  // levels of the tree of chunks at which a left subtree waits
  int last = -1;
  place[0] = same<float4>(0.0f);
#pragma unroll 1
  for (int base = begin; base < end; base += kChunk) {
    const int i = base + lane_id();
    const int64_t at = prompt * a.rollouts + i;
    float weight = i < end ? a.weights[at] : 0.0f;
    if (a.length && weight != 0.0f && static_cast<int64_t>(stream.step) >= a.length[at])
      weight = 0.0f;
    const uint32_t mask = __ballot_sync(kFullWarp, weight != 0.0f);
    if (!mask) continue;
    __syncwarp();  // the last readers of `leaves`: weight, counter word 3, subtrees it closes
    if (weight != 0.0f) {
      const uint32_t word3 = counter_word3(kNoise, a.iteration, static_cast<uint32_t>(i));
      leaves[__popc(mask & ((1u << lane_id()) - 1u))] =
          make_int4(__float_as_int(weight), static_cast<int>(word3), merges_of(mask, lane_id()), 0);
    }
    __syncwarp();
    const float4 x = chunk_sum(stream, block, leaves, __popc(mask), place);
    const int chunk = (base - begin) / kChunk;
    if (last >= 0) {
      const int level = 31 - __clz(last ^ chunk);
      const uint32_t below = (1u << level) - 1u;
      place[kUpperPlaces + level] = closed(place, open & below);
      open = (open & ~below) | (1u << level);
    }
    place[0] = x;
    last = chunk;
  }
  place[0] = closed(place, open);
}

// kWhole: rows of mean and out are made of whole, aligned groups of four.
template <bool kWhole>
__global__ void __launch_bounds__(kUpdateThreads, 8)
    control_update_kernel(ControlArgs a, UpdateShape shape, int64_t first) {
  TTA_DYNAMIC_SHARED(float4, subtrees);
  TTA_SHARED_ARRAY(int4, leaves, kUpdateWarps * kChunk);
  const Places place{subtrees + threadIdx.x};
  const int slice = warp_id() & ((1 << shape.slices) - 1);
  const uint32_t task =
      (blockIdx.x * kUpdateWarps + static_cast<uint32_t>(warp_id())) >> shape.slices;
  const bool active = task < shape.tasks;
  const int64_t prompt = first + blockIdx.y;
  const uint32_t step = task / shape.spans;
  const uint32_t block = (task % shape.spans) * 32 + static_cast<uint32_t>(lane_id());

  bool bad = false;
#pragma unroll 4
  for (int i = lane_id(); i < static_cast<int>(a.rollouts); i += 32)
    bad |= !finite(a.weights[prompt * a.rollouts + i]);
  bad = __any_sync(kFullWarp, bad);
  if (active && !bad) {
    const NoiseStream stream =
        noise_stream(a.seed, step, static_cast<uint32_t>(a.sequence[prompt]));
    const int begin = shape.start + slice * shape.slice;
    const int end = begin + shape.slice < shape.stop ? begin + shape.slice : shape.stop;
    slice_sum(a, stream, block, prompt, begin, end, leaves + warp_id() * kChunk, place);
  } else {
    place[0] = same<float4>(0.0f);
  }
  for (int m = 0; m < shape.slices; ++m) {  // the tree goes on over the warps of the task
    __syncthreads();
    if ((slice & ((2 << m) - 1)) == 0) place[0] = add(place[0], subtrees[threadIdx.x + (32u << m)]);
  }
  if (!active || slice != 0) return;
  const int64_t d = static_cast<int64_t>(block) * 4;
  if (d >= a.dim) return;
  float4 sum = add(place[0], same<float4>(0.0f));
  const int64_t at = (prompt * a.steps + step) * a.dim + d;
  if (!a.partial) sum = add(load4<kWhole>(a.mean + at, a.dim - d), mul(a.sigma, sum));
  store4<kWhole>(a.out + at, a.dim - d, bad ? same<float4>(kNaN) : sum);
}

// ---- control_merge -----------------------------------------------------------------------------

constexpr int kMergeGroup = 8;  // shards that go together, in registers

// T: float, or float4 where everything is aligned to it. count: in units of T.
template <class T>
__global__ void __launch_bounds__(kThreads)
    control_merge_kernel(const T* mean, const T* partials, T* out, int64_t shards, int64_t count,
                         float sigma) {
  TTA_DYNAMIC_SHARED(float4, shared);
  T* place = reinterpret_cast<T*>(shared) + threadIdx.x;  // [level][thread]
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const T zero = same<T>(0.0f);
  T sum = zero;
  for (int64_t first = 0; first < shards; first += kMergeGroup) {
    T node[kMergeGroup];
    for (int k = 0; k < kMergeGroup; ++k)
      node[k] = first + k < shards ? partials[(first + k) * count + at] : zero;
    for (int m = 1; m < kMergeGroup; m *= 2)
      for (int k = 0; k < kMergeGroup; k += 2 * m) node[k] = add(node[k], node[k + m]);
    sum = node[0];
    int level = 0;
    for (int64_t group = first / kMergeGroup; group & 1; group >>= 1)
      sum = add(place[level++ * kThreads], sum);
    if (first + kMergeGroup < shards) place[level * kThreads] = sum;
  }
  out[at] = add(mean[at], mul(sigma, add(sum, zero)));
}

// 2^31 blocks, the most of a line, would be terabytes.
template <class T>
void launch_merge(const MergeArgs& a, cudaStream_t stream) {
  const int64_t count = a.count / static_cast<int64_t>(sizeof(T) / sizeof(float));
  const int levels = a.shards > kMergeGroup ? log2_of(a.shards / kMergeGroup) : 1;
  const size_t shared = static_cast<size_t>(levels) * kThreads * sizeof(T);
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  TTA_LAUNCH((control_merge_kernel<T>), blocks, kThreads, shared, stream,
             reinterpret_cast<const T*>(a.mean), reinterpret_cast<const T*>(a.partials),
             reinterpret_cast<T*>(a.out), a.shards, count, a.sigma);
}

cudaError_t copy(const float* from, float* to, int64_t count, cudaStream_t stream) {
  if (from == to) return cudaSuccess;
  return cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(float),
                         cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

Need need_of(const WeightsArgs&) { return {}; }
Need need_of(const ControlArgs&) { return {}; }
Need need_of(const MergeArgs&) { return {}; }

cudaError_t importance_weights(const WeightsArgs& a, const Launch& launch) {
  if (a.prompts == 0) return cudaSuccess;
  const int64_t groups = padded_count((a.rollouts + kThreads - 1) / kThreads);
  const double inv_lambda = a.lambda == 0.0 ? 0.0 : 1.0 / a.lambda;
  const double slack = a.sigma == 0.0 ? 0.0 : (1.0 - a.alpha) / a.sigma;
  for (int64_t first = 0; first < a.prompts; first += kMostRows)
    TTA_LAUNCH((importance_weights_kernel), grid_of(1, a.prompts - first), kThreads, 0,
               launch.stream, a, first, groups, inv_lambda, slack);
  return cudaGetLastError();
}

cudaError_t control_update(const ControlArgs& a, const Launch& launch) {
  const int64_t count = a.prompts * a.steps * a.dim;
  if (count == 0) return cudaSuccess;
  if (a.sigma == 0.0f && !a.partial) return copy(a.mean, a.out, count, launch.stream);
  const UpdateShape shape = update_shape(a);
  const bool whole = a.dim % 4 == 0 && aligned(a.mean, 16) && aligned(a.out, 16);
  const int64_t tasks = kUpdateWarps >> shape.slices;  // of a block
  const int columns = static_cast<int>((shape.tasks + tasks - 1) / tasks);
  const size_t shared = static_cast<size_t>(shape.places) * kUpdateThreads * sizeof(float4);
  for (int64_t first = 0; first < a.prompts; first += kMostRows) {
    const dim3 grid = grid_of(columns, a.prompts - first);
    if (whole) {
      TTA_LAUNCH((control_update_kernel<true>), grid, kUpdateThreads, shared, launch.stream, a,
                 shape, first);
    } else {
      TTA_LAUNCH((control_update_kernel<false>), grid, kUpdateThreads, shared, launch.stream, a,
                 shape, first);
    }
  }
  return cudaGetLastError();
}

cudaError_t control_merge(const MergeArgs& a, const Launch& launch) {
  if (a.count == 0) return cudaSuccess;
  if (a.sigma == 0.0f) return copy(a.mean, a.out, a.count, launch.stream);
  if (a.count % 4 == 0 && aligned(a.mean, 16) && aligned(a.partials, 16) && aligned(a.out, 16))
    launch_merge<float4>(a, launch.stream);
  else
    launch_merge<float>(a, launch.stream);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
