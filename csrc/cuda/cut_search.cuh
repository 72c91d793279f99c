// The search of the knapsack's critical item among the elements of a bracket: all of them listed,
// or in bands of their own, or equal. cut.cuh says when.
#pragma once

#include "cuda/cut_bands.cuh"

namespace tta {
namespace cuda {

// Appends a thread's elements of a row to its list, where there is room: bit i of `inside` is
// element id_of(i). Counts them all.
template <class IdOf>
__device__ __forceinline__ void append(const Kad& a, int64_t row, const Row& base, uint32_t inside,
                                       const IdOf& id_of) {
  if (!inside) return;
  uint32_t to = atomicAdd(&a.s.state(row).bracket.listed, static_cast<uint32_t>(__popc(inside)));
  for (; inside && to < kListed; inside &= inside - 1, ++to) {
    const int32_t v = id_of(__ffs(static_cast<int>(inside)) - 1);
    a.s.list_x(row)[to] = base.at(v);
    a.s.list_id(row)[to] = v;
  }
}

// Elements of a tile or a row that are in question: how many, and their ends.
struct Found {
  int count;
  float least, most;

  __device__ __forceinline__ bool equal() const { return least == most; }
};
__device__ __forceinline__ Found nothing() { return {0, kInfinity, -kInfinity}; }
__device__ __forceinline__ Found block_reduce(const Found& mine) {
  TTA_SHARED_ARRAY(int, part, 3 * kWarps);
  int count = __reduce_add_sync(kFullWarp, mine.count);
  int least = __reduce_min_sync(kFullWarp, ordered_bits(mine.least));
  int most = __reduce_max_sync(kFullWarp, ordered_bits(mine.most));
  if (lane_id() == 0) {
    part[warp_id()] = count;
    part[kWarps + warp_id()] = least;
    part[2 * kWarps + warp_id()] = most;
  }
  __syncthreads();
  for (int w = 1; w < kWarps; ++w) {
    const int other = (warp_id() + w) % kWarps;
    count += part[other];
    least = min(least, part[kWarps + other]);
    most = max(most, part[2 * kWarps + other]);
  }
  __syncthreads();
  return {count, from_ordered_bits(least), from_ordered_bits(most)};
}

// What is found in the tiles, in the place of queries 1 and 2.
__device__ __forceinline__ double* found_counts(const Kad& a, int64_t row) {
  return a.s.mass(row, 1);
}
__device__ __forceinline__ float2* found_ends(const Kad& a, int64_t row) {
  return reinterpret_cast<float2*>(a.s.mass(row, 2));
}
__device__ __forceinline__ Found found_of_row(const Kad& a, int64_t row) {
  Found mine = nothing();
  for (int t = static_cast<int>(threadIdx.x); t < a.s.tiles; t += kThreads) {
    const float2 ends = found_ends(a, row)[t];
    mine.count += static_cast<int>(found_counts(a, row)[t]);
    mine.least = fminf(mine.least, ends.x);
    mine.most = fmaxf(mine.most, ends.y);
  }
  return block_reduce(mine);
}

// Bands of a bracket: kFine from its highest logit to its lowest, as if of another temperature.
// Their integers count weights relative to that of a logit in the middle.
struct Fine {
  SlotNumbers p;
  float middle, inv_temperature, one;
  bool narrow;

