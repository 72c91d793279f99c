// The rows of a KAD operator, and rules: which tokens a rule defers. csrc/cpu/rule.h is the same in
// loops.
#pragma once

#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace tta {
namespace cuda {

// What every stage of the KAD family is given.
struct Kad {
  Logits base, proxy;
  RuleSpec rule;
  InvalidRow* invalid = nullptr;
  Scratch s;
  uint32_t* arrivals = nullptr;
  int64_t rows = 0;       // batch rows times positions
  int64_t positions = 1;  // K + 1 in verification
  int64_t param_row_stride = 1, param_position_stride = 0;
  bool same_temperature = true;

  __device__ __forceinline__ int64_t batch_row(int64_t row) const { return row / positions; }
  __device__ __forceinline__ int64_t position(int64_t row) const { return row % positions; }
  __device__ __forceinline__ Row base_row(int64_t row) const {
    return Row(base, batch_row(row), position(row));
  }
  __device__ __forceinline__ Row proxy_row(int64_t row) const {
    return Row(proxy, batch_row(row), position(row));
  }
  __device__ __forceinline__ double param(int64_t row) const {
    return rule.param[batch_row(row) * param_row_stride + position(row) * param_position_stride];
  }
  __device__ __forceinline__ bool valid_param(int64_t row) const {
    const double p = param(row);
    return p == p && !(rule.rule == kKnapsack && p < 0.0);
  }
  __device__ __forceinline__ int base_rule_slot() const {
    return same_temperature ? kBaseSlot : kBaseRuleSlot;
  }
  __device__ __forceinline__ int proxy_rule_slot() const {
    return same_temperature ? kProxySlot : kProxyRuleSlot;
  }
  __device__ __forceinline__ void note(int64_t row, int64_t tensor) const {
    if (threadIdx.x == 0 && invalid)
      atomicMin(reinterpret_cast<long long*>(invalid->code()),
                static_cast<long long>(InvalidRow::encode(row, tensor)));
  }
};

__device__ __forceinline__ float base_probability(const Kad& a, const RowState& r, int64_t row,
                                                  int64_t v) {
  return r.slot[kBaseSlot].probability(a.base_row(row).at(v));
}
__device__ __forceinline__ float proxy_probability(const Kad& a, const RowState& r, int64_t row,
                                                   int64_t v) {
  return r.slot[kProxySlot].probability(a.proxy_row(row).at(v));
}

// mu(v), of a resolved rule.
__device__ __forceinline__ double mu_of(const Kad& a, const Deferral& d, int64_t row, int64_t v) {
  if (d.admits((d.by_proxy ? a.proxy_row(row) : a.base_row(row)).at(v), v)) return 1.0;
  return v == d.critical ? d.fraction : 0.0;
}

// {v : p(v) < t} (or <= t) as a cut: p is monotone in the logit, so a search over the floats finds
// the last logit inside. 128 floats are tried at a time: five rounds for the 2^32 of them.
__device__ __forceinline__ Cut below_probability(const SlotNumbers& s, double t,
                                                 bool or_equal = false) {
  const auto inside = [&](float x) {
    const double p = static_cast<double>(s.probability(x));
    return or_equal ? p <= t : p < t;
  };
  if (inside(s.max)) return Cut::all();
  if (!inside(-kInfinity)) return Cut::none();
  int64_t low = ordered_bits(-kInfinity), high = ordered_bits(s.max);
  while (high - low > 1) {
    const int64_t step = (high - low + kThreads) / (kThreads + 1);
    const int64_t mine = low + (static_cast<int64_t>(threadIdx.x) + 1) * step;
    const bool in = mine < high && inside(from_ordered_bits(static_cast<int32_t>(mine)));
    const int64_t count = __syncthreads_count(in);
    low += count * step;
    high = low + step < high ? low + step : high;
  }
  return Cut{from_ordered_bits(static_cast<int32_t>(low)), kNoLimit};
}

// Every rule but the knapsack, from the rows' statistics alone. For a whole block.
__device__ __forceinline__ Deferral resolve(const Kad& a, int64_t row, const SlotNumbers& p,
                                            const SlotNumbers& q) {
  Deferral d = {Cut::none(), -1, 0.0, kInfinity, false, false};
  const double param = a.param(row);
  const double max_p = static_cast<double>(p.max_probability());
  switch (a.rule.rule) {
    case kThreshold:
      d.cut = below_probability(p, param);
      break;
    case kConfidenceBet:
      d.cut = below_probability(p, sub_rn(static_cast<double>(q.max_probability()), param));
      break;
    case kNudging:
      d.cut = max_p < param ? Cut::all() : Cut::none();
      break;
    case kRelative:
      d.cut = below_probability(p, sub_rn(max_p, param));
      break;
    case kArgmax:
      d.cut = below_probability(p, max_p);
      break;
    case kProxyBelow:
      d.by_proxy = true;
      d.cut = below_probability(q, add_rn(max_p, param));
      break;
    default:
      d.by_proxy = d.upper = true;
      d.cut = below_probability(q, add_rn(max_p, param), true);
  }
  return d;
}

// Whether a drawn token with logits x (base) and y (proxy) is deferred, by any rule but the
// knapsack; the set is not built.
__device__ __forceinline__ bool judge(const Kad& a, int64_t row, const SlotNumbers& p,
                                      const SlotNumbers& q, float x, float y) {
  const double param = a.param(row);
  const double max_p = static_cast<double>(p.max_probability());
  switch (a.rule.rule) {
    case kThreshold:
      return static_cast<double>(p.probability(x)) < param;
    case kConfidenceBet:
      return static_cast<double>(p.probability(x)) <
             sub_rn(static_cast<double>(q.max_probability()), param);
    case kNudging:
      return max_p < param;
    case kRelative:
      return static_cast<double>(p.probability(x)) < sub_rn(max_p, param);
    case kArgmax:
      return static_cast<double>(p.probability(x)) < max_p;
    case kProxyBelow:
      return static_cast<double>(q.probability(y)) < add_rn(max_p, param);
    default:
      return static_cast<double>(q.probability(y)) > add_rn(max_p, param);
  }
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

// A block's tile of one model's row, at the temperatures the rule wants.
__device__ __forceinline__ void model_statistics(const Kad& a, int64_t row, int t, int model,
                                                 bool for_rule, float* weights) {
  Tile tile;
  (model ? a.proxy_row(row) : a.base_row(row)).load(t, &tile);
  tile_statistics(tile, t, a.rule.inv_temperature, a.s.tile_max(row, model),
                  a.s.tile_sum(row, model), for_rule && !a.same_temperature,
                  a.rule.inv_rule_temperature, a.s.tile_sum(row, model + 2), weights);
}

// Merges a model's row; false (and noted) if it is invalid. `cum` is left for a draw from the
// sampling temperature's slot.
__device__ __forceinline__ bool finish_model(const Kad& a, int64_t row, int model, bool for_rule,
                                             double* cum, SlotNumbers* at, SlotNumbers* at_rule) {
  bool valid = true;
  if (for_rule && !a.same_temperature)
    valid = finish_slot(a.s, row, model + 2, model, a.rule.inv_rule_temperature, cum, at_rule);
  valid = finish_slot(a.s, row, model, model, a.rule.inv_temperature, cum, at) && valid;
  if (a.same_temperature || !for_rule) *at_rule = *at;
  if (!valid) a.note(row, model ? kProxyLogits : kBaseLogits);
  return valid;
}

// ---- masked sums -------------------------------------------------------------------------------

// The base weights, at one temperature, of the tokens a set defers, or of those it keeps.
struct Query {
  Deferral set;
  int slot;
  bool kept;
};

// Whether a tile lies wholly before the cut.
__device__ __forceinline__ bool tile_before(float tile_max, int t, const Cut& cut) {
  return tile_max < cut.x || (tile_max == cut.x && cut.id >= (static_cast<int64_t>(t) + 1) * kTile);
}

// A query's canonical mass in one tile, into scratch memory. A tile that counts whole, or not at
// all, is not read. The critical item counts as kept. For a whole block.
__device__ __forceinline__ void tile_mass(const Kad& a, int64_t row, int t, int query,
                                          const Query& q, float* weights) {
  const float m = a.s.tile_max(row, 0)[t];
  const double scale = a.s.scale(row, q.slot)[t];
  double* out = a.s.mass(row, query) + t;
  const bool whole = !q.set.by_proxy && tile_before(m, t, q.set.cut);
  if (scale == 0.0 || whole) {
    if (threadIdx.x == 0) {
      const double sum = static_cast<double>(a.s.tile_sum(row, q.slot)[t]);
      *out = whole && !q.kept && scale != 0.0 ? mul_rn(sum, scale) : 0.0;
    }
    return;
  }
  const float inv = q.slot < 2 ? a.rule.inv_temperature : a.rule.inv_rule_temperature;
  Tile tile, judged;
  a.base_row(row).load(t, &tile);
  if (q.set.by_proxy) a.proxy_row(row).load(t, &judged);
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    float w[4];
    weigh_four(tile.x + i, m, inv, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t v = static_cast<int64_t>(t) * kTile + tile.at(i + k);
      // With maps of their own, the two rows are matched by element in shared memory.
      const float x = tile.x[i + k];
      if (!q.set.by_proxy && q.set.admits(x, v) == q.kept) w[k] = 0.0f;
    }
    put_four(tile, i, w, weights);
  }
  __syncthreads();
  if (q.set.by_proxy) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t v = static_cast<int64_t>(t) * kTile + judged.at(i);
      if (q.set.admits(judged.x[i], v) == q.kept) weights[judged.at(i)] = 0.0f;
    }
    __syncthreads();
  }
  if (warp_id() == 0) {
    const float sum = canonical_sum(weights, tile.count);
    if (lane_id() == 0) *out = mul_rn(static_cast<double>(sum), scale);
  }
}

