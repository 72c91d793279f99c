// The KAD family: deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample.
//
// Problem: B rows of V base (and proxy) logits; each row's rule is a set of tokens, held as a cut
// in the order of one model's logits. Thread map: in every stage a block of 128 threads a tile of
// 4096 elements, the last block to arrive at a row deciding for the row (row.cuh), so one row of
// 128256 logits occupies 32 blocks and no thread sees more than 32 elements of a tile at a time.
//
// Stages, one launch each; blocks whose row needs nothing return at once.
//   sample, propose   base statistics, draw, judge          [knapsack: masked sums of the drawn
//                     token's prefix]  [sample: statistics of the proxy where the draw is deferred]
//   the others        statistics, cut by a search over the floats [knapsack: cut.cuh, two stages]
//                     masses   then the mask, pi, or the best tokens, tile by tile
//
// Bytes a row, s bytes an element, from DRAM where L2 holds what is read again:
//   propose, or sample kept  s V        sample deferred   2 s V       mask    s V + V
//   probs                    2 s V + 4 V                              stats   s V
// Determinism: the canonical sum inside tiles, float64 from left to right over them; which block
// merges, and in what order candidates are listed, changes nothing.

#include "cuda/cut.cuh"
#include "cuda/launch.h"
#include "cuda/policy.cuh"

