// deferral_verify: speculative verification of a draft from q against pi = (1 - mu) p + q D.
//
// Problem: K + 1 positions of B rows; along a row's draft, accept x at position k iff
// r q(x) < (1 - mu(x)) p(x) + D q(x); at the first rejection draw from max((1 - mu) p - (1 - D) q,
// 0), after the last acceptance from pi. What is accepted is known only at the end, and a GPU has
// the width, so positions do not wait for each other: all those within a row's draft are judged at
// once, and one thread then walks along the verdicts. What lies behind the first rejection has no
// effect: not on the outputs, and an invalid row there is not reported.
//
// Stages, one launch each, a block of 128 threads a tile of 4096 elements of a position, or up to
// four where positions are enough to fill the device:
//   statistics of base and proxy; resolve the rule; draw the bonus token
//   [knapsack: the cut, two stages, cut.cuh; optimal: the distance of p and q, distance.cuh]
//   masses: D and 1 - D where a token does not stand without; accept or not; the last position of
//   a row walks   [greedy: argmax of pi]
//   emit: the residual at the rejected position, or the proxy for a deferred bonus token
// Bytes a row of a batch with a draft of k, s bytes an element: (2 k + 1) s V from DRAM, what is
// read again (two tiles' worth up to both rows of the rejected position) from L2. No dense pi is
// written.
// Determinism: as in deferral.cu; the walk looks at the positions in order, whoever takes it.

#include "cuda/cut.cuh"
#include "cuda/draw.cuh"
#include "cuda/launch.h"
#include "cuda/policy.cuh"

namespace tta {
namespace cuda {
namespace {

struct Verify : Kad {
  static constexpr bool kSingle = false;
  VerifyArgs v;
  bool needs_proxy = false;

