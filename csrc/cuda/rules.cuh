// Rules: from a row's statistics to the tokens that a rule defers. csrc/cpu/rule.h is the same in
// loops.
#pragma once

#include "cuda/kad.cuh"
#include "cuda/statistics.cuh"

namespace tta {
namespace cuda {

// The logits `inside`, where those of a row whose largest is `max` are from some logit down: a
// search over the floats finds the last. 128 floats are tried at a time: five rounds for the 2^32
// of them, fewer where `low` is a guess that is inside and `high` one that is not.
template <class Inside>
__device__ __forceinline__ Cut up_to_last(float low, float high, float max, const Inside& inside) {
  if (inside(max)) return Cut::all();
  if (!inside(-kInfinity)) return Cut::none();
  int64_t last = ordered_bits(inside(low) ? low : -kInfinity);
  int64_t next = ordered_bits(inside(high) ? max : high);
  while (next - last > 1) {
    const int64_t step = (next - last + kThreads) / (kThreads + 1);
    const int64_t mine = last + (static_cast<int64_t>(threadIdx.x) + 1) * step;
    const bool in = mine < next && inside(from_ordered_bits(static_cast<int32_t>(mine)));
    const int64_t count = __syncthreads_count(in);
    last += count * step;
    next = last + step < next ? last + step : next;
  }
  return Cut{from_ordered_bits(static_cast<int32_t>(last)), kNoLimit};
}

// {v : p(v) < t} (or <= t) as a cut: p is monotone in the logit.
__device__ __forceinline__ Cut below_probability(const SlotNumbers& s, double t, bool or_equal) {
  return up_to_last(-kInfinity, s.max, s.max, [&](float x) {
    const double p = static_cast<double>(s.probability(x));
    return or_equal ? p <= t : p < t;
  });
}

// Every rule but the knapsack, from the rows' statistics and, for kOptimal, their total variation.
// For a whole block.
__device__ __forceinline__ Deferral resolve(const Kad& a, int64_t row, const SlotNumbers& p,
                                            const SlotNumbers& q, double distance = 0.0) {
  const RuleTest test = RuleTest::of(a.rule.rule, a.param(row), p, q, [=] { return distance; });
  SlotNumbers judging = p;
  if (test.by_proxy) judging = q;
  const Cut cut = below_probability(judging, test.threshold, test.above);
  return {cut, -1, 0.0, kInfinity, test.by_proxy, test.above};
}

// Whether a drawn token with logits x (base) and y (proxy) is deferred, by any rule but the
// knapsack and kOptimal; the set is not built.
__device__ __forceinline__ bool judge(const Kad& a, int64_t row, const SlotNumbers& p,
                                      const SlotNumbers& q, float x, float y) {
  const RuleTest test = RuleTest::of(a.rule.rule, a.param(row), p, q, [] { return 0.0; });
  return test.defers(test.by_proxy ? q.probability(y) : p.probability(x));
}

// Weight of one element as the canonical sum counts it.
__device__ __forceinline__ double canonical_weight(const Scratch& s, int64_t row, int slot,
                                                   float inv_temperature, float x, int64_t v) {
  const int t = static_cast<int>(v / kTile);
  const float w = exp_of(mul_rn(sub_rn(x, s.tile_max(row, slot & 1)[t]), inv_temperature));
  return mul_rn(static_cast<double>(w), s.scale(row, slot)[t]);
}

// How much of the critical item fills the capacity; float32, so that what is reported is what is
// used.
__device__ __forceinline__ double split_fraction(double bound, double before, double weight) {
  const double part = div_rn(sub_rn(bound, before), weight);
  return static_cast<double>(static_cast<float>(part < 0.0 ? 0.0 : part > 1.0 ? 1.0 : part));
}

// ---- statistics --------------------------------------------------------------------------------

// Where a model's statistics go, at the temperatures the rule wants; with_nodes: the base's nodes
// too, where the call keeps them.
__device__ __forceinline__ TileNumbers numbers_of(const Kad& a, int64_t row, int model,
                                                  bool for_rule, bool with_nodes = false) {
  return {a.s.tile_max(row, model),
          a.s.tiles,
          a.rule.inv_temperature,
          a.rule.inv_rule_temperature,
          for_rule && !a.same_temperature ? 2 : 1,
          with_nodes && model == 0 && a.nodes ? a.nodes_of(row, 0) : nullptr};
}

// This block's tiles of one model's row: the base has the first `columns` columns of blocks, the
// proxy the next.
__device__ __forceinline__ void row_statistics(const Kad& a, int64_t row, int model, bool for_rule,
                                               float* weights, bool with_nodes = false) {
  block_statistics(model ? a.proxy_row(row) : a.base_row(row), a.column(), a.span, a.s.tiles,
                   numbers_of(a, row, model, for_rule, with_nodes), weights);
}

// Merges a model's row into its slots; false if it is invalid. `cum` is left for a draw from the
// sampling temperature's.
__device__ __forceinline__ bool finish_model(const Kad& a, int64_t row, int model, bool for_rule,
                                             double* cum, SlotNumbers* slot) {
  bool valid = true;
  if (for_rule && !a.same_temperature)
    valid =
        finish_slot(a.s, row, model + 2, model, a.rule.inv_rule_temperature, cum, slot + model + 2);
  valid = finish_slot(a.s, row, model, model, a.rule.inv_temperature, cum, slot + model) && valid;
  if (a.same_temperature || !for_rule) slot[model + 2] = slot[model];
  return valid;
}

// A column's share of what must be zero before the knapsack's cut is searched.
__device__ __forceinline__ void clear_bands(const Kad& a, int64_t row) {
  if (!a.s.with_cut) return;
  uint64_t* total = a.s.histogram(row);
  for (int i = a.column() * kThreads + static_cast<int>(threadIdx.x); i < kBuckets;
       i += a.columns * kThreads)
    total[i] = 0;
}

// A row whose statistics are known, for the stages that follow: the rule resolved, or the search of
// its cut prepared, the knapsack's (cut.cuh) or kOptimal's (distance.cuh). For a whole block.
__device__ __forceinline__ void prepare_row(const Kad& a, int64_t row, const SlotNumbers* slot,
                                            bool valid) {
  Deferral d = {Cut::none(), -1, 0.0, kInfinity, false, false};
  double bound = 0.0;
  bool open = false;
  if (valid && a.rule.rule == kKnapsack) {
    bound = mul_rn(a.param(row), slot[kBaseRuleSlot].z);
    open = !(slot[kBaseRuleSlot].z <= bound);
    d.cut = Cut::all();
  } else if (valid && a.rule.rule == kOptimal) {
    open = true;
  } else if (valid) {
    d = resolve(a, row, slot[kBaseRuleSlot], slot[kProxyRuleSlot]);
  }
  if (threadIdx.x) return;
  RowState& r = a.s.state(row);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) r.slot[i] = slot[i];
  r.deferral = d;
  r.bound = bound;
  r.valid = valid;
  r.summed = false;
  r.keeps_many = false;
  r.step = open ? kSeeksCut : kDone;
}

}  // namespace cuda
}  // namespace tta
