// Last stages over a resolved rule, a block a tile: the mask, pi written out, or the best tokens.
//
// pi(v) = (1 - mu(v)) p(v) + q(v) D: p and q rounded to float32, then mul and add in float64,
// rounded once.
#pragma once

#include <type_traits>

#include "cuda/divide.cuh"
#include "cuda/draw.cuh"
#include "cuda/masked_sum.cuh"

namespace tta {
namespace cuda {

// What a policy is made of, in registers, and where its numbers lie in a tile.
struct Policy {
  Source base, proxy;
  Tile map;
  TileTest test;
  SlotNumbers p, q;
  DivideBy pz, qz;
  double kept_part;  // of the critical item
  bool by_proxy;
  bool all_deferred;  // (1 - mu) p is 0 in the whole tile

  __device__ __forceinline__ Policy(const Kad& a, const RowState& r, int64_t row, int t)
      : base(a.base_row(row), t),
        proxy(a.proxy_row(row), t),
        map(map_of(a.base.vocab, t, base.aligned() && proxy.aligned())),
        test(r.deferral, t, a.s.tile_max(row, r.deferral.by_proxy)[t]),
        p(r.slot[kBaseSlot]),
        q(r.slot[kProxySlot]),
        pz(p.z),
        qz(q.z),
        kept_part(sub_rn(1.0, r.deferral.fraction)),
        by_proxy(r.deferral.by_proxy),
        all_deferred(test.uniform && test.all) {}

  __device__ __forceinline__ Source judged() const {
    Source source = base;
    if (by_proxy) source = proxy;
    return source;
  }
  // Which of elements i .. i + 3 are deferred.
  template <bool kPlain>
  __device__ __forceinline__ void judge(int i, const float* x, const float* y, bool* in) const {
    if (by_proxy)
      test.four<kPlain>(y, map, i, in);
    else
      test.four<kPlain>(x, map, i, in);
  }
  // p (0 where `in`) or q of four elements.
  template <bool kException>
  __device__ __forceinline__ static void shares(const float* x, const bool* in,
                                                const SlotNumbers& of, const DivideBy& z,
                                                double* out) {
    float w[4];
    weigh_four(x, of.max, of.inv_temperature, w);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      out[k] = static_cast<double>(z.template quotient<kException>(in && in[k] ? 0.0f : w[k]));
  }
  // (1 - mu) p of elements i .. i + 3 with logits x, of which those that are deferred are `in`.
  template <bool kException, class Read>
  __device__ __forceinline__ void keep(Read, int i, const float* x, const bool* in,
                                       double* kept) const {
    shares<kException>(x, in, p, pz, kept);
    if (!Read::kPlain && test.parted) {  // the critical item is the first tie the cut leaves
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (map.at(i + k) == test.ties) kept[k] = mul_rn(kept_part, kept[k]);
    }
  }

