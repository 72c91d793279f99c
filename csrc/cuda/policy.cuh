// Last stages over a resolved rule, a block a tile: the mask, pi written out, or the best tokens.
//
// pi(v) = (1 - mu(v)) p(v) + q(v) D: p and q rounded to float32, then mul and add in float64,
// rounded once. p = fl32(w / Z) has the bits of the float64 division but takes a reciprocal and two
// corrections (Markstein 1990), as on the CPU.
#pragma once

#include "cuda/kad.cuh"

namespace tta {
namespace cuda {

// fl32(w / z) for many w and one z; z with an all-ones mantissa is the theorem's exception, for
// which callers have a second, slower loop.
struct DivideBy {
  double z, y;
  __device__ __forceinline__ explicit DivideBy(double by) : z(by), y(div_rn(1.0, by)) {}
  __device__ __forceinline__ bool exception() const {
    unsigned long long u;
    std::memcpy(&u, &z, sizeof u);
    return (u & 0xfffffffffffffull) == 0xfffffffffffffull;
  }
  template <bool kException>
  __device__ __forceinline__ float quotient(float w) const {
    const double a = static_cast<double>(w);
    if (kException) return static_cast<float>(div_rn(a, z));
    double q = mul_rn(a, y);
    q = fma_rn(fma_rn(q, -z, a), y, q);
    q = fma_rn(fma_rn(q, -z, a), y, q);
    return static_cast<float>(q);
  }
};

// Where two rows' tiles lie under one map, to be read four elements a thread at a time: two whole
// tiles would not fit the registers beside the arithmetic.
struct TilePair {
  const char *base, *proxy;
  int base_type, proxy_type;
  Tile map;  // its numbers are the caller's

  __device__ __forceinline__ TilePair(const Kad& a, int64_t row, int t) {
    const Row b = a.base_row(row), q = a.proxy_row(row);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    base = b.data + begin * element_bytes(b.dtype);
    proxy = q.data + begin * element_bytes(q.dtype);
    base_type = b.dtype;
    proxy_type = q.dtype;
    place(&map, b.vocab, t, aligned_to_four(b.data, b.dtype) && aligned_to_four(q.data, q.dtype));
  }
  __device__ __forceinline__ void read(const char* data, int dtype, int i, float* x) const {
    if (dtype == kFloat32)
      read_part<kFloat32>(data, map, i, x);
    else if (dtype == kFloat16)
      read_part<kFloat16>(data, map, i, x);
    else
      read_part<kBFloat16>(data, map, i, x);
  }
};

// What a policy is made of, in registers.
struct Policy {
  Deferral d;
  SlotNumbers p, q;
  DivideBy pz, qz;
  __device__ __forceinline__ explicit Policy(const RowState& r)
      : d(r.deferral),
        p(r.slot[kBaseSlot]),
        q(r.slot[kProxySlot]),
        pz(r.slot[kBaseSlot].z),
        qz(r.slot[kProxySlot].z) {}

  // (1 - mu) p and q of a thread's elements i .. i + 3 in tile t.
  template <bool kException>
  __device__ __forceinline__ void four(const TilePair& pair, int t, int i, double* kept,
                                       double* moved) const {
    float x[4], y[4], w[4];
    pair.read(pair.base, pair.base_type, i, x);
    pair.read(pair.proxy, pair.proxy_type, i, y);
    weigh_four(x, p.max, p.inv_temperature, w);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t v = static_cast<int64_t>(t) * kTile + pair.map.at(i + k);
      kept[k] = d.admits(d.by_proxy ? y[k] : x[k], v)
                    ? 0.0
                    : static_cast<double>(pz.template quotient<kException>(w[k]));
      if (v == d.critical && d.fraction > 0.0) kept[k] = mul_rn(sub_rn(1.0, d.fraction), kept[k]);
    }
    weigh_four(y, q.max, q.inv_temperature, w);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      moved[k] = static_cast<double>(qz.template quotient<kException>(w[k]));
  }

  // use(i, kept, moved) for all of a thread's elements, four at a time.
  template <class Use>
  __device__ __forceinline__ void each_four(const TilePair& pair, int t, Use use) const {
    double kept[4], moved[4];
    if (pz.exception() || qz.exception()) {
#pragma unroll 1
      for (int i = 0; i < kPerThread; i += 4) {
        four<true>(pair, t, i, kept, moved);
        use(i, kept, moved);
      }
      return;
    }
#pragma unroll 2
    for (int i = 0; i < kPerThread; i += 4) {
      four<false>(pair, t, i, kept, moved);
      use(i, kept, moved);
    }
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
  const TilePair pair(a, row, t);
  const Policy policy(r);
  const double mass = r.mass;
  uint64_t best = 0;
  policy.each_four(pair, t, [&](int i, const double* kept, const double* moved) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = pair.map.at(i + k);
      if (at >= pair.map.count) continue;
      const uint64_t rank =
          ranked(mixed(kept[k], moved[k], mass), static_cast<int64_t>(t) * kTile + at);
      best = rank > best ? rank : best;
    }
  });
  return block_reduce(best, Max());
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

// The kept tokens of a thread's elements; rules that look at the base alone.
__device__ __forceinline__ Kept kept_of_tile(const Deferral& d, const Tile& tile, int t) {
  Kept best = Kept::none();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t v = static_cast<int64_t>(t) * kTile + tile.at(i);
    const bool kept = tile.at(i) < tile.count && !d.admits(tile.x[i], v) &&
                      !(d.fraction > 0.0 && v == d.critical);
    if (kept && tile.x[i] > -kInfinity) best.merge(tile.x[i], -kInfinity, v);
  }
  return best;
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
