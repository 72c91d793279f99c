// The KAD family: deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample.
//
// A rule is a set of tokens. Every rule of the table is a lower (or upper) set in the logits of one
// model, so it is held as a cut: one comparison an element decides membership, and the deferred
// mass is a canonical masked sum that skips whole tiles.
// Sampling never builds the set: it draws first and judges the one token drawn. For the knapsack
// that is one masked sum, cut short by bounds from the tile statistics.
//
// Passes over memory (V elements of the logits' own width):
//   sample, kept        base once, plus the tiles that hold anything above the drawn token
//   sample, deferred    the same, plus the proxy once
//   probs               base 2-4 times (statistics, cut, S, write), proxy twice, 4 V bytes written
// Operators that need the whole cut keep the base's weights, 4 V bytes a thread, between the
// passes. Work is split over rows; a row's result depends on nothing but the row.

#define TTA_TARGET_FILE "cpu/deferral.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/denormals.h"
#include "cpu/kad.h"

namespace tta {
namespace TTA_ISA {

// ---- mask
// ----------------------------------------------------------------------------------------

static void mask_row(const MaskArgs& a, int64_t b) {
  bool* out = a.mask + b * a.mask_stride;
  RowPair rows;
  Deferral d;
  rows.keeps_weights = a.rule.rule == kKnapsack;
  if (!rows.read(a, b, rule_needs_proxy(a.rule.rule)) || !resolve(a.rule, b, rows, &d)) {
    std::memset(out, 0, static_cast<size_t>(a.base.vocab));
    a.critical_index[b] = -2;
    a.fraction[b] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  alignas(64) float scratch[kTile];
  const Row& judged = d.by_proxy ? rows.proxy : rows.base;
  for (int t = 0; t < judged.tiles(); ++t) {
    const Tile tile = load_tile(judged, t, scratch);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const int64_t left = a.base.vocab - begin;
    const int count = left < kTile ? static_cast<int>(left) : kTile;
    with_mode(d.cut, t, [&](auto mode) {
      const auto in = [&](int j) { return deferred_as<mode>(d, load(tile.x + j), begin + j); };
      int j = 0;
      for (; j + kBools <= count; j += kBools) {
        M pack[kBools / kWidth];
        for (int k = 0; k < kBools / kWidth; ++k) pack[k] = in(j + k * kWidth);
        store_bools(out + begin + j, pack);
      }
      for (; j < count; j += kWidth)
        write_bools(out + begin + j, lanes(in(j)), count - j < kWidth ? count - j : kWidth);
    });
  }
  a.critical_index[b] = d.critical;
  a.fraction[b] = d.critical < 0                ? 0.0f
                  : a.rule.critical == kInclude ? 1.0f
                                                : static_cast<float>(d.fraction);
}

// ---- pi
// ------------------------------------------------------------------------------------------

static void probs_row(const ProbsArgs& a, int64_t b) {
  float* out = a.out + b * a.out_stride;
  RowPair rows;
  Deferral d;
  rows.keeps_weights = true;
  // A rule that judges by the base has its say while the base's weights are in the cache.
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  bool valid = rows.read(a, b, needs_proxy);
  double mass = 0.0;
  if (valid) {
    const bool resolved = resolve(a.rule, b, rows, &d);
    if (resolved) mass = deferred_mass(rows, d);
    valid = (needs_proxy || rows.read_proxy(a, b, false)) && resolved;
  }
  if (!valid) {
    for (int64_t v = 0; v < a.base.vocab; ++v) out[v] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  PolicyTile policy(rows, d, mass);
  alignas(64) float tail[kTile];
  for (int t = 0; t < rows.base.tiles(); ++t) {
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const int64_t left = a.base.vocab - begin;
    if (left >= kTile) {
      policy.write(t, out + begin);
    } else {
      policy.write(t, tail);
      std::memcpy(out + begin, tail, static_cast<size_t>(left) * sizeof(float));
    }
  }
}

// ---- statistics
// ----------------------------------------------------------------------------------

static float lowest_kept_logit(const RowPair& rows, const Deferral& d) {
  alignas(64) float base_scratch[kTile];
  alignas(64) float judged_scratch[kTile];
  F lowest = set1(-kInfinity);  // of the negated logits
  bool any = false;
  for (int t = 0; t < rows.base.tiles(); ++t) {
    const Tile base = load_tile(rows.base, t, base_scratch);
    const Tile judged = d.by_proxy ? load_tile(rows.proxy, t, judged_scratch) : base;
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const int64_t left = rows.base.vocab - begin;
    for (int j = 0; j < base.count && j < left; j += kWidth) {
      M kept = mask_not(deferred_lanes(d, load(judged.x + j), begin + j, t));
      kept = mask_and(kept, less(add(iota(), set1i(j)),
                                 set1i(left < kTile ? static_cast<int32_t>(left) : kTile)));
      const F negated = sub(set1(0.0f), load(base.x + j));
      lowest = max(select(kept, negated, set1(-kInfinity)), lowest);
      any = any || lanes(kept);
    }
  }
  return any ? -reduce_max(lowest) : kInfinity;
}

static void stats_row(const StatsArgs& a, int64_t b) {
  RowPair rows;
  Deferral d;
  rows.keeps_weights = true;
  if (!rows.read(a, b, rule_needs_proxy(a.rule.rule)) || !resolve(a.rule, b, rows, &d)) {
    a.deferred_mass[b] = a.used[b] = std::numeric_limits<double>::quiet_NaN();
    a.critical_index[b] = -2;
    a.cut_logit[b] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  a.deferred_mass[b] = deferred_mass(rows, d);
  a.used[b] = rows.same_temperature ? a.deferred_mass[b] : mass_at(rows, d, rows.base_rule());
  a.critical_index[b] = d.critical;
  a.cut_logit[b] = a.rule.rule == kKnapsack ? d.critical_x : lowest_kept_logit(rows, d);
}

// ---- draws
// ---------------------------------------------------------------------------------------

static void sample_row(const SampleArgs& a, int64_t b) {
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  a.token[b] = -1;
  a.deferred[b] = false;
  RowPair rows;
  if (!a.rule.valid_param(b)) return;
  rows.keeps_weights = !a.key.do_sample;
  if (!rows.read(a, b, needs_proxy || (!a.key.do_sample && !a.propose))) return;
  if (!a.key.do_sample) {
    Deferral d;
    resolve(a.rule, b, rows, &d);
    const double mass = deferred_mass(rows, d);
    if (a.propose) {
      a.token[b] = propose_greedy(rows, d, mass, &a.deferred[b]);
      return;
    }
    const int64_t v = PolicyTile(rows, d, mass).argmax();
    a.token[b] = v;
    a.deferred[b] = d.mu(rows, v) == 1.0;
    return;
  }
  const int64_t v = draw(rows.base, rows.base_stats, uniform(a.key, b, 0, kBase));
  const bool deferred = judge(a.rule, b, rows, v, [&] { return uniform(a.key, b, 0, kSplit); });
  if (!deferred || a.propose) {
    a.token[b] = v;
    a.deferred[b] = deferred;
    return;
  }
  if (!needs_proxy && !rows.read_proxy(a, b, false)) return;
  a.token[b] = draw(rows.proxy, rows.proxy_stats, uniform(a.key, b, 0, kProxy));
  a.deferred[b] = true;
}

template <class Args, void (*kRow)(const Args&, int64_t)>
static void rows_body(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const Args& a = *static_cast<const Args*>(context);
  for (int64_t b = begin; b < end; ++b) kRow(a, b);
}

template <class Args, void (*kRow)(const Args&, int64_t)>
static void for_rows(const Args& a, const Parallel& parallel) {
  parallel.run(a.batch, parallel.grain, rows_body<Args, kRow>, const_cast<Args*>(&a));
}

void deferral_mask(const MaskArgs& a, const Parallel& parallel) {
  for_rows<MaskArgs, mask_row>(a, parallel);
}
void deferral_probs(const ProbsArgs& a, const Parallel& parallel) {
  for_rows<ProbsArgs, probs_row>(a, parallel);
}
void deferral_stats(const StatsArgs& a, const Parallel& parallel) {
  for_rows<StatsArgs, stats_row>(a, parallel);
}
void deferral_sample(const SampleArgs& a, const Parallel& parallel) {
  for_rows<SampleArgs, sample_row>(a, parallel);
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void deferral_mask(const MaskArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(deferral_mask, a, parallel)
}
void deferral_probs(const ProbsArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(deferral_probs, a, parallel)
}
void deferral_stats(const StatsArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(deferral_stats, a, parallel)
}
void deferral_sample(const SampleArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(deferral_sample, a, parallel)
}
#endif

}  // namespace tta