  // (1 - mu) p and q of a thread's elements i .. i + 3; y: the proxy's.
  template <bool kException, class Read>
  __device__ __forceinline__ void four(Read read, int i, const float* y, double* kept,
                                       double* moved) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) kept[k] = 0.0;
    if (!all_deferred) {
      float x[4];
      bool in[4];
      read(base, map, i, x);
      judge<Read::kPlain>(i, x, y, in);
      // By most rules a whole warp seldom keeps any.
      if (!(in[0] && in[1] && in[2] && in[3])) keep<kException>(read, i, x, in, kept);
    }
    shares<kException>(y, nullptr, q, qz, moved);
  }
  // use(read, i, x) for all of a thread's elements of a source, with kException for what divides
  // by an exception.
  template <class Use>
  __device__ __forceinline__ void each_of(const Source& source, const Source& other, bool plain,
                                          Use use) const {
    if (!pz.exception() && !qz.exception()) {
      each_four(map, source, other, plain && !test.parted,
                [&](auto read, int i, const float* x) { use(std::false_type(), read, i, x); });
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kPerThread; i += 4) {
      const ReadPart read;
      float x[4];
      read(source, map, i, x);
      use(std::true_type(), read, i, x);
    }
  }
  // use(read, i, kept, moved) for all of a thread's elements, as each_four does.
  template <class Use>
  __device__ __forceinline__ void each(bool plain, Use use) const {
    each_of(proxy, base, plain, [&](auto exception, auto read, int i, const float* y) {
      double kept[4], moved[4];
      four<exception.value>(read, i, y, kept, moved);
      use(read, i, kept, moved);
    });
  }
  // use(i, kept, moved) for the fours of which one is kept, in one loop of any type: they are few
  // by most rules.
  template <class Use>
  __device__ __forceinline__ void each_kept(Use use) const {
    uint32_t some = 0;  // element i is kept: bit i
    each_four(map, judged(), !test.parted, [&](auto read, int i, const float* x) {
      bool in[4];
      test.four<decltype(read)::kPlain>(x, map, i, in);
      some >>= 4;
#pragma unroll
      for (int k = 0; k < 4; ++k) some |= in[k] ? 0u : 1u << (28 + k);
    });
    if (pz.exception() || qz.exception())
      each_kept_of<true>(some, use);
    else
      each_kept_of<false>(some, use);
  }
  template <bool kException, class Use>
  __device__ __forceinline__ void each_kept_of(uint32_t some, Use use) const {
    const ReadPart read;
#pragma unroll 1
    for (int i = 0; i < kPerThread; i += 4) {
      if (!(some >> i & 0xfu)) continue;
      float x[4], y[4];
      bool in[4];
      double kept[4], moved[4];
      read(base, map, i, x);
      read(proxy, map, i, y);
#pragma unroll
      for (int k = 0; k < 4; ++k) in[k] = !(some >> (i + k) & 1u);
      keep<kException>(read, i, x, in, kept);
      shares<kException>(y, nullptr, q, qz, moved);
      use(i, kept, moved);
    }
  }
};

__device__ __forceinline__ float mixed(double kept, double moved, double mass) {
  return static_cast<float>(add_rn(kept, mul_rn(moved, mass)));
}