namespace tta {
namespace cuda {
namespace {

enum Task : int { kMaskTask, kProbsTask, kStatsTask, kProposeTask, kSampleTask };

enum Step : int32_t { kDone, kOpen, kWantsProxy };  // RowState::step

// An operator that resolves its rule, with what it writes.
struct Resolved : Kad {
  int task = kMaskTask;
  bool with_proxy = false;
  bool* mask = nullptr;
  int64_t mask_stride = 0;
  float* probs = nullptr;
  int64_t probs_stride = 0;
  int64_t* critical_index = nullptr;
  float* fraction = nullptr;
  double* deferred_mass = nullptr;
  float* cut_logit = nullptr;
  double* used = nullptr;
  int64_t* token = nullptr;
  bool* deferred = nullptr;
};

__device__ __forceinline__ void write_invalid(const Resolved& a, int64_t row) {
  if (threadIdx.x) return;
  if (a.critical_index) a.critical_index[row] = -2;
  if (a.fraction) a.fraction[row] = kNaN;
  if (a.deferred_mass) a.deferred_mass[row] = a.used[row] = static_cast<double>(kNaN);
  if (a.cut_logit) a.cut_logit[row] = kNaN;
  if (a.token) a.token[row] = -1;
  if (a.deferred) a.deferred[row] = false;
}

// Statistics of every row the rule and the task look at; the last block resolves the rule, or
// prepares the search of the knapsack's cut.
__global__ void __launch_bounds__(kThreads, 5) resolve_kernel(const Resolved a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const int parts = a.with_proxy ? 2 * a.s.tiles : a.s.tiles;
  const int64_t row = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  const int model = part / a.s.tiles, t = part % a.s.tiles;
  if (a.s.with_cut && model == 0) {
    uint64_t* total = a.s.histogram(row);
    for (int i = t * kThreads + static_cast<int>(threadIdx.x); i < kBuckets;
         i += a.s.tiles * kThreads)
      total[i] = 0;
  }
  model_statistics(a, row, t, model, true, weights);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(parts))) return;
  SlotNumbers p, p_rule, q = {}, q_rule = {};
  bool valid = !a.token || a.valid_param(row);
  if (valid) valid = finish_model(a, row, 0, true, cum, &p, &p_rule);
  if (valid && a.with_proxy) valid = finish_model(a, row, 1, true, cum, &q, &q_rule);
  valid = valid && a.valid_param(row);
  Deferral d = {Cut::none(), -1, 0.0, kInfinity, false, false};
  double bound = 0.0;
  bool open = false;
  if (valid && a.rule.rule == kKnapsack) {
    bound = mul_rn(a.param(row), p_rule.z);
    open = !(p_rule.z <= bound);
    d.cut = Cut::all();
  } else if (valid) {
    d = resolve(a, row, p_rule, q_rule);
  }
  if (!valid) write_invalid(a, row);
  if (threadIdx.x) return;
  RowState& r = a.s.state(row);
  r.slot[kBaseSlot] = p;
  r.slot[kProxySlot] = q;
  r.slot[kBaseRuleSlot] = p_rule;
  r.slot[kProxyRuleSlot] = q_rule;
  r.deferral = d;
  r.bound = bound;
  r.valid = valid;
  r.step = open ? kOpen : kDone;
}

__global__ void __launch_bounds__(kThreads, 6) cut_histogram_kernel(const Kad a) {
  TTA_SHARED_ARRAY(uint32_t, counts, kBuckets);
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  if (!r.valid || r.step != kOpen) return;
  band_masses(a, row, t, counts);
  if (last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) bracket_bands(a, row);
}

__global__ void __launch_bounds__(kThreads, 3) cut_collect_kernel(const Kad a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  RowState& r = a.s.state(row);
  if (!r.valid || r.step != kOpen) return;
  collect(a, row, t);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  const Critical c = find_critical(a, row, weights, shared);
  if (threadIdx.x) return;
  r.deferral.critical = c.id;
  r.deferral.critical_x = c.x;
  r.deferral.cut = a.rule.critical == kInclude ? Cut::through(c.x, c.id) : Cut::before(c.x, c.id);
}

// The deferred mass at the sampling temperature and, where they are wanted, at the rule's.
__global__ void __launch_bounds__(kThreads, 5) masses_kernel(const Resolved a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  RowState& r = a.s.state(row);
  if (!r.valid) return;
  const Deferral set = r.deferral;
  tile_mass(a, row, t, 0, {set, kBaseSlot, false}, weights);
  if (!a.same_temperature) {
    __syncthreads();
    tile_mass(a, row, t, 1, {set, kBaseRuleSlot, false}, weights);
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  double sum = sum_of_masses(a.s, row, 0, shared);
  double rule_sum = a.same_temperature ? sum : sum_of_masses(a.s, row, 1, shared);
  if (threadIdx.x) return;
  Deferral& d = r.deferral;
  if (d.critical >= 0 && a.rule.critical == kSplitItem) {
    const int slot = a.base_rule_slot();
    const double here =
        canonical_weight(a.s, row, slot, a.rule.inv_rule_temperature, d.critical_x, d.critical);
    d.fraction = split_fraction(r.bound, rule_sum, here);
    if (d.fraction > 0.0) {
      sum = add_rn(sum,
                   mul_rn(d.fraction, canonical_weight(a.s, row, kBaseSlot, a.rule.inv_temperature,
                                                       d.critical_x, d.critical)));
      rule_sum = add_rn(rule_sum, mul_rn(d.fraction, here));
    }
  }
  r.mass = div_rn(sum, r.slot[kBaseSlot].z);
  if (a.task != kStatsTask) return;
  a.deferred_mass[row] = r.mass;
  a.used[row] = a.same_temperature ? r.mass : div_rn(rule_sum, r.slot[kBaseRuleSlot].z);
  a.critical_index[row] = d.critical;
  if (a.rule.rule == kKnapsack) a.cut_logit[row] = d.critical_x;
}

__global__ void __launch_bounds__(kThreads, 6) mask_kernel(const Resolved a) {
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  const bool valid = r.valid;
  const Deferral d = r.deferral;
  const int64_t begin = static_cast<int64_t>(t) * kTile;
  bool* out = a.mask + row * a.mask_stride + begin;
  Tile tile;
  (valid && d.by_proxy ? a.proxy_row(row) : a.base_row(row)).load(t, &tile);
  const bool whole_words = tile.vector && reinterpret_cast<uintptr_t>(out) % 4 == 0;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (valid && d.admits(tile.x[i + k], begin + tile.at(i + k))) word |= 1u << 8 * k;
    if (whole_words && tile.at(i) + 4 <= tile.count) {
      *reinterpret_cast<uint32_t*>(out + tile.at(i)) = word;
      continue;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tile.at(i + k) < tile.count) out[tile.at(i + k)] = (word >> 8 * k & 1u) != 0;
  }
  if (t || threadIdx.x || !valid) return;
  a.critical_index[row] = d.critical;
  a.fraction[row] = d.critical < 0                ? 0.0f
                    : a.rule.critical == kInclude ? 1.0f
                                                  : static_cast<float>(d.fraction);
}

__global__ void __launch_bounds__(kThreads, 5) probs_kernel(const Resolved a) {
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  float* out = a.probs + row * a.probs_stride + static_cast<int64_t>(t) * kTile;
  const TilePair pair(a, row, t);
  const Policy policy(r);
  const double mass = r.mass;
  const bool valid = r.valid;
  const bool vectors = pair.map.vector && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  policy.each_four(pair, t, [&](int i, const double* kept, const double* moved) {
    float pi[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) pi[k] = valid ? mixed(kept[k], moved[k], mass) : kNaN;
    const int at = pair.map.at(i);
    if (vectors && at + 4 <= pair.map.count) {
      // Through the intrinsic: nvcc splits a plain assignment into four stores.
      __stcg(reinterpret_cast<float4*>(out + at), make_float4(pi[0], pi[1], pi[2], pi[3]));
      return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (pair.map.at(i + k) < pair.map.count) out[pair.map.at(i + k)] = pi[k];
  });
}

// Argmax of pi, ties to the lowest id.
__global__ void __launch_bounds__(kThreads, 5) best_kernel(const Resolved a) {
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  if (!r.valid) return;
  uint64_t best = best_of_tile(a, r, row, t);
  if (threadIdx.x == 0) reinterpret_cast<uint64_t*>(a.s.mass(row, 0))[t] = best;
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  best = best_of_row(a, row);
  if (threadIdx.x) return;
  const int64_t v = ranked_id(best);
  a.token[row] = v;
  a.deferred[row] = mu_of(a, r.deferral, row, v) == 1.0;
}

// Greedy choice without q: the most probable kept token, and whether q could still change it.
__global__ void __launch_bounds__(kThreads, 6) kept_kernel(const Resolved a) {
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  if (!r.valid) return;
  {
    Tile tile;
    a.base_row(row).load(t, &tile);
    put_tile_best(a.s, row, t, block_best(kept_of_tile(r.deferral, tile, t)));
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  const Choice choice = choose_kept(a, r, row);
  if (threadIdx.x) return;
  a.token[row] = choice.token;
  a.deferred[row] = choice.needs_proxy;
}

// The lowest kept logit, for statistics.
__global__ void __launch_bounds__(kThreads, 6) lowest_kernel(const Resolved a) {
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  const RowState& r = a.s.state(row);
  if (!r.valid) return;
  const Deferral d = r.deferral;
  float lowest = kInfinity;
  bool any = false;
  {
    Tile tile;
    const Row base = a.base_row(row);
    base.load(t, &tile);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (tile.at(i) >= tile.count) continue;
      const int64_t v = static_cast<int64_t>(t) * kTile + tile.at(i);
      if (d.admits(d.by_proxy ? a.proxy_row(row).at(v) : tile.x[i], v)) continue;
      any = true;
      lowest = tile.x[i] < lowest ? tile.x[i] : lowest;
    }
  }
  lowest = block_reduce(lowest, Min());
  any = __syncthreads_or(any);
  if (threadIdx.x == 0) {
    a.s.mass(row, 0)[t] = static_cast<double>(lowest);
    a.s.mass(row, 1)[t] = any ? 1.0 : 0.0;
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  lowest = kInfinity;
  any = false;
  for (int i = static_cast<int>(threadIdx.x); i < a.s.tiles; i += kThreads) {
    lowest = fminf(lowest, static_cast<float>(a.s.mass(row, 0)[i]));
    any = any || a.s.mass(row, 1)[i] != 0.0;
  }
  lowest = block_reduce(lowest, Min());
  any = __syncthreads_or(any);
  if (threadIdx.x == 0) a.cut_logit[row] = any ? -sub_rn(0.0f, lowest) : kInfinity;
}

// ---- draws -------------------------------------------------------------------------------------

struct Drawn : Kad {
  KeySpec key;
  bool propose = false;
  int64_t* token = nullptr;
  bool* deferred = nullptr;
};

// Statistics of the base (and of the proxy, for rules that look at it), draw and judgement.
__global__ void __launch_bounds__(kThreads, 5) draw_kernel(const Drawn a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  const int parts = needs_proxy ? 2 * a.s.tiles : a.s.tiles;
  const int64_t row = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  model_statistics(a, row, part % a.s.tiles, part / a.s.tiles, true, weights);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(parts))) return;
  RowState& r = a.s.state(row);
  SlotNumbers p, p_rule, q = {}, q_rule = {};
  bool valid = a.valid_param(row);
  if (valid) valid = finish_model(a, row, 0, true, cum, &p, &p_rule);
  if (valid && needs_proxy) {
    valid = finish_model(a, row, 1, true, cum, &q, &q_rule);
    // The masses of the base again, for the draw.
    if (valid) finish_slot(a.s, row, kBaseSlot, 0, a.rule.inv_temperature, cum, &p);
  }
  int64_t v = -1;
  bool deferred = false;
  int step = kDone;
  if (valid) {
    v = draw(a.base_row(row), a.s, row, kBaseSlot, 0, a.rule.inv_temperature, p.z,
             uniform_of(a.key, row, 0, kBase), cum, weights);
    if (a.rule.rule == kKnapsack) {
      const double bound = mul_rn(a.param(row), p_rule.z);
      if (p_rule.z <= bound) {
        deferred = true;
      } else {
        step = kOpen;
        if (threadIdx.x == 0) {
          r.bound = bound;
          r.token = v;
          r.deferral.critical_x = a.base_row(row).at(v);
        }
      }
    } else {
      deferred = judge(a, row, p_rule, q_rule, a.base_row(row).at(v),
                       needs_proxy ? a.proxy_row(row).at(v) : 0.0f);
    }
    if (deferred && !a.propose && !needs_proxy) step = kWantsProxy;
    if (deferred && !a.propose && needs_proxy) {
      __syncthreads();
      finish_slot(a.s, row, kProxySlot, 1, a.rule.inv_temperature, cum, &q);
      v = draw(a.proxy_row(row), a.s, row, kProxySlot, 1, a.rule.inv_temperature, q.z,
               uniform_of(a.key, row, 0, kProxy), cum, weights);
    }
  }
  if (threadIdx.x) return;
  r.step = step;
  a.token[row] = v;
  a.deferred[row] = deferred;
}

// The knapsack's verdict on a drawn token: masked sums through it and before it.
__global__ void __launch_bounds__(kThreads, 4) judge_kernel(const Drawn a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  RowState& r = a.s.state(row);
  if (r.step != kOpen) return;
  const int slot = a.base_rule_slot();
  const int64_t v = r.token;
  const float x = r.deferral.critical_x;
  const bool through = a.rule.critical != kInclude, strictly = a.rule.critical != kExclude;
  if (through) tile_mass(a, row, t, 0, before(Cut::through(x, v), slot), weights);
  if (through && strictly) __syncthreads();
  if (strictly) tile_mass(a, row, t, 1, before(Cut::before(x, v), slot), weights);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  const double through_sum = through ? sum_of_masses(a.s, row, 0, shared) : 0.0;
  const double before_sum = strictly ? sum_of_masses(a.s, row, 1, shared) : 0.0;
  if (threadIdx.x) return;
  bool deferred = through ? through_sum <= r.bound : before_sum <= r.bound;
  if (!deferred && a.rule.critical == kSplitItem && before_sum <= r.bound)
    deferred = uniform_of(a.key, row, 0, kSplit) <
               split_fraction(r.bound, before_sum,
                              canonical_weight(a.s, row, slot, a.rule.inv_rule_temperature, x, v));
  a.deferred[row] = deferred;
  r.step = deferred && !a.propose ? kWantsProxy : kDone;
  if (deferred && !a.propose) a.token[row] = -1;
}

// What replaces a rejected token: the proxy is read for those rows alone.
__global__ void __launch_bounds__(kThreads, 5) replace_kernel(const Drawn a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t row = blockIdx.x / a.s.tiles;
  const int t = static_cast<int>(blockIdx.x % a.s.tiles);
  if (a.s.state(row).step != kWantsProxy) return;
  model_statistics(a, row, t, 1, false, weights);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.s.tiles))) return;
  SlotNumbers q, unused;
  const bool valid = finish_model(a, row, 1, false, cum, &q, &unused);
  int64_t v = -1;
  if (valid)
    v = draw(a.proxy_row(row), a.s, row, kProxySlot, 1, a.rule.inv_temperature, q.z,
             uniform_of(a.key, row, 0, kProxy), cum, weights);
  if (threadIdx.x) return;
  a.token[row] = v;
  a.deferred[row] = valid;
}

