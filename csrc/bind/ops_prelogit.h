// The operators of adaptive importance sampling on pre-logits: their arguments checked and filled
// in for any device (stable.h says what a device is).
#pragma once

#include <string>

#include "bind/stable.h"
#include "core/philox.h"

namespace tta {
namespace bind {

constexpr int64_t kMaxRollouts = 1 << 16;
inline float finite_float(double x, const char* name) {
  const float value = static_cast<float>(x);
  STD_TORCH_CHECK(x >= 0 && std::isfinite(value), name, " is ", x,
                  ", expected a finite number >= 0");
  return value;
}

// u and its like, [P, tau, d].
template <class Device>
const float* control(Device& device, Tensor& mean, const char* name) {
  device.own(mean, name);
  device.reads(mean, name);
  check_dtype(mean, ScalarType::Float, name);
  STD_TORCH_CHECK(mean.dim() == 3, name, " has ", mean.dim(), " dimensions, expected 3");
  return static_cast<const float*>(dense(mean).const_data_ptr());
}

template <class Device>
void prelogit_perturb(Tensor hidden, Tensor mean, Tensor step, Tensor row, Tensor sequence,
                      Tensor rollout, int64_t iteration, double sigma, Tensor seed, bool check,
                      Tensor out, Tensor dot) {
  Device device(hidden, "hidden", check);
  PerturbArgs a;
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden has ", hidden.dim(), " dimensions, expected 2");
  a.dtype = logits_dtype(hidden, "hidden");
  device.reads(hidden, "hidden");
  check_unit_stride(hidden, "hidden");
  a.rows = hidden.size(0);
  a.dim = hidden.size(1);
  STD_TORCH_CHECK(a.dim >= 1, "hidden has no columns, expected at least 1");
  a.hidden = hidden.const_data_ptr();
  a.hidden_stride = hidden.stride(0);
  a.mean = control(device, mean, "mean");
  a.prompts = mean.size(0);
  a.steps = mean.size(1);
  STD_TORCH_CHECK(mean.size(2) == a.dim && a.prompts >= 1, "mean is [", a.prompts, ", ", a.steps,
                  ", ", mean.size(2), "], expected [P, tau, ", a.dim, "] with P >= 1");
  a.mean_prompt_stride = a.steps * a.dim;
  a.mean_step_stride = a.dim;
  a.step = per_row<int64_t>(device, step, ScalarType::Long, a.rows, "step");
  a.prompt = per_row<int64_t>(device, row, ScalarType::Long, a.rows, "row");
  a.sequence = per_row<int64_t>(device, sequence, ScalarType::Long, a.rows, "sequence");
  a.rollout = per_row<int64_t>(device, rollout, ScalarType::Long, a.rows, "rollout");
  if (check) {
    check_word(device, a.step, a.rows, kWord, "step", "2**32");
    check_word(device, a.prompt, a.rows, a.prompts, "row", std::to_string(a.prompts).c_str());
    check_word(device, a.sequence, a.rows, kWord, "sequence", "2**32");
    check_word(device, a.rollout, a.rows, kMaxRollouts, "rollout", "65536");
  }
  a.iteration = counter_field(iteration, 1 << 12, "iteration");
  a.sigma = finite_float(sigma, "sigma");
  a.seed = seed_of(device, seed);
  device.own(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == hidden.scalar_type() && out.dim() == 2 &&
                      out.size(0) == a.rows && out.size(1) == a.dim && out.is_contiguous(),
                  "out must be contiguous, of hidden's shape and dtype");
  device.writes(out, "out", {"hidden"});
  a.out = out.mutable_data_ptr();
  a.out_stride = a.dim;
  a.dot = output<float>(device, dot, ScalarType::Float, a.rows, "dot");
  device.run(a);
}

template <class Device>
const float* rewards(Device& device, Tensor& x, const Tensor& like, int64_t* stride,
                     const char* name) {
  device.own(x, name);
  device.reads(x, name);
  check_dtype(x, ScalarType::Float, name);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1), name,
                  " must be [P, n] like reward");
  if (x.stride(1) != 1) dense(x);
  *stride = x.stride(0);
  return static_cast<const float*>(x.const_data_ptr());
}

template <class Device>
void importance_weights(Tensor reward, Tensor dot, Tensor norm2, double lam, double alpha,
                        double sigma, bool check, Tensor weights, Tensor ess) {
  Device device(reward, "reward", check);
  WeightsArgs a;
  STD_TORCH_CHECK(reward.dim() == 2, "reward has ", reward.dim(), " dimensions, expected 2");
  a.prompts = reward.size(0);
  a.rollouts = reward.size(1);
  STD_TORCH_CHECK(a.rollouts >= 1, "reward has no rollouts, expected at least 1");
  a.reward = rewards(device, reward, reward, &a.reward_stride, "reward");
  a.dot = rewards(device, dot, reward, &a.dot_stride, "dot");
  a.norm2 = rewards(device, norm2, reward, &a.norm2_stride, "norm2");
  STD_TORCH_CHECK(lam >= 0 && std::isfinite(lam), "lam is ", lam,
                  ", expected a finite number >= 0");
  STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, "alpha is ", alpha, ", expected 0 to 1");
  finite_float(sigma, "sigma");
  a.lambda = lam;
  a.alpha = alpha;
  a.sigma = sigma;
  a.weights = output<float>(device, weights, ScalarType::Float, a.prompts * a.rollouts, "weights",
                            {"reward", "dot", "norm2"});
  a.ess = output<float>(device, ess, ScalarType::Float, a.prompts, "ess");
  a.invalid = device.invalid();
  device.run(a);
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (!invalid.any()) return;
  const int64_t bad = invalid.row();
  switch (invalid.tensor()) {
    case kRewardInput:
      STD_TORCH_CHECK(false, "invalid row: row ", bad, " of reward", kBadRow);
    case kDotInput:
      STD_TORCH_CHECK(false, "invalid row: row ", bad, " of dot has NaN or inf");
    case kNorm2Input:
      STD_TORCH_CHECK(false, "invalid row: row ", bad, " of norm2 has NaN or inf");
    default:
      STD_TORCH_CHECK(false, "invalid row: row ", bad,
                      " of the scores is undefined or has no finite value");
  }
}

