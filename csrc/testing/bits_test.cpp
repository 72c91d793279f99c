// The kernels' bits, pinned: a fingerprint of what each operator writes for fixed inputs, the same
// for every instruction set, compiler and kind of processor. Where one changes, a seed no longer
// gives the answer it gave: that is for CHANGELOG.md, and for `bits_test --print`.

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "testing/check.h"
#include "testing/host.h"

namespace tta {
namespace testing {
namespace {

struct Pinned {
  const char* name;
  uint64_t fingerprint;
};
const Pinned kPinned[] = {
    {"deferral_mask", 0x4b68c30230e54058},
    {"deferral_probs", 0xee7d6d3017a5cf36},
    {"deferral_stats", 0x4ea861bcdb10546c},
    {"deferral_sample", 0xc202642fe7104685},
    {"deferral_verify", 0x4397546e0785b345},
    {"categorical_sample", 0x2eff909ae47a49d3},
    {"implicit_reward", 0xd031df8855f59209},
    {"greedy_knapsack", 0xe3572ca1db9dac48},
    {"prelogit_perturb", 0xe264e088ec49c4da},
    {"importance_weights", 0xb0bb9dfc232e1936},
    {"control_update", 0x0cc794920f549a1a},
    {"control_merge", 0x3d8af1b50806a34f},
    {"normal", 0xcdeb09603baaf29f},
    {"deferral_mask, cascades", 0x82164464338010df},
    {"deferral_probs, cascades", 0x9bbb0e224d8e85da},
    {"deferral_stats, cascades", 0xff01b61b1e309d59},
    {"deferral_sample, cascades", 0x4f6b9ecec59f37f3},
    {"deferral_verify, cascades", 0x8e36cafa10f70bee},
};

// Several tiles with a ragged end.
constexpr int64_t kVocab = 9001, kRows = 6, kDim = 4100;

// FNV-1a over the bytes of arrays.
class Fingerprint {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i)
      state_ = (state_ ^ bytes[i]) * 0x100000001b3u;
  }
  uint64_t value() const { return state_; }

 private:
  uint64_t state_ = 0xcbf29ce484222325u;
};

// About normal, of additions and products alone.
double random_number(Random* random) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) sum += random->uniform();
  return sum;
}

std::vector<float> numbers(int64_t count, double scale, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = static_cast<float>(scale * random_number(&random));
  return x;
}

// Numbers of any dtype.
struct Array {
  std::vector<char> data;
  int dtype;
  Array(int64_t count, double scale, int type, uint64_t seed) : dtype(type) {
    const std::vector<float> x = numbers(count, scale, seed);
    data.resize(static_cast<size_t>(count * bytes_of(dtype)));
    for (int64_t i = 0; i < count; ++i) store(data.data(), dtype, i, x[static_cast<size_t>(i)]);
  }
  // Rows of kVocab, `positions` of them to a row of the batch.
  Logits rows(int64_t positions = 1) const {
    return {data.data(), positions * kVocab, kVocab, kVocab, dtype};
  }
};

KeySpec key_of(bool do_sample) {
  static const int64_t sequence[kRows] = {3, 1, 4, 1, 5, 9};
  KeySpec key;
  key.seed = int64_t{0x123456789abcdef};
  key.position = int64_t{17};
  key.sequence = {sequence, 1};
  key.rollout = int64_t{2};
  key.iteration = 7;
  key.do_sample = do_sample;
  return key;
}

// Rules whose results are in one fingerprint: those of one release.
struct Rules {
  int first, end;
};
constexpr Rules kFirst = {kKnapsack, kRelativeRatio}, kCascades = {kRelativeRatio, kOptimal + 1};
static_assert(kCascades.end == kRules, "every rule is in a fingerprint");

// use(arguments) for every dtype, every one of the rules, and critical item.
template <class Args, class Use>
void each_rule(Rules rules, int64_t positions, const Use& use) {
  for (const int dtype : {kFloat32, kFloat16, kBFloat16}) {
    const Array base(kRows * kVocab, 3.0, dtype, 1), proxy(kRows * kVocab, 3.0, dtype, 2);
    for (int rule = rules.first; rule < rules.end; ++rule)
      for (int critical = kExclude; critical <= (rule == kKnapsack ? kSplitItem : kExclude);
           ++critical) {
        Args a;
        a.base = base.rows(positions);
        a.proxy = proxy.rows(positions);
        a.batch = kRows / positions;
        a.rule.rule = rule;
        a.rule.critical = critical;
        a.rule.param = rule == kKnapsack ? 0.3 : rule == kThreshold ? 2e-4 : 0.01;
        a.rule.inv_temperature = critical == kSplitItem ? 1.25f : 1.0f;
        a.rule.inv_rule_temperature = critical == kExclude ? a.rule.inv_temperature : 0.8f;
        use(a);
      }
  }
}

