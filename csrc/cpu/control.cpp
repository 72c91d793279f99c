// Adaptive importance sampling on pre-logits, after the rewards are known: `importance_weights`,
// `control_update` (u + sigma sum_i w_i eps^i, with eps made anew) and `control_merge`.
//
// Sums over rollouts are pairwise trees over the rollout index, padded to a power of two; what is
// missing, has weight 0 or has ended is no leaf. So any aligned range of rollouts is a subtree, its
// sum can be made elsewhere, and control_merge finishes with the same bits. Adding the zeros that
// are left out could at most turn -0 into +0; every sum that leaves here has its -0 made +0.
//
// control_update walks the tree once per block of dimensions (64 with AVX-512). Its finished
// subtrees wait on a stack of at most 17 blocks, in L1; nothing grows with rollouts x steps x
// dimensions. Bytes: 8 P tau d; the work is P n tau d normals.
//
// Arithmetic, all in float32: a leaf is fl(w eps), nodes fl(left + right), and the new mean is
// fl(u + fl(sigma sum)): with one weight of 1 that is the v of this rollout, bit for bit.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // cpu/noise.h says why
#endif

#define TTA_TARGET_FILE "cpu/control.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/canonical.h"
#include "cpu/denormals.h"
#include "cpu/noise.h"

namespace tta {
namespace TTA_ISA {

// ---- importance_weights ------------------------------------------------------------------------

// A pairwise tree over numbers that come in order.
class PairwiseSum {
 public:
  void add(double x) {
    for (int64_t n = count_++; n & 1; n >>= 1) x = stack_[--top_] + x;
    stack_[top_++] = x;
  }
  double total() const {
    double x = 0.0;
    for (int k = top_; k-- > 0;) x = stack_[k] + x;
    return x;
  }

 private:
  double stack_[64];
  int top_ = 0;
  int64_t count_ = 0;
};

static bool finite(float x) { return x - x == 0.0f; }

// Which input of a row cannot be used, or kUsable.
static int unusable(const float* reward, const float* dot, const float* norm2, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    if (!finite(reward[i]) && reward[i] != -kInfinity) return kRewardInput;
    any = any || reward[i] != -kInfinity;
  }
  if (!any) return kRewardInput;
  for (int64_t i = 0; i < n; ++i)
    if (!finite(dot[i])) return kDotInput;
  for (int64_t i = 0; i < n; ++i)
    if (!finite(norm2[i])) return kNorm2Input;
  return kUsable;
}

// s_i in float64.
struct Score {
  double top, inv_lambda, slack;  // max r, 1 / lambda, (1 - alpha) / sigma
  double operator()(float reward, float dot, float norm2) const {
    const double gain = (static_cast<double>(reward) - top) * inv_lambda;
    const double drift = slack * static_cast<double>(dot);
    const double cost = (0.5 * slack * slack) * static_cast<double>(norm2);
    return (gain - drift) - cost;
  }
};

// Weights and ESS of a usable row; false if no score is a number to go by.
static bool weights_row(const WeightsArgs& a, const float* reward, const float* dot,
                        const float* norm2, float* weights, float* ess) {
  const int64_t n = a.rollouts;
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (reward[i] > reward[best]) best = i;
  if (a.lambda == 0.0) {
    for (int64_t i = 0; i < n; ++i) weights[i] = i == best ? 1.0f : 0.0f;
    *ess = 1.0f;
    return true;
  }
  const Score score{static_cast<double>(reward[best]), 1.0 / a.lambda,
                    a.sigma == 0.0 ? 0.0 : (1.0 - a.alpha) / a.sigma};
  double top = -std::numeric_limits<double>::infinity();
  bool numbers = true;
  for (int64_t i = 0; i < n; ++i) {
    const double s = score(reward[i], dot[i], norm2[i]);
    numbers = numbers && s == s;
    top = s > top ? s : top;
  }
  if (!numbers || top - top != 0.0) return false;
  for (int64_t i = 0; i < n; ++i)
    weights[i] = static_cast<float>(score(reward[i], dot[i], norm2[i]) - top);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(weights + i, exp(load(weights + i)));
  for (; i < n; ++i) weights[i] = exp_scalar(weights[i]);
  PairwiseSum z, squares;
  for (i = 0; i < n; ++i) z.add(static_cast<double>(weights[i]));
  const double total = z.total();
  for (i = 0; i < n; ++i) {
    weights[i] = static_cast<float>(static_cast<double>(weights[i]) / total);
    squares.add(static_cast<double>(weights[i]) * static_cast<double>(weights[i]));
  }
  *ess = static_cast<float>(1.0 / squares.total());
  return true;
}

void importance_weights(const WeightsArgs& a) {
  const KeepDenormals guard;
  for (int64_t row = 0; row < a.prompts; ++row) {
    const int64_t at = row * a.rollouts;
    const float* reward = a.reward + row * a.reward_stride;
    const float* dot = a.dot + row * a.dot_stride;
    const float* norm2 = a.norm2 + row * a.norm2_stride;
    int bad = unusable(reward, dot, norm2, a.rollouts);
    if (bad == kUsable && !weights_row(a, reward, dot, norm2, a.weights + at, a.ess + row))
      bad = kScores;
    if (bad == kUsable) continue;
    a.invalid->note(row, bad);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < a.rollouts; ++i) a.weights[at + i] = nan;
    a.ess[row] = nan;
  }
}

