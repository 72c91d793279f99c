// categorical_sample, and sampling from or writing out a log-linear mixture of models
// (implicit_reward: proxy tuning, ensembles, contrast).
//
// Problem: B rows of V logits, one draw from softmax(x / T) of each by inverse CDF, or its largest
// logit. Thread map: a block of 128 threads a tile of 4096, or up to four of them where rows enough
// fill the device without (a warp each, if four of 16-bit elements); the block that arrives last at
// a row merges its tiles, chooses the tile the draw falls into and reads that tile again.
// Passes: every logits row once from DRAM, one tile of each again from L2; probabilities read the
// row a second time (L2 permitting) and write 4 V bytes. Mixtures compute their scores from
// (1 + 2 E) rows, in shared memory, and never store them.
// Bytes a row: categorical s V + 4096 s (s bytes an element); mixture (1 + 2 E) s V, probabilities
// twice that + 4 V.
// Determinism: the canonical sum (tile.cuh) and float64 sums over tiles from left to right,
// whatever block arrives last; prefixes inside a tile are exact integers.

#include "cuda/divide.cuh"
#include "cuda/draw.cuh"
#include "cuda/launch.h"
#include "cuda/mixture.cuh"
#include "cuda/statistics.cuh"

namespace tta {
namespace cuda {
namespace {

// The stored row of a plain draw.
struct Categorical {
  static constexpr int kResident = 5;  // blocks a multiprocessor holds at least
  CategoricalArgs a;
  Scratch s;
  uint32_t* arrivals;
  uint32_t first_row = 0;
  int span = 1;
  __device__ __forceinline__ Row reader(int64_t row) const { return Row(a.logits, row, 0); }
  __device__ __forceinline__ float inv_temperature() const { return a.inv_temperature; }
  __device__ __forceinline__ const KeySpec& key() const { return a.key; }
  __device__ __forceinline__ uint32_t stream() const { return a.stream; }
  __device__ __forceinline__ uint32_t number() const { return a.draw; }
  __device__ __forceinline__ int64_t* token() const { return a.token; }
  __device__ __forceinline__ void invalid(int64_t row) const {
    report(a.invalid, row, kBaseLogits);
  }
  __device__ __forceinline__ bool all_have_a_token(int64_t) const { return true; }
};

// The same where the build wants kernels to know their dtype (Typed in kad.cuh).
template <int kType>
struct CategoricalOf : Categorical {
  explicit CategoricalOf(const Categorical& op) : Categorical(op) {}
  __device__ __forceinline__ Row reader(int64_t row) const {
    Logits x = a.logits;
    x.dtype = kType;
    return Row(x, row, 0);
  }
};

struct Mixed {
  static constexpr int kResident = 4;
  MixtureArgs a;
  Scratch s;
  uint32_t* arrivals;
  uint32_t first_row = 0;
  int span = 1;
  __device__ __forceinline__ MixtureRow reader(int64_t row) const { return {a, row}; }
  __device__ __forceinline__ float inv_temperature() const { return a.inv_temperature; }
  __device__ __forceinline__ const KeySpec& key() const { return a.key; }
  __device__ __forceinline__ uint32_t stream() const { return kBase; }
  __device__ __forceinline__ uint32_t number() const { return 0; }
  __device__ __forceinline__ int64_t* token() const { return a.token; }

  // Which tensor is to blame: only asked for when somebody waits for an error, so one block may
  // read every model's row.
  __device__ __forceinline__ void invalid(int64_t row) const {
    if (!a.invalid) return;
    const MixtureRow mixture{a, row};
    const int64_t tensors = 1 + (a.anti.data ? 2 : 1) * a.experts;
    int64_t culprit = 1 + 2 * a.experts;  // the scores themselves
    for (int64_t i = 0; i < tensors; ++i) {
      if (!bad_tensor(mixture, i)) continue;
      culprit = i;
      break;
    }
    report(a.invalid, row, culprit);
  }

  // Each model has a token that it does not rule out. Only pairs can hide that one has none: where
  // both rule all out they say nothing. A warp a tensor; the first tokens tell, as a rule.
  __device__ __forceinline__ bool all_have_a_token(int64_t row) const {
    if (!a.anti.data) return true;
    const MixtureRow mixture{a, row};
    bool empty = false;
    for (int64_t i = warp_id(); i < 2 * a.experts; i += kWarps) {
      if (a.beta[i / 2] == 0.0f) continue;
      const Logits& x = i % 2 ? a.anti : a.expert;
      const char* data = mixture.data(x, i / 2);
      bool found = false;
      for (int64_t first = 0; first < x.vocab && !found; first += 32) {
        const int64_t v = first + lane_id();
        found = __any_sync(kFullWarp, v < x.vocab && read_one(data, x.dtype, v) != -kInfinity);
      }
      empty = empty || !found;
    }
    return !__syncthreads_or(empty);
  }

