// The AISP kernels against their definitions written out one number at a time, on every instruction
// set: perturbation with its canonical dot product, the tree over rollouts, its shards. Buffers are
// exactly as long as they must be, for the sanitizers.

#include <cmath>
#include <memory>
#include <vector>

#include "core/philox.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "testing/check.h"
#include "testing/functions.h"
#include "testing/host.h"

namespace tta {
namespace testing {
namespace {

constexpr uint64_t kSeed = 0xfedcba9876543210ull;
constexpr uint32_t kIteration = 4095;
constexpr float kSigma = 0.37f;

// Every item a task of its own, the last one first.
const Parallel kScattered{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
      for (int64_t i = n; i-- > 0;) body(context, i, i + 1);
    }};

float naive_normal(uint32_t step, uint32_t sequence, uint32_t rollout, int64_t d) {
  const Philox4 block =
      philox4x32(Philox4{{static_cast<uint32_t>(d / 4), step, sequence,
                          counter_word3(kNoise, kIteration, rollout)}},
                 static_cast<uint32_t>(kSeed), static_cast<uint32_t>(kSeed >> 32));
  const int pair = static_cast<int>(d % 4) / 2;
  float c, s;
  functions(0).normal_pair(&block.x[2 * pair], &block.x[2 * pair + 1], 1, &c, &s);
  return d % 2 ? s : c;
}

float naive_dot(const float* u, const float* eps, int64_t dim) {
  double total = 0.0;
  for (int64_t tile = 0; tile < dim; tile += 4096) {
    float lane[128] = {};
    for (int64_t d = tile; d < dim && d < tile + 4096; ++d)
      lane[d % 128] = std::fma(u[d], eps[d], lane[d % 128]);
    for (int n = 64; n >= 1; n /= 2)
      for (int l = 0; l < n; ++l) lane[l] += lane[l + n];
    total += static_cast<double>(lane[0]);
  }
  return static_cast<float>(total);
}

// Every leaf of the padded tree, zeros included.
float naive_tree(const std::vector<float>& leaf, int64_t begin, int64_t end) {
  if (end - begin == 1) return begin < static_cast<int64_t>(leaf.size()) ? leaf[begin] : 0.0f;
  const int64_t middle = (begin + end) / 2;
  return naive_tree(leaf, begin, middle) + naive_tree(leaf, middle, end);
}

std::vector<float> random_floats(int64_t n, Random* random) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = static_cast<float>(2.0 * random->uniform() - 1.0);
  return x;
}

const char* isa_name() { return functions(active_isa()).name; }

void check_perturb(int64_t dim, int dtype, float sigma, const Parallel& parallel, Random* random) {
  constexpr int64_t kRows = 3, kPrompts = 2, kSteps = 2;
  const std::vector<float> mean = random_floats(kPrompts * kSteps * dim, random);
  const std::vector<float> values = random_floats(kRows * dim, random);
  std::vector<char> hidden(static_cast<size_t>(kRows * dim * bytes_of(dtype)));
  std::vector<char> out(hidden.size()), want_out(hidden.size());
  for (int64_t i = 0; i < kRows * dim; ++i) store(hidden.data(), dtype, i, values[i]);
  const int64_t step[kRows] = {1, 2, 0}, prompt[kRows] = {1, 0, 0}, rollout[kRows] = {9, 1, 65535};
  const int64_t sequence = 0xffffffff;
  float dot[kRows] = {1.25f, -0.0f, 3.0f};
  PerturbArgs a;
  a.hidden = hidden.data();
  a.out = out.data();
  a.dtype = dtype;
  a.hidden_stride = a.out_stride = a.dim = dim;
  a.rows = kRows;
  a.mean = mean.data();
  a.mean_prompt_stride = kSteps * dim;
  a.mean_step_stride = dim;
  a.prompts = kPrompts;
  a.steps = kSteps;
  a.step = {step, 1};
  a.prompt = {prompt, 1};
  a.sequence = {&sequence, 0};
  a.rollout = {rollout, 1};
  a.iteration = kIteration;
  a.sigma = sigma;
  a.seed = kSeed;
  a.dot = dot;
  prelogit_perturb(a, parallel);

  const float dot_before[kRows] = {1.25f, -0.0f, 3.0f};
  for (int64_t r = 0; r < kRows; ++r) {
    const bool inside = step[r] < kSteps;
    const float* u = mean.data() + (prompt[r] * kSteps + (inside ? step[r] : 0)) * dim;
    std::vector<float> eps(static_cast<size_t>(dim));
    for (int64_t d = 0; d < dim; ++d) {
      eps[d] = naive_normal(static_cast<uint32_t>(step[r]), static_cast<uint32_t>(sequence),
                            static_cast<uint32_t>(rollout[r]), d);
      const int64_t i = r * dim + d;
      const float scaled = sigma * eps[d];
      const float v = sigma == 0.0f ? u[d] : u[d] + scaled;
      const float x = load(hidden.data(), dtype, i);
      store(want_out.data(), dtype, i, inside ? x + v : x);
      const int64_t size = bytes_of(dtype);
      CHECK(!std::memcmp(out.data() + i * size, want_out.data() + i * size, size),
            "%s: perturb, dim %d, dtype %d, row %d, dimension %d", isa_name(),
            static_cast<int>(dim), dtype, static_cast<int>(r), static_cast<int>(d));
    }
    const float want = inside ? dot_before[r] + naive_dot(u, eps.data(), dim) : dot_before[r];
    CHECK(bits_of(dot[r]) == bits_of(want), "%s: dim %d, row %d: dot %a, want %a", isa_name(),
          static_cast<int>(dim), static_cast<int>(r), dot[r], want);
  }
}

struct Update {
  int64_t rollouts, dim;
  std::vector<float> mean, weights;
  std::vector<int64_t> length;
  static constexpr int64_t kPrompts = 2, kSteps = 2;
  int64_t sequence[kPrompts] = {7, 0xffffffff};

