// Deferral rules: codes shared with tta_ext/rules.py, and what each needs.
#pragma once

#include "core/config.h"

namespace tta {

enum Rule : int {
  kKnapsack = 0,       // v is in the greedy knapsack of capacity `param`
  kThreshold = 1,      // p(v) < param
  kConfidenceBet = 2,  // p(v) < max q - param
  kNudging = 3,        // max p < param, whatever v
  kRelative = 4,       // p(v) < max p - param
  kArgmax = 5,         // p(v) < max p
  kProxyBelow = 6,     // q(v) < max p + param
  kProxyAbove = 7,     // q(v) > max p + param
};

enum Critical : int { kExclude = 0, kInclude = 1, kSplitItem = 2 };

TTA_INLINE bool rule_needs_proxy(int rule) {
  return rule == kConfidenceBet || rule == kProxyBelow || rule == kProxyAbove;
}

}  // namespace tta
