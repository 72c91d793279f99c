// Adaptive importance sampling on pre-logits, while rollouts run: `prelogit_perturb` adds the
// controlled noise v = u + sigma eps to a batch of hidden rows, `normal` writes eps out.
//
// One pass over hidden and u, one over out. eps is made 1024 dimensions at a time, in L1.
// Bytes: a row moves d (2 s + 4), s bytes an element of hidden, and 4 d of u are shared by the rows
// of a prompt at the same step. Bound by the arithmetic of the noise.
//
// Arithmetic: v = fl(u + fl(sigma eps)), out = hidden's dtype of fl(hidden + v), all in float32;
// v = u where sigma is 0. dot is the canonical sum (cpu/canonical.h) of u eps, a lane adding by
// fma in float32, tiles in float64, rounded to float32 and added to what dot holds.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // cpu/noise.h says why
#endif

#define TTA_TARGET_FILE "cpu/prelogit.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/canonical.h"
#include "cpu/denormals.h"
#include "cpu/noise.h"

namespace tta {
namespace TTA_ISA {

constexpr int kEpsChunk = 1024;  // dimensions of noise made ahead, whole groups of 128
static_assert(kTile % kEpsChunk == 0 && kEpsChunk % kLanes == 0 && kLanes % kNoiseStep == 0,
              "tiles are whole chunks, chunks whole groups, groups whole steps");

// Everything about one row that its groups share.
struct Perturbation {
  const NoiseKey& key;
  NoiseStream stream;
  uint32_t rollout;
  float sigma;
};

// 128 dimensions.
template <int kType>
TTA_INLINE void perturb_group(float sigma, const float* eps, const float* u, const char* hidden,
                              char* out, F* acc) {
  const F scale = set1(sigma);
  for (int k = 0; k < kAcc; ++k) {
    const int j = k * kWidth;
    const F mean = load(u + j), noise = load(eps + j);
    acc[k] = fma(mean, noise, acc[k]);
    const F v = sigma == 0.0f ? mean : add(mean, mul(scale, noise));
    store_as<kType>(out, j, add(load_as<kType>(hidden, j), v));
  }
}

// Dimensions [begin, end), at most kEpsChunk, into the sums of their tile.
template <int kType>
static void perturb_chunk(const Perturbation& p, int64_t begin, int64_t end, const float* u,
                          const char* hidden, char* out, F* acc) {
  constexpr int kBytes = kType == kFloat32 ? 4 : 2;
  alignas(64) float noise[kEpsChunk];
  noise_steps(p.key, p.stream, p.rollout, begin, (end - begin + kLanes - 1) / kLanes * kLanes,
              noise);
  const float* eps = noise;
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes, eps += kLanes)
    perturb_group<kType>(p.sigma, eps, u + d, hidden + d * kBytes, out + d * kBytes, acc);
  if (d == end) return;
  const size_t count = static_cast<size_t>(end - d);
  float u_tail[kLanes] = {};  // beyond the row u is 0 and adds nothing to the sum
  char row_tail[kLanes * kBytes] = {};
  std::memcpy(u_tail, u + d, count * sizeof(float));
  std::memcpy(row_tail, hidden + d * kBytes, count * kBytes);
  perturb_group<kType>(p.sigma, eps, u_tail, row_tail, row_tail, acc);
  std::memcpy(out + d * kBytes, row_tail, count * kBytes);
}

template <int kType>
static float perturb_row(const Perturbation& p, int64_t dim, const float* u, const char* hidden,
                         char* out) {
  double total = 0.0;
  for (int64_t tile = 0; tile < dim; tile += kTile) {
    const int64_t end = tile + kTile < dim ? tile + kTile : dim;
    F acc[kAcc];
    for (int k = 0; k < kAcc; ++k) acc[k] = set1(0.0f);
    for (int64_t d = tile; d < end; d += kEpsChunk)
      perturb_chunk<kType>(p, d, d + kEpsChunk < end ? d + kEpsChunk : end, u, hidden, out, acc);
    total += static_cast<double>(fold(acc));
  }
  return static_cast<float>(total);
}

static void perturb_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const PerturbArgs& a = *static_cast<const PerturbArgs*>(context);
  const NoiseKey key(seed_bits(a.seed));
  const int64_t bytes = dtype_bytes(a.dtype);
  for (int64_t row = begin; row < end; ++row) {
    const char* hidden = static_cast<const char*>(a.hidden) + row * a.hidden_stride * bytes;
    char* out = static_cast<char*>(a.out) + row * a.out_stride * bytes;
    const int64_t step = a.step[row];
    if (step < 0 || step >= a.steps) {
      std::memmove(out, hidden, static_cast<size_t>(a.dim * bytes));
      continue;
    }
    int64_t prompt = a.prompt[row];  // out of range only where nobody asked for a check
    prompt = prompt < 0 ? 0 : prompt < a.prompts ? prompt : a.prompts - 1;
    const float* u = a.mean + prompt * a.mean_prompt_stride + step * a.mean_step_stride;
    const NoiseStream stream(key, static_cast<uint32_t>(step),
                             static_cast<uint32_t>(a.sequence[row]));
    const uint32_t rollout = static_cast<uint32_t>(a.rollout[row]) & 0xffffu;
    const Perturbation p{key, stream, stream.rollout(counter_word3(kNoise, a.iteration, rollout)),
                         a.sigma};
    a.dot[row] += a.dtype == kFloat32   ? perturb_row<kFloat32>(p, a.dim, u, hidden, out)
                  : a.dtype == kFloat16 ? perturb_row<kFloat16>(p, a.dim, u, hidden, out)
                                        : perturb_row<kBFloat16>(p, a.dim, u, hidden, out);
  }
}

void prelogit_perturb(const PerturbArgs& a, const Parallel& parallel) {
  parallel.run(a.rows, parallel.grain, perturb_body, const_cast<PerturbArgs*>(&a));
}

// ---- normal ------------------------------------------------------------------------------------

constexpr int64_t kNormalTask = 1 << 14;  // floats a task, a multiple of 4

static void normal_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const NormalArgs& a = *static_cast<const NormalArgs*>(context);
  const NoiseKey key(seed_bits(a.seed));
  const NoiseStream stream(key, a.step, a.sequence);
  const int64_t first = begin * kNormalTask, last = end * kNormalTask;
  noise_range(key, stream, stream.rollout(a.word3), first, last < a.count ? last : a.count,
              a.out + first);
}

void normal(const NormalArgs& a, const Parallel& parallel) {
  parallel.run((a.count + kNormalTask - 1) / kNormalTask, 1, normal_body,
               const_cast<NormalArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void prelogit_perturb(const PerturbArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(prelogit_perturb, a, parallel)
}
void normal(const NormalArgs& a, const Parallel& parallel) { TTA_DISPATCH(normal, a, parallel) }
#endif

}  // namespace tta
