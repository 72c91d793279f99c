// Adaptive importance sampling on pre-logits, while rollouts run: `prelogit_perturb` adds the
// controlled noise v = u + sigma eps to a batch of hidden rows, `normal` writes eps out. The bits
// are those of csrc/cpu/prelogit.cpp.
//
// prelogit_perturb. Thread map: a block of 64 to 256 threads a tile of 4096 dimensions of a row,
//   fewer the more tiles there are, because each warp has to get ready. A warp has an unbroken run
//   of the tile, a thread the elements 4 l .. 4 l + 3 of every 128 of it: one Philox block each,
//   loads and stores of 16 bytes (8 of 16-bit types) where all rows are aligned, else one by one.
//   Passes: hidden and u once, out once. Bytes a row: d (2 s + 4), s bytes an element of hidden;
//   rows of a prompt at the same step share u's 4 d. Bound by the arithmetic of the noise.
//
//   A whole tile in one block, although a few rows leave most of the GPU idle: a tile is eight
//   Philox blocks for each lane of a warp scheduler, little beside handing partial sums over
//   through memory (write, fence, counter, read), which spreading it would need. Several tiles of a
//   row, which would follow each other, do go to blocks of their own; the one that arrives last
//   adds them.
//
//   dot. eps and u wait in shared memory, and one warp adds u eps by fma, 128 virtual lanes, four a
//   thread, in order of dimension, folds them by shuffles, and tiles are added in float64 from left
//   to right: the canonical sum, whatever block comes last.
//
// normal. Thread map: a thread 2, 4 or 8 Philox blocks, as many as leave blocks enough for the
//   device; a block an unbroken run, its threads side by side. Bytes: 4 n.

#include "cuda/block.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/launch.h"
#include "cuda/noise.cuh"
#include "cuda/tile.cuh"

namespace tta {
namespace cuda {
namespace {

constexpr int kMostWarps = 8, kFewestWarps = 2;  // of a block of prelogit_perturb
constexpr int kTileQuads = kTile / 4;

// Elements of hidden and out in fours. Plain loads, not those of read-only memory that logits are
// read by: out may be hidden.
template <int kType, bool kWhole>
struct Four {
  using Element = uint16_t;
  uint2 bits;

  __device__ __forceinline__ void load(const Element* p, int64_t left) {
    if constexpr (kWhole) {
      bits = *reinterpret_cast<const uint2*>(p);
    } else {
      uint32_t raw[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) raw[k] = k < left ? p[k] : 0u;
      bits = make_uint2(raw[0] | raw[1] << 16, raw[2] | raw[3] << 16);
    }
  }
  __device__ __forceinline__ void store(Element* p, int64_t left) const {
    if constexpr (kWhole) {
      __stcg(reinterpret_cast<uint2*>(p), bits);
    } else {
      const uint32_t raw[4] = {bits.x, bits.x >> 16, bits.y, bits.y >> 16};
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < left) p[k] = static_cast<uint16_t>(raw[k] & 0xffffu);
    }
  }
  __device__ __forceinline__ float4 floats() const {
    return make_float4(widened<kType>(static_cast<uint16_t>(bits.x & 0xffffu)),
                       widened<kType>(static_cast<uint16_t>(bits.x >> 16)),
                       widened<kType>(static_cast<uint16_t>(bits.y & 0xffffu)),
                       widened<kType>(static_cast<uint16_t>(bits.y >> 16)));
  }
  __device__ __forceinline__ void round(float4 x) {
    bits = make_uint2(narrowed<kType>(x.x, x.y), narrowed<kType>(x.z, x.w));
  }
};

template <bool kWhole>
struct Four<kFloat32, kWhole> {
  using Element = float;
  float4 x;