template <class Device>
void check_weights(const Device& device, const ControlArgs& a) {
  const auto values = device.host(a.weights, a.prompts * a.rollouts);
  for (int64_t p = 0; p < a.prompts; ++p)
    for (int64_t i = 0; i < a.rollouts; ++i)
      STD_TORCH_CHECK(std::isfinite(values[p * a.rollouts + i]), "invalid row: row ", p,
                      " of weights has NaN or inf");
}

template <class Device>
void control_update(Tensor mean, Tensor weights, std::optional<Tensor> length, Tensor seed,
                    Tensor sequence, int64_t iteration, double sigma, int64_t start, int64_t stop,
                    bool partial, bool check, Tensor out) {
  Device device(mean, "mean", check);
  ControlArgs a;
  a.mean = control(device, mean, "mean");
  a.prompts = mean.size(0);
  a.steps = mean.size(1);
  a.dim = mean.size(2);
  device.own(weights, "weights");
  device.reads(weights, "weights");
  check_dtype(weights, ScalarType::Float, "weights");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == a.prompts, "weights must be [",
                  a.prompts, ", n]");
  a.rollouts = weights.size(1);
  STD_TORCH_CHECK(a.rollouts <= kMaxRollouts, "weights has ", a.rollouts,
                  " rollouts, expected at most 65536");
  a.weights = static_cast<const float*>(dense(weights).const_data_ptr());
  if (length) {
    device.own(*length, "length");
    device.reads(*length, "length");
    check_dtype(*length, ScalarType::Long, "length");
    STD_TORCH_CHECK(
        length->dim() == 2 && length->size(0) == a.prompts && length->size(1) == a.rollouts,
        "length must be [", a.prompts, ", ", a.rollouts, "]");
    a.length = static_cast<const int64_t*>(dense(*length).const_data_ptr());
  }
  a.sequence = per_row<int64_t>(device, sequence, ScalarType::Long, a.prompts, "sequence");
  a.seed = seed_of(device, seed);
  a.iteration = counter_field(iteration, 1 << 12, "iteration");
  a.sigma = finite_float(sigma, "sigma");
  const int64_t size = stop - start;
  STD_TORCH_CHECK(start >= 0 && size >= 1 && (size & (size - 1)) == 0 && start % size == 0,
                  "rollouts ", start, " to ", stop, " are not an aligned power of two");
  a.start = start;
  a.stop = stop;
  a.partial = partial;
  if (check) {
    check_word(device, a.sequence, a.prompts, kWord, "sequence", "2**32");
    check_weights(device, a);
  }
  a.out = output<float>(device, out, ScalarType::Float, mean.numel(), "out", {"mean"});
  device.run(a);
}

template <class Device>
void control_merge(Tensor mean, Tensor partials, double sigma, Tensor out) {
  Device device(mean, "mean", false);
  MergeArgs a;
  a.mean = control(device, mean, "mean");
  device.own(partials, "partials");
  device.reads(partials, "partials");
  check_dtype(partials, ScalarType::Float, "partials");
  a.count = mean.numel();
  STD_TORCH_CHECK(partials.dim() == 4, "partials must be [S, P, tau, d]");
  a.shards = partials.size(0);
  STD_TORCH_CHECK(a.shards >= 1 && (a.shards & (a.shards - 1)) == 0, "partials has ", a.shards,
                  " shards, expected a power of two");
  STD_TORCH_CHECK(partials.numel() == a.shards * a.count, "partials has ", partials.numel(),
                  " elements, expected ", a.shards * a.count);
  a.partials = static_cast<const float*>(dense(partials).const_data_ptr());
  a.sigma = finite_float(sigma, "sigma");
  a.out = output<float>(device, out, ScalarType::Float, a.count, "out", {"mean", "partials"});
  device.run(a);
}

// `X.out` of every operator here, under the key of the library block.
template <class Device>
void register_prelogit_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("prelogit_perturb.out", TORCH_BOX(&prelogit_perturb<Device>));
  m.impl("importance_weights.out", TORCH_BOX(&importance_weights<Device>));
  m.impl("control_update.out", TORCH_BOX(&control_update<Device>));
  m.impl("control_merge.out", TORCH_BOX(&control_merge<Device>));
}

}  // namespace bind
}  // namespace tta
