// deferral_verify: speculative verification of a draft from q against pi = (1 - mu) p + q D.
//
// Walk along a row's draft; at position k accept x iff r q(x) < (1 - mu(x)) p(x) + D q(x). At the
// first rejection draw from max((1 - mu) p - (1 - D) q, 0); after the last acceptance draw from pi.
//
// D is rarely needed in full: p and q of the one token x bound the decision from below (D = 0), the
// budget from both sides, and for rules with a known cut the masked sum stops as soon as it
// decides. Passes over memory: base and proxy once for every position reached; a residual draw
// reads both again, and an undecided position reads the base again. No dense pi is ever written.

#define TTA_TARGET_FILE "cpu/verify.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/denormals.h"
#include "cpu/kad.h"

namespace tta {
namespace TTA_ISA {

// The law max((1 - mu) p - (1 - D) q, 0), tile by tile. Weights are scaled by a power of two to at
// most 1 in each tile, so that the draw inside a tile keeps its resolution however small they are.
class Residual {
 public:
  Residual(const RowPair& rows, const Deferral& d, double kept) : rows_(rows), d_(d), kept_(kept) {
    alignas(64) float w[kTile];
    for (int t = 0; t < rows.base.tiles(); ++t) {
      const int count = weights(t, w);
      mass_[t] = 0.0;
      if (scale_[t] == 0.0) continue;
      F acc[kAcc];
      for (int k = 0; k < kAcc; ++k) acc[k] = set1(0.0f);
      for (int j = 0; j < count; j += kLanes)
        for (int k = 0; k < kAcc; ++k) acc[k] = add(acc[k], load(w + j + k * kWidth));
      mass_[t] = static_cast<double>(fold(acc)) * scale_[t];
      total_ += mass_[t];
    }
  }

  double total() const { return total_; }

  int64_t draw(double u) {
    double target = u * total_;
    double before = 0.0;
    int t = 0, last = 0;
    const int tiles = rows_.base.tiles();
    for (; t < tiles; ++t) {
      const double next = before + mass_[t];
      if (next > target) break;
      if (mass_[t] > 0.0) last = t;
      before = next;
    }
    if (t == tiles) {
      t = last;
      target = static_cast<double>(kInfinity);
    }
    alignas(64) float w[kTile];
    const int count = weights(t, w);
    return static_cast<int64_t>(t) * kTile + find_in_tile(w, count, scale_[t], before, target);
  }

 private:
  int weights(int t, float* out) {
    alignas(64) float base_scratch[kTile];
    alignas(64) float proxy_scratch[kTile];
    alignas(64) float q[kTile];
    const Tile base = load_tile(rows_.base, t, base_scratch);
    const Tile proxy = load_tile(rows_.proxy, t, proxy_scratch);
    const float* judged = d_.by_proxy ? proxy.x : base.x;
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const D kept = set1d(kept_);
    const bool split_here = d_.fraction > 0.0 && d_.critical / kTile == t;
    const int at = split_here ? static_cast<int>(d_.critical - begin) : 0;
    double critical_p = 0.0;
    with_mode(d_.cut, t, [&](auto mode) {
      const Deferral d = d_;  // what is stored might lie in another's
      const auto keeps = [&](int j) { return keeps_any<mode>(d, judged + j, begin + j); };
      write_probabilities(base, rows_.base_stats, keeps, out);
      write_probabilities(proxy, rows_.proxy_stats, keeps, q);
      if (split_here) critical_p = static_cast<double>(out[at]);
      for (int j = 0; j < base.count; j += kWidth) {
        const M deferred = deferred_as<mode>(d, load(judged + j), begin + j);
        const D p = widen(drop(deferred, load(out + j)));  // of these neither may be written
        const D w = sub(p, mul(kept, widen(drop(deferred, load(q + j)))));
        store_narrow(out + j, max(w, set1d(0.0)));
      }
    });
    if (split_here) {
      const double share = (1.0 - d_.fraction) * critical_p;
      const double moved = kept_ * static_cast<double>(q[at]);
      const float w = static_cast<float>(share - moved);
      out[at] = w > 0.0f ? w : 0.0f;
    }
    const float top = tile_max({out, base.count});
    if (!(top > 0.0f)) {
      scale_[t] = 0.0;
      return base.count;
    }
    int exponent;
    std::frexp(top, &exponent);
    scale_[t] = std::ldexp(1.0, exponent);
    const D shrink = set1d(std::ldexp(1.0, -exponent));
    for (int j = 0; j < base.count; j += kWidth)
      store_narrow(out + j, mul(load_wide(out + j), shrink));
    return base.count;
  }