  __device__ __forceinline__ void load(const float* p, int64_t left) { x = load4<kWhole>(p, left); }
  __device__ __forceinline__ void store(float* p, int64_t left) const {
    store4<kWhole>(p, left, x);
  }
  __device__ __forceinline__ float4 floats() const { return x; }
  __device__ __forceinline__ void round(float4 y) { x = y; }
};

// The canonical sum of u eps over the first `quads` groups of four of a tile, in the first thread
// of the warp that calls it. factors: kTileQuads groups of eps, then those of u.
__device__ __forceinline__ float dot_of(const float4* factors, int quads) {
  float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int q = lane_id(); q < quads; q += 32) {
    const float4 eps = factors[q], u = factors[kTileQuads + q];
    lane[0] = fma_rn(u.x, eps.x, lane[0]);
    lane[1] = fma_rn(u.y, eps.y, lane[1]);
    lane[2] = fma_rn(u.z, eps.z, lane[2]);
    lane[3] = fma_rn(u.w, eps.w, lane[3]);
  }
  return fold(lane);
}

// kWhole: rows of hidden, out and mean are made of whole, aligned groups of four.
template <int kType, bool kWhole>
__global__ void __launch_bounds__(32 * kMostWarps, 3)
    prelogit_perturb_kernel(PerturbArgs a, int run, double* sums, uint32_t* arrivals) {
  TTA_SHARED_ARRAY(float4, factors, 2 * kTileQuads);
  using Element = typename Four<kType, kWhole>::Element;
  constexpr int kUnroll = kWhole ? 4 : 2;  // more would be for the instruction cache to pay
  const int64_t row = blockIdx.x, tiles = gridDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTile;
  const int dim = static_cast<int>(a.dim - first < kTile ? a.dim - first : kTile);
  const int quads = static_cast<int>(static_cast<unsigned>(dim + 3) / 4);
  const int begin = warp_id() * run + lane_id();  // run: groups of four that a warp has
  const int end = quads < (warp_id() + 1) * run ? quads : (warp_id() + 1) * run;
  const Element* hidden = static_cast<const Element*>(a.hidden) + row * a.hidden_stride + first;
  Element* out = static_cast<Element*>(a.out) + row * a.out_stride + first;

  const int64_t step = a.step[row];
  if (step < 0 || step >= a.steps) {  // the same in all tiles of the row
#pragma unroll 1
    for (int q = begin; q < end; q += 32) {
      Four<kType, kWhole> x;
      x.load(hidden + q * 4, dim - q * 4);
      x.store(out + q * 4, dim - q * 4);
    }
    return;
  }

  int64_t prompt = a.prompt[row];  // out of range only where nobody asked for a check
  prompt = prompt < 0 ? 0 : prompt < a.prompts ? prompt : a.prompts - 1;
  const float* u = a.mean + prompt * a.mean_prompt_stride + step * a.mean_step_stride + first;
  const NoiseStream stream =
      noise_stream(a.seed, static_cast<uint32_t>(step), static_cast<uint32_t>(a.sequence[row]));
  const uint32_t word3 =
      counter_word3(kNoise, a.iteration, static_cast<uint32_t>(a.rollout[row]) & 0xffffu);
  const bool still = a.sigma == 0.0f;
  const Element* from = hidden + begin * 4;
  Element* to = out + begin * 4;
  const float* mean_at = u + begin * 4;
  float4* place = factors + begin;
  uint32_t block = static_cast<uint32_t>(first / 4) + static_cast<uint32_t>(begin);
#pragma unroll kUnroll
  for (int q = begin; q < end; q += 32) {
    Four<kType, kWhole> x;
    x.load(from, dim - q * 4);
    const float4 mean = load4<kWhole>(mean_at, dim - q * 4);
    const float4 eps = noise(stream, block, word3);
    place[0] = eps;
    place[kTileQuads] = mean;
    x.round(add(x.floats(), still ? mean : add(mean, mul(a.sigma, eps))));
    x.store(to, dim - q * 4);
    from += kLanes;
    to += kLanes;
    mean_at += kLanes;
    place += 32;
    block += 32;
  }
  __syncthreads();
  const float sum = warp_id() == 0 ? dot_of(factors, quads) : 0.0f;
  if (tiles == 1) {  // + 0: a sum over tiles starts there
    if (threadIdx.x == 0) a.dot[row] = add_rn(a.dot[row], add_rn(sum, 0.0f));
    return;
  }
  if (threadIdx.x == 0) sums[row * tiles + blockIdx.y] = static_cast<double>(sum);
  if (!last_to_arrive(arrivals + row, gridDim.y) || threadIdx.x != 0) return;
  double total = 0.0;
#pragma unroll 1
  for (int64_t t = 0; t < tiles; ++t) total = add_rn(total, __ldcg(sums + row * tiles + t));
  a.dot[row] = add_rn(a.dot[row], __double2float_rn(total));
}

// Warps of a block, for tiles of `groups` of kLanes elements: as few as still make eight for each
// of the blocks that fill the device.
int warps_of(int64_t tiles, int groups, const Launch& launch) {
  int warps = kMostWarps;
  while (warps > groups || (warps > kFewestWarps && tiles * warps >= 16 * launch.width)) warps /= 2;
  return warps;
}

template <int kType>
void launch_perturb(const PerturbArgs& a, const Launch& launch) {
  const int64_t tiles = tiles_of(a.dim);
  const int groups = static_cast<int>(((a.dim < kTile ? a.dim : kTile) + kLanes - 1) / kLanes);
  const int warps = warps_of(a.rows * tiles, groups, launch);
  const int run = (groups + warps - 1) / warps * 32;
  const unsigned threads = static_cast<unsigned>(warps) * 32;
  double* sums = static_cast<double*>(launch.scratch);
  constexpr uintptr_t kBytes = kType == kFloat32 ? 16 : 8;
  const bool whole =
      (a.dim | a.hidden_stride | a.out_stride | a.mean_prompt_stride | a.mean_step_stride) % 4 ==
          0 &&
      aligned(a.hidden, kBytes) && aligned(a.out, kBytes) && aligned(a.mean, 16);
  // Rows along the longer side of a grid; the shorter one takes 2^28 dimensions.
  const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>(tiles));
  if (whole) {
    TTA_LAUNCH((prelogit_perturb_kernel<kType, true>), grid, threads, 0, launch.stream, a, run,
               sums, launch.arrivals);
  } else {
    TTA_LAUNCH((prelogit_perturb_kernel<kType, false>), grid, threads, 0, launch.stream, a, run,
               sums, launch.arrivals);
  }
}

