// Ten calls of the CPU kernels over rows of several shapes, each in a function of its own that
// .ci/instructions counts under valgrind: a guard of speed without a clock.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "testing/check.h"
#include "testing/host.h"

namespace tta {
namespace testing {

constexpr int64_t kVocab = 32000, kSeeds = 8;

struct Rows {
  std::vector<char> base, proxy;
  int dtype;
  Logits logits(const std::vector<char>& x) const { return {x.data(), kVocab, 0, kVocab, dtype}; }
};

enum Shape { kPeaked, kGaussian, kConstant };

Rows rows_of(Shape shape, int dtype) {
  Random random(1);
  const auto normal = [&random] {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += random.uniform();
    return sum;
  };
  std::vector<double> x;
  for (int64_t rank = 0; rank < kVocab; ++rank)
    x.push_back(shape == kPeaked     ? normal() - 1.6 * std::log(static_cast<double>(rank + 3))
                : shape == kGaussian ? normal()
                                     : 1.5);
  for (int64_t i = kVocab - 1; i > 0; --i)
    std::swap(x[static_cast<size_t>(i)], x[static_cast<size_t>(random.below(i + 1))]);
  const auto bytes = static_cast<size_t>(kVocab * bytes_of(dtype));
  Rows rows{std::vector<char>(bytes), std::vector<char>(bytes), dtype};
  for (int64_t i = 0; i < kVocab; ++i) {
    const double one = x[static_cast<size_t>(i)];
    store(rows.base.data(), dtype, i, static_cast<float>(one));
    store(rows.proxy.data(), dtype, i, static_cast<float>(one + 0.3 * normal()));
  }
  return rows;
}

struct Call {
  const char* what;
  Shape shape;
  int dtype;
  void (*run)(const Rows& rows);
};

template <class Args>
Args args_of(const Rows& rows, int rule, double param) {
  static InvalidRow invalid;
  Args a;
  a.base = rows.logits(rows.base);
  a.proxy = rows.logits(rows.proxy);
  a.batch = 1;
  a.rule.rule = rule;
  a.rule.param = param;
  a.invalid = &invalid;
  return a;
}

KeySpec key_of(int64_t seed) {
  KeySpec key;
  key.seed = seed;
  key.position = int64_t{7};
  key.sequence = key.rollout = int64_t{0};
  return key;
}

void sample(const Rows& rows, bool propose, double budget) {
  for (int64_t seed = 0; seed < kSeeds; ++seed) {
    auto a = args_of<SampleArgs>(rows, kKnapsack, budget);
    int64_t token = -1;
    bool deferred = false;
    a.key = key_of(seed);
    a.propose = propose;
    a.token = &token;
    a.deferred = &deferred;
    deferral_sample(a, kSerial);
    CHECK(token >= 0, "no token");
  }
}

void stats(const Rows& rows, int rule, double param) {
  auto a = args_of<StatsArgs>(rows, rule, param);
  double mass = -1.0, used = 0.0;
  int64_t critical = 0;
  float cut = 0.0f;
  a.deferred_mass = &mass;
  a.used = &used;
  a.critical_index = &critical;
  a.cut_logit = &cut;
  deferral_stats(a, kSerial);
  CHECK(mass >= 0.0 && mass <= 1.0, "mass %g", mass);
}

void mask(const Rows& rows, double budget) {
  auto a = args_of<MaskArgs>(rows, kKnapsack, budget);
  std::vector<uint8_t> out(static_cast<size_t>(kVocab));
  int64_t critical = -2;
  float fraction = 0.0f;
  a.mask = reinterpret_cast<bool*>(out.data());
  a.mask_stride = kVocab;
  a.critical_index = &critical;
  a.fraction = &fraction;
  deferral_mask(a, kSerial);
  CHECK(critical >= 0, "no critical item");
}

void probs(const Rows& rows, double budget) {
  auto a = args_of<ProbsArgs>(rows, kKnapsack, budget);
  std::vector<float> out(static_cast<size_t>(kVocab));
  a.out = out.data();
  a.out_stride = kVocab;
  deferral_probs(a, kSerial);
  CHECK(out[0] >= 0.0f, "%g", static_cast<double>(out[0]));
}

void verify(const Rows& rows, double budget) {
  auto a = args_of<VerifyArgs>(rows, kKnapsack, budget);
  const int64_t draft = 5, length = 1;
  int64_t accepted = -1, token = -1;
  bool deferred = false;
  double mass[2];
  a.key = key_of(1);
  a.draft_capacity = 1;
  a.has_bonus_row = true;
  a.draft = &draft;
  a.draft_length = &length;
  a.draft_row_stride = a.draft_position_stride = 1;
  a.accepted = &accepted;
  a.token = &token;
  a.deferred = &deferred;
  a.mass = mass;
  deferral_verify(a, kSerial);
  CHECK(accepted >= 0 && token >= 0, "accepted %d", static_cast<int>(accepted));
}

const Call kCalls[] = {
    {"sample .3, peaked, float32", kPeaked, kFloat32, [](const Rows& r) { sample(r, false, 0.3); }},
    {"sample .7, Gaussian, bfloat16", kGaussian, kBFloat16,
     [](const Rows& r) { sample(r, false, 0.7); }},
    {"propose .5, Gaussian, float32", kGaussian, kFloat32,
     [](const Rows& r) { sample(r, true, 0.5); }},
    {"stats .3, peaked, float32", kPeaked, kFloat32,
     [](const Rows& r) { stats(r, kKnapsack, 0.3); }},
    {"stats .3, Gaussian, float32", kGaussian, kFloat32,
     [](const Rows& r) { stats(r, kKnapsack, 0.3); }},
    {"stats .3, constant, float32", kConstant, kFloat32,
     [](const Rows& r) { stats(r, kKnapsack, 0.3); }},
    {"stats confidence_bet, Gaussian, float16", kGaussian, kFloat16,
     [](const Rows& r) { stats(r, kConfidenceBet, 1e-4); }},
    {"mask .1, Gaussian, bfloat16", kGaussian, kBFloat16, [](const Rows& r) { mask(r, 0.1); }},
    {"probs .3, Gaussian, float32", kGaussian, kFloat32, [](const Rows& r) { probs(r, 0.3); }},
    {"verify .3, Gaussian, float32", kGaussian, kFloat32, [](const Rows& r) { verify(r, 0.3); }},
};

// What is counted, from its entry to its end: it must not end by jumping into another function. The
// first call of each kernel makes its scratch, so it is made before.
TTA_NOINLINE int64_t counted_call(const Call& call, const Rows& rows) {
  call.run(rows);
  return failures();
}

}  // namespace testing
}  // namespace tta

// calls [NUMBER]: all of them, or one.
int main(int argc, char** argv) {
  using namespace tta::testing;
  const int only = argc > 1 ? std::atoi(argv[1]) : -1;
  int number = 0;
  for (const Call& call : kCalls) {
    if (only >= 0 && number++ != only) continue;
    const Rows rows = rows_of(call.shape, call.dtype);
    call.run(rows);
    std::printf("%s\n", call.what);
    counted_call(call, rows);
  }
  return finish("calls");
}