// ---- control_update ----------------------------------------------------------------------------

constexpr int kMaxLevels = 17;  // 2^16 rollouts

// A rollout that counts at this step, and how many finished subtrees it closes.
struct Leaf {
  float weight;
  uint32_t rollout;  // for philox_pack
  int32_t merges;
};

static int bit_length(uint32_t x) {
  int n = 0;
  for (; x; x >>= 1) ++n;
  return n;
}

// The leaves of one prompt and step in order. Two neighbours meet at the level of the highest bit
// in which their indices differ; a leaf closes every meeting before it that is lower than the next.
static int64_t find_leaves(const ControlArgs& a, int64_t prompt, int64_t step,
                           const NoiseStream& stream, Leaf* leaves) {
  const float* weights = a.weights + prompt * a.rollouts;
  const int64_t* length = a.length ? a.length + prompt * a.rollouts : nullptr;
  const int64_t stop = a.stop < a.rollouts ? a.stop : a.rollouts;
  int meeting[kMaxLevels + 1];
  int open = 0;
  int64_t count = 0, last = 0;
  for (int64_t i = a.start; i < stop; ++i) {
    if (weights[i] == 0.0f || (length && step >= length[i])) continue;
    if (count) {
      const int level = bit_length(static_cast<uint32_t>(last ^ i));
      for (; open && meeting[open - 1] < level; --open) ++leaves[count - 1].merges;
      meeting[open++] = level;
    }
    const uint32_t word3 = counter_word3(kNoise, a.iteration, static_cast<uint32_t>(i));
    leaves[count++] = {weights[i], stream.rollout(word3), 0};
    last = i;
  }
  if (count) leaves[count - 1].merges += open;
  return count;
}

// Finished subtrees of one block of dimensions, four vectors each.
struct Stack {
  F node[kMaxLevels + 1][4];
  int top = 0;
  TTA_INLINE void push(const Leaf& leaf, const F* eps) {
    const F w = set1(leaf.weight);
    F x[4];
    for (int k = 0; k < 4; ++k) x[k] = mul(w, eps[k]);
    for (int m = 0; m < leaf.merges; ++m) {
      --top;
      for (int k = 0; k < 4; ++k) x[k] = add(node[top][k], x[k]);
    }
    for (int k = 0; k < 4; ++k) node[top][k] = x[k];
    ++top;
  }
};

TTA_INLINE void leaf_words(const NoiseKey& key, const NoiseStream& stream, const Leaf* leaves,
                           const uint32_t* block, I* a, I* b) {
  uint32_t rollout[kNoisePack];
  for (int n = 0; n < kNoisePack; ++n) rollout[n] = leaves[n].rollout;
  philox_pack<kNoisePack>(key, stream, rollout, block, a, b);
}

TTA_INLINE void push_leaves(const Leaf* leaves, const I* a, const I* b, Stack* stack) {
  F eps[4 * kNoisePack];
  normal_words<kNoisePack>(a, b, eps);
  for (int n = 0; n < kNoisePack; ++n) stack->push(leaves[n], eps + 4 * n);
}

// The sum over the leaves for kBlock dimensions from `d`, in order of dimension. As in noise_steps,
// the words of the next leaves are made beside the normals of these.
static void block_sum(const NoiseKey& key, const NoiseStream& stream, const Leaf* leaves,
                      int64_t count, int64_t d, F* sum) {
  uint32_t block[kNoisePack];
  for (int n = 0; n < kNoisePack; ++n) block[n] = static_cast<uint32_t>(d / 4);
  Stack stack;
  const Leaf* end = leaves + count;
  if (count >= kNoisePack) {
    I a[2 * kNoisePack], b[2 * kNoisePack];
    leaf_words(key, stream, leaves, block, a, b);
    for (; end - leaves >= 2 * kNoisePack; leaves += kNoisePack) {
      I next_a[2 * kNoisePack], next_b[2 * kNoisePack];
      leaf_words(key, stream, leaves + kNoisePack, block, next_a, next_b);
      push_leaves(leaves, a, b, &stack);
      for (int k = 0; k < 2 * kNoisePack; ++k) {
        a[k] = next_a[k];
        b[k] = next_b[k];
      }
    }
    push_leaves(leaves, a, b, &stack);
    leaves += kNoisePack;
  }
  for (; leaves != end; ++leaves) {
    I a[2], b[2];
    F eps[4];
    philox_pack<1>(key, stream, &leaves->rollout, block, a, b);
    normal_words<1>(a, b, eps);
    stack.push(*leaves, eps);
  }
  for (int k = 0; k < 4; ++k) sum[k] = count ? add(stack.node[0][k], set1(0.0f)) : set1(0.0f);
  in_order(sum);
}