// The same over all tiles by one block: rare decisions only.
__device__ __forceinline__ double sum_here(const Kad& a, int64_t row, int query, const Query& q,
                                           float* weights, double* shared) {
  for (int t = 0; t < a.s.tiles; ++t) {
    tile_mass(a, row, t, query, q, weights);
    __syncthreads();
  }
  return sum_of_masses(a.s, row, query, shared);
}

__device__ __forceinline__ Query before(const Cut& cut, int slot) {
  return {{cut, -1, 0.0, kInfinity, false, false}, slot, false};
}

// ---- launches ----------------------------------------------------------------------------------

inline void fill(Kad* k, const DeferralArgs& a, const Launch& launch, bool with_cut) {
  k->base = a.base;
  k->proxy = a.proxy;
  k->rule = a.rule;
  k->invalid = a.invalid;
  k->rows = a.batch;
  k->arrivals = launch.arrivals;
  k->same_temperature = a.rule.inv_temperature == a.rule.inv_rule_temperature;
  k->s.base = static_cast<char*>(launch.scratch);
  k->s.tiles = tiles_of(a.base.vocab);
  k->s.with_cut = with_cut;
  k->s.row_bytes = static_cast<int64_t>(Scratch::bytes_of_row(k->s.tiles, with_cut));
}

}  // namespace cuda
}  // namespace tta
