// The operators of deferral, verification, mixtures, knapsack and random numbers: their arguments
// checked and filled in for any device (stable.h says what a device is).
#pragma once

#include "bind/stable.h"
#include "core/philox.h"

namespace tta {
namespace bind {

// ---- deferral

template <class Device>
void raise_invalid(Device& device, bool check) {
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (!invalid.any()) return;
  STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of ",
                  invalid.tensor() == kBaseLogits ? "base_logits" : "proxy_logits", kBadRow);
}

template <class Device>
void fill(Device& device, DeferralArgs* a, const Tensor& base, const std::optional<Tensor>& proxy,
          Tensor& param, int64_t rule, int64_t critical, double temperature,
          double rule_temperature, bool check) {
  a->base = logits(device, base, "base_logits");
  a->batch = base.size(0);
  a->rule =
      rule_spec(device, param, rule, critical, temperature, rule_temperature, a->batch, check);
  if (proxy) {
    a->proxy = logits(device, *proxy, "proxy_logits");
    STD_TORCH_CHECK(a->proxy.vocab == a->base.vocab && proxy->size(0) == a->batch,
                    "proxy_logits is [", proxy->size(0), ", ", a->proxy.vocab,
                    "], expected base_logits' [", a->batch, ", ", a->base.vocab, "]");
  } else {
    STD_TORCH_CHECK(!rule_needs_proxy(static_cast<int>(rule)), "rule ", rule,
                    " needs proxy_logits");
  }
  a->invalid = device.invalid();
}

template <class Device>
void deferral_mask(Tensor base, std::optional<Tensor> proxy, Tensor param, int64_t rule,
                   int64_t critical, double temperature, double rule_temperature, bool check,
                   Tensor mask, Tensor critical_index, Tensor fraction) {
  Device device(base, "base_logits", check);
  MaskArgs a;
  fill(device, &a, base, proxy, param, rule, critical, temperature, rule_temperature, check);
  a.mask = output<bool>(device, mask, ScalarType::Bool, a.batch * a.base.vocab, "mask");
  a.mask_stride = a.base.vocab;
  a.critical_index =
      output<int64_t>(device, critical_index, ScalarType::Long, a.batch, "critical_index");
  a.fraction = output<float>(device, fraction, ScalarType::Float, a.batch, "fraction");
  device.run(a);
  raise_invalid(device, check);
}

template <class Device>
void deferral_probs(Tensor base, Tensor proxy, Tensor param, int64_t rule, int64_t critical,
                    double temperature, double rule_temperature, bool check, Tensor out) {
  Device device(base, "base_logits", check);
  ProbsArgs a;
  fill(device, &a, base, proxy, param, rule, critical, temperature, rule_temperature, check);
  a.out = output<float>(device, out, ScalarType::Float, a.batch * a.base.vocab, "out",
                        {"base_logits", "proxy_logits"});
  a.out_stride = a.base.vocab;
  device.run(a);
  raise_invalid(device, check);
}

template <class Device>
void deferral_stats(Tensor base, std::optional<Tensor> proxy, Tensor param, int64_t rule,
                    int64_t critical, double temperature, double rule_temperature, bool check,
                    Tensor deferred_mass, Tensor critical_index, Tensor cut_logit, Tensor used) {
  Device device(base, "base_logits", check);
  StatsArgs a;
  fill(device, &a, base, proxy, param, rule, critical, temperature, rule_temperature, check);
  a.deferred_mass =
      output<double>(device, deferred_mass, ScalarType::Double, a.batch, "deferred_mass");
  a.critical_index =
      output<int64_t>(device, critical_index, ScalarType::Long, a.batch, "critical_index");
  a.cut_logit = output<float>(device, cut_logit, ScalarType::Float, a.batch, "cut_logit");
  a.used = output<double>(device, used, ScalarType::Double, a.batch, "used");
  device.run(a);
  raise_invalid(device, check);
}

template <class Device>
void sample(const Tensor& base, const std::optional<Tensor>& proxy, Tensor& param, int64_t rule,
            int64_t critical, double temperature, double rule_temperature, const Tensor& seed,
            Tensor& position, Tensor& sequence, int64_t iteration, Tensor& rollout, bool do_sample,
            bool check, const Tensor& token, const Tensor& deferred) {
  Device device(base, "base_logits", check);
  SampleArgs a;
  fill(device, &a, base, proxy, param, rule, critical, temperature, rule_temperature, check);
  a.key = key_spec(device, seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.propose = !proxy;
  a.token = output<int64_t>(device, token, ScalarType::Long, a.batch, "token");
  a.deferred = output<bool>(device, deferred, ScalarType::Bool, a.batch, "deferred");
  device.run(a);
  raise_invalid(device, check);
}

template <class Device>
void deferral_propose(Tensor base, Tensor param, int64_t rule, int64_t critical, double temperature,
                      double rule_temperature, Tensor seed, Tensor position, Tensor sequence,
                      int64_t iteration, Tensor rollout, bool do_sample, bool check, Tensor token,
                      Tensor deferred) {
  sample<Device>(base, std::nullopt, param, rule, critical, temperature, rule_temperature, seed,
                 position, sequence, iteration, rollout, do_sample, check, token, deferred);
}

template <class Device>
void deferral_sample(Tensor base, Tensor proxy, Tensor param, int64_t rule, int64_t critical,
                     double temperature, double rule_temperature, Tensor seed, Tensor position,
                     Tensor sequence, int64_t iteration, Tensor rollout, bool do_sample, bool check,
                     Tensor token, Tensor deferred) {
  sample<Device>(base, proxy, param, rule, critical, temperature, rule_temperature, seed, position,
                 sequence, iteration, rollout, do_sample, check, token, deferred);
}

template <class Device>
void deferral_verify(Tensor base, Tensor proxy, Tensor draft, Tensor draft_length, Tensor param,
                     int64_t rule, int64_t critical, double temperature, double rule_temperature,
                     Tensor seed, Tensor position, Tensor sequence, int64_t iteration,
                     Tensor rollout, bool do_sample, bool return_mass, bool check, Tensor accepted,
                     Tensor token, Tensor deferred, Tensor mass) {
  Device device(base, "base_logits", check);
  VerifyArgs a;
  a.base = logits(device, base, "base_logits", 3);
  a.proxy = logits(device, proxy, "proxy_logits", 3);
  a.batch = base.size(0);
  const int64_t positions = base.size(1), proxy_rows = proxy.size(1);
  STD_TORCH_CHECK(positions >= 1, "base_logits has no positions, expected K + 1");
  a.draft_capacity = positions - 1;
  STD_TORCH_CHECK(proxy.size(0) == a.batch && a.proxy.vocab == a.base.vocab &&
                      (proxy_rows == positions || proxy_rows == positions - 1),
                  "proxy_logits is [", proxy.size(0), ", ", proxy_rows, ", ", a.proxy.vocab,
                  "], expected [", a.batch, ", ", positions - 1, " or ", positions, ", ",
                  a.base.vocab, "]");
  a.has_bonus_row = proxy_rows == positions;
  device.own(draft, "draft");
  device.own(draft_length, "draft_length");
  device.reads(draft, "draft");
  device.reads(draft_length, "draft_length");
  check_dtype(draft, ScalarType::Long, "draft");
  check_dtype(draft_length, ScalarType::Long, "draft_length");
  STD_TORCH_CHECK(draft.dim() == 2 && draft.size(0) == a.batch && draft.size(1) == a.draft_capacity,
                  "draft must be [", a.batch, ", ", a.draft_capacity, "]");
  STD_TORCH_CHECK(draft_length.numel() == a.batch, "draft_length has ", draft_length.numel(),
                  " elements, expected ", a.batch);
  a.draft = static_cast<const int64_t*>(draft.const_data_ptr());
  a.draft_row_stride = draft.stride(0);
  a.draft_position_stride = draft.stride(1);
  a.draft_length = static_cast<const int64_t*>(dense(draft_length).const_data_ptr());
  const int64_t params = param.numel();
  const bool each = params != 1 && params != a.batch;
  a.rule = rule_spec(device, param, rule, critical, temperature, rule_temperature,
                     each ? a.batch * positions : a.batch, check);
  a.param_row_stride = params == 1 ? 0 : each ? positions : 1;
  a.param_position_stride = each ? 1 : 0;
  a.key = key_spec(device, seed, position, sequence, iteration, rollout, do_sample, a.batch, check,
                   a.draft_capacity);
  a.return_mass = return_mass;
  a.accepted = output<int64_t>(device, accepted, ScalarType::Long, a.batch, "accepted");
  a.token = output<int64_t>(device, token, ScalarType::Long, a.batch, "token");
  a.deferred = output<bool>(device, deferred, ScalarType::Bool, a.batch, "deferred");
  a.mass = output<double>(device, mass, ScalarType::Double, a.batch * positions, "mass");
  a.invalid = device.invalid();
  if (check && a.batch > 0) {
    const auto lengths = device.host(a.draft_length, a.batch);
    // From the first element to the last, whatever the strides; without drafts nothing is read.
    const int64_t span =
        (a.batch - 1) * a.draft_row_stride + (a.draft_capacity - 1) * a.draft_position_stride + 1;
    const auto drafts = device.host(a.draft, a.draft_capacity > 0 ? span : 0);
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t length = lengths[b];
      STD_TORCH_CHECK(length >= 0 && length <= a.draft_capacity, "invalid row: draft_length[", b,
                      "] is ", length, ", expected 0 <= draft_length < ", positions);
      for (int64_t k = 0; k < length; ++k) {
        const int64_t x = drafts[b * a.draft_row_stride + k * a.draft_position_stride];
        STD_TORCH_CHECK(x >= 0 && x < a.base.vocab, "invalid row: draft[", b * a.draft_capacity + k,
                        "] is ", x, ", expected 0 <= draft < ", a.base.vocab);
      }
    }
  }
  device.run(a);
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row() / positions, ", position ",
                    invalid.row() % positions, " of ",
                    invalid.tensor() == kBaseLogits ? "base_logits" : "proxy_logits", kBadRow);
}

