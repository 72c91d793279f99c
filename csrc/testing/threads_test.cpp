// Rows in many threads, and calls from many threads: the results of one thread, and nothing for
// ThreadSanitizer to say (cmake -DTTA_EXT_SANITIZE=thread).

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "testing/check.h"
#include "testing/host.h"

namespace tta {
namespace testing {

constexpr int64_t kRows = 8, kVocab = 9001, kBad = 5;

// A thread a row.
constexpr Parallel kThreads{
    [](int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
      std::vector<std::thread> threads;
      for (int64_t i = 0; i < n; ++i) threads.emplace_back(body, context, i, i + 1);
      for (std::thread& thread : threads) thread.join();
    }};

struct Models {
  std::vector<float> base, proxy;
  Models() : base(kRows * kVocab), proxy(kRows * kVocab) {
    Random random(3);
    for (std::vector<float>* x : {&base, &proxy})
      for (float& logit : *x) logit = static_cast<float>(8.0 * random.uniform());
    base[kBad * kVocab + 17] = kNaN;
  }
  Logits logits(const std::vector<float>& x) const {
    return {x.data(), kVocab, 0, kVocab, kFloat32};
  }
};

// What a call of each kernel writes.
struct Results {
  std::vector<int64_t> whole;
  std::vector<double> real;
  int64_t invalid_row = -1;
};

template <class Args>
Args args_of(const Models& models, int rule, InvalidRow* invalid) {
  Args a;
  a.base = models.logits(models.base);
  a.proxy = models.logits(models.proxy);
  a.batch = kRows;
  a.rule.rule = rule;
  a.rule.param = 0.3;
  a.invalid = invalid;
  return a;
}

Results run(const Models& models, int rule, const Parallel& parallel) {
  constexpr size_t rows = kRows, all = kRows * kVocab;
  std::vector<int64_t> token(rows), critical(rows), critical_of_mask(rows);
  std::vector<double> mass(rows), used(rows);
  std::vector<float> cut(rows), fraction(rows), probs(all);
  std::vector<uint8_t> deferred(rows), mask(all);
  InvalidRow invalid;

  auto sample = args_of<SampleArgs>(models, rule, &invalid);
  sample.key.seed = int64_t{11};
  sample.key.position = int64_t{7};
  sample.key.sequence = sample.key.rollout = int64_t{0};
  sample.token = token.data();
  sample.deferred = reinterpret_cast<bool*>(deferred.data());
  deferral_sample(sample, parallel);

  auto stats = args_of<StatsArgs>(models, rule, &invalid);
  stats.deferred_mass = mass.data();
  stats.used = used.data();
  stats.critical_index = critical.data();
  stats.cut_logit = cut.data();
  deferral_stats(stats, parallel);

  auto masks = args_of<MaskArgs>(models, rule, &invalid);
  masks.mask = reinterpret_cast<bool*>(mask.data());
  masks.mask_stride = kVocab;
  masks.critical_index = critical_of_mask.data();
  masks.fraction = fraction.data();
  deferral_mask(masks, parallel);

  auto laws = args_of<ProbsArgs>(models, rule, &invalid);
  laws.out = probs.data();
  laws.out_stride = kVocab;
  deferral_probs(laws, parallel);

  // Pairs of rows, with a draft token for the first of each.
  constexpr int64_t kPairs = kRows / 2;
  const std::vector<int64_t> draft(kPairs, 23), length(kPairs, 1);
  std::vector<int64_t> accepted(kPairs), verified(kPairs);
  std::vector<uint8_t> by_proxy(kPairs);
  std::vector<double> masses(rows);
  auto pairs = args_of<VerifyArgs>(models, rule, &invalid);
  for (Logits* x : {&pairs.base, &pairs.proxy}) x->batch_stride = 2 * (x->row_stride = kVocab);
  pairs.batch = kPairs;
  pairs.key = sample.key;
  pairs.draft_capacity = pairs.draft_row_stride = 1;
  pairs.has_bonus_row = pairs.return_mass = true;
  pairs.draft = draft.data();
  pairs.draft_length = length.data();
  pairs.accepted = accepted.data();
  pairs.token = verified.data();
  pairs.deferred = reinterpret_cast<bool*>(by_proxy.data());
  pairs.mass = masses.data();
  deferral_verify(pairs, parallel);

  Results out;
  out.invalid_row = invalid.row();
  for (const auto* x : {&token, &critical, &critical_of_mask, &accepted, &verified})
    out.whole.insert(out.whole.end(), x->begin(), x->end());
  for (const auto* x : {&deferred, &mask, &by_proxy})
    out.whole.insert(out.whole.end(), x->begin(), x->end());
  for (const auto* x : {&mass, &used, &masses})
    out.real.insert(out.real.end(), x->begin(), x->end());
  for (const auto* x : {&cut, &fraction, &probs})
    out.real.insert(out.real.end(), x->begin(), x->end());
  return out;
}

void compare(const Results& got, const Results& want, const char* what) {
  CHECK(got.whole == want.whole, "%s", what);
  CHECK(got.invalid_row == want.invalid_row, "%s", what);
  const auto equal = [](double a, double b) { return a == b || (a != a && b != b); };
  CHECK(std::equal(got.real.begin(), got.real.end(), want.real.begin(), want.real.end(), equal),
        "%s", what);
}

void test_threads(int rule) {
  const Models models;
  const Results want = run(models, rule, kSerial);
  CHECK(want.invalid_row == kBad, "%d", static_cast<int>(want.invalid_row));
  compare(run(models, rule, kThreads), want, "a thread a row");
  std::vector<Results> found(4);
  std::vector<std::thread> callers;
  for (Results& one : found)
    callers.emplace_back([&models, &one, rule] { one = run(models, rule, kSerial); });
  for (std::thread& caller : callers) caller.join();
  for (const Results& one : found) compare(one, want, "calls at once");
}

}  // namespace testing
}  // namespace tta

int main() {
  for (int rule = 0; rule < tta::kRules; ++rule) tta::testing::test_threads(rule);
  return tta::testing::finish("threads_test");
}
