// The KAD family: deferral_mask, deferral_probs, deferral_stats, deferral_propose, deferral_sample.
//
// Problem: B rows of V base (and proxy) logits; each row's rule is a set of tokens, held as a cut
// in the order of one model's logits. Thread map: in every stage a block of 128 threads a tile of
// 4096 elements, the last block to arrive at a row deciding for the row (row.cuh), so one row of
// 128256 logits occupies 32 blocks and no thread sees more than 32 elements of a tile at a time.
// Where rows are enough to fill the device a block of most stages has up to four tiles: one after
// another, or at a time, a warp each (masked sums by nodes; of 16-bit elements statistics, the
// mask, and the stages of the cut as well).
//
// Stages, one launch each; blocks whose row needs nothing return at once.
//   sample, propose   base statistics, draw, judge          [knapsack: masked sums of the drawn
//                     token's prefix]  [sample: statistics of the proxy where the draw is deferred]
//                     [optimal: statistics, distance of p and q (distance.cuh), draw]
//   the others        statistics, cut by a search over the floats [knapsack: cut.cuh, two stages;
//                     optimal: the distance]
//                     masses, by nodes (masked_sum.cuh) where few tokens of a tile are above the
//                     cut; with them the statistics' results or the greedy choice without q
//                     the mask, pi, or the best token, of which tiles that cannot have it are not
//                     read
//
// Bytes a row, s bytes an element, from DRAM where L2 holds what is read again:
//   propose, or sample kept  s V        sample deferred   2 s V       mask    s V + V
//   probs                    2 s V + 4 V                              stats   s V
// Determinism: the canonical sum inside tiles, float64 from left to right over them; which block
// merges, and in what order candidates are listed, changes nothing.

#include "cuda/cut.cuh"
#include "cuda/draw.cuh"
#include "cuda/launch.h"
#include "cuda/policy.cuh"