template <class T>
std::vector<T> filled(int64_t count) {
  return std::vector<T>(static_cast<size_t>(count), T(0));
}

// std::vector<bool> has no array of bool.
using Bools = std::vector<uint8_t>;
bool* flags(Bools* x) { return reinterpret_cast<bool*>(x->data()); }

void deferral(Rules rules, Fingerprint* mask, Fingerprint* probs, Fingerprint* stats) {
  each_rule<MaskArgs>(rules, 1, [&](MaskArgs a) {
    Bools out = filled<uint8_t>(kRows * kVocab);
    std::vector<int64_t> critical = filled<int64_t>(kRows);
    std::vector<float> fraction = filled<float>(kRows);
    a.mask = flags(&out);
    a.mask_stride = kVocab;
    a.critical_index = critical.data();
    a.fraction = fraction.data();
    deferral_mask(a, kSerial);
    mask->add(out), mask->add(critical), mask->add(fraction);
  });
  each_rule<ProbsArgs>(rules, 1, [&](ProbsArgs a) {
    std::vector<float> out = filled<float>(kRows * kVocab);
    a.out = out.data();
    a.out_stride = kVocab;
    deferral_probs(a, kSerial);
    probs->add(out);
  });
  each_rule<StatsArgs>(rules, 1, [&](StatsArgs a) {
    std::vector<double> mass = filled<double>(kRows), used = mass;
    std::vector<int64_t> critical = filled<int64_t>(kRows);
    std::vector<float> cut = filled<float>(kRows);
    a.deferred_mass = mass.data();
    a.critical_index = critical.data();
    a.cut_logit = cut.data();
    a.used = used.data();
    deferral_stats(a, kSerial);
    stats->add(mass), stats->add(critical), stats->add(cut), stats->add(used);
  });
}

void sample(Rules rules, Fingerprint* found) {
  for (const bool do_sample : {true, false})
    each_rule<SampleArgs>(rules, 1, [&](SampleArgs a) {
      std::vector<int64_t> token = filled<int64_t>(kRows);
      Bools deferred = filled<uint8_t>(kRows);
      a.key = key_of(do_sample);
      a.token = token.data();
      a.deferred = flags(&deferred);
      deferral_sample(a, kSerial);
      found->add(token), found->add(deferred);
    });
}

void verify(Rules rules, Fingerprint* found) {
  constexpr int64_t kDrafted = 2, kBatch = kRows / (kDrafted + 1);
  for (const bool do_sample : {true, false})
    each_rule<VerifyArgs>(rules, kDrafted + 1, [&](VerifyArgs a) {
      const int64_t draft[kBatch * kDrafted] = {11, 22, 33, 44}, length[kBatch] = {2, 1};
      std::vector<int64_t> accepted = filled<int64_t>(kBatch), token = accepted;
      Bools deferred = filled<uint8_t>(kBatch);
      std::vector<double> mass = filled<double>(kRows);
      a.key = key_of(do_sample);
      a.draft_capacity = kDrafted;
      a.has_bonus_row = a.return_mass = true;
      a.draft = draft;
      a.draft_row_stride = kDrafted;
      a.draft_position_stride = 1;
      a.draft_length = length;
      a.accepted = accepted.data();
      a.token = token.data();
      a.deferred = flags(&deferred);
      a.mass = mass.data();
      deferral_verify(a, kSerial);
      found->add(accepted), found->add(token), found->add(deferred), found->add(mass);
    });
}