// ---- launches ----------------------------------------------------------------------------------

bool wants_cut(const DeferralArgs& a) { return a.rule.rule == kKnapsack; }

Need need_of_rows(const DeferralArgs& a, bool with_cut) {
  const int tiles = tiles_of(a.base.vocab);
  return {static_cast<size_t>(a.batch) * Scratch::bytes_of_row(tiles, with_cut), a.batch};
}

cudaError_t run(Resolved a, const Launch& launch) {
  if (!a.rows) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(a.rows * a.s.tiles);
  const unsigned both = a.with_proxy ? 2 * grid : grid;
  const bool masses =
      a.task != kMaskTask || (a.rule.rule == kKnapsack && a.rule.critical == kSplitItem);
  TTA_LAUNCH((resolve_kernel), both, kThreads, 0, launch.stream, a);
  if (a.s.with_cut) {
    TTA_LAUNCH((cut_histogram_kernel), grid, kThreads, 0, launch.stream, a);
    TTA_LAUNCH((cut_collect_kernel), grid, kThreads, 0, launch.stream, a);
  }
  if (masses) TTA_LAUNCH((masses_kernel), grid, kThreads, 0, launch.stream, a);
  switch (a.task) {
    case kMaskTask:
      TTA_LAUNCH((mask_kernel), grid, kThreads, 0, launch.stream, a);
      break;
    case kProbsTask:
      TTA_LAUNCH((probs_kernel), grid, kThreads, 0, launch.stream, a);
      break;
    case kSampleTask:
      TTA_LAUNCH((best_kernel), grid, kThreads, 0, launch.stream, a);
      break;
    case kProposeTask:
      TTA_LAUNCH((kept_kernel), grid, kThreads, 0, launch.stream, a);
      break;
    default:
      if (a.rule.rule != kKnapsack)
        TTA_LAUNCH((lowest_kernel), grid, kThreads, 0, launch.stream, a);
  }
  return cudaGetLastError();
}

