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

  __device__ __forceinline__ Fine(const Kad& a, const SlotNumbers& numbers, const Between& ends)
      : p(numbers), inv_temperature(numbers.inv_temperature), one(one_of(a)) {
    constexpr float kNats = static_cast<float>(kFine - 1) / kBandsPerNat;
    const float t = div_rn(1.0f, inv_temperature), width = sub_rn(ends.most, ends.least);
    narrow = width < mul_rn(0.09f, t);
    middle = narrow ? fma_rn(0.5f, ends.most, mul_rn(0.5f, ends.least)) : ends.most;
    p.max = ends.most;
    // Beyond a depth of 90 all are in the last band; so steep that none is infinite.
    p.inv_temperature = div_rn(kNats, fmaxf(fminf(width, mul_rn(90.0f, t)), 0x1p-122f));
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
  // A logit's band.
  __device__ __forceinline__ uint32_t band(float x) const {
    return device::scalar_bits(place(x)) - device::scalar_bits(kBandZero);
  }
  // The mass of a unit, for a row of this largest logit.
  __device__ __forceinline__ double unit(const Kad& a, float max) const {
    return static_cast<double>(exp_of(mul_rn(sub_rn(middle, max), inv_temperature))) * band_unit(a);
  }
};

// Which of this thread's elements of a tile are in question, as bits. note(x, in): of each.
template <class Note>
__device__ __forceinline__ uint32_t inside_of(const Source& source, const Tile& map,
                                              const Between& ends, const Note& note) {
  uint32_t inside = 0;
  each_four_stored(map, source, true, [&](auto, int i, const float* x) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool in = ends.holds(x[k]);
      if (in) inside |= 1u << (i + k);
      note(x[k], in);
    }
  });
  return inside;
}

// Lists what a tile has in question. For a whole block.
__device__ __forceinline__ void list_tile(const Kad& a, int64_t row, const Row& base, int t,
                                          const Between& ends) {
  if (a.s.tile_max(row, 0)[t] < ends.least) return;
  const Source source(base, t);
  const Tile map = map_of(base.vocab, t, source.aligned());
  const uint32_t inside = inside_of(source, map, ends, [](float, bool) {});
  append(a, row, base, inside, [&](int i) { return t * kTile + map.at(i); });
}

// Surveys tiles first .. end - 1, as many as a block has: notes what each has between two logits,
// and adds it to the row's fine bands. Of equal elements of a tile their number is enough. For a
// whole block; `counts4`: shared, of kFine.
__device__ __forceinline__ void survey(const Kad& a, int64_t row, const Between& ends, int first,
                                       int end, uint4* counts4) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(counts4);
  auto* total = reinterpret_cast<unsigned long long*>(a.s.histogram(row));
  const Row base = a.base_row(row);
  bool counting = false;
#pragma unroll 1
  for (int t = first; t < end; ++t) {
    const Source source(base, t);
    const Tile map = map_of(base.vocab, t, source.aligned());
    Found found = nothing();
    uint32_t inside = 0;
    if (a.s.tile_max(row, 0)[t] >= ends.least) {
      inside = inside_of(source, map, ends, [&](float x, bool in) {
        const float y = in ? x : kNaN;  // which a minimum does not see
        found.least = fminf(found.least, y);
        found.most = fmaxf(found.most, y);
      });
      found.count = __popc(inside);
      found = block_reduce(found);
    }
    if (threadIdx.x == 0) {
      found_counts(a, row)[t] = static_cast<double>(found.count);
      found_ends(a, row)[t] = make_float2(found.least, found.most);
    }
    if (!found.count || (found.equal() && threadIdx.x)) continue;
    const Fine fine(a, a.s.state(row).slot[a.base_rule_slot()], ends);
    if (found.equal()) {
      atomicAdd(total + fine.band(found.most),
                static_cast<unsigned long long>(found.count) * fine.units(found.most));
      continue;
    }
    if (!counting) clear_counts<kFine>(counts4);
    counting = true;
    for (; inside; inside &= inside - 1) {
      const float x = base.at(t * kTile + map.at(__ffs(static_cast<int>(inside)) - 1));
      atomicAdd(&counts[fine.band(x)], fine.units(x));
    }
  }
  if (counting) add_counts<kFine>(counts4, a.s.histogram(row));
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