  std::vector<float> run(int64_t start, int64_t stop, bool partial, const Parallel& parallel) {
    std::vector<float> out(mean.size());
    ControlArgs a;
    a.mean = mean.data();
    a.out = out.data();
    a.prompts = kPrompts;
    a.steps = kSteps;
    a.dim = dim;
    a.rollouts = rollouts;
    a.weights = weights.data();
    a.length = length.data();
    a.sequence = {sequence, 1};
    a.seed = kSeed;
    a.iteration = kIteration;
    a.sigma = kSigma;
    a.start = start;
    a.stop = stop;
    a.partial = partial;
    control_update(a, parallel);
    return out;
  }

  float naive(int64_t prompt, int64_t step, int64_t d, int64_t padded) const {
    std::vector<float> leaf;
    for (int64_t i = 0; i < rollouts; ++i) {
      const float w = weights[prompt * rollouts + i];
      const bool counts = w != 0.0f && step < length[prompt * rollouts + i];
      leaf.push_back(counts ? w * naive_normal(static_cast<uint32_t>(step),
                                               static_cast<uint32_t>(sequence[prompt]),
                                               static_cast<uint32_t>(i), d)
                            : 0.0f);
    }
    const float sum = naive_tree(leaf, 0, padded) + 0.0f;
    const float moved = kSigma * sum;
    return mean[(prompt * kSteps + step) * dim + d] + moved;
  }
};

void check_update(int64_t rollouts, int64_t dim, Random* random) {
  Update u{rollouts,
           dim,
           random_floats(Update::kPrompts * Update::kSteps * dim, random),
           random_floats(Update::kPrompts * rollouts, random),
           {}};
  for (float& w : u.weights) {
    u.length.push_back(random->below(Update::kSteps + 2));
    const int64_t kind = random->below(6);
    w = kind == 0 ? 0.0f : kind == 1 ? w * 1e-38f : w;
  }
  int64_t padded = 1;
  while (padded < rollouts) padded *= 2;
  const std::vector<float> whole = u.run(0, padded, false, kSerial);
  for (int64_t i = 0; i < static_cast<int64_t>(whole.size()); ++i) {
    const int64_t row = i / dim;
    const float want = u.naive(row / Update::kSteps, row % Update::kSteps, i % dim, padded);
    CHECK(bits_of(whole[i]) == bits_of(want), "%s: n %d, dim %d, element %d: %a, want %a",
          isa_name(), static_cast<int>(rollouts), static_cast<int>(dim), static_cast<int>(i),
          whole[i], want);
  }
  for (int64_t size = 1; size <= padded; size *= 2) {
    std::vector<float> partials, merged(whole.size());
    for (int64_t start = 0; start < padded; start += size) {
      const std::vector<float> part = u.run(start, start + size, true, kScattered);
      partials.insert(partials.end(), part.begin(), part.end());
    }
    MergeArgs m;
    m.mean = u.mean.data();
    m.partials = partials.data();
    m.out = merged.data();
    m.shards = padded / size;
    m.count = static_cast<int64_t>(merged.size());
    m.sigma = kSigma;
    control_merge(m, kScattered);
    CHECK(!std::memcmp(merged.data(), whole.data(), whole.size() * sizeof(float)),
          "%s: n %d, dim %d, shards of %d do not merge to the whole", isa_name(),
          static_cast<int>(rollouts), static_cast<int>(dim), static_cast<int>(size));
  }
}

}  // namespace
}  // namespace testing
}  // namespace tta

int main() {
  using namespace tta;
  using namespace tta::testing;
  const int widest = active_isa();
  for (int level = 0; level <= widest; ++level) {
    set_isa(level);
    Random random(11);
    for (const int64_t dim : {1, 4, 63, 128, 130, 257, 4096, 4099, 8300}) {
      for (const int dtype : {kFloat32, kFloat16, kBFloat16}) {
        check_perturb(dim, dtype, kSigma, kSerial, &random);
        check_perturb(dim, dtype, 0.0f, kScattered, &random);
      }
    }
    for (const int64_t rollouts : {1, 2, 3, 5, 8, 37})
      for (const int64_t dim : {1, 4, 31, 64, 67}) check_update(rollouts, dim, &random);
    check_update(3, 2051, &random);
  }
  return finish("prelogit_test");
}