static void update_range(const ControlArgs& a, const NoiseKey& key, const NoiseStream& stream,
                         const Leaf* leaves, int64_t count, const float* mean, float* out,
                         int64_t begin, int64_t end) {
  const F sigma = set1(a.sigma);
  for (int64_t d = begin; d < end; d += kBlock) {
    F sum[4];
    block_sum(key, stream, leaves, count, d, sum);
    float tail[kBlock] = {};
    const bool whole = d + kBlock <= end;
    const size_t bytes = static_cast<size_t>(end - d) * sizeof(float);
    float* to = whole ? out + d : tail;
    if (!a.partial) {
      const float* from = mean + d;
      if (!whole) from = static_cast<const float*>(std::memcpy(tail, from, bytes));
      for (int k = 0; k < 4; ++k) sum[k] = add(load(from + k * kWidth), mul(sigma, sum[k]));
    }
    for (int k = 0; k < 4; ++k) store(to + k * kWidth, sum[k]);
    if (!whole) std::memcpy(out + d, tail, bytes);
  }
}

static bool all_finite(const float* x, int64_t n) {
  bool ok = true;
  for (int64_t i = 0; i < n; ++i) ok = ok && finite(x[i]);
  return ok;
}

static void update_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const ControlArgs& a = *static_cast<const ControlArgs*>(context);
  const NoiseKey key(seed_bits(a.seed));
  const std::unique_ptr<Leaf[]> leaves(new Leaf[static_cast<size_t>(a.rollouts)]);
  const int64_t chunks = (a.dim + kControlTask - 1) / kControlTask;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / chunks, first = task % chunks * kControlTask;
    const int64_t last = first + kControlTask < a.dim ? first + kControlTask : a.dim;
    const int64_t prompt = row / a.steps, step = row % a.steps;
    const float* mean = a.mean + row * a.dim;
    float* out = a.out + row * a.dim;
    if (a.sigma == 0.0f && !a.partial) {
      std::memmove(out + first, mean + first, static_cast<size_t>(last - first) * sizeof(float));
      continue;
    }
    if (!all_finite(a.weights + prompt * a.rollouts, a.rollouts)) {
      for (int64_t d = first; d < last; ++d) out[d] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    const NoiseStream stream(key, static_cast<uint32_t>(step),
                             static_cast<uint32_t>(a.sequence[prompt]));
    const int64_t count = find_leaves(a, prompt, step, stream, leaves.get());
    update_range(a, key, stream, leaves.get(), count, mean, out, first, last);
  }
}

void control_update(const ControlArgs& a, const Parallel& parallel) {
  const int64_t chunks = (a.dim + kControlTask - 1) / kControlTask;
  parallel.run(a.prompts * a.steps * chunks, parallel.grain, update_body,
               const_cast<ControlArgs*>(&a));
}

// ---- control_merge -----------------------------------------------------------------------------

constexpr int64_t kMergeTask = 1 << 12;

// The tree over all shards; `part` gives a shard's elements.
template <class Part>
TTA_INLINE F merged(int64_t shards, Part part) {
  F node[64];
  int top = 0;
  for (int64_t s = 0; s < shards; ++s) {
    F x = part(s);
    for (int64_t n = s; n & 1; n >>= 1) x = add(node[--top], x);
    node[top++] = x;
  }
  return add(node[0], set1(0.0f));
}

static void merge_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const MergeArgs& a = *static_cast<const MergeArgs*>(context);
  const int64_t first = begin * kMergeTask;
  const int64_t last = end * kMergeTask < a.count ? end * kMergeTask : a.count;
  const F sigma = set1(a.sigma);
  int64_t at = first;
  for (; at + kWidth <= last; at += kWidth) {
    const F sum = merged(a.shards, [&](int64_t s) { return load(a.partials + s * a.count + at); });
    store(a.out + at, add(load(a.mean + at), mul(sigma, sum)));
  }
  for (; at < last; ++at) {
    const F sum = merged(a.shards, [&](int64_t s) { return set1(a.partials[s * a.count + at]); });
    float lane[kWidth];
    store(lane, add(set1(a.mean[at]), mul(sigma, sum)));
    a.out[at] = lane[0];
  }
}

void control_merge(const MergeArgs& a, const Parallel& parallel) {
  if (a.sigma == 0.0f) {
    if (a.count > 0) std::memmove(a.out, a.mean, static_cast<size_t>(a.count) * sizeof(float));
    return;
  }
  parallel.run((a.count + kMergeTask - 1) / kMergeTask, parallel.grain, merge_body,
               const_cast<MergeArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void importance_weights(const WeightsArgs& a) { TTA_DISPATCH(importance_weights, a) }
void control_update(const ControlArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(control_update, a, parallel)
}
void control_merge(const MergeArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(control_merge, a, parallel)
}
#endif

}  // namespace tta