// Largest value, ties to the lowest id, of numbers >= 0 as one integer.
__device__ __forceinline__ uint64_t ranked(float value, int64_t id) {
  return static_cast<uint64_t>(device::scalar_bits(value)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int64_t ranked_id(uint64_t rank) {
  return 0xffffffffu - static_cast<uint32_t>(rank);
}

// What can be the best of pi: pi >= `least`, which some token reaches, and pi <= p + q D; so p or
// q D is half of that. As logits, with a margin against the rounding on the way.
struct Contenders {
  float x, y;  // one of base and proxy is at least so much

  __device__ __forceinline__ explicit Contenders(const RowState& r) {
    const SlotNumbers &p = r.slot[kBaseSlot], &q = r.slot[kProxySlot];
    const Deferral& d = r.deferral;
    const double most_q = mul_rn(static_cast<double>(q.max_probability()), r.masses.deferred);
    const bool keeps_max = !d.by_proxy && p.max > d.cut.x;
    const double most_p = keeps_max ? static_cast<double>(p.max_probability()) : 0.0;
    const double half = 0.5 * (most_p > most_q ? most_p : most_q);
    x = logit_of(p, half);
    y = r.masses.deferred > 0.0 ? logit_of(q, half / r.masses.deferred) : kInfinity;
  }
  __device__ __forceinline__ static float logit_of(const SlotNumbers& s, double probability) {
    const float weight = static_cast<float>(probability * s.z);  // of the maximum: 1
    if (!(weight > 0x1p-100f)) return -kInfinity;
    if (!(weight < 0x1p100f)) return kInfinity;
    const double depth = static_cast<double>(device::log({weight}).v) - 0.01;
    return static_cast<float>(static_cast<double>(s.max) +
                              depth * 1.001 / static_cast<double>(s.inv_temperature));
  }
};

// The best of pi in a tile, known to every thread; 0 if it is surely elsewhere.
__device__ __forceinline__ uint64_t best_of_tile(const Kad& a, const RowState& r, int64_t row,
                                                 int t, const Contenders& least) {
  if (a.s.tile_max(row, 0)[t] < least.x && a.s.tile_max(row, 1)[t] < least.y) return 0;
  const Policy policy(a, r, row, t);
  const double mass = r.masses.deferred;
  float best = -1.0f;
  int place = 0;
  policy.each_of(policy.base, policy.proxy, true,
                 [&](auto exception, auto read, int i, const float* x) {
                   float y[4];
                   read(policy.proxy, policy.map, i, y);
                   bool any = false;
#pragma unroll
                   for (int k = 0; k < 4; ++k) any |= (x[k] >= least.x) | (y[k] >= least.y);
                   if (!any) return;
                   double kept[4], moved[4];
                   policy.template four<exception.value>(read, i, y, kept, moved);
#pragma unroll
                   for (int k = 0; k < 4; ++k) {
                     const int at = policy.map.at(i + k);
                     const float pi = mixed(kept[k], moved[k], mass);
                     if (!(pi > best) || (!read.kPlain && at >= policy.map.count)) continue;
                     best = pi;
                     place = at;  // rises with i + k: of ties the first stays
                   }
                 });
  const int64_t id = static_cast<int64_t>(t) * kTile + place;
  return block_reduce(best < 0.0f ? uint64_t{0} : ranked(best, id), Max());
}

// The best of each of this block's tiles.
__device__ __forceinline__ void put_best(const Kad& a, const RowState& r, int64_t row) {
  const Contenders least(r);
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t) {
    const uint64_t best = best_of_tile(a, r, row, t, least);
    if (threadIdx.x == 0) reinterpret_cast<uint64_t*>(a.s.mass(row, 0))[t] = best;
  }
}

// The best of a row whose tiles' best are known.
__device__ __forceinline__ uint64_t best_of_row(const Kad& a, int64_t row) {
  const uint64_t* ranks = reinterpret_cast<const uint64_t*>(a.s.mass(row, 0));
  uint64_t best = 0;
  for (int t = static_cast<int>(threadIdx.x); t < a.s.tiles; t += kThreads)
    best = ranks[t] > best ? ranks[t] : best;
  return block_reduce(best, Max());
}

// The best and the second best kept logit, of a part of a row.
struct Kept {
  float top, next;
  int64_t id;  // lowest of the best, -1 if nothing is kept

  __device__ __forceinline__ static Kept none() { return {-kInfinity, -kInfinity, -1}; }
  __device__ __forceinline__ void merge(float other_top, float other_next, int64_t other_id) {
    const bool wins =
        other_top > top || (other_top == top && other_id >= 0 && (id < 0 || other_id < id));
    const float lower = wins ? top : other_top, beside = wins ? other_next : next;
    next = lower > beside ? lower : beside;
    if (wins) {
      top = other_top;
      id = other_id;
    }
  }
};

__device__ __forceinline__ Kept block_best(Kept best) {
  TTA_SHARED_ARRAY(Kept, part, kWarps);
  for (int n = 16; n >= 1; n /= 2) {
    const float top = __shfl_xor_sync(kFullWarp, best.top, n);
    const float next = __shfl_xor_sync(kFullWarp, best.next, n);
    const int64_t id = __shfl_xor_sync(kFullWarp, best.id, n);
    best.merge(top, next, id);
  }
  if (lane_id() == 0) part[warp_id()] = best;
  __syncthreads();
  best = part[0];
  for (int w = 1; w < kWarps; ++w) best.merge(part[w].top, part[w].next, part[w].id);
  __syncthreads();
  return best;
}

// ---- greedy choice without the proxy -----------------------------------------------------------

// The best kept tokens of a tile, known to every thread; rules that look at the base alone. A
// critical item that keeps a part of its p is not among them.
__device__ __forceinline__ Kept kept_of_tile(const Kad& a, const Deferral& d, int64_t row, int t) {
  const TileTest test(d, t, a.s.tile_max(row, 0)[t]);
  Kept best = Kept::none();
  if (!test.uniform || !test.all) {
    const Source base(a.base_row(row), t);
    const Tile map = map_of(a.base.vocab, t, base.aligned());
    int place = -1;
    each_four(map, base, !test.parted, [&](auto read, int i, const float* x) {
      bool in[4];
      test.four<decltype(read)::kPlain>(x, map, i, in);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float kept = in[k] ? -kInfinity : x[k];  // so is what lies beyond the row
        best.next = fmaxf(best.next, fminf(best.top, kept));
        if (!(kept > best.top)) continue;
        best.top = kept;
        place = map.at(i + k);
      }
    });
    if (place >= 0) best.id = static_cast<int64_t>(t) * kTile + place;
  }
  return block_best(best);
}

