#include "testing/cuda/cases.h"

#include <cmath>
#include <limits>

namespace tta {
namespace testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

int64_t padding(Random* random) { return random->below(3) ? 0 : random->below(5); }

}  // namespace

double random_normal(Random* random) {
  const double r = std::sqrt(-2.0 * std::log(1.0 - random->uniform()));
  return r * std::cos(6.283185307179586 * random->uniform());
}

int64_t random_vocab(int64_t most, Random* random) {
  const int64_t v = pick<int64_t>(
      {1, 2, 31, 100, 128, 1000, 4095, 4096, 4097, 5003, 8192, 12300, 16384, 20000, 40001, 128256},
      random);
  return v <= most ? v : 1 + random->below(most);
}

Rows::Rows(int64_t rows, int64_t vocab, int dtype, Random* random)
    : rows_(rows),
      vocab_(vocab),
      stride_(vocab + padding(random)),
      dtype_(dtype),
      data_((rows ? (rows - 1) * stride_ + vocab : 0) * bytes_of(dtype),
            padding(random) * bytes_of(dtype)) {
  const double spread = pick({0.0, 0.01, 1.0, 3.0, 8.0, 30.0}, random);
  const bool holes = random->below(5) == 0, ties = random->below(5) == 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t v = 0; v < vocab; ++v) {
      double x = random_normal(random) * spread;
      if (spread > 2.0 && random->below(50) == 0) x += 10.0;
      if (ties) x = std::round(2.0 * x) / 2.0;
      if (holes && random->below(3) == 0) x = -kInf;
      set(r, v, static_cast<float>(x));
    }
    set(r, random->below(vocab), 1.0f);  // a token at least is possible
  }
  upload();
}

void Rows::set(int64_t row, int64_t v, float value) {
  store(data_.at(kHost), dtype_, row * stride_ + v, value);
}

float Rows::get(int64_t row, int64_t v) const {
  return load(data_.at(kHost), dtype_, row * stride_ + v);
}

void Rows::spoil(Random* random) {
  const int64_t row = random->below(rows_);
  const int kind = static_cast<int>(random->below(3));
  if (kind < 2) set(row, random->below(vocab_), kind ? kInf : std::nanf(""));
  for (int64_t v = 0; kind == 2 && v < vocab_; ++v) set(row, v, -kInf);
  upload();
}

Logits Rows::at(Side side, int64_t batch_stride, int64_t row_stride) const {
  return {data_.at(side), batch_stride * stride_, row_stride * stride_, vocab_, dtype_};
}

Keys::Keys(int64_t batch, Random* random)
    : position(batch), sequence(batch), rollout(batch), seed(static_cast<int64_t>(random->next())) {
  for (int64_t b = 0; b < batch; ++b) {
    position[b] = random->below(100000);
    sequence[b] = random->below(int64_t{1} << 32);
    rollout[b] = random->below(65536);
  }
  position.upload();
  sequence.upload();
  rollout.upload();
}

KeySpec Keys::at(Side side, bool do_sample) const {
  KeySpec key;
  key.seed = seed;
  key.position = {position.at(side), 1};
  key.sequence = {sequence.at(side), 1};
  key.rollout = {rollout.at(side), 1};
  key.iteration = 3;
  key.do_sample = do_sample;
  return key;
}

RandomRule::RandomRule(int rule, int critical, int64_t rows, Random* random)
    : rule(rule), critical(critical), param(rows) {
  const double temperature = pick({1.0, 1.0, 0.5, 2.0, 0.05}, random);
  inv_temperature = 1.0f / static_cast<float>(temperature);
  inv_rule_temperature =
      1.0f / static_cast<float>(random->below(2) ? temperature : pick({1.0, 0.7, 3.0}, random));
  for (int64_t r = 0; r < rows; ++r) {
    if (rule == kKnapsack)
      param[r] = pick({0.0, 1e-6, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0, 2.0}, random);
    else if (rule == kThreshold || rule == kNudging)
      param[r] = pick({0.0, 1e-5, 0.01, 0.1, 0.4, 0.9, 1.5}, random);
    else
      param[r] = pick({-0.3, -0.05, 0.0, 0.05, 0.2, 0.8}, random);
    if (random->below(50) == 0) param[r] = std::nan("");
  }
  param.upload();
}

RuleSpec RandomRule::at(Side side) const {
  RuleSpec spec;
  spec.param = {param.at(side), 1};
  spec.rule = rule;
  spec.critical = critical;
  spec.inv_temperature = inv_temperature;
  spec.inv_rule_temperature = inv_rule_temperature;
  return spec;
}

std::string RandomRule::text() const {
  return "rule " + std::to_string(rule) + ", critical " + std::to_string(critical) + ", 1/T " +
         std::to_string(inv_temperature) + " and " + std::to_string(inv_rule_temperature);
}

}  // namespace testing
}  // namespace tta