  const RowPair& rows_;
  const Deferral& d_;
  double kept_;
  double total_ = 0.0;
  double mass_[kMaxTiles];
  double scale_[kMaxTiles];
};

// One position of one row, and what has been found out about it so far.
class Position {
 public:
  Position(const VerifyArgs& a, int64_t b, int64_t k)
      : a_(a), b_(b), k_(k), param_(a.param_index(b, k)) {}

  bool read_base() {
    return a_.rule.valid_param(param_) && rows_.read(a_, b_, false, k_, number());
  }
  bool read_proxy() {
    return rows_.read_proxy(a_, b_, rule_needs_proxy(a_.rule.rule), k_, number());
  }
  double coin(Stream stream) const { return uniform(a_.key, b_, k_, stream); }
  RowPair& rows() { return rows_; }

  const Deferral& deferral() {
    if (!resolved_) resolve(a_.rule, param_, rows_, &deferral_);
    resolved_ = true;
    return deferral_;
  }
  double mass() {
    if (mass_ < 0.0) mass_ = deferred_mass(rows_, deferral());
    return mass_;
  }
  bool judged(int64_t v) {
    return judge(a_.rule, param_, rows_, v, [this] { return coin(kSplit); });
  }

  // r q(x) < (1 - mu(x)) p(x) + D q(x), finding out no more about D than it takes.
  bool accepts(int64_t x) {
    const double q = static_cast<double>(proxy_probability(rows_, x));
    const double scaled = coin(kVerify) * q;
    const auto below = [&](double kept_p, double d) {
      const double moved = d * q;
      return scaled < kept_p + moved;
    };
    const bool knapsack = a_.rule.rule == kKnapsack;
    if (mass_ >= 0.0 || (knapsack && (a_.rule.critical != kExclude || !rows_.same_temperature))) {
      const double mu = deferral().mu(rows_, x);
      return below((1.0 - mu) * static_cast<double>(base_probability(rows_, x)), mass());
    }
    if (knapsack) {
      const Stats& s = rows_.base_stats;
      const double bound = a_.rule.param[param_] * s.z;
      const float logit = logit_at(rows_.base, x);
      const double p = static_cast<double>(s.probability(logit));
      if (!below(p, bound / s.z))
        return false;  // whatever mu(x) is: the taken mass is within budget
      // Nor is it short of the budget by more than the critical item, which weighs at most 1, and
      // the rounding of its tile.
      if (below(0.0, ((bound < s.z ? bound : s.z) - 1.0 - s.z * 0x1p-17) / s.z)) return true;
      const bool taken = prefix_at_most(rows_.base, s, Cut::through(logit, x), bound);
      const double kept_p = taken ? 0.0 : p;
      if (below(kept_p, 0.0)) return true;
      if (!below(kept_p, bound / s.z)) return false;
      return below(kept_p, mass());
    }
    const Deferral& d = deferral();
    const double kept_p = (1.0 - d.mu(rows_, x)) * static_cast<double>(base_probability(rows_, x));
    if (below(kept_p, 0.0)) return true;
    if (!below(kept_p, 1.0)) return false;
    if (d.by_proxy) return below(kept_p, mass());
    const Stats& s = rows_.base_stats;
    return prefix_reaches(rows_.base, s, d.cut,
                          [&](double sum) { return below(kept_p, sum / s.z); });
  }

 private:
  int64_t number() const { return b_ * (a_.draft_capacity + 1) + k_; }