cudaError_t run(Drawn a, const Launch& launch) {
  if (!a.rows) return cudaSuccess;
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  const unsigned grid = static_cast<unsigned>(a.rows * a.s.tiles);
  TTA_LAUNCH((draw_kernel), needs_proxy ? 2 * grid : grid, kThreads, 0, launch.stream, a);
  if (a.rule.rule == kKnapsack) TTA_LAUNCH((judge_kernel), grid, kThreads, 0, launch.stream, a);
  if (!a.propose && !needs_proxy) TTA_LAUNCH((replace_kernel), grid, kThreads, 0, launch.stream, a);
  return cudaGetLastError();
}

}  // namespace

Need need_of(const MaskArgs& a) { return need_of_rows(a, wants_cut(a)); }
Need need_of(const ProbsArgs& a) { return need_of_rows(a, wants_cut(a)); }
Need need_of(const StatsArgs& a) { return need_of_rows(a, wants_cut(a)); }
Need need_of(const SampleArgs& a) { return need_of_rows(a, !a.key.do_sample && wants_cut(a)); }

cudaError_t deferral_mask(const MaskArgs& a, const Launch& launch) {
  Resolved op;
  fill(&op, a, launch, wants_cut(a));
  op.task = kMaskTask;
  op.with_proxy = rule_needs_proxy(a.rule.rule);
  op.mask = a.mask;
  op.mask_stride = a.mask_stride;
  op.critical_index = a.critical_index;
  op.fraction = a.fraction;
  return run(op, launch);
}