  __device__ __forceinline__ Fine(const Kad& a, const SlotNumbers& numbers, float least, float most)
      : inv_temperature(numbers.inv_temperature), one(one_of(a)) {
    constexpr double kNats = (kFine - 1) / static_cast<double>(kBandsPerNat);
    const double t = 1.0 / static_cast<double>(inv_temperature), high = most, low = least;
    narrow = high - low < 0.09 * t;
    middle = narrow ? static_cast<float>(0.5 * high + 0.5 * low) : most;
    p.max = most;
    // Beyond a depth of 90 all are in the last band; so steep that none is infinite.
    p.inv_temperature = static_cast<float>(kNats / fmax(fmin(high - low, 90.0 * t), 0x1p-122));
  }
  __device__ __forceinline__ float place(float x) const {
    return fminf(band_place(depth_of(x, p)), place_of(kFine - 1));
  }
  // exp(e), as the bits of a multiple of 2^-149: 1 + e + e^2 / 2 + e^3 / 6, |e| < 0.046, to 2e-7.
  __device__ __forceinline__ uint32_t units(float x) const {
    const float e = mul_rn(sub_rn(x, middle), inv_temperature);
    if (!narrow) return device::scalar_bits(mul_rn(exp_of(e), one));
    const float square = fma_rn(fma_rn(e, one / 6.0f, 0.5f * one), e, one);
    return device::scalar_bits(fma_rn(square, e, one));
  }
  __device__ __forceinline__ void add(float x, uint32_t number, uint32_t* counts) const {
    atomicAdd(&counts[device::scalar_bits(place(x)) - device::scalar_bits(kBandZero)],
              number * units(x));
  }
  // The mass of a unit, for a row of this largest logit.
  __device__ __forceinline__ double unit(const Kad& a, float max) const {
    return static_cast<double>(exp_of(mul_rn(sub_rn(middle, max), inv_temperature))) * band_unit(a);
  }
};

// Lists what a tile has in question. For a whole block.
__device__ __forceinline__ void list_tile(const Kad& a, int64_t row, const Row& base, int t,
                                          const BracketTest& test) {
  if (a.s.tile_max(row, 0)[t] < test.least) return;
  const Source source(base, t);
  const Tile map = map_of(base.vocab, t, source.aligned());
  uint32_t inside = 0;
  each_four(map, source, true,
            [&](auto, int i, const float* x) { inside |= test.inside<4>(x) << i; });
  append(a, row, base, inside, [&](int i) { return t * kTile + map.at(i); });
}

// Surveys tiles first .. end - 1, as many as a block has: notes what each has between two logits,
// and adds it to the row's fine bands. Of equal elements of a tile their number is enough. For a
// whole block; `counts4`: shared, of kFine.
__device__ __forceinline__ void survey(const Kad& a, int64_t row, float least, float most,
                                       int first, int end, uint4* counts4) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(counts4);
  const Row base = a.base_row(row);
  clear_counts<kFine>(counts4);
#pragma unroll 1
  for (int t = first; t < end; ++t) {
    const Source source(base, t);
    const Tile map = map_of(base.vocab, t, source.aligned());
    Found found = nothing();
    uint32_t inside = 0;
    if (a.s.tile_max(row, 0)[t] >= least) {
      each_four(map, source, true, [&](auto, int i, const float* x) {
        bool in[4], any = false;
#pragma unroll
        for (int k = 0; k < 4; ++k) any |= in[k] = (x[k] >= least) & (x[k] <= most);
        if (!any) return;
        uint32_t four = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float y = in[k] ? x[k] : kNaN;  // which a minimum does not see
          four |= in[k] ? 1u << k : 0u;
          found.least = fminf(found.least, y);
          found.most = fmaxf(found.most, y);
        }
        inside |= four << i;
      });
      found.count = __popc(inside);
      found = block_reduce(found);
    }
    if (threadIdx.x == 0) {
      found_counts(a, row)[t] = static_cast<double>(found.count);
      found_ends(a, row)[t] = make_float2(found.least, found.most);
    }
    if (found.equal() ? threadIdx.x != 0 : !inside) continue;
    const Fine fine(a, a.s.state(row).slot[a.base_rule_slot()], least, most);
    if (found.equal()) {
      fine.add(found.most, static_cast<uint32_t>(found.count), counts);
      continue;
    }
    for (; inside; inside &= inside - 1)
      fine.add(base.at(t * kTile + map.at(__ffs(static_cast<int>(inside)) - 1)), 1, counts);
  }
  add_counts<kFine>(counts4, a.s.histogram(row));
}

// What is known of the critical item: it is the last element of which this was said, or one that
// lies before that and behind what is taken.
struct Search {
  double below;  // mass of what is taken, roughly
  double vague;  // what that may be wrong by, besides shallow_slack
  int64_t critical = -1;
  float critical_x = kInfinity;
  bool summed = false;  // query 0 has the tiles' masses before `cut`

  // What is deferred whole.
  __device__ __forceinline__ Cut cut(const Kad& a) const {
    return a.rule.critical == kInclude ? Cut::through(critical_x, critical)
                                       : Cut::before(critical_x, critical);
  }
};

// Whether a mass, roughly known, is clear of the capacity; where it is not its canonical sum
// decides.
__device__ __forceinline__ bool is_clear(const Kad& a, const RowState& r, const Search& search,
                                         double mass) {
  return fabs(mass - r.bound) > mass * shallow_slack(a) + search.vague;
}

// The canonical sums of a search, one after another: tiles in which two sets are the same are not
// read again.
struct Sums {
  const Kad& a;
  int64_t row;
  float* weights;
  double* shared;
  bool any = false;

