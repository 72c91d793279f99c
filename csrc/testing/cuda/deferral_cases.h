// Problems of the operators that take a rule: two models' rows, every rule over them.
#pragma once

#include "testing/cuda/cases.h"

namespace tta {
namespace testing {

struct Problem {
  const Rows& base;
  const Rows& proxy;
  const RandomRule& rule;
  std::string where;
};

// use(problem) for every rule and critical item, over rows of random numbers, spoilt now and then.
template <class Use>
void each_rule(int64_t repetition, int64_t rows, int64_t vocab, Random* random, const Use& use) {
  const int dtype = static_cast<int>(random->below(3));
  Rows base(rows, vocab, dtype, random), proxy(rows, vocab, dtype, random);
  if (random->below(6) == 0) base.spoil(random);
  if (random->below(6) == 0) proxy.spoil(random);
  for (int rule = 0; rule < kRules; ++rule)
    for (int critical = kExclude; critical <= (rule == kKnapsack ? kSplitItem : kExclude);
         ++critical) {
      const RandomRule random_rule(rule, critical, rows, random);
      use(Problem{base, proxy, random_rule,
                  "repetition " + std::to_string(repetition) + ", V " + std::to_string(vocab) +
                      ", dtype " + std::to_string(dtype) + ", " + random_rule.text()});
    }
}

}  // namespace testing
}  // namespace tta