// ---- normal ------------------------------------------------------------------------------------

constexpr int kNormalThreads = 64;

template <bool kWhole>
__global__ void __launch_bounds__(kNormalThreads) normal_kernel(NormalArgs a, int each) {
  constexpr int kStride = 4 * kNormalThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * each * kStride;
  const int64_t rest = a.count - first;
  const int count = rest < each * kStride ? static_cast<int>(rest) : each * kStride;
  const int thread = static_cast<int>(threadIdx.x);
  const NoiseStream stream = noise_stream(a.seed, a.step, a.sequence);
  uint32_t block = static_cast<uint32_t>(first / 4) + threadIdx.x;
  float* out = a.out + first + 4 * thread;
#pragma unroll 2
  for (int left = count - 4 * thread; left > 0; left -= kStride) {
    store4<kWhole>(out, left, noise(stream, block, a.word3));
    out += kStride;
    block += kNormalThreads;
  }
}

}  // namespace

Need need_of(const PerturbArgs& a) {
  const int64_t tiles = tiles_of(a.dim);
  if (tiles == 1) return {};
  return {static_cast<size_t>(a.rows * tiles) * sizeof(double), a.rows};
}

Need need_of(const NormalArgs&) { return {}; }

cudaError_t prelogit_perturb(const PerturbArgs& a, const Launch& launch) {
  if (a.rows == 0 || a.dim == 0) return cudaSuccess;
  if (a.dtype == kFloat32)
    launch_perturb<kFloat32>(a, launch);
  else if (a.dtype == kFloat16)
    launch_perturb<kFloat16>(a, launch);
  else
    launch_perturb<kBFloat16>(a, launch);
  return cudaGetLastError();
}

cudaError_t normal(const NormalArgs& a, const Launch& launch) {
  if (a.count == 0) return cudaSuccess;
  // 2^31 blocks, the most of a line, would be terabytes.
  constexpr int kStride = 4 * kNormalThreads;
  const int64_t pairs = (a.count + 2 * kStride - 1) / (2 * kStride);
  const int each = 2 * span_of(1, pairs, launch.width);
  const unsigned blocks = static_cast<unsigned>((a.count + each * kStride - 1) / (each * kStride));
  if (a.count % 4 == 0 && aligned(a.out, 16)) {
    TTA_LAUNCH((normal_kernel<true>), blocks, kNormalThreads, 0, launch.stream, a, each);
  } else {
    TTA_LAUNCH((normal_kernel<false>), blocks, kNormalThreads, 0, launch.stream, a, each);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
