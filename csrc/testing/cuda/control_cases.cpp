// importance_weights, control_update, control_merge.
#include <cmath>
#include <limits>

#include "testing/cuda/cases.h"

namespace tta {
namespace testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void importance_weights_serial(const WeightsArgs& a, const Parallel&) { importance_weights(a); }

void weights_case(int64_t rollouts, Random* random) {
  const int64_t prompts = 1 + random->below(3), stride = rollouts + random->below(4);
  const Twin<float> reward((prompts - 1) * stride + rollouts);
  const Twin<float> dot(prompts * rollouts), norm2(prompts * rollouts);
  const bool ties = random->below(3) == 0, holes = random->below(4) == 0;
  for (int64_t i = 0; i < reward.count(); ++i) {
    reward[i] =
        ties ? static_cast<float>(random->below(3)) : static_cast<float>(random_normal(random));
    if (holes && random->below(3) == 0) reward[i] = -kInf;
  }
  for (int64_t i = 0; i < dot.count(); ++i) {
    dot[i] = static_cast<float>(random_normal(random));
    norm2[i] = static_cast<float>(random->uniform());
  }
  for (const Twin<float>* x : {&reward, &dot, &norm2}) {
    if (random->below(8) == 0)
      (*x)[random->below(x->count())] = random->below(2) ? kInf : std::nanf("");
    x->upload();
  }
  const double lambda = pick({0.0, 0.01, 0.7, 1e-320}, random);
  const double alpha = pick({0.0, 0.7, 1.0}, random), sigma = pick({0.0, 0.37}, random);
  const std::string where = "weights " + std::to_string(prompts) + " x " +
                            std::to_string(rollouts) + ", lambda " + std::to_string(lambda) +
                            ", alpha " + std::to_string(alpha) + ", sigma " + std::to_string(sigma);
  const InvalidTwin invalid;
  const WeightsOutputs out(prompts, rollouts);
  call_both<WeightsArgs>(
      importance_weights_serial, cuda::importance_weights,
      [&](Side side) {
        WeightsArgs a;
        a.reward = reward.at(side);
        a.dot = dot.at(side);
        a.norm2 = norm2.at(side);
        a.reward_stride = stride;
        a.dot_stride = a.norm2_stride = rollouts;
        a.prompts = prompts;
        a.rollouts = rollouts;
        a.lambda = lambda;
        a.alpha = alpha;
        a.sigma = sigma;
        out.at(side, &a);
        a.invalid = invalid.at(side);
        return a;
      },
      where);
  out.compare_in(where);
  compare("weights invalid", where, invalid);
}

void update_case(int64_t rollouts, int64_t dim, Random* random) {
  const int64_t prompts = 1 + random->below(2), steps = 1 + random->below(3);
  const int64_t skip = random->below(2), count = prompts * steps * dim;
  int64_t padded = 1;
  while (padded < rollouts) padded *= 2;
  // The whole tree, or an aligned subtree of it.
  const bool partial = random->below(2) != 0;
  int64_t size = padded, start = 0;
  if (partial) {
    while (size > 1 && random->below(2)) size /= 2;
    start = size * random->below(padded / size);
  }
  const Twin<float> mean(count, skip), out(count, skip), weights(prompts * rollouts);
  const Twin<int64_t> length(prompts * rollouts), sequence(prompts);
  const double zeros = pick({0.0, 0.5, 0.95}, random);
  for (int64_t i = 0; i < count; ++i)
    mean[i] = random->below(7) ? static_cast<float>(random_normal(random)) : -0.0f;
  for (int64_t i = 0; i < weights.count(); ++i) {
    weights[i] = random->uniform() < zeros ? 0.0f : static_cast<float>(random->uniform());
    length[i] = random->below(steps + 2);
  }
  if (random->below(8) == 0) weights[random->below(weights.count())] = kInf;
  for (int64_t p = 0; p < prompts; ++p) sequence[p] = random->below(int64_t{1} << 32);
  mean.upload();
  weights.upload();
  length.upload();
  sequence.upload();
  const float sigma = pick({0.0f, 0.37f, 1.5f}, random);
  const bool with_length = random->below(2) != 0;
  const int64_t seed = static_cast<int64_t>(random->next());
  const std::string where = "update " + std::to_string(prompts) + " x " + std::to_string(steps) +
                            " x " + std::to_string(dim) + ", rollouts " + std::to_string(rollouts) +
                            " in " + std::to_string(start) + " to " + std::to_string(start + size) +
                            ", sigma " + std::to_string(sigma);
  call_both<ControlArgs>(
      control_update, cuda::control_update,
      [&](Side side) {
        ControlArgs a;
        a.mean = mean.at(side);
        a.out = out.at(side);
        a.prompts = prompts;
        a.steps = steps;
        a.dim = dim;
        a.rollouts = rollouts;
        a.weights = weights.at(side);
        a.length = with_length ? length.at(side) : nullptr;
        a.sequence = {sequence.at(side), 1};
        a.seed = seed;
        a.iteration = 77;
        a.sigma = sigma;
        a.start = start;
        a.stop = start + size;
        a.partial = partial;
        return a;
      },
      where);
  compare("update", where, out);
}

void merge_case(int64_t shards, int64_t count, Random* random) {
  const int64_t skip = random->below(2);
  const Twin<float> mean(count, skip), partials(shards * count), out(count, skip);
  for (int64_t i = 0; i < count; ++i) mean[i] = static_cast<float>(random_normal(random));
  for (int64_t i = 0; i < partials.count(); ++i)
    partials[i] = random->below(4) ? static_cast<float>(random_normal(random)) : -0.0f;
  mean.upload();
  partials.upload();
  const float sigma = pick({0.0f, 0.37f}, random);
  const std::string where = "merge " + std::to_string(shards) + " x " + std::to_string(count);
  call_both<MergeArgs>(
      control_merge, cuda::control_merge,
      [&](Side side) {
        MergeArgs a;
        a.mean = mean.at(side);
        a.partials = partials.at(side);
        a.out = out.at(side);
        a.shards = shards;
        a.count = count;
        a.sigma = sigma;
        return a;
      },
      where);
  compare("merge", where, out);
}

}  // namespace

void control_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    weights_case(pick<int64_t>({1, 2, 31, 32, 33, 256, 257, 1000}, random), random);
    update_case(pick<int64_t>({1, 2, 3, 8, 31, 32, 33, 64, 100}, random),
                pick<int64_t>({1, 4, 31, 128, 132, 300}, random), random);
    merge_case(pick<int64_t>({1, 2, 4, 8, 32, 64}, random), 1 + random->below(1100), random);
  }
}

}  // namespace testing
}  // namespace tta