  __device__ __forceinline__ int64_t length(int64_t b) const {
    const int64_t n = v.draft_length[b];
    return n < 0 ? 0 : n > v.draft_capacity ? v.draft_capacity : n;
  }
  __device__ __forceinline__ bool has_proxy(int64_t k) const {
    return k < v.draft_capacity || v.has_bonus_row;
  }
  // Whether the proxy's row of a position is read before it is known to be wanted.
  __device__ __forceinline__ bool reads_proxy(int64_t k, int64_t n) const {
    return k < n || (has_proxy(k) && (needs_proxy || !v.key.do_sample));
  }
  __device__ __forceinline__ bool seeks_cut(int64_t row) const {
    return position(row) <= length(batch_row(row)) && Kad::seeks_cut(row);
  }
  __device__ __forceinline__ double coin(int64_t row, uint32_t stream) const {
    return uniform_of(v.key, batch_row(row), position(row), stream);
  }
};

// Whether the token drafted at a position is accepted if D is `mass`; monotone in it.
__device__ __forceinline__ bool stands(const Verify& a, int64_t row, double mass) {
  const RowState& r = a.s.state(row);
  const int64_t x = a.v.draft_at(a.batch_row(row), a.position(row));
  if (!r.verdict.proxy_valid || x < 0 || x >= a.base.vocab) return false;
  const double q = static_cast<double>(proxy_probability(a, r, row, x));
  const double p = static_cast<double>(base_probability(a, r, row, x));
  const double kept_p = mul_rn(sub_rn(1.0, mu_of(a, r.deferral, row, x)), p);
  return q > 0.0 && mul_rn(a.coin(row, kVerify), q) < add_rn(kept_p, mul_rn(mass, q));
}

__global__ void __launch_bounds__(kThreads, 4) verify_statistics_kernel(const Verify a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  const int model = a.model();
  const int64_t k = a.position(row), n = a.length(a.batch_row(row));
  const bool with_proxy = a.reads_proxy(k, n);
  if (k > n || (model && !with_proxy)) return;
  if (model == 0) clear_bands(a, row);
  row_statistics(a, row, model, true, weights, true);
  const int blocks = with_proxy ? 2 * a.columns : a.columns;
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(blocks))) return;
  SlotNumbers slot[kSlots] = {};
  const bool proxy_valid = with_proxy && finish_model(a, row, 1, true, cum, slot);
  const bool base_valid = finish_model(a, row, 0, true, cum, slot);
  const bool valid = base_valid && a.valid_param(row) && (!a.needs_proxy || proxy_valid);
  int64_t token = -1;
  if (valid && k == n && a.v.key.do_sample)
    token = draw(a.base_row(row), a.s, row, kBaseSlot, 0, a.rule.inv_temperature, slot[kBaseSlot].z,
                 a.coin(row, kBonus), cum, weights);
  prepare_row(a, row, slot, valid);
  if (threadIdx.x) return;
  RowState& r = a.s.state(row);
  r.verdict.base_valid = base_valid;
  r.verdict.proxy_valid = proxy_valid;
  r.verdict.token = token;
  // Accepted whatever D is: then nobody has to add it up.
  r.verdict.stands = valid && k < n && a.v.key.do_sample && !a.v.return_mass &&
                     r.step != kSeeksCut && stands(a, row, 0.0);
}

// ---- the walk ----------------------------------------------------------------------------------

// From position k on, for one thread: outputs up to the end.
__device__ __forceinline__ WalkEnd walk(const Verify& a, int64_t b, int64_t k) {
  const int64_t n = a.length(b);
  double* mass = a.v.mass + b * a.positions;
  for (; k <= n; ++k) {
    const int64_t row = b * a.positions + k;
    const RowState& state = a.s.state(row);
    const Verdict& r = state.verdict;
    const bool bonus = k == n;
    int64_t culprit = -1;
    bool usable = r.base_valid && a.valid_param(row);
    if (!r.base_valid && a.valid_param(row)) culprit = kBaseLogits;
    if (usable && !bonus) {
      const int64_t x = a.v.draft_at(b, k);
      usable = x >= 0 && x < a.base.vocab;
    }
    const bool asks_proxy = !bonus || a.needs_proxy || (usable && !a.v.key.do_sample && r.deferred);
    if (usable && asks_proxy && !r.proxy_valid && (!bonus || a.needs_proxy || a.has_proxy(k))) {
      usable = false;
      if (a.has_proxy(k)) culprit = kProxyLogits;
    }
    if (!usable) {
      mass[k] = static_cast<double>(kNaN);
      if (culprit >= 0) a.note(row, culprit);
      return {k, kNoDraw};
    }
    if (a.v.return_mass) mass[k] = state.masses.deferred;
    if (r.stands && !bonus) {
      ++a.v.accepted[b];
      continue;
    }
    if (!a.v.key.do_sample) {
      a.v.token[b] = r.token;
      a.v.deferred[b] = r.deferred;
      return {k, kNoDraw};
    }
    if (!bonus) return {k, kResidualDraw};
    a.v.token[b] = r.deferred ? -1 : r.token;
    a.v.deferred[b] = r.deferred;
    return {k, r.deferred && a.has_proxy(k) ? kProxyDraw : kNoDraw};
  }
  return {n, kNoDraw};
}

// The first walk of a row, by the block that finds all its positions judged.
__device__ __forceinline__ void start_walk(const Verify& a, int64_t b) {
  if (!last_to_arrive(a.arrivals + a.rows + b, static_cast<uint32_t>(a.length(b) + 1))) return;
  if (threadIdx.x) return;
  for (int64_t k = 0; k < a.positions; ++k) a.v.mass[b * a.positions + k] = -1.0;
  a.v.accepted[b] = 0;
  a.v.token[b] = -1;
  a.v.deferred[b] = false;
  a.s.state(b * a.positions).end = walk(a, b, 0);
}

// ---- masses and verdicts -----------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads, 5) verify_masses_kernel(const Verify a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  float* weights = reinterpret_cast<float*>(weights4);
  const uint32_t row = a.row();
  const int64_t b = a.batch_row(row), k = a.position(row), n = a.length(b);
  if (k > n) return;
  RowState& r = a.s.state(row);
  const bool splits = a.rule.rule == kKnapsack && a.rule.critical == kSplitItem;
  const bool valid = r.valid;
  // What becomes of a drawn bonus token depends on no mass but that which splits the critical item.
  const bool masses =
      valid && !r.verdict.stands && (k < n || splits || a.v.return_mass || !a.v.key.do_sample);
  if (masses) {
    const Deferral set = r.deferral;
    block_masses<true, false>(a, row, set, weights);
    if (splits && !a.same_temperature) block_masses_at_rule(a, row, 2, set, weights);
  }
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  if (valid) {
    double sum = masses ? sum_of_masses(a.s, row, 0, shared) : 0.0;
    double kept = masses ? sum_of_masses(a.s, row, 1, shared) : 0.0;
    const double rule_sum =
        splits && !a.same_temperature ? sum_of_masses(a.s, row, 2, shared) : sum;
    if (threadIdx.x == 0) {
      const Share share = split(a, row, rule_sum);
      sum = add_rn(sum, share.sampled);
      kept = sub_rn(kept, share.sampled);
      const double mass = div_rn(sum, r.slot[kBaseSlot].z);
      r.masses.deferred = mass;
      r.masses.kept = div_rn(kept, r.slot[kBaseSlot].z);
      r.verdict.deferred = false;
      if (a.v.key.do_sample && k < n) {
        r.verdict.stands = r.verdict.stands || stands(a, row, mass);
      } else if (a.v.key.do_sample) {
        const double mu = mu_of(a, r.deferral, row, r.verdict.token);
        r.verdict.deferred = mu == 1.0 || (mu > 0.0 && a.coin(row, kSplit) < mu);
      }
    }
  }
  if (a.v.key.do_sample) start_walk(a, b);
}

