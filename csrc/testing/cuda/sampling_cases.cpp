// categorical_sample, implicit_reward.
#include "testing/cuda/cases.h"

namespace tta {
namespace testing {
namespace {

void categorical_case(const Rows& logits, float inv_temperature, bool do_sample,
                      const std::string& where, Random* random) {
  const InvalidTwin invalid;
  const Keys keys(logits.rows(), random);
  const Twin<int64_t> token(logits.rows());
  call_both<CategoricalArgs>(
      categorical_sample, cuda::categorical_sample,
      [&](Side side) {
        CategoricalArgs a;
        a.logits = logits.at(side, 1, 0);
        a.batch = logits.rows();
        a.inv_temperature = inv_temperature;
        a.key = keys.at(side, do_sample);
        a.stream = 9;
        a.draw = 4;
        a.token = token.at(side);
        a.invalid = invalid.at(side);
        return a;
      },
      where);
  compare("token", where, token);
  compare("invalid", where, invalid);
}

enum Want { kTokenDrawn, kTokenGreedy, kProbabilities };

void mixture_case(const Rows& base, const Rows& expert, const Rows& anti, float inv_temperature,
                  Want want, const std::string& where, Random* random) {
  const int64_t rows = base.rows(), vocab = base.vocab(), experts = expert.rows() / rows;
  const bool with_anti = random->below(2) != 0;
  const InvalidTwin invalid;
  const Keys keys(rows, random);
  Twin<float> beta(experts);
  for (int64_t e = 0; e < experts; ++e) beta[e] = pick({0.0f, 1.0f, -1.0f, 0.5f}, random);
  beta.upload();
  const Twin<int64_t> token(rows);
  const Twin<float> probs(rows * vocab, rows % 2);
  call_both<MixtureArgs>(
      implicit_reward, cuda::implicit_reward,
      [&](Side side) {
        MixtureArgs a;
        a.base = base.at(side, 0, 1);
        a.expert = expert.at(side, rows, 1);
        if (with_anti) a.anti = anti.at(side, rows, 1);
        a.experts = experts;
        a.beta = beta.at(side);
        a.batch = rows;
        a.inv_temperature = inv_temperature;
        a.invalid = invalid.at(side);
        a.key = keys.at(side, want == kTokenDrawn);
        if (want == kProbabilities) {
          a.probs = probs.at(side);
          a.probs_stride = vocab;
        } else {
          a.token = token.at(side);
        }
        return a;
      },
      where);
  compare("mixture token", where, token);
  compare("mixture probabilities", where, probs);
  compare("mixture invalid", where, invalid);
}

}  // namespace

void sampling_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    const int64_t vocab = random_vocab(options.vocab, random), rows = 1 + random->below(4);
    const int dtype = static_cast<int>(random->below(3));
    const float inv_temperature = pick({1.0f, 2.0f, 0.5f, 20.0f}, random);
    const int64_t experts = random->below(3);
    Rows base(rows, vocab, dtype, random);
    Rows expert(rows * experts, vocab, dtype, random), anti(rows * experts, vocab, dtype, random);
    if (random->below(4) == 0) base.spoil(random);
    if (experts && random->below(4) == 0) (random->below(2) ? expert : anti).spoil(random);
    const std::string where = "repetition " + std::to_string(i) + ", V " + std::to_string(vocab) +
                              ", dtype " + std::to_string(dtype) + ", experts " +
                              std::to_string(experts);
    for (const bool do_sample : {true, false})
      categorical_case(base, inv_temperature, do_sample, where, random);
    for (const Want want : {kTokenDrawn, kTokenGreedy, kProbabilities})
      mixture_case(base, expert, anti, inv_temperature, want, where, random);
  }
}

}  // namespace testing
}  // namespace tta
