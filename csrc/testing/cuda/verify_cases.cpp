// deferral_verify.
#include "testing/cuda/deferral_cases.h"

namespace tta {
namespace testing {
namespace {

void verify_case(const Problem& problem, int64_t batch, int64_t drafted, Random* random) {
  const Rows& proxy = problem.proxy;
  const int64_t positions = drafted + 1, vocab = proxy.vocab();
  const bool bonus = random->below(2) != 0, do_sample = random->below(2) != 0;
  const bool return_mass = random->below(2) != 0;
  const std::string where = problem.where + ", drafted " + std::to_string(drafted) +
                            (bonus ? ", bonus" : "") + (do_sample ? "" : ", greedy");
  const InvalidTwin invalid;
  const Keys keys(batch, random);
  Twin<int64_t> draft(batch * drafted), length(batch);
  for (int64_t b = 0; b < batch; ++b) {
    length[b] = random->below(drafted + 1);
    for (int64_t k = 0; k < drafted; ++k) {
      int64_t chosen = random->below(vocab);
      const bool likely = random->below(2) != 0;  // accepted more often
      for (int64_t v = 0; likely && v < vocab; ++v)
        if (proxy.get(b * positions + k, v) > proxy.get(b * positions + k, chosen)) chosen = v;
      draft[b * drafted + k] = chosen;
    }
  }
  draft.upload();
  length.upload();
  const VerifyOutputs out(batch, positions);
  call_both<VerifyArgs>(
      deferral_verify, cuda::deferral_verify,
      [&](Side side) {
        VerifyArgs a;
        a.base = problem.base.at(side, positions, 1);
        a.proxy = proxy.at(side, positions, 1);
        a.batch = batch;
        a.rule = problem.rule.at(side);
        a.param_row_stride = positions;
        a.param_position_stride = 1;
        a.invalid = invalid.at(side);
        a.key = keys.at(side, do_sample);
        a.draft_capacity = drafted;
        a.has_bonus_row = bonus;
        a.return_mass = return_mass;
        a.draft = draft.at(side);
        a.draft_row_stride = drafted;
        a.draft_position_stride = 1;
        a.draft_length = length.at(side);
        out.at(side, &a);
        return a;
      },
      where);
  out.compare_in(where);
  compare("verify invalid", where, invalid);
}

}  // namespace

void verify_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    const int64_t vocab = random_vocab(options.vocab, random), batch = 1 + random->below(3);
    const int64_t drafted = random->below(4);
    each_rule(i, batch * (drafted + 1), vocab, random,
              [&](const Problem& problem) { verify_case(problem, batch, drafted, random); });
  }
}

}  // namespace testing
}  // namespace tta