// Greedy: argmax of pi at every position; where the bonus row has no usable proxy, the best kept
// token, and whether the proxy could still change it.
__global__ void __launch_bounds__(kThreads, 3) verify_best_kernel(const Verify a) {
  const uint32_t row = a.row();
  const int64_t b = a.batch_row(row), k = a.position(row), n = a.length(b);
  if (k > n) return;
  RowState& r = a.s.state(row);
  Verdict& verdict = r.verdict;
  const bool with_proxy = verdict.proxy_valid, valid = r.valid && (with_proxy || k == n);
  if (valid && with_proxy) put_best(a, r, row);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  const int i = static_cast<int>(threadIdx.x);
  if (valid && with_proxy) {
    const uint64_t best = best_of_row(a, row);
    if (i == 0) {
      verdict.token = ranked_id(best);
      verdict.deferred = mu_of(a, r.deferral, row, verdict.token) == 1.0;
      verdict.stands = k < n && verdict.token == a.v.draft_at(b, k);
    }
  } else if (valid) {
    const Choice choice = choose_kept(a, r, row);
    if (i == 0) {
      verdict.token = choice.needs_proxy ? -1 : choice.token;
      verdict.deferred = choice.needs_proxy;
      verdict.stands = false;
    }
  }
  start_walk(a, b);
}

// ---- the last token ----------------------------------------------------------------------------