cudaError_t deferral_probs(const ProbsArgs& a, const Launch& launch) {
  Resolved op;
  fill(&op, a, launch, wants_cut(a));
  op.task = kProbsTask;
  op.with_proxy = true;
  op.probs = a.out;
  op.probs_stride = a.out_stride;
  return run(op, launch);
}

cudaError_t deferral_stats(const StatsArgs& a, const Launch& launch) {
  Resolved op;
  fill(&op, a, launch, wants_cut(a));
  op.task = kStatsTask;
  op.with_proxy = rule_needs_proxy(a.rule.rule);
  op.deferred_mass = a.deferred_mass;
  op.critical_index = a.critical_index;
  op.cut_logit = a.cut_logit;
  op.used = a.used;
  return run(op, launch);
}

cudaError_t deferral_sample(const SampleArgs& a, const Launch& launch) {
  if (!a.key.do_sample) {
    Resolved op;
    fill(&op, a, launch, wants_cut(a));
    op.task = a.propose ? kProposeTask : kSampleTask;
    op.with_proxy = !a.propose;
    op.token = a.token;
    op.deferred = a.deferred;
    return run(op, launch);
  }
  Drawn op;
  fill(&op, a, launch, false);
  op.key = a.key;
  op.propose = a.propose;
  op.token = a.token;
  op.deferred = a.deferred;
  return run(op, launch);
}

}  // namespace cuda
}  // namespace tta