  // Of what lies before a cut. changed(t): whether a tile may have elements between the last cut
  // and this one; less than 0 where it is known to have none before this one. For a whole block.
  template <class Changed>
  __device__ __forceinline__ double before_cut(const Cut& cut, const Changed& changed) {
    for (int t = 0; t < a.s.tiles; ++t) {
      const int part = changed(t);
      if (!part) continue;
      if (part >= 0)
        tile_mass<false>(a, row, t, 0, before(cut), a.base_rule_slot(), weights);
      else if (threadIdx.x == 0)
        a.s.mass(row, 0)[t] = 0.0;
      __syncthreads();
    }
    any = true;
    return sum_of_masses(a.s, row, 0, shared);
  }
};

// Bisects the search over the list of all that is in question. For a whole block; a list that a
// warp can hold, as most are, is bisected by one until a sum is wanted.
__device__ __forceinline__ void search_list(const Kad& a, int64_t row, int count, Search* search,
                                            float* weights, double* shared) {
  static_assert(kListed <= 32 * kThreads && kListed <= kTile, "a bit and a weight each");
  TTA_SHARED_ARRAY(float, x, kListed);
  TTA_SHARED_ARRAY(int32_t, id, kListed);
  TTA_SHARED_ARRAY(uint32_t, changed, kMaxTiles / 32);
  TTA_SHARED(int, pivot);  // -1: nothing is left
  TTA_SHARED(int, found);
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot(), me = static_cast<int>(threadIdx.x);
  const float inv_temperature = r.slot[slot].inv_temperature;
  const bool alone = count <= 32 * 32;
  const int threads = alone ? 32 : kThreads;
  uint32_t left = 0;  // of this thread's elements: bit k is number me + k threads
  const auto weigh = [&] {
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int i = me + (__ffs(static_cast<int>(rest)) - 1) * threads;
      weights[i] =
          static_cast<float>(canonical_weight(a.s, row, slot, inv_temperature, x[i], id[i]));
    }
  };
  for (int i = me; i < count; i += kThreads) {
    x[i] = a.s.list_x(row)[i];
    id[i] = a.s.list_id(row)[i];
  }
  for (int i = me; me < threads && i < count; i += threads) left |= 1u << (i / threads);
  __syncthreads();
  weigh();
  Sums sums = {a, row, weights, shared};
  Cut last;
  const auto sum_before = [&](const Cut& cut) {
    if (sums.any) {
      if (me < kMaxTiles / 32) changed[me] = 0;
      __syncthreads();
      for (int i = me; i < count; i += kThreads) {
        const int t = id[i] / kTile;
        if (cut.admits(x[i], id[i]) != last.admits(x[i], id[i]))
          atomicOr(&changed[t / 32], 1u << t % 32);
      }
      __syncthreads();
    }
    last = cut;
    return sums.before_cut(
        cut, [&](int t) { return !sums.any || (changed[t / 32] >> t % 32 & 1u) != 0; });
  };
  uint32_t mine = 0, lower = 0;  // the pivot, and all through it
  const auto decide = [&](int at, double through) {
    if (through <= r.bound) {
      search->below = through;
      left &= ~lower;
    } else {
      search->critical = id[at];
      search->critical_x = x[at];
      left &= lower & ~mine;
    }
  };
  uint32_t tries = 1;
#pragma unroll 1
  while (true) {
    for (bool clear = me < threads; clear;) {
      const int here = __popc(left);
      const int earlier = alone ? warp_scan(here) - here : block_scan(here);
      const int all = alone ? __reduce_add_sync(kFullWarp, here) : block_reduce(here, Sum());
      // Any of them: lists have an order of their own, with which a fixed choice may be in step.
      int rank =
          static_cast<int>(__umulhi(static_cast<uint32_t>(all), tries++ * 0x9e3779b1u)) - earlier;
      if (!all) {
        if (me == 0) pivot = -1;
        break;
      }
      if (rank >= 0 && rank < here) {
        uint32_t rest = left;
        for (; rank > 0; --rank) rest &= rest - 1;
        pivot = me + (__ffs(static_cast<int>(rest)) - 1) * threads;
      }
      if (alone)
        __syncwarp();
      else
        __syncthreads();
      const int at = pivot;
      mine = at % threads == me ? 1u << (at / threads) : 0u;
      const Cut cut = Cut::before(x[at], id[at]);
      lower = mine;
      double sum = mine ? static_cast<double>(weights[at]) : 0.0;
      for (uint32_t rest = left; rest; rest &= rest - 1) {
        const int bit = __ffs(static_cast<int>(rest)) - 1, i = me + bit * threads;
        if (!cut.admits(x[i], id[i])) continue;
        lower |= 1u << bit;
        sum += static_cast<double>(weights[i]);
      }
      __syncwarp();
      const double through =
          search->below + (alone ? warp_reduce(sum, Sum()) : block_reduce(sum, Sum()));
      clear = is_clear(a, r, *search, through);
      if (clear) decide(at, through);
    }
    __syncthreads();
    const int at = pivot;
    if (at < 0) break;
    decide(at, sum_before(Cut::through(x[at], id[at])));
    weigh();  // the sum's weights took their place
  }
  if (!sums.any) return;
  // A warp that was alone knows what the others do not.
  if (me == 0) found = static_cast<int>(search->critical);
  __syncthreads();
  search->critical = found;
  search->critical_x = a.base_row(row).at(found);
  sum_before(search->cut(a));
  search->summed = true;
}

