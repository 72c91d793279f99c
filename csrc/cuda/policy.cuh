// Last stages over a resolved rule, a block a tile: the mask, pi written out, or the best tokens.
//
// pi(v) = (1 - mu(v)) p(v) + q(v) D: p and q rounded to float32, then mul and add in float64,
// rounded once.
#pragma once

#include "cuda/divide.cuh"
#include "cuda/kad.cuh"

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

  // (1 - mu) p and q of a thread's elements i .. i + 3; y: the proxy's.
  template <bool kException, class Read>
  __device__ __forceinline__ void four(Read read, int i, const float* y, double* kept,
                                       double* moved) const {
    float w[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) kept[k] = 0.0;
    if (!all_deferred) {
      float x[4];
      bool in[4];
      read(base, map, i, x);
      if (by_proxy)
        test.four<Read::kPlain>(y, map, i, in);
      else
        test.four<Read::kPlain>(x, map, i, in);
      if (!(in[0] && in[1] && in[2] && in[3])) {  // by most rules a whole warp seldom does
        weigh_four(x, p.max, p.inv_temperature, w);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          kept[k] = static_cast<double>(pz.template quotient<kException>(in[k] ? 0.0f : w[k]));
      }
      if (!Read::kPlain && test.parted) {  // the critical item is the first tie the cut leaves
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (map.at(i + k) == test.ties) kept[k] = mul_rn(kept_part, kept[k]);
      }
    }
    weigh_four(y, q.max, q.inv_temperature, w);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      moved[k] = static_cast<double>(qz.template quotient<kException>(w[k]));
  }

  // use(read, i, kept, moved) for all of a thread's elements, as each_four does.
  template <class Use>
  __device__ __forceinline__ void each(bool plain, Use use) const {
    double kept[4], moved[4];
    if (pz.exception() || qz.exception()) {
#pragma unroll 1
      for (int i = 0; i < kPerThread; i += 4) {
        const ReadPart read;
        float y[4];
        read(proxy, map, i, y);
        four<true>(read, i, y, kept, moved);
        use(read, i, kept, moved);
      }
      return;
    }
    each_four(map, proxy, base, plain && !test.parted, [&](auto read, int i, const float* y) {
      four<false>(read, i, y, kept, moved);
      use(read, i, kept, moved);
    });
  }
};

__device__ __forceinline__ float mixed(double kept, double moved, double mass) {
  return static_cast<float>(add_rn(kept, mul_rn(moved, mass)));
}

// Largest value, ties to the lowest id, of numbers >= 0 as one integer.
__device__ __forceinline__ uint64_t ranked(float value, int64_t id) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int64_t ranked_id(uint64_t rank) {
  return 0xffffffffu - static_cast<uint32_t>(rank);
}

// The best of pi in a tile, known to every thread.
__device__ __forceinline__ uint64_t best_of_tile(const Kad& a, const RowState& r, int64_t row,
                                                 int t) {
  const Policy policy(a, r, row, t);
  const double mass = r.mass;
  float best = -1.0f;
  int place = 0;
  policy.each(true, [&](auto read, int i, const double* kept, const double* moved) {
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
__device__ __forceinline__ Kept kept_of_tile(const Kad& a, const RowState& r, int64_t row, int t) {
  Deferral d = r.deferral;
  if (d.fraction > 0.0) d.cut = Cut::through(d.critical_x, d.critical);
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

__device__ __forceinline__ void put_tile_best(const Scratch& s, int64_t row, int t,
                                              const Kept& best) {
  if (threadIdx.x) return;
  s.mass(row, 0)[t] = static_cast<double>(best.top);
  s.mass(row, 1)[t] = static_cast<double>(best.next);
  reinterpret_cast<int64_t*>(s.mass(row, 2))[t] = best.id;
}

struct Choice {
  int64_t token;
  bool needs_proxy;  // q could still change it
};

// The most probable kept token of a row whose tiles' best are known. pi of any other token is at
// most fl32(second best kept p + D), pi of this one at least its p.
__device__ __forceinline__ Choice choose_kept(const Kad& a, const RowState& r, int64_t row) {
  const Deferral d = r.deferral;
  Kept best = Kept::none();
  for (int t = static_cast<int>(threadIdx.x); t < a.s.tiles; t += kThreads)
    best.merge(static_cast<float>(a.s.mass(row, 0)[t]), static_cast<float>(a.s.mass(row, 1)[t]),
               reinterpret_cast<const int64_t*>(a.s.mass(row, 2))[t]);
  best = block_best(best);
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
      best.id < 0 || (r.mass > 0.0 && !(static_cast<float>(add_rn(second, r.mass)) < first));
  if (best.id < 0) best.id = first_of_max(a.base_row(row), a.s, row, 0, p.max);
  return {best.id, needs_proxy};
}

}  // namespace cuda
}  // namespace tta