template <class Device>
void categorical_sample(Tensor x, double temperature, Tensor seed, Tensor position, Tensor sequence,
                        int64_t iteration, Tensor rollout, bool do_sample, int64_t stream,
                        int64_t draw, bool check, Tensor out) {
  Device device(x, "logits", check);
  CategoricalArgs a;
  a.logits = logits(device, x, "logits");
  a.batch = x.size(0);
  a.inv_temperature = inverse_temperature(temperature, "temperature");
  a.key = key_spec(device, seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.stream = counter_field(stream, 16, "stream");
  a.draw = counter_field(draw, kWord, "draw");
  a.token = output<int64_t>(device, out, ScalarType::Long, a.batch, "out");
  a.invalid = device.invalid();
  device.run(a);
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of logits", kBadRow);
}

// ---- mixtures

template <class Device>
Logits expert_logits(Device& device, const Tensor& x, const MixtureArgs& a, const char* name) {
  const Logits out = logits(device, x, name, 3);
  STD_TORCH_CHECK(x.size(0) == a.experts && x.size(1) == a.batch && out.vocab == a.base.vocab, name,
                  " is [", x.size(0), ", ", x.size(1), ", ", out.vocab, "], expected [", a.experts,
                  ", ", a.batch, ", ", a.base.vocab, "]");
  return out;
}

template <class Device>
void fill(Device& device, MixtureArgs* a, const Tensor& base, const Tensor& expert,
          const std::optional<Tensor>& anti, Tensor& beta, double temperature, bool check) {
  a->base = logits(device, base, "base_logits");
  a->base.row_stride = a->base.batch_stride;
  a->base.batch_stride = 0;
  a->batch = base.size(0);
  a->experts = beta.numel();
  device.own(beta, "beta");
  device.reads(beta, "beta");
  check_dtype(beta, ScalarType::Float, "beta");
  STD_TORCH_CHECK(1 + 2 * a->experts < InvalidRow::kTensors, "beta has ", a->experts,
                  " elements, expected fewer than ", InvalidRow::kTensors / 2);
  a->beta = static_cast<const float*>(dense(beta).const_data_ptr());
  if (check) {
    const auto values = device.host(a->beta, a->experts);
    for (int64_t e = 0; e < a->experts; ++e)
      STD_TORCH_CHECK(std::isfinite(values[e]), "invalid row: beta[", e, "] is ", values[e],
                      ", expected a finite number");
  }
  a->expert = expert_logits(device, expert, *a, "expert_logits");
  if (anti) a->anti = expert_logits(device, *anti, *a, "anti_logits");
  a->inv_temperature = inverse_temperature(temperature, "temperature");
  a->invalid = device.invalid();
}

template <class Device>
void raise_invalid(Device& device, const MixtureArgs& a, bool check) {
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (!invalid.any()) return;
  const int64_t row = invalid.row(), tensor = invalid.tensor(), n = a.experts;
  if (tensor == kBaseLogits)
    STD_TORCH_CHECK(false, "invalid row: row ", row, " of base_logits", kBadRow);
  STD_TORCH_CHECK(tensor <= 2 * n, "invalid row: row ", row,
                  " of the combined scores is undefined or has no finite value");
  STD_TORCH_CHECK(false, "invalid row: row ", row, " of ",
                  tensor <= n ? "expert_logits[" : "anti_logits[",
                  tensor <= n ? tensor - 1 : tensor - 1 - n, "]", kBadRow);
}

template <class Device>
void implicit_reward_probs(Tensor base, Tensor expert, std::optional<Tensor> anti, Tensor beta,
                           double temperature, bool check, Tensor out) {
  Device device(base, "base_logits", check);
  MixtureArgs a;
  fill(device, &a, base, expert, anti, beta, temperature, check);
  a.probs =
      output<float>(device, out, ScalarType::Float, a.batch * a.base.vocab, "out", {"base_logits"});
  a.probs_stride = a.base.vocab;
  device.run(a);
  raise_invalid(device, a, check);
}

template <class Device>
void implicit_reward_sample(Tensor base, Tensor expert, std::optional<Tensor> anti, Tensor beta,
                            double temperature, Tensor seed, Tensor position, Tensor sequence,
                            int64_t iteration, Tensor rollout, bool do_sample, bool check,
                            Tensor out) {
  Device device(base, "base_logits", check);
  MixtureArgs a;
  fill(device, &a, base, expert, anti, beta, temperature, check);
  a.key = key_spec(device, seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.token = output<int64_t>(device, out, ScalarType::Long, a.batch, "out");
  device.run(a);
  raise_invalid(device, a, check);
}

// ---- knapsack

template <class Device>
void greedy_knapsack(Tensor profit, Tensor weight, Tensor capacity, bool check, Tensor selected,
                     Tensor used, Tensor value, Tensor critical_index, Tensor upper_bound) {
  Device device(profit, "profit", check);
  KnapsackArgs a;
  const Logits p = logits(device, profit, "profit"), w = logits(device, weight, "weight");
  check_dtype(profit, ScalarType::Float, "profit");
  check_dtype(weight, ScalarType::Float, "weight");
  a.batch = profit.size(0);
  a.items = p.vocab;
  STD_TORCH_CHECK(weight.size(0) == a.batch && w.vocab == a.items, "weight is [", weight.size(0),
                  ", ", w.vocab, "], expected profit's [", a.batch, ", ", a.items, "]");
  a.profit = static_cast<const float*>(p.data);
  a.weight = static_cast<const float*>(w.data);
  a.profit_stride = p.batch_stride;
  a.weight_stride = w.batch_stride;
  a.capacity = per_row<double>(device, capacity, ScalarType::Double, a.batch, "capacity");
  a.selected = output<bool>(device, selected, ScalarType::Bool, a.batch * a.items, "selected");
  a.selected_stride = a.items;
  a.used = output<double>(device, used, ScalarType::Double, a.batch, "used");
  a.value = output<double>(device, value, ScalarType::Double, a.batch, "value");
  a.critical_index =
      output<int64_t>(device, critical_index, ScalarType::Long, a.batch, "critical_index");
  a.upper_bound = output<double>(device, upper_bound, ScalarType::Double, a.batch, "upper_bound");
  a.invalid = device.invalid();
  if (check) {
    const int64_t n = a.capacity.stride ? a.batch : 1;
    const auto values = device.host(a.capacity, n);
    for (int64_t b = 0; b < n; ++b)
      STD_TORCH_CHECK(values[b] >= 0, "invalid row: capacity[", b, "] is ", values[b],
                      ", expected a capacity >= 0");
  }
  device.run(a);
  if (!check) return;
  const InvalidRow invalid = device.found();
  if (invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of ",
                    invalid.tensor() == 0 ? "profit" : "weight",
                    " has a negative, infinite or NaN value");
}

// ---- random numbers

template <class Device>
void philox(Tensor counter, Tensor key, Tensor out) {
  Device device(counter, "counter", false);
  PhiloxArgs a;
  check_dtype(counter, ScalarType::Long, "counter");
  check_dtype(key, ScalarType::Long, "key");
  STD_TORCH_CHECK(counter.dim() >= 1 && counter.size(counter.dim() - 1) == 4,
                  "counter must have 4 words in its last dimension");
  STD_TORCH_CHECK(key.numel() == 2, "key must have 2 words");
  device.reads(counter, "counter");
  device.reads(key, "key");
  a.counter = static_cast<const int64_t*>(dense(counter).const_data_ptr());
  a.key_low = device.template one<int64_t>(dense(key), "key", 0);
  a.key_high = device.template one<int64_t>(key, "key", 1);
  a.out = output<int64_t>(device, out, ScalarType::Long, counter.numel(), "out", {"counter"});
  a.blocks = counter.numel() / 4;
  device.run(a);
}

template <class Device>
void normal(int64_t n, Tensor seed, int64_t step, int64_t sequence, int64_t iteration,
            int64_t rollout, Tensor out) {
  Device device(out, "out", false);
  NormalArgs a;
  a.seed = seed_of(device, seed);
  a.out = output<float>(device, out, ScalarType::Float, n, "out");
  a.count = n;
  a.step = counter_field(step, kWord, "step");
  a.sequence = counter_field(sequence, kWord, "sequence");
  a.word3 = counter_word3(kNoise, counter_field(iteration, 1 << 12, "iteration"),
                          counter_field(rollout, 1 << 16, "rollout"));
  device.run(a);
}

// `X.out` of every operator here, under the key of the library block.
template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("deferral_mask.out", TORCH_BOX(&deferral_mask<Device>));
  m.impl("deferral_probs.out", TORCH_BOX(&deferral_probs<Device>));
  m.impl("deferral_stats.out", TORCH_BOX(&deferral_stats<Device>));
  m.impl("deferral_propose.out", TORCH_BOX(&deferral_propose<Device>));
  m.impl("deferral_sample.out", TORCH_BOX(&deferral_sample<Device>));
  m.impl("deferral_verify.out", TORCH_BOX(&deferral_verify<Device>));
  m.impl("categorical_sample.out", TORCH_BOX(&categorical_sample<Device>));
  m.impl("implicit_reward_probs.out", TORCH_BOX(&implicit_reward_probs<Device>));
  m.impl("implicit_reward_sample.out", TORCH_BOX(&implicit_reward_sample<Device>));
  m.impl("greedy_knapsack.out", TORCH_BOX(&greedy_knapsack<Device>));
  m.impl("philox.out", TORCH_BOX(&philox<Device>));
  m.impl("normal.out", TORCH_BOX(&normal<Device>));
}

}  // namespace bind
}  // namespace tta
