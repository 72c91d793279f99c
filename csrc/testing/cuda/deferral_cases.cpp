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
  const MaskOutputs out(rows, vocab, rows % 2);
  call_both<MaskArgs>(
      deferral_mask, cuda::deferral_mask,
      [&](Side side) {
        MaskArgs a = arguments<MaskArgs>(problem, side, invalid);
        out.at(side, &a);
        return a;
      },
      problem.where);
  out.compare_in(problem.where);
  compare("mask invalid", problem.where, invalid);
}

void probs_case(const Problem& problem) {
  const int64_t rows = problem.base.rows(), vocab = problem.base.vocab();
  const InvalidTwin invalid;
  const ProbsOutputs out(rows, vocab, rows % 2);
  call_both<ProbsArgs>(
      deferral_probs, cuda::deferral_probs,
      [&](Side side) {
        ProbsArgs a = arguments<ProbsArgs>(problem, side, invalid);
        out.at(side, &a);
        return a;
      },
      problem.where);
  out.compare_in(problem.where);
  compare("probs invalid", problem.where, invalid);
}

void stats_case(const Problem& problem) {
  const InvalidTwin invalid;
  const StatsOutputs out(problem.base.rows());
  call_both<StatsArgs>(
      deferral_stats, cuda::deferral_stats,
      [&](Side side) {
        StatsArgs a = arguments<StatsArgs>(problem, side, invalid);
        out.at(side, &a);
        return a;
      },
      problem.where);
  out.compare_in(problem.where);
  compare("stats invalid", problem.where, invalid);
}

void sample_case(const Problem& problem, bool propose, bool do_sample, Random* random) {
  const int64_t rows = problem.base.rows();
  const std::string where =
      problem.where + (propose ? ", propose" : ", sample") + (do_sample ? "" : ", greedy");
  const InvalidTwin invalid;
  const Keys keys(rows, random);
  const SampleOutputs out(rows);
  call_both<SampleArgs>(
      deferral_sample, cuda::deferral_sample,
      [&](Side side) {
        SampleArgs a = arguments<SampleArgs>(problem, side, invalid);
        if (propose) a.proxy.data = nullptr;
        a.key = keys.at(side, do_sample);
        a.propose = propose;
        out.at(side, &a);
        return a;
      },
      where);
  out.compare_in(where);
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