namespace tta {
namespace cuda {
namespace {

enum Task : int { kMaskTask, kProbsTask, kStatsTask, kProposeTask, kSampleTask, kTakeTask };

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

// Merges a model's row; an invalid one is reported.
__device__ __forceinline__ bool finish_or_note(const Kad& a, int64_t row, int model, bool for_rule,
                                               double* cum, SlotNumbers* slot) {
  const bool valid = finish_model(a, row, model, for_rule, cum, slot);
  if (!valid) a.note(row, model ? kProxyLogits : kBaseLogits);
  return valid;
}

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
template <class Given>
__global__ void __launch_bounds__(kThreads, 4) deferral_resolve_kernel(const Given given) {
  const Resolved a = single(known(given));
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  const int model = a.model();
  if (model == 0) clear_bands(a, row);
  row_statistics(a, row, model, true, weights, true);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  SlotNumbers slot[kSlots] = {};
  bool valid = !a.token || a.valid_param(row);
  if (valid) valid = finish_or_note(a, row, 0, true, cum, slot);
  if (valid && a.with_proxy) valid = finish_or_note(a, row, 1, true, cum, slot);
  valid = valid && a.valid_param(row);
  if (!valid) write_invalid(a, row);
  prepare_row(a, row, slot, valid);
}

// The deferred mass at the sampling temperature and, where they are wanted, at the rule's; kLowest:
// the lowest kept logit. The last block also makes the greedy choice that needs no q.
template <bool kLowest, class Given>
__global__ void __launch_bounds__(kThreads, 5) deferral_masses_kernel(const Given given) {
  const Resolved a = single(known(given));
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  RowState& r = a.s.state(row);
  {
    const Deferral set = r.deferral;  // one wait for both
    if (!r.valid) return;
    if (!r.summed) block_masses<false, kLowest>(a, row, set, weights);
    if (!a.same_temperature) block_masses_at_rule(a, row, 1, set, weights);
  }
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  double sum = sum_of_masses(a.s, row, 0, shared);
  double rule_sum = a.same_temperature ? sum : sum_of_masses(a.s, row, 1, shared);
  if (kLowest) {
    float lowest = kInfinity;  // nothing is kept
    for (int t = static_cast<int>(threadIdx.x) * a.span; t < a.s.tiles; t += kThreads * a.span)
      lowest = fminf(lowest, static_cast<float>(a.s.mass(row, 2)[t]));
    lowest = block_reduce(lowest, Min());
    if (threadIdx.x == 0) a.cut_logit[row] = -sub_rn(0.0f, lowest);
  }
  if (threadIdx.x == 0) {
    const Share share = split(a, row, rule_sum);
    sum = add_rn(sum, share.sampled);
    rule_sum = add_rn(rule_sum, share.at_rule);
    r.masses.deferred = div_rn(sum, r.slot[kBaseSlot].z);
    if (a.task == kStatsTask) {
      a.deferred_mass[row] = r.masses.deferred;
      a.used[row] =
          a.same_temperature ? r.masses.deferred : div_rn(rule_sum, r.slot[kBaseRuleSlot].z);
      a.critical_index[row] = r.deferral.critical;
      if (!kLowest) a.cut_logit[row] = r.deferral.critical_x;
    }
  }
  if (a.task != kProposeTask) return;
  __syncthreads();
  const Choice choice = choose_kept(a, r, row);
  if (threadIdx.x) return;
  a.token[row] = choice.token;
  a.deferred[row] = choice.needs_proxy;
}

// A tile of the mask: `words` where its start allows to write fours.
__device__ __forceinline__ void mask_tile(const TileTest& test, const Row& judged_row, int t,
                                          bool words, bool* out) {
  const auto write = [&](const Tile& map, int i, uint32_t word, bool plain) {
    if (plain || (words && map.vector && map.at(i) + 4 <= map.count)) {
      *reinterpret_cast<uint32_t*>(out + map.at(i)) = word;
      return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (map.at(i + k) < map.count) out[map.at(i + k)] = (word >> 8 * k & 1u) != 0;
  };
  if (test.uniform) {
    const Tile map = map_of(judged_row.vocab, t, words);
#pragma unroll 2
    for (int i = 0; i < kPerThread; i += 4) write(map, i, test.all ? 0x01010101u : 0u, false);
    return;
  }
  const Source judged(judged_row, t);
  const Tile map = map_of(judged_row.vocab, t, judged.aligned());
  // each_four_stored, written out: of that nvcc makes half to two instructions an element more.
  if (words && !test.parted && map.vector && map.count == kTile) {
    of_type(judged.dtype, [&](auto type) {
      const Stored<type.value> stored(judged.data, map.first);
#pragma unroll
      for (int i = 0; i < kPerThread; i += 4) {
        float x[4];
        stored.four(i / 4, x);
        write(map, i, test.bytes<true>(x, [](int) { return 0; }), true);
      }
    });
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    read_part(judged.data, judged.dtype, map, i, x);
    write(map, i, test.bytes<false>(x, [&](int k) { return map.at(i + k); }), false);
  }
}

// A tile by one warp (Kad::by_warps), where `out` is aligned to 8 bytes.
template <int kType>
__device__ __forceinline__ void mask_tile_by_warp(const TileTest& test, const char* data, int count,
                                                  bool* out) {
  const uint32_t deferred = test.all ? 0x01010101u : 0u;
#pragma unroll 4
  for (int j = lane_id() * kWide; j < count; j += 32 * kWide) {
    uint32_t word[2] = {deferred, deferred};
    if (!test.uniform) {
      float x[kWide];
      widen<kType>(wide_at(data, j), x);
#pragma unroll
      for (int k = 0; k < kWide; k += 4)
        word[k / 4] = test.bytes<false>(x + k, [&](int c) { return j + k + c; });
    }
    *reinterpret_cast<uint2*>(out + j) = make_uint2(word[0], word[1]);
  }
}

template <class Given>
__global__ void __launch_bounds__(kThreads, 6) deferral_mask_kernel(const Given given) {
  const Resolved a = single(known(given));
  const uint32_t row = a.row();
  const RowState& r = a.s.state(row);
  const Deferral d = r.deferral;  // none of a row that is invalid
  const Row judged = d.by_proxy ? a.proxy_row(row) : a.base_row(row);
  bool* out = a.mask + row * a.mask_stride;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out);
  const auto test_of = [&](int t) { return TileTest(d, t, a.s.tile_max(row, d.by_proxy)[t]); };
  each_tile(
      a, judged, a.by_warps(judged) && start % 8 == 0,
      [&](auto type, int t, int count) {
        mask_tile_by_warp<type.value>(test_of(t), judged.begin(t), count,
                                      out + static_cast<int64_t>(t) * kTile);
      },
      [&](int t) {
        mask_tile(test_of(t), judged, t, start % 4 == 0, out + static_cast<int64_t>(t) * kTile);
      });
  if (a.column() || threadIdx.x || !r.valid) return;
  a.critical_index[row] = d.critical;
  a.fraction[row] = d.critical < 0                ? 0.0f
                    : a.rule.critical == kInclude ? 1.0f
                                                  : static_cast<float>(d.fraction);
}

template <class Given>
__global__ void __launch_bounds__(kThreads, 5) deferral_probs_kernel(const Given given) {
  const Resolved a = single(known(given));
  const uint32_t row = a.row();
  const int t = a.tile();
  const RowState& r = a.s.state(row);
  float* out = a.probs + row * a.probs_stride + static_cast<int64_t>(t) * kTile;
  const Policy policy(a, r, row, t);
  const Tile& map = policy.map;
  const double mass = r.valid ? r.masses.deferred : static_cast<double>(kNaN);
  const bool vectors = reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const auto write = [&](int i, const float* pi, bool plain) {
    const int at = map.at(i);
    if (plain || (vectors && map.vector && at + 4 <= map.count)) {
      // Through the intrinsic: nvcc splits a plain assignment into four stores.
      __stcg(reinterpret_cast<float4*>(out + at), make_float4(pi[0], pi[1], pi[2], pi[3]));
      return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (map.at(i + k) < map.count) out[map.at(i + k)] = pi[k];
  };
  policy.each(vectors, [&](auto read, int i, const double* kept, const double* moved) {
    float pi[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) pi[k] = mixed(kept[k], moved[k], mass);
    write(i, pi, read.kPlain);
  });
}

// Argmax of pi, ties to the lowest id.
template <class Given>
__global__ void __launch_bounds__(kThreads, 5) deferral_best_kernel(const Given given) {
  const Resolved a = single(known(given));
  const uint32_t row = a.row();
  const RowState& r = a.s.state(row);
  if (!r.valid) return;
  put_best(a, r, row);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  const uint64_t best = best_of_row(a, row);
  if (threadIdx.x) return;
  const int64_t v = ranked_id(best);
  a.token[row] = v;
  a.deferred[row] = mu_of(a, r.deferral, row, v) == 1.0;
}

// A draw where the rule defers all of a row or nothing: one block a row, from p or from q.
template <class Given>
__global__ void __launch_bounds__(kThreads, 4)
    deferral_take_kernel(const Given given, const KeySpec key) {
  const Resolved a = single(known(given));
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  const uint32_t row = a.row();
  const RowState& r = a.s.state(row);
  if (!r.valid) return;
  const bool deferred = r.deferral.admits(kInfinity, 0);
  const int model = deferred, slot = deferred ? kProxySlot : kBaseSlot;
  SlotNumbers numbers;
  finish_slot(a.s, row, slot, model, a.rule.inv_temperature, cum, &numbers);
  const int64_t v =
      draw(model ? a.proxy_row(row) : a.base_row(row), a.s, row, slot, model,
           a.rule.inv_temperature, numbers.z, uniform_of(key, row, 0, deferred ? kProxy : kBase),
           cum, reinterpret_cast<float*>(weights4));
  if (threadIdx.x) return;
  a.token[row] = v;
  a.deferred[row] = deferred;
}

// ---- draws -------------------------------------------------------------------------------------

struct Drawn : Kad {
  KeySpec key;
  bool propose = false;
  int64_t* token = nullptr;
  bool* deferred = nullptr;
};

// Statistics of the base (and of the proxy, for rules that look at it), draw and judgement.
template <class Given>
__global__ void __launch_bounds__(kThreads, 5) deferral_draw_kernel(const Given given) {
  const Drawn& a = known(given);
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  TTA_SHARED(double, coin);
  float* weights = reinterpret_cast<float*>(weights4);
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  const uint32_t row = a.row();
  row_statistics(single(a), row, a.model(), true, weights);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  // By a warp that has nothing else to do while the tiles are added up.
  if (threadIdx.x == kThreads - 1) coin = uniform_of(a.key, row, 0, kBase);
  RowState& r = a.s.state(row);
  SlotNumbers slot[kSlots] = {};
  bool valid = a.valid_param(row);
  if (valid) valid = finish_or_note(a, row, 0, true, cum, slot);
  if (valid && needs_proxy) {
    valid = finish_or_note(a, row, 1, true, cum, slot);
    // The masses of the base again, for the draw.
    if (valid) finish_slot(a.s, row, kBaseSlot, 0, a.rule.inv_temperature, cum, slot + kBaseSlot);
  }
  int64_t v = -1;
  bool deferred = false;
  Step step = kDone;
  if (valid) {
    v = draw(a.base_row(row), a.s, row, kBaseSlot, 0, a.rule.inv_temperature, slot[kBaseSlot].z,
             coin, cum, weights);
    if (threadIdx.x && !needs_proxy) return;
    if (a.rule.rule == kKnapsack) {
      const double z = slot[kBaseRuleSlot].z, bound = mul_rn(a.param(row), z);
      deferred = z <= bound;
      if (!deferred) {
        step = kSeeksVerdict;
        r.bound = bound;
        r.drawn = {v, a.base_row(row).at(v)};
      }
    } else {
      deferred = judge(a, row, slot[kBaseRuleSlot], slot[kProxyRuleSlot], a.base_row(row).at(v),
                       needs_proxy ? a.proxy_row(row).at(v) : 0.0f);
    }
    if (deferred && !a.propose && !needs_proxy) step = kWantsProxy;
    if (deferred && !a.propose && needs_proxy) {
      __syncthreads();
      finish_slot(a.s, row, kProxySlot, 1, a.rule.inv_temperature, cum, slot + kProxySlot);
      v = draw(a.proxy_row(row), a.s, row, kProxySlot, 1, a.rule.inv_temperature,
               slot[kProxySlot].z, uniform_of(a.key, row, 0, kProxy), cum, weights);
    }
  }
  if (threadIdx.x) return;
  r.step = step;
  a.token[row] = v;
  a.deferred[row] = deferred;
}

// The knapsack's verdict on a drawn token: masked sums through it and before it.
template <class Given>
__global__ void __launch_bounds__(kThreads, 4) deferral_judge_kernel(const Given given) {
  const Drawn a = single(known(given));
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  const int t = a.tile();
  RowState& r = a.s.state(row);
  if (r.step != kSeeksVerdict) return;
  const int slot = a.base_rule_slot();
  const int64_t v = r.drawn.id;
  const float x = r.drawn.x;
  const bool through = a.rule.critical != kInclude, strictly = a.rule.critical != kExclude;
#pragma unroll 1
  for (int query = through ? 0 : 1; query <= (strictly ? 1 : 0); ++query) {
    if (query && through && t != static_cast<int>(v / kTile)) {  // nothing but v is between them
      if (threadIdx.x == 0) a.s.mass(row, 1)[t] = a.s.mass(row, 0)[t];
      break;
    }
    const Cut cut = query ? Cut::before(x, v) : Cut::through(x, v);
    tile_mass<false>(a, row, t, query, before(cut), slot, weights);
    __syncthreads();
  }
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
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
template <class Given>
__global__ void __launch_bounds__(kThreads, 5) deferral_replace_kernel(const Given given) {
  const Drawn a = single(known(given));
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  TTA_SHARED(double, coin);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  if (a.s.state(row).step != kWantsProxy) return;
  row_statistics(a, row, 1, false, weights);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  if (threadIdx.x == kThreads - 1) coin = uniform_of(a.key, row, 0, kProxy);
  SlotNumbers slot[kSlots];
  const bool valid = finish_or_note(a, row, 1, false, cum, slot);
  int64_t v = -1;
  if (valid)
    v = draw(a.proxy_row(row), a.s, row, kProxySlot, 1, a.rule.inv_temperature, slot[kProxySlot].z,
             coin, cum, weights);
  if (threadIdx.x) return;
  a.token[row] = v;
  a.deferred[row] = valid;
}

// ---- launches ----------------------------------------------------------------------------------

bool wants_cut(const DeferralArgs& a) { return a.rule.rule == kKnapsack; }

Need need_of_rows(const DeferralArgs& a, bool with_cut, bool with_nodes) {
  return {scratch_of(a, a.batch, with_cut, with_nodes), a.batch};
}

template <class Op>
cudaError_t run_resolved(Op a, int64_t rows, const Launch& launch, const KeySpec& key) {
  share_tiles(&a, rows, launch);
  const bool masses = (a.task != kMaskTask && a.task != kTakeTask) ||
                      (a.rule.rule == kKnapsack && a.rule.critical == kSplitItem);
  if (a.task != kMaskTask && a.task != kTakeTask) place_nodes(&a, rows);
  for (int64_t first = 0; first < rows; first += kMostRows) {
    a.first_row = static_cast<uint32_t>(first);
    const dim3 statistics = grid_of(a.with_proxy ? 2 * a.columns : a.columns, rows - first);
    const dim3 shared = grid_of(a.columns, rows - first);
    const dim3 tiles = grid_of(a.s.tiles, rows - first);
    TTA_LAUNCH((deferral_resolve_kernel<Op>), statistics, kThreads, 0, launch.stream, a);
    launch_cut<Kad>(a, shared, launch.stream);
    // The knapsack's lowest kept logit is the critical item's.
    if (a.task == kStatsTask && a.rule.rule != kKnapsack)
      TTA_LAUNCH((deferral_masses_kernel<true, Op>), shared, kThreads, 0, launch.stream, a);
    else if (masses)
      TTA_LAUNCH((deferral_masses_kernel<false, Op>), shared, kThreads, 0, launch.stream, a);
    if (a.task == kMaskTask)
      TTA_LAUNCH((deferral_mask_kernel<Op>), shared, kThreads, 0, launch.stream, a);
    else if (a.task == kProbsTask)
      TTA_LAUNCH((deferral_probs_kernel<Op>), tiles, kThreads, 0, launch.stream, a);
    else if (a.task == kSampleTask)
      TTA_LAUNCH((deferral_best_kernel<Op>), shared, kThreads, 0, launch.stream, a);
    else if (a.task == kTakeTask)
      TTA_LAUNCH((deferral_take_kernel<Op>), grid_of(1, rows - first), kThreads, 0, launch.stream,
                 a, key);
  }
  return cudaGetLastError();
}

template <class Op>
cudaError_t run_drawn(Op a, int64_t rows, const Launch& launch) {
  share_tiles(&a, rows, launch);
  const bool needs_proxy = rule_needs_proxy(a.rule.rule);
  for (int64_t first = 0; first < rows; first += kMostRows) {
    a.first_row = static_cast<uint32_t>(first);
    const dim3 statistics = grid_of(needs_proxy ? 2 * a.columns : a.columns, rows - first);
    const dim3 tiles = grid_of(a.s.tiles, rows - first);
    TTA_LAUNCH((deferral_draw_kernel<Op>), statistics, kThreads, 0, launch.stream, a);
    if (a.rule.rule == kKnapsack)
      TTA_LAUNCH((deferral_judge_kernel<Op>), tiles, kThreads, 0, launch.stream, a);
    if (!a.propose && !needs_proxy)
      TTA_LAUNCH((deferral_replace_kernel<Op>), statistics, kThreads, 0, launch.stream, a);
  }
  return cudaGetLastError();
}

cudaError_t run(const Resolved& a, int64_t rows, const Launch& launch, const KeySpec& key = {}) {
  return with_dtype(a, [&](const auto& op) { return run_resolved(op, rows, launch, key); });
}
cudaError_t run(const Drawn& a, int64_t rows, const Launch& launch) {
  return with_dtype(a, [&](const auto& op) { return run_drawn(op, rows, launch); });
}

}  // namespace

Need need_of(const MaskArgs& a) { return need_of_rows(a, wants_cut(a), false); }
Need need_of(const ProbsArgs& a) { return need_of_rows(a, wants_cut(a), true); }
Need need_of(const StatsArgs& a) { return need_of_rows(a, wants_cut(a), true); }
Need need_of(const SampleArgs& a) {
  const bool greedy = !a.key.do_sample;
  return need_of_rows(a, greedy && wants_cut(a), greedy);
}

cudaError_t deferral_mask(const MaskArgs& a, const Launch& launch) {
  Resolved op;
  fill(&op, a, launch, wants_cut(a));
  op.task = kMaskTask;
  op.with_proxy = rule_needs_proxy(a.rule.rule);
  op.mask = a.mask;
  op.mask_stride = a.mask_stride;
  op.critical_index = a.critical_index;
  op.fraction = a.fraction;
  return run(op, a.batch, launch);
}

cudaError_t deferral_probs(const ProbsArgs& a, const Launch& launch) {
  Resolved op;
  fill(&op, a, launch, wants_cut(a));
  op.task = kProbsTask;
  op.with_proxy = true;
  op.probs = a.out;
  op.probs_stride = a.out_stride;
  return run(op, a.batch, launch);
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
  return run(op, a.batch, launch);
}

cudaError_t deferral_sample(const SampleArgs& a, const Launch& launch) {
  const bool takes = a.key.do_sample && a.rule.rule == kOptimal;
  if (!a.key.do_sample || takes) {
    Resolved op;
    fill(&op, a, launch, wants_cut(a));
    op.task = takes ? kTakeTask : a.propose ? kProposeTask : kSampleTask;
    op.with_proxy = !a.propose;
    op.token = a.token;
    op.deferred = a.deferred;
    return run(op, a.batch, launch, a.key);
  }
  Drawn op;
  fill(&op, a, launch, false);
  op.key = a.key;
  op.propose = a.propose;
  op.token = a.token;
  op.deferred = a.deferred;
  return run(op, a.batch, launch);
}

}  // namespace cuda
}  // namespace tta
