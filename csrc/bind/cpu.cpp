// Registers the CPU kernels: for every op `X`, `X.out` under the CPU key. Schemas, fakes, autograd
// and the functional forms are Python's (tta_ext/schemas.py).

#include "bind/stable.h"
#include "core/philox.h"
#include "cpu/isa.h"

namespace tta {
namespace bind {
namespace {

// Raised only when a later library could not serve the schemas of this package.
constexpr int64_t kNativeVersion = 1;

void raise_invalid(const InvalidRow& invalid, bool check) {
  if (!check || !invalid.any()) return;
  STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of ",
                  invalid.tensor() == kBaseLogits ? "base_logits" : "proxy_logits", kBadRow);
}

// Rows of about this many elements are worth a thread of their own.
constexpr int64_t kElementsPerTask = 1 << 14;

int64_t row_grain(int64_t vocab) {
  const int64_t grain = kElementsPerTask / vocab;
  return grain < 1 ? 1 : grain;
}

void fill(DeferralArgs* a, const Tensor& base, const std::optional<Tensor>& proxy,
          const Tensor& param, int64_t rule, int64_t critical, double temperature,
          double rule_temperature, bool check, InvalidRow* invalid) {
  a->base = logits(base, "base_logits");
  a->batch = base.size(0);
  a->rule = rule_spec(param, rule, critical, temperature, rule_temperature, a->batch, check);
  if (proxy) {
    a->proxy = logits(*proxy, "proxy_logits");
    STD_TORCH_CHECK(a->proxy.vocab == a->base.vocab && proxy->size(0) == a->batch,
                    "proxy_logits is [", proxy->size(0), ", ", a->proxy.vocab,
                    "], expected base_logits' [", a->batch, ", ", a->base.vocab, "]");
  } else {
    STD_TORCH_CHECK(!rule_needs_proxy(static_cast<int>(rule)), "rule ", rule,
                    " needs proxy_logits");
  }
  a->invalid = invalid;
}

void deferral_mask(Tensor base, std::optional<Tensor> proxy, Tensor param, int64_t rule,
                   int64_t critical, double temperature, double rule_temperature, bool check,
                   Tensor mask, Tensor critical_index, Tensor fraction) {
  InvalidRow invalid;
  MaskArgs a;
  fill(&a, base, proxy, param, rule, critical, temperature, rule_temperature, check, &invalid);
  a.mask = output<bool>(mask, ScalarType::Bool, a.batch * a.base.vocab, "mask");
  a.mask_stride = a.base.vocab;
  a.critical_index = output<int64_t>(critical_index, ScalarType::Long, a.batch, "critical_index");
  a.fraction = output<float>(fraction, ScalarType::Float, a.batch, "fraction");
  tta::deferral_mask(a, pool(row_grain(a.base.vocab)));
  raise_invalid(invalid, check);
}

void deferral_probs(Tensor base, Tensor proxy, Tensor param, int64_t rule, int64_t critical,
                    double temperature, double rule_temperature, bool check, Tensor out) {
  InvalidRow invalid;
  ProbsArgs a;
  fill(&a, base, proxy, param, rule, critical, temperature, rule_temperature, check, &invalid);
  a.out = output<float>(out, ScalarType::Float, a.batch * a.base.vocab, "out");
  a.out_stride = a.base.vocab;
  tta::deferral_probs(a, pool(row_grain(a.base.vocab)));
  raise_invalid(invalid, check);
}

void deferral_stats(Tensor base, std::optional<Tensor> proxy, Tensor param, int64_t rule,
                    int64_t critical, double temperature, double rule_temperature, bool check,
                    Tensor deferred_mass, Tensor critical_index, Tensor cut_logit, Tensor used) {
  InvalidRow invalid;
  StatsArgs a;
  fill(&a, base, proxy, param, rule, critical, temperature, rule_temperature, check, &invalid);
  a.deferred_mass = output<double>(deferred_mass, ScalarType::Double, a.batch, "deferred_mass");
  a.critical_index = output<int64_t>(critical_index, ScalarType::Long, a.batch, "critical_index");
  a.cut_logit = output<float>(cut_logit, ScalarType::Float, a.batch, "cut_logit");
  a.used = output<double>(used, ScalarType::Double, a.batch, "used");
  tta::deferral_stats(a, pool(row_grain(a.base.vocab)));
  raise_invalid(invalid, check);
}

void sample(const Tensor& base, const std::optional<Tensor>& proxy, const Tensor& param,
            int64_t rule, int64_t critical, double temperature, double rule_temperature,
            const Tensor& seed, const Tensor& position, const Tensor& sequence, int64_t iteration,
            const Tensor& rollout, bool do_sample, bool check, const Tensor& token,
            const Tensor& deferred) {
  InvalidRow invalid;
  SampleArgs a;
  fill(&a, base, proxy, param, rule, critical, temperature, rule_temperature, check, &invalid);
  a.key = key_spec(seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.propose = !proxy;
  a.token = output<int64_t>(token, ScalarType::Long, a.batch, "token");
  a.deferred = output<bool>(deferred, ScalarType::Bool, a.batch, "deferred");
  tta::deferral_sample(a, pool(row_grain(a.base.vocab)));
  raise_invalid(invalid, check);
}

void deferral_propose(Tensor base, Tensor param, int64_t rule, int64_t critical, double temperature,
                      double rule_temperature, Tensor seed, Tensor position, Tensor sequence,
                      int64_t iteration, Tensor rollout, bool do_sample, bool check, Tensor token,
                      Tensor deferred) {
  sample(base, std::nullopt, param, rule, critical, temperature, rule_temperature, seed, position,
         sequence, iteration, rollout, do_sample, check, token, deferred);
}

void deferral_sample(Tensor base, Tensor proxy, Tensor param, int64_t rule, int64_t critical,
                     double temperature, double rule_temperature, Tensor seed, Tensor position,
                     Tensor sequence, int64_t iteration, Tensor rollout, bool do_sample, bool check,
                     Tensor token, Tensor deferred) {
  sample(base, proxy, param, rule, critical, temperature, rule_temperature, seed, position,
         sequence, iteration, rollout, do_sample, check, token, deferred);
}

void deferral_verify(Tensor base, Tensor proxy, Tensor draft, Tensor draft_length, Tensor param,
                     int64_t rule, int64_t critical, double temperature, double rule_temperature,
                     Tensor seed, Tensor position, Tensor sequence, int64_t iteration,
                     Tensor rollout, bool do_sample, bool return_mass, bool check, Tensor accepted,
                     Tensor token, Tensor deferred, Tensor mass) {
  InvalidRow invalid;
  VerifyArgs a;
  a.base = logits(base, "base_logits", 3);
  a.proxy = logits(proxy, "proxy_logits", 3);
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
  check_dtype(draft, ScalarType::Long, "draft");
  check_dtype(draft_length, ScalarType::Long, "draft_length");
  STD_TORCH_CHECK(draft.dim() == 2 && draft.size(0) == a.batch && draft.size(1) == a.draft_capacity,
                  "draft must be [", a.batch, ", ", a.draft_capacity, "]");
  STD_TORCH_CHECK(draft_length.numel() == a.batch && draft_length.is_contiguous(),
                  "draft_length must hold ", a.batch, " contiguous elements");
  a.draft = static_cast<const int64_t*>(draft.const_data_ptr());
  a.draft_row_stride = draft.stride(0);
  a.draft_position_stride = draft.stride(1);
  a.draft_length = static_cast<const int64_t*>(draft_length.const_data_ptr());
  const int64_t params = param.numel();
  const bool each = params != 1 && params != a.batch;
  a.rule = rule_spec(param, rule, critical, temperature, rule_temperature,
                     each ? a.batch * positions : a.batch, check);
  a.param_row_stride = params == 1 ? 0 : each ? positions : 1;
  a.param_position_stride = each ? 1 : 0;
  a.key = key_spec(seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.return_mass = return_mass;
  a.accepted = output<int64_t>(accepted, ScalarType::Long, a.batch, "accepted");
  a.token = output<int64_t>(token, ScalarType::Long, a.batch, "token");
  a.deferred = output<bool>(deferred, ScalarType::Bool, a.batch, "deferred");
  a.mass = output<double>(mass, ScalarType::Double, a.batch * positions, "mass");
  a.invalid = &invalid;
  if (check) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t length = a.draft_length[b];
      STD_TORCH_CHECK(length >= 0 && length <= a.draft_capacity, "invalid row: draft_length[", b,
                      "] is ", length, ", expected 0 <= draft_length < ", positions);
      for (int64_t k = 0; k < length; ++k) {
        const int64_t x = a.draft_at(b, k);
        STD_TORCH_CHECK(x >= 0 && x < a.base.vocab, "invalid row: draft[", b * a.draft_capacity + k,
                        "] is ", x, ", expected 0 <= draft < ", a.base.vocab);
      }
    }
  }
  tta::deferral_verify(a, pool());
  if (check && invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row() / positions, ", position ",
                    invalid.row() % positions, " of ",
                    invalid.tensor() == kBaseLogits ? "base_logits" : "proxy_logits", kBadRow);
}

void categorical_sample(Tensor x, double temperature, Tensor seed, Tensor position, Tensor sequence,
                        int64_t iteration, Tensor rollout, bool do_sample, int64_t stream,
                        int64_t draw, bool check, Tensor out) {
  InvalidRow invalid;
  CategoricalArgs a;
  a.logits = logits(x, "logits");
  a.batch = x.size(0);
  a.inv_temperature = inverse_temperature(temperature, "temperature");
  a.key = key_spec(seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.stream = counter_field(stream, 16, "stream");
  a.draw = counter_field(draw, kWord, "draw");
  a.token = output<int64_t>(out, ScalarType::Long, a.batch, "out");
  a.invalid = &invalid;
  tta::categorical_sample(a, pool(row_grain(a.logits.vocab)));
  if (check && invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of logits", kBadRow);
}

// ---- mixtures
// ------------------------------------------------------------------------------------

Logits expert_logits(const Tensor& x, const MixtureArgs& a, const char* name) {
  const Logits out = logits(x, name, 3);
  STD_TORCH_CHECK(x.size(0) == a.experts && x.size(1) == a.batch && out.vocab == a.base.vocab, name,
                  " is [", x.size(0), ", ", x.size(1), ", ", out.vocab, "], expected [", a.experts,
                  ", ", a.batch, ", ", a.base.vocab, "]");
  return out;
}

void fill(MixtureArgs* a, const Tensor& base, const Tensor& expert,
          const std::optional<Tensor>& anti, const Tensor& beta, double temperature, bool check,
          InvalidRow* invalid) {
  a->base = logits(base, "base_logits");
  a->base.row_stride = a->base.batch_stride;
  a->base.batch_stride = 0;
  a->batch = base.size(0);
  a->experts = beta.numel();
  check_dtype(beta, ScalarType::Float, "beta");
  STD_TORCH_CHECK(beta.is_contiguous(), "beta must be contiguous");
  STD_TORCH_CHECK(1 + 2 * a->experts < InvalidRow::kTensors, "beta has ", a->experts,
                  " elements, expected fewer than ", InvalidRow::kTensors / 2);
  a->beta = static_cast<const float*>(beta.const_data_ptr());
  if (check) {
    for (int64_t e = 0; e < a->experts; ++e)
      STD_TORCH_CHECK(std::isfinite(a->beta[e]), "invalid row: beta[", e, "] is ", a->beta[e],
                      ", expected a finite number");
  }
  a->expert = expert_logits(expert, *a, "expert_logits");
  if (anti) a->anti = expert_logits(*anti, *a, "anti_logits");
  a->inv_temperature = inverse_temperature(temperature, "temperature");
  a->invalid = invalid;
}

void raise_invalid(const MixtureArgs& a, bool check) {
  if (!check || !a.invalid->any()) return;
  const int64_t row = a.invalid->row(), tensor = a.invalid->tensor(), n = a.experts;
  if (tensor == kBaseLogits)
    STD_TORCH_CHECK(false, "invalid row: row ", row, " of base_logits", kBadRow);
  STD_TORCH_CHECK(tensor <= 2 * n, "invalid row: row ", row,
                  " of the combined scores is undefined or has no finite value");
  STD_TORCH_CHECK(false, "invalid row: row ", row, " of ",
                  tensor <= n ? "expert_logits[" : "anti_logits[",
                  tensor <= n ? tensor - 1 : tensor - 1 - n, "]", kBadRow);
}

void implicit_reward_probs(Tensor base, Tensor expert, std::optional<Tensor> anti, Tensor beta,
                           double temperature, bool check, Tensor out) {
  InvalidRow invalid;
  MixtureArgs a;
  fill(&a, base, expert, anti, beta, temperature, check, &invalid);
  a.probs = output<float>(out, ScalarType::Float, a.batch * a.base.vocab, "out");
  a.probs_stride = a.base.vocab;
  tta::implicit_reward(a, pool(row_grain(a.base.vocab)));
  raise_invalid(a, check);
}

void implicit_reward_sample(Tensor base, Tensor expert, std::optional<Tensor> anti, Tensor beta,
                            double temperature, Tensor seed, Tensor position, Tensor sequence,
                            int64_t iteration, Tensor rollout, bool do_sample, bool check,
                            Tensor out) {
  InvalidRow invalid;
  MixtureArgs a;
  fill(&a, base, expert, anti, beta, temperature, check, &invalid);
  a.key = key_spec(seed, position, sequence, iteration, rollout, do_sample, a.batch, check);
  a.token = output<int64_t>(out, ScalarType::Long, a.batch, "out");
  tta::implicit_reward(a, pool(row_grain(a.base.vocab)));
  raise_invalid(a, check);
}

// ---- knapsack
// ------------------------------------------------------------------------------------

void greedy_knapsack(Tensor profit, Tensor weight, Tensor capacity, bool check, Tensor selected,
                     Tensor used, Tensor value, Tensor critical_index, Tensor upper_bound) {
  InvalidRow invalid;
  KnapsackArgs a;
  const Logits p = logits(profit, "profit"), w = logits(weight, "weight");
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
  a.capacity = per_row<double>(capacity, ScalarType::Double, a.batch, "capacity");
  a.selected = output<bool>(selected, ScalarType::Bool, a.batch * a.items, "selected");
  a.selected_stride = a.items;
  a.used = output<double>(used, ScalarType::Double, a.batch, "used");
  a.value = output<double>(value, ScalarType::Double, a.batch, "value");
  a.critical_index = output<int64_t>(critical_index, ScalarType::Long, a.batch, "critical_index");
  a.upper_bound = output<double>(upper_bound, ScalarType::Double, a.batch, "upper_bound");
  a.invalid = &invalid;
  if (check) {
    for (int64_t b = 0; b < (a.capacity.stride ? a.batch : 1); ++b)
      STD_TORCH_CHECK(a.capacity[b] >= 0, "invalid row: capacity[", b, "] is ", a.capacity[b],
                      ", expected a capacity >= 0");
  }
  tta::greedy_knapsack(a, pool(row_grain(a.items)));
  if (check && invalid.any())
    STD_TORCH_CHECK(false, "invalid row: row ", invalid.row(), " of ",
                    invalid.tensor() == 0 ? "profit" : "weight",
                    " has a negative, infinite or NaN value");
}

// ---- random numbers
// --------------------------------------------------------------------------------

void philox(Tensor counter, Tensor key, Tensor out) {
  check_dtype(counter, ScalarType::Long, "counter");
  check_dtype(key, ScalarType::Long, "key");
  STD_TORCH_CHECK(counter.dim() >= 1 && counter.size(counter.dim() - 1) == 4,
                  "counter must have 4 words in its last dimension");
  STD_TORCH_CHECK(key.numel() == 2 && key.is_contiguous(), "key must have 2 words");
  STD_TORCH_CHECK(counter.is_contiguous(), "counter must be contiguous");
  const int64_t* c = static_cast<const int64_t*>(counter.const_data_ptr());
  const int64_t* k = static_cast<const int64_t*>(key.const_data_ptr());
  int64_t* o = output<int64_t>(out, ScalarType::Long, counter.numel(), "out");
  const int64_t blocks = counter.numel() / 4;
  for (int64_t i = 0; i < blocks; ++i) {
    Philox4 block;
    for (int j = 0; j < 4; ++j) block.x[j] = static_cast<uint32_t>(c[4 * i + j]);
    block = philox4x32(block, static_cast<uint32_t>(k[0]), static_cast<uint32_t>(k[1]));
    for (int j = 0; j < 4; ++j) o[4 * i + j] = block.x[j];
  }
}

void normal(int64_t n, Tensor seed, int64_t step, int64_t sequence, int64_t iteration,
            int64_t rollout, Tensor out) {
  NormalArgs a;
  a.out = output<float>(out, ScalarType::Float, n, "out");
  a.count = n;
  a.seed = seed_of(seed);
  a.step = counter_field(step, kWord, "step");
  a.sequence = counter_field(sequence, kWord, "sequence");
  a.word3 = counter_word3(kNoise, counter_field(iteration, 1 << 12, "iteration"),
                          counter_field(rollout, 1 << 16, "rollout"));
  tta::normal(a, pool());
}

int64_t cpu_isa(int64_t level) { return set_isa(static_cast<int>(level)); }
int64_t native_version() { return kNativeVersion; }

}  // namespace
}  // namespace bind
}  // namespace tta

STABLE_TORCH_LIBRARY_IMPL(tta_ext, CPU, m) {
  m.impl("deferral_mask.out", TORCH_BOX(&tta::bind::deferral_mask));
  m.impl("deferral_probs.out", TORCH_BOX(&tta::bind::deferral_probs));
  m.impl("deferral_stats.out", TORCH_BOX(&tta::bind::deferral_stats));
  m.impl("deferral_propose.out", TORCH_BOX(&tta::bind::deferral_propose));
  m.impl("deferral_sample.out", TORCH_BOX(&tta::bind::deferral_sample));
  m.impl("deferral_verify.out", TORCH_BOX(&tta::bind::deferral_verify));
  m.impl("categorical_sample.out", TORCH_BOX(&tta::bind::categorical_sample));
  m.impl("implicit_reward_probs.out", TORCH_BOX(&tta::bind::implicit_reward_probs));
  m.impl("implicit_reward_sample.out", TORCH_BOX(&tta::bind::implicit_reward_sample));
  m.impl("greedy_knapsack.out", TORCH_BOX(&tta::bind::greedy_knapsack));
  m.impl("philox.out", TORCH_BOX(&tta::bind::philox));
  m.impl("normal.out", TORCH_BOX(&tta::bind::normal));
}

// No tensor says which device these are for.
STABLE_TORCH_LIBRARY_IMPL(tta_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&tta::bind::cpu_isa));
  m.impl("native_version", TORCH_BOX(&tta::bind::native_version));
}