// max((1 - mu) p - (1 - D) q, 0) of a thread's elements, scaled by a power of two to at most 1 in
// the tile, so that the draw inside it keeps its resolution however small the weights are. Into
// `weights`, followed by a barrier; returns the scale, 0 if the tile has none.
__device__ __forceinline__ double residual_weights(const Verify& a, int64_t row, int t,
                                                   float* weights) {
  const RowState& r = a.s.state(row);
  const Policy policy(a, r, row, t);
  const Tile& map = policy.map;
  if (policy.all_deferred) return 0.0;
  const double kept_mass = r.masses.kept;
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    const float nothing[4] = {};
    put_four(map, i, nothing, weights);
  }
  policy.each_kept([&](int i, const double* kept, const double* moved) {
    float w[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float residual = static_cast<float>(sub_rn(kept[k], mul_rn(kept_mass, moved[k])));
      w[k] = residual > 0.0f ? residual : 0.0f;
      top = fmaxf(top, w[k]);
    }
    put_four(map, i, w, weights);
  });
  top = block_reduce(top, Max());
  if (!(top > 0.0f)) return 0.0;
  int exponent;
  std::frexp(top, &exponent);
  // In two factors: 2^149 is no float. Exact, but for what is halved.
  const int part = -exponent / 2;
  const float first = std::ldexp(1.0f, part), second = std::ldexp(1.0f, -exponent - part);
  const auto shrunk = [=](float w) { return mul_rn(mul_rn(w, first), second); };
#pragma unroll 4
  for (int j = static_cast<int>(threadIdx.x) * 4; j < kTile; j += kThreads * 4) {
    float4* at = reinterpret_cast<float4*>(weights + j);
    const float4 w = *at;
    *at = make_float4(shrunk(w.x), shrunk(w.y), shrunk(w.z), shrunk(w.w));
  }
  __syncthreads();
  return std::ldexp(1.0, exponent);
}

// A tile's part in what has to be emitted at a position.
__device__ __forceinline__ void emit_tile(const Verify& a, int64_t row, int t, EndDraw draw,
                                          float* weights) {
  if (draw == kProxyDraw)
    return tile_statistics(a.proxy_row(row), t, numbers_of(a, row, 1, false), weights);
  const double scale = residual_weights(a, row, t, weights);
  if (warp_id()) return;
  const int64_t left = a.base.vocab - static_cast<int64_t>(t) * kTile;
  const float sum =
      scale == 0.0 ? 0.0f : canonical_sum(weights, left < kTile ? static_cast<int>(left) : kTile);
  if (lane_id() == 0) a.s.mass(row, 0)[t] = mul_rn(static_cast<double>(sum), scale);
}

// A draw from the proxy's row of a position.
__device__ __forceinline__ int64_t draw_proxy(const Verify& a, int64_t row, double* cum,
                                              uint32_t stream, float* weights, bool* valid) {
  SlotNumbers q;
  *valid = finish_slot(a.s, row, kProxySlot, 1, a.rule.inv_temperature, cum, &q);
  if (!*valid) return -1;
  return draw(a.proxy_row(row), a.s, row, kProxySlot, 1, a.rule.inv_temperature, q.z,
              a.coin(row, stream), cum, weights);
}

// A draw from the residual, whose masses over the tiles are known; -1 if it is empty.
__device__ __forceinline__ int64_t draw_residual(const Verify& a, int64_t row, double* cum,
                                                 float* weights) {
  const double* mass = a.s.mass(row, 0);
  for (int t = static_cast<int>(threadIdx.x); t < a.s.tiles; t += kThreads) cum[t] = mass[t];
  __syncthreads();
  if (warp_id() == 0) accumulate(cum, a.s.tiles);
  __syncthreads();
  const double total = cum[a.s.tiles - 1];
  if (total == 0.0) return -1;
  const TileChoice choice = choose_tile(cum, a.s.tiles, mul_rn(a.coin(row, kResidual), total),
                                        [&](int t) { return mass[t]; });
  const double scale = residual_weights(a, row, choice.t, weights);
  return static_cast<int64_t>(choice.t) * kTile +
         find_in_tile(weights, scale, choice.before, choice.target);
}