  __device__ __forceinline__ bool bad_tensor(const MixtureRow& mixture, int64_t i) const {
    const bool is_base = i == 0, is_expert = i >= 1 && i <= a.experts;
    const int64_t e = is_base ? 0 : is_expert ? i - 1 : i - 1 - a.experts;
    const Logits& x = is_base ? a.base : is_expert ? a.expert : a.anti;
    if (!is_base && a.beta[e] == 0.0f) return false;
    const char* data = mixture.data(x, e);
    bool bad = false, finite = false;
    for (int64_t v = threadIdx.x; v < x.vocab; v += kThreads) {
      const float value = read_one(data, x.dtype, v);
      bad = bad || !(value < kInfinity);
      finite = finite || value != -kInfinity;
    }
    bad = __syncthreads_or(bad);
    finite = __syncthreads_or(finite);
    return bad || !finite;
  }
};

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kResident) sampling_draw_kernel(const Op op) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  TTA_SHARED(double, coin);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = op.first_row + blockIdx.y;
  const auto reader = op.reader(row);
  const TileNumbers to = {op.s.tile_max(row, 0), op.s.tiles, op.inv_temperature(), 1.0f, 1};
  block_statistics(reader, static_cast<int>(blockIdx.x), op.span, op.s.tiles, to, weights);
  if (!last_to_arrive(op.arrivals + row, gridDim.x)) return;
  // By a warp that has nothing else to do while the tiles are added up.
  if (threadIdx.x == kThreads - 1 && op.token() && op.key().do_sample)
    coin = uniform_of(op.key(), row, 0, op.stream(), op.number());
  SlotNumbers numbers;
  const bool valid =
      finish_slot(op.s, row, 0, 0, op.inv_temperature(), cum, &numbers) && op.all_have_a_token(row);
  if (!valid) op.invalid(row);
  if (!op.token()) {
    if (threadIdx.x == 0) {
      op.s.state(row).slot[0] = numbers;
      op.s.state(row).valid = valid;
    }
    return;
  }
  int64_t token = -1;
  if (valid && op.key().do_sample)
    token = draw(reader, op.s, row, 0, 0, op.inv_temperature(), numbers.z, coin, cum, weights);
  else if (valid)
    token = first_of_max(reader, op.s, row, 0, numbers.max);
  if (threadIdx.x == 0) op.token()[row] = token;
}

// Probabilities of a tile's staged scores.
template <bool kException>
__device__ __forceinline__ void write_probs(const Tile& tile, const SlotNumbers& numbers,
                                            const DivideBy& z, const float* scores, float* out) {
  const bool vectors = tile.vector && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float w[4];
    take_four(tile, i, scores, w);
    weigh_four(w, numbers.max, numbers.inv_temperature, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = z.quotient<kException>(w[k]);
    put_four_out(tile, i, w, vectors, out);
  }
}

// p(v) = fl32(w / Z) of a mixture, a block a tile.
__global__ void __launch_bounds__(kThreads, 4) sampling_mixture_probs_kernel(const Mixed op) {
  TTA_SHARED_ARRAY(float4, scores4, kTile / 4);
  float* scores = reinterpret_cast<float*>(scores4);
  const uint32_t row = op.first_row + blockIdx.y;
  const int t = static_cast<int>(blockIdx.x);
  const RowState& state = op.s.state(row);
  const SlotNumbers numbers = state.slot[0];
  const MixtureRow reader = op.reader(row);
  const Tile tile = reader.map(t);
  float* out = op.a.probs + row * op.a.probs_stride + static_cast<int64_t>(t) * kTile;
  if (!state.valid) {
    for (int i = static_cast<int>(threadIdx.x); i < tile.count; i += kThreads) out[i] = kNaN;
    return;
  }
  stage(reader, t, tile, scores);
  const DivideBy z(numbers.z);
  if (z.exception())
    write_probs<true>(tile, numbers, z, scores, out);
  else
    write_probs<false>(tile, numbers, z, scores, out);
}

template <class Args>
Scratch scratch_of(const Args&, int64_t vocab, const Launch& launch) {
  Scratch s;
  s.base = static_cast<char*>(launch.scratch);
  s.tiles = tiles_of(vocab);
  s.row_bytes = static_cast<int64_t>(Scratch::bytes_of_row(s.tiles, false));
  return s;
}

template <class Op>
cudaError_t run(Op op, const Launch& launch) {
  const int64_t batch = op.a.batch;
  for (int64_t first = 0; first < batch; first += kMostRows) {
    op.first_row = static_cast<uint32_t>(first);
    const dim3 grid = grid_of(columns_of(op.s.tiles, op.span), batch - first);
    TTA_LAUNCH((sampling_draw_kernel<Op>), grid, kThreads, 0, launch.stream, op);
  }
  return cudaGetLastError();
}

Need need_of_rows(int64_t rows, int64_t vocab) {
  return {static_cast<size_t>(rows) * Scratch::bytes_of_row(tiles_of(vocab), false), rows};
}

}  // namespace

Need need_of(const CategoricalArgs& a) { return need_of_rows(a.batch, a.logits.vocab); }
Need need_of(const MixtureArgs& a) { return need_of_rows(a.batch, a.base.vocab); }

cudaError_t categorical_sample(const CategoricalArgs& a, const Launch& launch) {
  Categorical op{a, scratch_of(a, a.logits.vocab, launch), launch.arrivals};
  op.span = span_of(op.s.tiles, a.batch, launch.width);
#if defined(TTA_CUDA_TYPED)
  if (a.logits.dtype == kFloat32) return run(CategoricalOf<kFloat32>(op), launch);
  if (a.logits.dtype == kFloat16) return run(CategoricalOf<kFloat16>(op), launch);
  return run(CategoricalOf<kBFloat16>(op), launch);
#else
  return run(op, launch);
#endif
}

cudaError_t implicit_reward(const MixtureArgs& a, const Launch& launch) {
  Mixed op{a, scratch_of(a, a.base.vocab, launch), launch.arrivals};
  op.span = span_of(op.s.tiles, a.batch, launch.width);
  for (int64_t first = 0; first < a.batch; first += kMostRows) {
    op.first_row = static_cast<uint32_t>(first);
    const dim3 draws = grid_of(columns_of(op.s.tiles, op.span), a.batch - first);
    TTA_LAUNCH((sampling_draw_kernel<Mixed>), draws, kThreads, 0, launch.stream, op);
    const dim3 tiles = grid_of(op.s.tiles, a.batch - first);
    if (!a.token)
      TTA_LAUNCH((sampling_mixture_probs_kernel), tiles, kThreads, 0, launch.stream, op);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
