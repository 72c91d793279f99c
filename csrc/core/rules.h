// Deferral rules: their codes (tta_ext/rules.py has the same), what each reads, and its verdict,
// for CPU and CUDA alike.
#pragma once

#include "core/config.h"
#include "core/order.h"
#include "core/rounding.h"

namespace tta {

// A line a rule: name, code, whether it reads q, and its test of a token v, by p(v) or q(v) alone;
// distance() is the total variation of p and q. The knapsack is the exception: what it defers
// depends on all tokens, and it has no test.
#define TTA_RULES(RULE)                                                        \
  RULE(kKnapsack, 0, false, none())                                            \
  RULE(kThreshold, 1, false, p_below(param))                                   \
  RULE(kConfidenceBet, 2, true, p_below(sub_rn(max_q(), param)))               \
  RULE(kNudging, 3, false, max_p() < param ? all() : none())                   \
  RULE(kRelative, 4, false, p_below(sub_rn(max_p(), param)))                   \
  RULE(kArgmax, 5, false, p_below(max_p()))                                    \
  RULE(kProxyBelow, 6, true, q_below(add_rn(max_p(), param)))                  \
  RULE(kProxyAbove, 7, true, q_above(add_rn(max_p(), param)))                  \
  RULE(kRelativeRatio, 8, false, p_below(mul_rn(max_p(), sub_rn(1.0, param)))) \
  RULE(kOptimal, 9, true, max_p() < sub_rn(max_q(), mul_rn(param, distance())) ? all() : none())

enum Rule : int {
#define TTA_CODE(name, code, reads_q, test) name = code,
  TTA_RULES(TTA_CODE)
#undef TTA_CODE
};

#define TTA_ONE(name, code, reads_q, test) +1
constexpr int kRules = TTA_RULES(TTA_ONE);
#undef TTA_ONE

enum Critical : int { kExclude = 0, kInclude = 1, kSplitItem = 2 };

TTA_INLINE bool rule_needs_proxy(int rule) {
  switch (rule) {
#define TTA_READS(name, code, reads_q, test) \
  case name:                                 \
    return reads_q;
    TTA_RULES(TTA_READS)
#undef TTA_READS
  }
  return false;
}

// Which tokens of a position a rule defers, by probabilities at its temperature, as float32: those
// below `threshold` or, where `above`, those above it.
struct RuleTest {
  double threshold;
  bool by_proxy;  // q's probabilities, not p's
  bool above;

  TTA_INLINE bool defers(float probability) const {
    const double x = static_cast<double>(probability);
    return above ? x > threshold : x < threshold;
  }

  bool operator==(const RuleTest& b) const {
    return threshold == b.threshold && by_proxy == b.by_proxy && above == b.above;
  }

  // p, q: statistics of the rows, with their max_probability(); q's only of a rule that reads q.
  // distance(): their total variation, float64, asked for by a rule that needs it.
  template <class Statistics, class Distance>
  TTA_INLINE static RuleTest of(int rule, double param, const Statistics& p, const Statistics& q,
                                const Distance& distance) {
    const auto max_p = [&] { return static_cast<double>(p.max_probability()); };
    const auto max_q = [&] { return static_cast<double>(q.max_probability()); };
    switch (rule) {
#define TTA_TEST(name, code, reads_q, test) \
  case name:                                \
    return test;
      TTA_RULES(TTA_TEST)
#undef TTA_TEST
    }
    return none();
  }

 private:
  TTA_INLINE static RuleTest p_below(double t) { return {t, false, false}; }
  TTA_INLINE static RuleTest q_below(double t) { return {t, true, false}; }
  TTA_INLINE static RuleTest q_above(double t) { return {t, true, true}; }
  TTA_INLINE static RuleTest all() { return p_below(static_cast<double>(kInfinity)); }
  TTA_INLINE static RuleTest none() { return p_below(static_cast<double>(-kInfinity)); }
};

}  // namespace tta