__global__ void __launch_bounds__(kThreads, 2) verify_emit_kernel(const Verify a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, cum, kMaxTiles);
  TTA_SHARED(WalkEnd, next);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t b = a.first_batch_row + blockIdx.y;
  WalkEnd end = a.s.state(b * a.positions).end;
  if (end.draw == kNoDraw) return;
  emit_tile(a, b * a.positions + end.position, a.tile(), end.draw, weights);
  if (!last_to_arrive(a.arrivals + a.rows + b, gridDim.x)) return;
  // A second turn is needed only where pi = q in floats although the token was rejected: then it
  // stands after all, and the walk goes on.
  for (;;) {
    const int64_t row = b * a.positions + end.position;
    const RowState& r = a.s.state(row);
    bool valid = true, again = false;
    int64_t token = -1;
    if (end.draw == kProxyDraw) {
      token = draw_proxy(a, row, cum, kProxy, weights, &valid);
      if (!valid) a.note(row, kProxyLogits);
    } else {
      if (r.masses.deferred != 1.0) token = draw_residual(a, row, cum, weights);
      if (token < 0) {
        const int64_t x = a.v.draft_at(b, end.position);
        again = proxy_probability(a, r, row, x) > 0.0f;
        if (!again) token = draw_proxy(a, row, cum, kResidual, weights, &valid);
        if (!again && threadIdx.x == 0) a.v.deferred[b] = true;
      }
    }
    if (!again) {
      if (threadIdx.x) return;
      a.v.token[b] = token;
      if (valid) return;
      a.v.deferred[b] = false;
      a.v.mass[b * a.positions + end.position] = static_cast<double>(kNaN);
      return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      ++a.v.accepted[b];
      next = walk(a, b, end.position + 1);
    }
    __syncthreads();
    end = next;
    if (end.draw == kNoDraw) return;
    for (int t = 0; t < a.s.tiles; ++t) {
      emit_tile(a, b * a.positions + end.position, t, end.draw, weights);
      __syncthreads();
    }
  }
}

}  // namespace

Need need_of(const VerifyArgs& a) {
  const int64_t rows = a.batch * (a.draft_capacity + 1);
  return {scratch_of(a, rows, a.rule.rule == kKnapsack, true), rows + a.batch};
}

cudaError_t deferral_verify(const VerifyArgs& v, const Launch& launch) {
  if (!v.batch) return cudaSuccess;
  Verify a;
  fill(&a, v, launch, v.rule.rule == kKnapsack);
  a.v = v;
  a.positions = v.draft_capacity + 1;
  if (a.positions > 1) a.inverse = ~uint32_t{0} / static_cast<uint32_t>(a.positions) + 1;
  a.param_row_stride = v.param_row_stride;
  a.param_position_stride = v.param_position_stride;
  a.needs_proxy = rule_needs_proxy(v.rule.rule);
  place_nodes(&a, v.batch * a.positions);
  share_tiles(&a, v.batch * a.positions, launch);
  if (a.positions > kMostRows) return cudaErrorInvalidValue;
  // Whole batch rows a launch: the last stage has a line of blocks for each.
  const int64_t most = kMostRows / a.positions;
  for (int64_t first = 0; first < v.batch; first += most) {
    const int64_t batch = v.batch - first < most ? v.batch - first : most;
    a.first_batch_row = static_cast<uint32_t>(first);
    a.first_row = static_cast<uint32_t>(first * a.positions);
    const dim3 statistics = grid_of(2 * a.columns, batch * a.positions);
    const dim3 shared = grid_of(a.columns, batch * a.positions);
    TTA_LAUNCH((verify_statistics_kernel), statistics, kThreads, 0, launch.stream, a);
    launch_cut(a, shared, launch.stream);
    TTA_LAUNCH((verify_masses_kernel), shared, kThreads, 0, launch.stream, a);
    if (v.key.do_sample)
      TTA_LAUNCH((verify_emit_kernel), grid_of(a.s.tiles, batch), kThreads, 0, launch.stream, a);
    else
      TTA_LAUNCH((verify_best_kernel), shared, kThreads, 0, launch.stream, a);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