void draws(Fingerprint* categorical, Fingerprint* mixture) {
  for (const int dtype : {kFloat32, kFloat16, kBFloat16}) {
    const Array base(kRows * kVocab, 3.0, dtype, 3);
    const Array expert(2 * kRows * kVocab, 1.0, dtype, 4), anti(2 * kRows * kVocab, 1.0, dtype, 5);
    for (const bool do_sample : {true, false}) {
      CategoricalArgs a;
      std::vector<int64_t> token = filled<int64_t>(kRows);
      a.logits = base.rows();
      a.batch = kRows;
      a.inv_temperature = 0.7f;
      a.key = key_of(do_sample);
      a.stream = kUser;
      a.token = token.data();
      categorical_sample(a, kSerial);
      categorical->add(token);
    }
    const float beta[] = {0.75f, -0.3f};
    std::vector<int64_t> token = filled<int64_t>(kRows);
    std::vector<float> probs = filled<float>(kRows * kVocab);
    MixtureArgs a;
    a.base = base.rows();
    a.base.batch_stride = 0;
    a.expert = expert.rows(kRows);
    a.anti = anti.rows(kRows);
    a.experts = 2;
    a.beta = beta;
    a.batch = kRows;
    a.key = key_of(true);
    a.token = token.data();
    implicit_reward(a, kSerial);
    a.token = nullptr;
    a.probs = probs.data();
    a.probs_stride = kVocab;
    implicit_reward(a, kSerial);
    mixture->add(token), mixture->add(probs);
  }
}

void knapsack(Fingerprint* found) {
  std::vector<float> profit = numbers(kRows * kVocab, 1.0, 6);
  std::vector<float> weight = numbers(kRows * kVocab, 1.0, 7);
  for (float& x : profit) x *= x;
  for (float& x : weight) x *= x;
  Bools selected = filled<uint8_t>(kRows * kVocab);
  std::vector<double> used = filled<double>(kRows), value = used, bound = used;
  std::vector<int64_t> critical = filled<int64_t>(kRows);
  KnapsackArgs a;
  a.profit = profit.data();
  a.weight = weight.data();
  a.profit_stride = a.weight_stride = a.selected_stride = a.items = kVocab;
  a.batch = kRows;
  a.capacity = 1000.0;
  a.selected = flags(&selected);
  a.used = used.data();
  a.value = value.data();
  a.critical_index = critical.data();
  a.upper_bound = bound.data();
  greedy_knapsack(a, kSerial);
  found->add(selected), found->add(used), found->add(value), found->add(critical);
  found->add(bound);
}

void perturb(Fingerprint* found) {
  const std::vector<float> mean = numbers(kDim, 1.0, 8);
  for (const int dtype : {kFloat32, kFloat16, kBFloat16}) {
    const Array hidden(kRows * kDim, 1.0, dtype, 9);
    std::vector<char> out = filled<char>(static_cast<int64_t>(hidden.data.size()));
    std::vector<float> dot = filled<float>(kRows);
    const int64_t rollout[kRows] = {0, 1, 2, 3, 400, 65535};
    PerturbArgs a;
    a.hidden = hidden.data.data();
    a.out = out.data();
    a.dtype = dtype;
    a.hidden_stride = a.out_stride = a.dim = kDim;
    a.rows = kRows;
    a.mean = mean.data();
    a.mean_prompt_stride = a.mean_step_stride = kDim;
    a.prompts = a.steps = 1;
    a.step = a.prompt = int64_t{0};
    a.sequence = int64_t{12};
    a.rollout = {rollout, 1};
    a.sigma = 0.37f;
    a.seed = int64_t{-5};
    a.dot = dot.data();
    prelogit_perturb(a, kSerial);
    found->add(out), found->add(dot);
  }
}

