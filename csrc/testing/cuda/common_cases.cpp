// One call of an operator as decoding loops make it most of the time, for profiles: every row valid
// and aligned. Still compared with the CPU.
#include <cmath>
#include <limits>

#include "testing/cuda/cases.h"

namespace tta {
namespace testing {
namespace {

constexpr int64_t kDim = 4096, kRollouts = 32, kSteps = 32, kDraft = 4, kShards = 8;

double peaked(double exponent, int64_t vocab, Random* random) {
  return random_normal(random) - exponent * std::log(static_cast<double>(random->below(vocab) + 3));
}

// One logit of a row; benchmarks/data.py has the same shapes.
struct Shape {
  const char* name;
  double (*logit)(int64_t vocab, Random* random);
};
const Shape kShapes[] = {
    {"normal", [](int64_t, Random* r) { return 3.0 * random_normal(r); }},
    {"language-model", [](int64_t v, Random* r) { return peaked(1.6, v, r); }},
    {"small-model", [](int64_t v, Random* r) { return peaked(1.04, v, r); }},
    {"constant", [](int64_t, Random*) { return 1.5; }},
    {"gaussian-.5", [](int64_t, Random* r) { return 0.5 * random_normal(r); }},
    {"gaussian-1", [](int64_t, Random* r) { return random_normal(r); }},
    {"gaussian-4", [](int64_t, Random* r) { return 4.0 * random_normal(r); }},
    {"zipf", [](int64_t v, Random* r) { return -std::log(static_cast<double>(r->below(v) + 1)); }},
    {"impossible",
     [](int64_t, Random* r) {
       return r->below(1000) ? -std::numeric_limits<double>::infinity() : random_normal(r);
     }},
    {"ties", [](int64_t, Random* r) { return std::round(16.0 * random_normal(r)) / 4.0; }},
    {"plateaus", [](int64_t, Random* r) { return static_cast<double>(r->below(2)); }}};

const Shape* shape_of(const std::string& name) {
  for (const Shape& shape : kShapes)
    if (name == shape.name) return &shape;
  return nullptr;
}

// Aligned rows of one shape; the first token is always possible.
Twin<char> shaped_rows(const Options& o, int64_t rows, Random* random) {
  const Shape* shape = shape_of(o.shape);
  Twin<char> data(rows * o.vocab * bytes_of(o.dtype));
  for (int64_t i = 0; i < rows * o.vocab; ++i)
    store(data.at(kHost), o.dtype, i,
          i % o.vocab ? static_cast<float>(shape->logit(o.vocab, random)) : 0.0f);
  data.upload();
  return data;
}

// The same, of numbers that are no logits.
Twin<char> plain_rows(int64_t rows, int64_t count, int dtype, Random* random) {
  Options o;
  o.vocab = count;
  o.dtype = dtype;
  return shaped_rows(o, rows, random);
}

void categorical(const Options& o, Random* random) {
  const Twin<char> logits = shaped_rows(o, o.batch, random);
  const Keys keys(o.batch, random);
  const Twin<int64_t> token(o.batch);
  call_both<CategoricalArgs>(
      categorical_sample, cuda::categorical_sample,
      [&](Side side) {
        CategoricalArgs a;
        a.logits = {logits.at(side), o.vocab, 0, o.vocab, o.dtype};
        a.batch = o.batch;
        a.key = keys.at(side, true);
        a.token = token.at(side);
        return a;
      },
      o.op);
  compare("token", o.op, token);
}

// The arguments that the deferral operators share.
struct Pair {
  const Options& o;
  Twin<char> base, proxy;
  double param;
  int rule;
  Pair(const Options& options, int64_t rows, int rule, double param, Random* random)
      : o(options),
        base(shaped_rows(o, rows, random)),
        proxy(shaped_rows(o, rows, random)),
        param(o.budget < 0.0 ? param : o.budget),
        rule(o.budget < 0.0 ? rule : kKnapsack) {}
  template <class Args>
  Args at(Side side, int64_t positions = 1) const {
    Args a;
    const int64_t row = o.vocab;
    a.base = {base.at(side), positions * row, positions > 1 ? row : 0, row, o.dtype};
    a.proxy = {proxy.at(side), positions * row, positions > 1 ? row : 0, row, o.dtype};
    a.batch = o.batch;
    a.rule.rule = rule;
    a.rule.param = param;
    return a;
  }
};

void draw(const Options& o, int rule, double param, bool propose, bool do_sample, bool is_deferred,
          Random* random) {
  const Pair pair(o, o.batch, rule, param, random);
  const Keys keys(o.batch, random);
  const SampleOutputs out(o.batch);
  call_both<SampleArgs>(
      deferral_sample, cuda::deferral_sample,
      [&](Side side) {
        SampleArgs a = pair.at<SampleArgs>(side);
        if (propose) a.proxy.data = nullptr;
        a.key = keys.at(side, do_sample);
        a.propose = propose;
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
  for (int64_t b = 0; b < o.batch && o.budget < 0.0; ++b)
    CHECK(out.deferred[b] == is_deferred, "row %" PRId64 " is %sdeferred", b,
          is_deferred ? "not " : "");
}

void mask(const Options& o, int rule, double param, Random* random) {
  const Pair pair(o, o.batch, rule, param, random);
  const MaskOutputs out(o.batch, o.vocab);
  call_both<MaskArgs>(
      deferral_mask, cuda::deferral_mask,
      [&](Side side) {
        MaskArgs a = pair.at<MaskArgs>(side);
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
}

void probs(const Options& o, int rule, double param, Random* random) {
  const Pair pair(o, o.batch, rule, param, random);
  const ProbsOutputs out(o.batch, o.vocab);
  call_both<ProbsArgs>(
      deferral_probs, cuda::deferral_probs,
      [&](Side side) {
        ProbsArgs a = pair.at<ProbsArgs>(side);
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
}

void stats(const Options& o, int rule, double param, Random* random) {
  const Pair pair(o, o.batch, rule, param, random);
  const StatsOutputs out(o.batch);
  call_both<StatsArgs>(
      deferral_stats, cuda::deferral_stats,
      [&](Side side) {
        StatsArgs a = pair.at<StatsArgs>(side);
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
}

// Gives every row a few tokens that hold most of its mass, more or less the same of both models.
void add_favourites(const Pair& pair, int64_t rows, Random* random) {
  const Options& o = pair.o;
  for (int64_t i = 0; i < 8 * rows; ++i) {
    const int64_t at = i / 8 * o.vocab + random->below(o.vocab);
    const double x = 18.0 + random_normal(random);
    for (const Twin<char>* model : {&pair.base, &pair.proxy})
      store(model->at(kHost), o.dtype, at, static_cast<float>(x + 0.3 * random_normal(random)));
  }
  pair.base.upload();
  pair.proxy.upload();
}

// `aligned`: a draft from a proxy much like the base, which is accepted for the most part. Else
// tokens and models that have nothing to do with each other. `return_mass`: as speculative decoding
// asks, which reports who wrote each token.
void verify(const Options& o, bool aligned, bool return_mass, Random* random) {
  const Pair pair(o, o.batch * (kDraft + 1), kThreshold, 0.001, random);
  if (aligned) add_favourites(pair, o.batch * (kDraft + 1), random);
  const Keys keys(o.batch, random);
  const Twin<int64_t> draft(o.batch * kDraft), length(o.batch);
  for (int64_t i = 0; i < draft.count(); ++i) draft[i] = random->below(o.vocab);
  for (int64_t b = 0; b < o.batch; ++b) length[b] = kDraft;
  for (int64_t k = 0; aligned && k < kDraft; ++k) {
    CategoricalArgs a;
    a.logits = {pair.proxy.at(kHost) + k * o.vocab * bytes_of(o.dtype), (kDraft + 1) * o.vocab, 0,
                o.vocab, o.dtype};
    a.batch = o.batch;
    a.key = keys.at(kHost, true);
    a.stream = tta::kDraft;
    a.draw = static_cast<uint32_t>(k);
    const Twin<int64_t> token(o.batch);
    a.token = token.at(kHost);
    categorical_sample(a, kSerial);
    for (int64_t b = 0; b < o.batch; ++b) draft[b * kDraft + k] = token[b];
  }
  draft.upload();
  length.upload();
  const VerifyOutputs out(o.batch, kDraft + 1);
  call_both<VerifyArgs>(
      deferral_verify, cuda::deferral_verify,
      [&](Side side) {
        VerifyArgs a = pair.at<VerifyArgs>(side, kDraft + 1);
        a.key = keys.at(side, true);
        a.draft_capacity = kDraft;
        a.has_bonus_row = true;
        a.return_mass = return_mass;
        a.draft = draft.at(side);
        a.draft_row_stride = kDraft;
        a.draft_position_stride = 1;
        a.draft_length = length.at(side);
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
}

// Proxy tuning: one expert against its anti-expert.
void mixture(const Options& o, bool probabilities, Random* random) {
  const Twin<char> base = shaped_rows(o, o.batch, random);
  const Twin<char> expert = shaped_rows(o, o.batch, random);
  const Twin<char> anti = shaped_rows(o, o.batch, random);
  const Twin<float> beta = twin_of(std::vector<float>{0.5f});
  const Keys keys(o.batch, random);
  const Twin<int64_t> token(o.batch);
  const Twin<float> out(probabilities ? o.batch * o.vocab : 0);
  call_both<MixtureArgs>(
      implicit_reward, cuda::implicit_reward,
      [&](Side side) {
        MixtureArgs a;
        a.base = {base.at(side), 0, o.vocab, o.vocab, o.dtype};
        a.expert = {expert.at(side), 0, o.vocab, o.vocab, o.dtype};
        a.anti = {anti.at(side), 0, o.vocab, o.vocab, o.dtype};
        a.experts = 1;
        a.beta = beta.at(side);
        a.batch = o.batch;
        a.key = keys.at(side, true);
        if (probabilities) {
          a.probs = out.at(side);
          a.probs_stride = o.vocab;
        } else {
          a.token = token.at(side);
        }
        return a;
      },
      o.op);
  compare("token", o.op, token);
  compare("probs", o.op, out);
}

void knapsack(const Options& o, Random* random) {
  Twin<float> profit(o.batch * o.vocab), weight(o.batch * o.vocab);
  for (int64_t i = 0; i < profit.count(); ++i) {
    profit[i] = static_cast<float>(random->uniform());
    weight[i] = static_cast<float>(random->uniform());
  }
  profit.upload();
  weight.upload();
  const KnapsackOutputs out(o.batch, o.vocab);
  call_both<KnapsackArgs>(
      greedy_knapsack, cuda::greedy_knapsack,
      [&](Side side) {
        KnapsackArgs a;
        a.profit = profit.at(side);
        a.weight = weight.at(side);
        a.profit_stride = a.weight_stride = a.items = o.vocab;
        a.batch = o.batch;
        a.capacity = 0.2 * static_cast<double>(o.vocab);
        out.at(side, &a);
        return a;
      },
      o.op);
  out.compare_in(o.op);
}

// A step of `kRollouts` rollouts of each of `batch` prompts.
void perturb(const Options& o, Random* random) {
  const int64_t rows = kRollouts * o.batch;
  const Twin<char> hidden = plain_rows(rows, kDim, o.dtype, random);
  const Twin<char> out(hidden.count());
  const Twin<char> mean = plain_rows(o.batch, kDim, kFloat32, random);
  Twin<float> dot(rows);
  Twin<int64_t> prompt(rows), rollout(rows);
  for (int64_t r = 0; r < rows; ++r) {
    prompt[r] = r / kRollouts;
    rollout[r] = r % kRollouts;
    dot[r] = 0.0f;
  }
  dot.upload();
  prompt.upload();
  rollout.upload();
  call_both<PerturbArgs>(
      prelogit_perturb, cuda::prelogit_perturb,
      [&](Side side) {
        PerturbArgs a;
        a.hidden = hidden.at(side);
        a.out = out.at(side);
        a.dtype = o.dtype;
        a.hidden_stride = a.out_stride = a.dim = kDim;
        a.rows = rows;
        a.mean = reinterpret_cast<const float*>(mean.at(side));
        a.mean_prompt_stride = a.mean_step_stride = kDim;
        a.prompts = o.batch;
        a.steps = 1;
        a.step = int64_t{0};
        a.prompt = {prompt.at(side), 1};
        a.sequence = int64_t{5};
        a.rollout = {rollout.at(side), 1};
        a.sigma = 0.5f;
        a.seed = int64_t{11};
        a.dot = dot.at(side);
        return a;
      },
      o.op);
  compare("hidden", o.op, out);
  compare("dot", o.op, dot);
}

void update(const Options& o, Random* random) {
  const int64_t count = o.batch * kSteps * kDim;
  const Twin<char> mean = plain_rows(o.batch * kSteps, kDim, kFloat32, random);
  const Twin<float> out(count);
  Twin<float> weights(o.batch * kRollouts);
  for (int64_t i = 0; i < weights.count(); ++i)
    weights[i] = 1.0f / 64.0f + 1e-4f * static_cast<float>(i);
  weights.upload();
  call_both<ControlArgs>(
      control_update, cuda::control_update,
      [&](Side side) {
        ControlArgs a;
        a.mean = reinterpret_cast<const float*>(mean.at(side));
        a.out = out.at(side);
        a.prompts = o.batch;
        a.steps = kSteps;
        a.dim = kDim;
        a.rollouts = kRollouts;
        a.weights = weights.at(side);
        a.sequence = int64_t{5};
        a.seed = int64_t{11};
        a.sigma = 0.5f;
        a.start = 0;
        a.stop = kRollouts;
        return a;
      },
      o.op);
  compare("update", o.op, out);
}

void merge(const Options& o, Random* random) {
  const int64_t count = o.batch * kSteps * kDim;
  const Twin<char> mean = plain_rows(o.batch * kSteps, kDim, kFloat32, random);
  const Twin<char> partials = plain_rows(kShards * o.batch * kSteps, kDim, kFloat32, random);
  const Twin<float> out(count);
  call_both<MergeArgs>(
      control_merge, cuda::control_merge,
      [&](Side side) {
        MergeArgs a;
        a.mean = reinterpret_cast<const float*>(mean.at(side));
        a.partials = reinterpret_cast<const float*>(partials.at(side));
        a.out = out.at(side);
        a.shards = kShards;
        a.count = count;
        a.sigma = 0.5f;
        return a;
      },
      o.op);
  compare("merge", o.op, out);
}

void weights(const Options& o, Random* random) {
  Twin<float> reward(o.batch * kRollouts), dot(reward.count()), norm2(reward.count());
  for (const Twin<float>* x : {&reward, &dot, &norm2}) {
    for (int64_t i = 0; i < x->count(); ++i) (*x)[i] = static_cast<float>(random->uniform());
    x->upload();
  }
  InvalidTwin invalid;
  const WeightsOutputs out(o.batch, kRollouts);
  call_both<WeightsArgs>([](const WeightsArgs& a, const Parallel&) { importance_weights(a); },
                         cuda::importance_weights,
                         [&](Side side) {
                           WeightsArgs a;
                           a.reward = reward.at(side);
                           a.dot = dot.at(side);
                           a.norm2 = norm2.at(side);
                           a.reward_stride = a.dot_stride = a.norm2_stride = a.rollouts = kRollouts;
                           a.prompts = o.batch;
                           a.lambda = 0.3;
                           a.alpha = 0.9;
                           a.sigma = 0.5;
                           out.at(side, &a);
                           a.invalid = invalid.at(side);
                           return a;
                         },
                         o.op);
  out.compare_in(o.op);
}

struct Common {
  const char* name;
  void (*run)(const Options&, Random*);
};
// Threshold 0 keeps every token, threshold 1.5 defers it.
const Common kCommon[] = {
    {"categorical_sample", categorical},
    {"deferral_propose",
     [](const Options& o, Random* r) { draw(o, kThreshold, 0.0, true, true, false, r); }},
    {"deferral_propose greedy",
     [](const Options& o, Random* r) { draw(o, kThreshold, 0.0, true, false, false, r); }},
    {"deferral_propose knapsack",
     [](const Options& o, Random* r) { draw(o, kKnapsack, 1e-6, true, true, false, r); }},
    {"deferral_sample",
     [](const Options& o, Random* r) { draw(o, kThreshold, 0.0, false, true, false, r); }},
    {"deferral_sample greedy",
     [](const Options& o, Random* r) { draw(o, kThreshold, 0.0, false, false, false, r); }},
    {"deferral_sample deferred",
     [](const Options& o, Random* r) { draw(o, kThreshold, 1.5, false, true, true, r); }},
    {"deferral_mask", [](const Options& o, Random* r) { mask(o, kThreshold, 0.001, r); }},
    {"deferral_mask knapsack", [](const Options& o, Random* r) { mask(o, kKnapsack, 0.4, r); }},
    {"deferral_probs", [](const Options& o, Random* r) { probs(o, kThreshold, 0.001, r); }},
    {"deferral_stats", [](const Options& o, Random* r) { stats(o, kThreshold, 0.001, r); }},
    {"deferral_verify", [](const Options& o, Random* r) { verify(o, true, false, r); }},
    {"deferral_verify mass", [](const Options& o, Random* r) { verify(o, true, true, r); }},
    {"deferral_verify unrelated", [](const Options& o, Random* r) { verify(o, false, false, r); }},
    {"implicit_reward", [](const Options& o, Random* r) { mixture(o, false, r); }},
    {"implicit_reward_probs", [](const Options& o, Random* r) { mixture(o, true, r); }},
    {"greedy_knapsack", knapsack},
    {"prelogit_perturb", perturb},
    {"importance_weights", weights},
    {"control_update", update},
    {"control_merge", merge},
    {"normal", [](const Options& o, Random* r) { normal_case(o.batch * kSteps * kDim, 0, r); }},
    {"philox", [](const Options& o, Random* r) { philox_case(o.batch * kSteps * kDim, 0, r); }}};

}  // namespace

bool known_shape(const std::string& name) { return shape_of(name) != nullptr; }

bool common_case(const Options& options, Random* random) {
  for (const Common& common : kCommon)
    if (options.op == common.name) {
      common.run(options, random);
      return true;
    }
  return false;
}

}  // namespace testing
}  // namespace tta