// The canonical sums of a search, one after another, by a warp a tile: tiles in which two sets are
// the same are not read again.
struct Sums {
  const Kad& a;
  int64_t row;
  double* shared;
  bool any = false;

  // Of what lies before a cut. changed(t): whether a tile may have elements between the last cut
  // and this one; less than 0 where it is known to have none before this one. For a whole block.
  template <class Changed>
  __device__ __forceinline__ double before_cut(const Cut& cut, const Changed& changed) {
#pragma unroll 1
    for (int t = warp_id(); t < a.s.tiles; t += kWarps) {
      const int part = changed(t);
      if (part > 0)
        warp_mass_before(a, row, t, cut, a.base_rule_slot());
      else if (part < 0 && lane_id() == 0)
        a.s.mass(row, 0)[t] = 0.0;
    }
    any = true;
    __syncthreads();
    return sum_of_masses(a.s, row, 0, shared);
  }
};

// Bisects the search over the list of all that is in question. For a whole block, until so few are
// left that a warp can go on alone, to the end or until a sum is wanted.
__device__ __forceinline__ void search_list(const Kad& a, int64_t row, int count, Search* search,
                                            float* weights, double* shared) {
  constexpr int kAlone = 32 * 32;
  static_assert(kListed <= 32 * kThreads, "a bit each");
  static_assert(kListed + kAlone <= kTile, "behind the weights");
  TTA_SHARED_ARRAY(float, x, kListed);
  TTA_SHARED_ARRAY(int32_t, id, kListed);
  TTA_SHARED_ARRAY(uint32_t, changed, kMaxTiles / 32);
  TTA_SHARED(int, pivot);  // -1: nothing is left
  TTA_SHARED(int, found);
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot(), me = static_cast<int>(threadIdx.x);
  const float inv_temperature = r.slot[slot].inv_temperature;
  for (int i = me; i < count; i += kThreads) {
    x[i] = a.s.list_x(row)[i];
    id[i] = a.s.list_id(row)[i];
    weights[i] = static_cast<float>(canonical_weight(a.s, row, slot, inv_temperature, x[i], id[i]));
  }
  // What is left of this thread's elements: bit k is number me + k threads, of all or of the few.
  const auto among = [=](int n, int threads) {
    const int mine = (n - me + threads - 1) / threads;
    return mine < 32 ? (1u << mine) - 1 : ~0u;
  };
  uint32_t left = among(count, kThreads);
  int* few = reinterpret_cast<int*>(weights + kListed);
  bool alone = false;
  const auto element = [&](int bit) { return alone ? few[me + bit * 32] : me + bit * kThreads; };
  __syncthreads();
  Sums sums = {a, row, shared};
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
    for (bool clear = !alone || me < 32; clear;) {
      const int here = __popc(left);
      int all, earlier;
      if (alone) {
        earlier = warp_scan(here) - here;
        all = __reduce_add_sync(kFullWarp, here);
      } else {
        earlier = block_scan(here, &all);
        if (all <= kAlone) {
          for (int to = earlier; left; left &= left - 1)
            few[to++] = element(__ffs(static_cast<int>(left)) - 1);
          __syncthreads();
          alone = true;
          clear = me < 32;
          if (clear) left = among(all, 32);
          continue;
        }
      }
      if (!all) {
        if (me == 0) pivot = -1;
        break;
      }
      // Any of them: lists have an order of their own, with which a fixed choice may be in step.
      int rank =
          static_cast<int>(__umulhi(static_cast<uint32_t>(all), tries++ * 0x9e3779b1u)) - earlier;
      mine = 0;
      if (rank >= 0 && rank < here) {
        uint32_t rest = left;
        for (; rank > 0; --rank) rest &= rest - 1;
        mine = rest & (0 - rest);
        pivot = element(__ffs(static_cast<int>(rest)) - 1);
      }
      if (alone)
        __syncwarp();
      else
        __syncthreads();
      const int at = pivot;
      const Cut cut = Cut::before(x[at], id[at]);
      lower = mine;
      double sum = mine ? static_cast<double>(weights[at]) : 0.0;
      for (uint32_t rest = left; rest; rest &= rest - 1) {
        const int bit = __ffs(static_cast<int>(rest)) - 1, i = element(bit);
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
                                             Search* search, double* shared) {
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
  Sums sums = {a, row, shared};
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