void control(Fingerprint* weights, Fingerprint* update, Fingerprint* merge) {
  constexpr int64_t kPrompts = 2, kRollouts = 13, kSteps = 3, kWidth = 260;
  constexpr int64_t kCount = kPrompts * kSteps * kWidth;
  const std::vector<float> mean = numbers(kCount, 1.0, 10);
  const std::vector<float> reward = numbers(kPrompts * kRollouts, 1.0, 11);
  const std::vector<float> dot = numbers(kPrompts * kRollouts, 0.1, 12);
  const std::vector<float> norm2 = numbers(kPrompts * kRollouts, 0.1, 13);
  std::vector<float> weight = filled<float>(kPrompts * kRollouts), ess = filled<float>(kPrompts);
  WeightsArgs w;
  w.reward = reward.data();
  w.dot = dot.data();
  w.norm2 = norm2.data();
  w.reward_stride = w.dot_stride = w.norm2_stride = w.rollouts = kRollouts;
  w.prompts = kPrompts;
  w.lambda = 0.3;
  w.alpha = 0.9;
  w.sigma = 0.37;
  w.weights = weight.data();
  w.ess = ess.data();
  importance_weights(w);
  weights->add(weight), weights->add(ess);

  std::vector<float> out = filled<float>(kCount), partials = filled<float>(2 * kCount);
  ControlArgs a;
  a.mean = mean.data();
  a.prompts = kPrompts;
  a.steps = kSteps;
  a.dim = kWidth;
  a.rollouts = kRollouts;
  a.weights = weight.data();
  a.sequence = int64_t{12};
  a.seed = int64_t{-5};
  a.iteration = 9;
  a.sigma = 0.37f;
  a.out = out.data();
  a.stop = 16;
  control_update(a, kSerial);
  update->add(out);
  for (int64_t shard = 0; shard < 2; ++shard) {
    a.partial = true;
    a.start = 8 * shard;
    a.stop = a.start + 8;
    a.out = partials.data() + shard * kCount;
    control_update(a, kSerial);
  }
  update->add(partials);
  std::vector<float> merged = filled<float>(kCount);
  MergeArgs m;
  m.mean = mean.data();
  m.partials = partials.data();
  m.out = merged.data();
  m.shards = 2;
  m.count = kCount;
  m.sigma = 0.37f;
  control_merge(m, kSerial);
  merge->add(merged);
  CHECK(merged == out, "shards give another update than one device");
}

void noise(Fingerprint* found) {
  std::vector<float> out = filled<float>(100003);
  NormalArgs a;
  a.out = out.data();
  a.count = static_cast<int64_t>(out.size());
  a.seed = int64_t{99};
  a.step = 5;
  a.sequence = 6;
  a.word3 = counter_word3(kNoise, 7, 8);
  normal(a, kSerial);
  found->add(out);
}

std::vector<Pinned> fingerprints() {
  Fingerprint mask, probs, stats, sampled, verified, categorical, mixture, selected, perturbed,
      weights, update, merge, normals;
  deferral(kFirst, &mask, &probs, &stats);
  sample(kFirst, &sampled);
  verify(kFirst, &verified);
  Fingerprint more[5];
  deferral(kCascades, &more[0], &more[1], &more[2]);
  sample(kCascades, &more[3]);
  verify(kCascades, &more[4]);
  draws(&categorical, &mixture);
  knapsack(&selected);
  perturb(&perturbed);
  control(&weights, &update, &merge);
  noise(&normals);
  return {{"deferral_mask", mask.value()},
          {"deferral_probs", probs.value()},
          {"deferral_stats", stats.value()},
          {"deferral_sample", sampled.value()},
          {"deferral_verify", verified.value()},
          {"categorical_sample", categorical.value()},
          {"implicit_reward", mixture.value()},
          {"greedy_knapsack", selected.value()},
          {"prelogit_perturb", perturbed.value()},
          {"importance_weights", weights.value()},
          {"control_update", update.value()},
          {"control_merge", merge.value()},
          {"normal", normals.value()},
          {"deferral_mask, cascades", more[0].value()},
          {"deferral_probs, cascades", more[1].value()},
          {"deferral_stats, cascades", more[2].value()},
          {"deferral_sample, cascades", more[3].value()},
          {"deferral_verify, cascades", more[4].value()}};
}

void check(int isa) {
  const std::vector<Pinned> found = fingerprints();
  CHECK(found.size() == sizeof kPinned / sizeof *kPinned, "operators and pinned fingerprints");
  for (size_t i = 0; i < found.size(); ++i)
    CHECK(!std::strcmp(found[i].name, kPinned[i].name) &&
              found[i].fingerprint == kPinned[i].fingerprint,
          "%s, instruction set %d: %#" PRIx64, found[i].name, isa, found[i].fingerprint);
}

}  // namespace
}  // namespace testing
}  // namespace tta

int main(int argc, char** argv) {
  using namespace tta::testing;
  if (has_flag(argc, argv, "--print")) {
    for (const Pinned& p : fingerprints())
      std::printf("    {\"%s\", 0x%016" PRIx64 "},\n", p.name, p.fingerprint);
    return 0;
  }
  for (int isa = 0; isa <= tta::kAvx512; ++isa)
    if (tta::set_isa(isa) == isa) check(isa);
  return finish("bits_test");
}