// The search over equal elements, which are in the order of their ids: how many fit is a division,
// and where that one is, what was found in the tiles tells. For a whole block.
__device__ __forceinline__ void search_equal(const Kad& a, int64_t row, const Found& all,
                                             Search* search, float* weights, double* shared) {
  static_assert(kMaxTiles == 2 * kThreads, "two tiles a thread");
  TTA_SHARED(int2, found);
  const RowState& r = a.s.state(row);
  const Row base = a.base_row(row);
  const float x = all.most;
  const bool in_fours = aligned_to_four(base.data, base.dtype);
  const int me = static_cast<int>(threadIdx.x);
  const auto in_tile = [&](int t) {
    return t < a.s.tiles ? static_cast<int>(found_counts(a, row)[t]) : 0;
  };
  const int in_first = in_tile(2 * me), here = in_first + in_tile(2 * me + 1);
  const int earlier = block_scan(here);
  const auto id_of = [&](int rank) {
    int left = rank - earlier;
    if (left >= 0 && left < here) {
      const bool second = left >= in_first;
      found = make_int2(2 * me + second, second ? left - in_first : left);
    }
    __syncthreads();
    const int2 at = found;
    const int first = at.x * kTile + me * kPerThread;
    uint32_t equal = 0;
    of_type(base.dtype, [&](auto type) {
#pragma unroll
      for (int k = 0; k < kPerThread; k += 4) {
        float y[4] = {kNaN, kNaN, kNaN, kNaN};
        if (in_fours && first + k + 4 <= base.vocab)
          read_four<type.value>(base.data, first + k, y);
        else
          for (int c = 0; c < 4 && first + k + c < base.vocab; ++c)
            y[c] = read_one<type.value>(base.data, first + k + c);
#pragma unroll
        for (int c = 0; c < 4; ++c) equal |= y[c] == x ? 1u << (k + c) : 0u;
      }
    });
    left = at.y - block_scan(__popc(equal));
    if (left >= 0 && left < __popc(equal)) {
      for (; left > 0; --left) equal &= equal - 1;
      found.x = first + __ffs(static_cast<int>(equal)) - 1;
    }
    __syncthreads();
    const int id = found.x;
    __syncthreads();
    return id;
  };
  // How many surely fit, and the first that surely does not.
  const double weight = static_cast<double>(exp_of(-depth_of(x, r.slot[a.base_rule_slot()])));
  const auto rank_at = [&](double mass) {
    const double rank = (mass - search->below) / weight;
    return rank >= all.count ? all.count - 1 : rank > 0.0 ? static_cast<int>(rank) : 0;
  };
  int low = 0, high = all.count - 1;
  if (weight > 0.0) {
    low = rank_at((r.bound - search->vague) / (1.0 + shallow_slack(a)));
    high = rank_at((r.bound + search->vague) / (1.0 - shallow_slack(a)));
  }
  Sums sums = {a, row, weights, shared};
  int last = 0;  // tile
  const auto sum_before = [&](const Cut& cut, int tile) {
    const double sum = sums.before_cut(cut, [&](int t) {
      if (t > tile && in_tile(t) == map_of(base.vocab, t, true).count) return -1;  // all equal
      return static_cast<int>(!sums.any || (t >= min(last, tile) && t <= max(last, tile)));
    });
    last = tile;
    return sum;
  };
#pragma unroll 1
  while (low < high) {
    const int rank = (low + high) / 2, id = id_of(rank);
    if (sum_before(Cut::through(x, id), id / kTile) <= r.bound)
      low = rank + 1;
    else
      high = rank;
  }
  search->critical = id_of(low);
  search->critical_x = base.at(search->critical);
  if (sums.any) sum_before(search->cut(a), static_cast<int>(search->critical / kTile));
  search->summed = sums.any;
}

}  // namespace cuda
}  // namespace tta
