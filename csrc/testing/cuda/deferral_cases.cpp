// deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample.
#include "testing/cuda/deferral_cases.h"

namespace tta {
namespace testing {
namespace {

template <class Args>
Args arguments(const Problem& problem, Side side, const InvalidTwin& invalid) {
  Args a;
  a.base = problem.base.at(side, 1, 0);
  a.proxy = problem.proxy.at(side, 1, 0);
  a.batch = problem.base.rows();
  a.rule = problem.rule.at(side);
  a.invalid = invalid.at(side);
  return a;
}

void mask_case(const Problem& problem) {
  const int64_t rows = problem.base.rows(), vocab = problem.base.vocab();
  const InvalidTwin invalid;
  const Twin<bool> mask(rows * vocab, rows % 2);
  const Twin<int64_t> critical(rows);
  const Twin<float> fraction(rows);
  call_both<MaskArgs>(
      deferral_mask, cuda::deferral_mask,
      [&](Side side) {
        MaskArgs a = arguments<MaskArgs>(problem, side, invalid);
        a.mask = mask.at(side);
        a.mask_stride = vocab;
        a.critical_index = critical.at(side);
        a.fraction = fraction.at(side);
        return a;
      },
      problem.where);
  compare("mask", problem.where, mask);
  compare("mask critical", problem.where, critical);
  compare("mask fraction", problem.where, fraction);
  compare("mask invalid", problem.where, invalid);
}

void probs_case(const Problem& problem) {
  const int64_t rows = problem.base.rows(), vocab = problem.base.vocab();
  const InvalidTwin invalid;
  const Twin<float> probs(rows * vocab, rows % 2);
  call_both<ProbsArgs>(
      deferral_probs, cuda::deferral_probs,
      [&](Side side) {
        ProbsArgs a = arguments<ProbsArgs>(problem, side, invalid);
        a.out = probs.at(side);
        a.out_stride = vocab;
        return a;
      },
      problem.where);
  compare("probs", problem.where, probs);
  compare("probs invalid", problem.where, invalid);
}

void stats_case(const Problem& problem) {
  const int64_t rows = problem.base.rows();
  const InvalidTwin invalid;
  const Twin<double> mass(rows), used(rows);
  const Twin<int64_t> critical(rows);
  const Twin<float> cut(rows);
  call_both<StatsArgs>(
      deferral_stats, cuda::deferral_stats,
      [&](Side side) {
        StatsArgs a = arguments<StatsArgs>(problem, side, invalid);
        a.deferred_mass = mass.at(side);
        a.critical_index = critical.at(side);
        a.cut_logit = cut.at(side);
        a.used = used.at(side);
        return a;
      },
      problem.where);
  compare("stats mass", problem.where, mass);
  compare("stats critical", problem.where, critical);
  compare("stats cut", problem.where, cut);
  compare("stats used", problem.where, used);
  compare("stats invalid", problem.where, invalid);
}

void sample_case(const Problem& problem, bool propose, bool do_sample, Random* random) {
  const int64_t rows = problem.base.rows();
  const std::string where =
      problem.where + (propose ? ", propose" : ", sample") + (do_sample ? "" : ", greedy");
  const InvalidTwin invalid;
  const Keys keys(rows, random);
  const Twin<int64_t> token(rows);
  const Twin<bool> deferred(rows);
  call_both<SampleArgs>(
      deferral_sample, cuda::deferral_sample,
      [&](Side side) {
        SampleArgs a = arguments<SampleArgs>(problem, side, invalid);
        if (propose) a.proxy.data = nullptr;
        a.key = keys.at(side, do_sample);
        a.propose = propose;
        a.token = token.at(side);
        a.deferred = deferred.at(side);
        return a;
      },
      where);
  compare("token", where, token);
  compare("deferred", where, deferred);
  compare("draw invalid", where, invalid);
}

}  // namespace

void deferral_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    const int64_t vocab = random_vocab(options.vocab, random), rows = 1 + random->below(4);
    each_rule(i, rows, vocab, random, [&](const Problem& problem) {
      mask_case(problem);
      probs_case(problem);
      stats_case(problem);
      for (const bool do_sample : {true, false}) {
        if (!rule_needs_proxy(problem.rule.rule)) sample_case(problem, true, do_sample, random);
        sample_case(problem, false, do_sample, random);
      }
    });
  }
}

}  // namespace testing
}  // namespace tta