struct Choice {
  int64_t token;
  bool needs_proxy;  // q could still change it
};

// The best kept tokens of a row: its tiles' maxima say in which tile they are. Where the cut parts
// a tile's ties its maximum does not say whether it is kept, so that tile is looked at anyway.
__device__ __forceinline__ Kept kept_of_row(const Kad& a, const RowState& r, int64_t row) {
  Deferral d = r.deferral;
  if (d.fraction > 0.0) d.cut = Cut::through(d.critical_x, d.critical);
  Kept tops = Kept::none();  // of the other tiles, which stand for their numbers in place of ids
  int parted = kMaxTiles;
  for (int t = static_cast<int>(threadIdx.x); t < a.s.tiles; t += kThreads) {
    const float max = a.s.tile_max(row, 0)[t];
    const TileTest test(d, t, max);
    if (test.uniform && (test.all || max == -kInfinity)) continue;
    if (test.parted && !test.uniform)
      parted = t;
    else
      tops.merge(max, -kInfinity, t);
  }
  tops = block_best(tops);
  parted = block_reduce(parted, Min());
  Kept best = Kept::none();
  if (tops.id >= 0) {
    best = kept_of_tile(a, d, row, static_cast<int>(tops.id));
    best.next = fmaxf(best.next, tops.next);
  }
  if (parted < kMaxTiles) {
    const Kept other = kept_of_tile(a, d, row, parted);
    best.merge(other.top, other.next, other.id);
  }
  return best;
}

// The most probable kept token of a row. pi of any other token is at most fl32(second best kept p +
// D), pi of this one at least its p. Logits may differ where the float32 p do not, so that with D =
// 0 too the lead must be one of p.
__device__ __forceinline__ Choice choose_kept(const Kad& a, const RowState& r, int64_t row) {
  const Deferral d = r.deferral;
  Kept best = kept_of_row(a, r, row);
  const SlotNumbers p = r.slot[kBaseSlot];
  float first = best.id >= 0 ? p.probability(best.top) : 0.0f;
  double second = best.next != -kInfinity ? static_cast<double>(p.probability(best.next)) : 0.0;
  if (d.fraction > 0.0) {  // the critical item keeps a part of its p
    const double part =
        mul_rn(sub_rn(1.0, d.fraction), static_cast<double>(p.probability(d.critical_x)));
    if (best.id < 0) {
      best.id = d.critical;
      first = static_cast<float>(part);
    } else if (part > second) {
      second = part;
    }
  }
  const bool needs_proxy =
      best.id < 0 || !(static_cast<float>(add_rn(second, r.masses.deferred)) < first);
  if (best.id < 0) best.id = first_of_max(a.base_row(row), a.s, row, 0, p.max);
  return {best.id, needs_proxy};
}

}  // namespace cuda
}  // namespace tta