  const VerifyArgs& a_;
  int64_t b_, k_, param_;
  RowPair rows_;
  Deferral deferral_;
  bool resolved_ = false;
  double mass_ = -1.0;
};

struct Outcome {
  bool valid = true;
  bool accepted = false;  // the draft token stands: go on
  int64_t token = -1;
  bool deferred = false;
};

static Outcome judge_draft(const VerifyArgs& a, Position* at, int64_t x) {
  Outcome out;
  if (!at->read_proxy()) return {false, false, -1, false};
  RowPair& rows = at->rows();
  if (!a.key.do_sample) {
    out.token = PolicyTile(rows, at->deferral(), at->mass()).argmax();
    out.accepted = out.token == x;
    out.deferred = at->deferral().mu(rows, out.token) == 1.0;
    return out;
  }
  const bool possible = proxy_probability(rows, x) > 0.0f;
  if (possible && at->accepts(x)) {
    out.accepted = true;
    return out;
  }
  Residual residual(rows, at->deferral(), kept_mass(rows, at->deferral()));
  if (at->mass() == 1.0 || residual.total() == 0.0) {  // pi = q in floats
    out.accepted = possible;
    if (possible) return out;
    out.token = draw(rows.proxy, rows.proxy_stats, at->coin(kResidual));
    out.deferred = true;
    return out;
  }
  out.token = residual.draw(at->coin(kResidual));
  return out;
}

static Outcome judge_bonus(const VerifyArgs& a, Position* at, bool has_proxy) {
  Outcome out;
  RowPair& rows = at->rows();
  if (rule_needs_proxy(a.rule.rule) && (!has_proxy || !at->read_proxy()))
    return {false, false, -1, false};
  if (a.key.do_sample) {
    out.token = draw(rows.base, rows.base_stats, at->coin(kBonus));
    out.deferred = at->judged(out.token);
    if (!out.deferred) return out;
  } else {
    if (!rule_needs_proxy(a.rule.rule)) {
      bool needs_proxy = false;
      out.token = propose_greedy(rows, at->deferral(), at->mass(), &needs_proxy);
      if (!needs_proxy) return out;
    }
    out.deferred = true;
  }
  out.token = -1;
  if (!has_proxy) return out;
  if (!rule_needs_proxy(a.rule.rule) && !at->read_proxy()) return {false, false, -1, false};
  if (a.key.do_sample) {
    out.token = draw(rows.proxy, rows.proxy_stats, at->coin(kProxy));
  } else {
    out.token = PolicyTile(rows, at->deferral(), at->mass()).argmax();
    out.deferred = at->deferral().mu(rows, out.token) == 1.0;
  }
  return out;
}

static void verify_row(const VerifyArgs& a, int64_t b) {
  const int64_t positions = a.draft_capacity + 1;
  double* mass = a.mass + b * positions;
  for (int64_t k = 0; k < positions; ++k) mass[k] = -1.0;
  a.accepted[b] = 0;
  a.token[b] = -1;
  a.deferred[b] = false;
  int64_t length = a.draft_length[b];
  length = length < 0 ? 0 : length > a.draft_capacity ? a.draft_capacity : length;
  for (int64_t k = 0; k <= length; ++k) {
    Position at(a, b, k);
    Outcome out;
    const bool bonus = k == length;
    const bool has_proxy = k < a.draft_capacity || a.has_bonus_row;
    if (!at.read_base()) {
      out.valid = false;
    } else if (bonus) {
      out = judge_bonus(a, &at, has_proxy);
    } else {
      const int64_t x = a.draft_at(b, k);
      out = x >= 0 && x < a.base.vocab ? judge_draft(a, &at, x) : Outcome{false, false, -1, false};
    }
    if (!out.valid) {
      mass[k] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    if (a.return_mass) mass[k] = at.mass();
    if (out.accepted) {
      ++a.accepted[b];
      continue;
    }
    a.token[b] = out.token;
    a.deferred[b] = out.deferred;
    return;
  }
}

static void verify_rows(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const VerifyArgs& a = *static_cast<const VerifyArgs*>(context);
  for (int64_t b = begin; b < end; ++b) verify_row(a, b);
}

void deferral_verify(const VerifyArgs& a, const Parallel& parallel) {
  parallel.run(a.batch, parallel.grain, verify_rows, const_cast<VerifyArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void deferral_verify(const VerifyArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(deferral_verify, a, parallel)
}
#endif

}  // namespace tta
