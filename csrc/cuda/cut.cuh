// The cut of the greedy knapsack over a row: its critical item, found without sorting.
//
// 1. `cut_histogram`: the mass of 4096 bands of depth below the row's maximum, in integers, so that
//    blocks may add in any order. Bands that surely fit the capacity, and those that surely do not,
//    leave a bracket of one or two, with the mass below it.
// 2. `cut_collect`: what lies inside the bracket is listed.
// 3. The last block bisects the list. Approximate masses answer wherever they clear the capacity by
//    more than their error bound; otherwise the canonical sum S of the candidate decides, so the
//    result is the one the definition gives.
// Where thousands of logits lie within the bracket (equal ones, or a row as flat as a few bands, 2%
// of a nat each), a sample of them is listed instead. It tells the last block two elements between
// which the critical one most likely lies; one reading of the row gives the masses before both,
// which say whether it does, and lists what is between them, or a sample of that.
//
// Thread map: a block's tiles one after another, four elements a thread at a time; of 16-bit
// elements, where a block has four, a warp each, eight elements a thread at a time.
// Passes: the base row twice, from L2 where it fits. Bytes a row: 2 s V + the bands a block
// touches.
#pragma once

#include "cuda/distance.cuh"
#include "cuda/masked_sum.cuh"

namespace tta {
namespace cuda {

constexpr float kBandsPerNat = static_cast<float>(kBuckets) / 88.0f;  // exp(-88) is 0
constexpr double kBandUnit = 0x1p-17;  // of a band's integers: 16384 weights < 1.02 fit 32 bits
static_assert(kMostSpan * kTile * 1.02 / kBandUnit < 0x1p32, "a block's counters");
// Bounds of the error of a band's mass against the canonical weights', relative, at a depth d:
// 2^-18 for the rounding to the unit, 2^-20 for polynomials, 5 d 2^-24 for the exponents' arguments
// on both sides. With the canonical sum's own 38 additions, up to a depth of 24, and of any.
constexpr double kShallowSlack = 0x1p-16, kBandSlack = 0x1p-14;
constexpr int kShallowBands = kBuckets * 24 / 88;
// And absolute: beyond a depth of 86, where weights near 2^-126 become 0 and, in the end, none is
// counted, canonical masses differ from the bands' by less than 2^20 exp(-86).
constexpr double kVague = 1e-31;
// Elements of a sample, about, and how far its sums may be trusted, in standard deviations.
constexpr int kSampled = 1024;
constexpr double kTrust = 3.0;

constexpr int kLastBand = kBuckets - 1;
constexpr int kCounters = kBuckets + 32;
// Places of bands are floats from 2 on, whose last bits are the band's number: four times their
// bits is four times that number, as 2^32 are dropped.
constexpr float kBandZero = 2.0f, kBandStep = 0x1p-22f;
constexpr float kLastPlace = std::numeric_limits<float>::max();  // of what weighs anything

__device__ __forceinline__ float depth_of(float x, const SlotNumbers& p) {
  return mul_rn(sub_rn(p.max, x), p.inv_temperature);
}
__device__ __forceinline__ float band_depth(int band) {
  return mul_rn(static_cast<float>(band), 1.0f / kBandsPerNat);
}
// Of the nearest band; rises as the logit falls, beyond the last band too.
__device__ __forceinline__ float band_place(float depth) {
  return fma_rn(depth, kBandsPerNat * kBandStep, kBandZero);
}
__device__ __forceinline__ float place_of(int band) {
  return kBandZero + static_cast<float>(band) * kBandStep;
}

// Adds some weights to `counts` (shared, kCounters); those beyond the last band (kVague) to
// counters that nobody reads, one for each lane of the warps: rows may have many impossible tokens.
template <int kCount>
__device__ __forceinline__ void count_bands(const float* x, const SlotNumbers& p,
                                            uint32_t* counts) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float depth = depth_of(x[k], p);
    const float place = fminf(band_place(depth), place_of(kBuckets + lane_id()));
    // exp(r) relative to the band's middle, |r| < 0.011: 1 + r + r^2 / 2, to 3e-7. In units of
    // 2^-149: the bits of so small a number are the integer (subnormal: nothing may flush it).
    const float r = fma_rn(sub_rn(place, kBandZero), 1.0f / (kBandsPerNat * kBandStep), -depth);
    constexpr float kOne = static_cast<float>(0x1p-149 / kBandUnit);
    const float units = fma_rn(fma_rn(r, kOne / 2.0f, kOne), r, kOne);
    atomicAdd(&counts[device::scalar_bits(place) - device::scalar_bits(kBandZero)],
              device::scalar_bits(units));
  }
}

// The share of this block's tiles.
__device__ __forceinline__ void band_masses(const Kad& a, int64_t row, uint4* counts4) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(counts4);
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  const Row base = a.base_row(row);
  const int me = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = me; i < kCounters / 4; i += kThreads) counts4[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  each_tile(
      a, base, a.by_warps(base),
      [&](auto type, int t, int count) {
#pragma unroll 2
        for (int j = lane_id() * kWide; j < count; j += 32 * kWide) {
          float x[kWide];
          widen<type.value>(wide_at(base.begin(t), j), x);
          count_bands<kWide>(x, p, counts);
        }
      },
      [&](int t) {
        const Source source(base, t);
        const Tile map = map_of(base.vocab, t, source.aligned());
        each_four(map, source, true,
                  [&](auto, int, const float* x) { count_bands<4>(x, p, counts); });
      });
  __syncthreads();
  uint64_t* total = a.s.histogram(row);
#pragma unroll
  for (int i = me; i < kBuckets / 4; i += kThreads) {
    const uint4 four = counts4[i];
    const uint32_t count[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (count[k])
        atomicAdd(reinterpret_cast<unsigned long long*>(total + i * 4 + k),
                  static_cast<unsigned long long>(count[k]));
  }
}

// How sparsely so many elements are listed: every 2^shift-th, about.
__device__ __forceinline__ int shift_of(double count) {
  int shift = 0;
  if (count > kListed)
    for (; count > kSampled; count *= 0.5) ++shift;
  return shift;
}

// Brackets the critical item by the bands' masses, deepest first: CutBracket, whose `vague` is
// besides kShallowSlack of all sums of the mass below. For a whole block.
__device__ __forceinline__ void bracket_bands(const Kad& a, int64_t row) {
  constexpr int kEach = kBuckets / kThreads, kAtOnce = 8;
  RowState& r = a.s.state(row);
  const uint64_t* total = a.s.histogram(row);
  // This thread's bands, from the deepest thread 0 on.
  const int first = kBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;
  const auto mass_of = [&](int band, uint64_t units) {
    return static_cast<double>(units) *
           (static_cast<double>(exp_of(-band_depth(band))) * kBandUnit);
  };
  double sum = 0.0, deep_sum = 0.0;
#pragma unroll 1
  for (int band = first; band > first - kEach; band -= kAtOnce) {
    uint64_t units[kAtOnce], any = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) any |= units[k] = total[band - k];
    if (!any) continue;  // like most of them
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const double mass = mass_of(band - k, units[k]);
      sum += mass;
      deep_sum += band - k >= kShallowBands ? mass : 0.0;
    }
  }
  const double scanned = block_scan(sum);
  int low = kBuckets, high = -1;
  double below = 0.0, above = r.slot[a.base_rule_slot()].z;
  // `mass` lies in all bands from the deepest to any of `from` .. `to`.
  const auto judge = [&](double mass, int from, int to) {
    if (mass * (1.0 + kBandSlack) + kVague <= r.bound) {
      low = to;
      below = mass;
    }
    if (mass * (1.0 - kBandSlack) - kVague > r.bound && from > high) {
      high = from;
      above = mass;
    }
  };
  if (sum == 0.0) {
    judge(scanned, first, first - kEach + 1);
  } else {
    double mass = scanned;
#pragma unroll kAtOnce
    for (int band = first; band > first - kEach; --band) {
      mass += mass_of(band, total[band]);
      judge(mass, band, band);
    }
  }
  low = block_reduce(low, Min());      // the shallowest band that surely fits
  high = block_reduce(high, Max());    // the deepest one that surely does not
  below = block_reduce(below, Max());  // through `low`
  above = block_reduce(above, Min());  // through `high`
  deep_sum = block_reduce(deep_sum, Sum());
  if (threadIdx.x == 0) {
    const SlotNumbers& p = r.slot[a.base_rule_slot()];
    const auto logit_of = [&](int band) {
      const double depth = static_cast<double>(band) * (1.0 / static_cast<double>(kBandsPerNat));
      return static_cast<float>(static_cast<double>(p.max) -
                                depth / static_cast<double>(p.inv_temperature));
    };
    const int shallow = high < 0 ? 0 : high, deep = low >= kBuckets ? kLastBand : low - 1;
    r.bracket.low = shallow;
    r.bracket.high = deep;
    r.bracket.most = shallow > 0 ? logit_of(shallow - 1) : kInfinity;
    r.bracket.least = deep == kLastBand ? -kInfinity : logit_of(deep + 1);
    r.bracket.listed = 0;
    // No element of the bracket weighs more than one of its shallowest band.
    r.bracket.shift = shift_of((above - below) / static_cast<double>(exp_of(-band_depth(shallow))));
    r.bracket.below = below;
    r.bracket.above = above;
    r.bracket.vague = kVague + deep_sum * kBandSlack;
  }
}

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

// Which of 32 places are in a sample of every 2^shift-th; `number`: of these 32 among others. The
// multiples of the golden ratio spread them evenly, whatever periods a row has.
__device__ __forceinline__ uint32_t sampled(int shift, uint32_t number) {
  if (shift == 0) return ~0u;
  const uint32_t at = number * 0x9e3779b1u;
  if (shift > 5 && (at >> 8 & ((1u << (shift - 5)) - 1))) return 0;
  const int gap = 1 << (shift < 5 ? shift : 5);
  const uint32_t one_in_gap = shift < 5 ? ~0u / ((1u << gap) - 1) : 1u;
  return __funnelshift_l(one_in_gap, one_in_gap, at >> 27);
}

// The bracket as a range of places, and the logits between which all of that lies.
struct BracketTest {
  SlotNumbers p;
  float shallow, deep;
  float most, least;

  __device__ __forceinline__ BracketTest(const RowState& r, const SlotNumbers& numbers)
      : p(numbers), shallow(place_of(r.bracket.low)), most(r.bracket.most), least(r.bracket.least) {
    deep = r.bracket.high == kLastBand ? kLastPlace : place_of(r.bracket.high);
  }
  // Bits of the elements inside.
  template <int kCount>
  __device__ __forceinline__ uint32_t inside(const float* x) const {
    bool any = false;
#pragma unroll
    for (int k = 0; k < kCount; ++k) any |= (x[k] >= least) & (x[k] <= most);
    uint32_t found = 0;
    if (!any) return found;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float place = band_place(depth_of(x[k], p));
      if (place >= shallow && place <= deep) found |= 1u << k;
    }
    return found;
  }
};

// Of a thread's elements of a tile among all such.
__device__ __forceinline__ uint32_t number_of(int t) {
  return static_cast<uint32_t>(t) * kThreads + threadIdx.x;
}

// Lists what this block's tiles have inside the bracket, or a sample. Few elements are as likely:
// where a warp looks at eight at a time, their largest tells most eights apart.
__device__ __forceinline__ void collect(const Kad& a, int64_t row) {
  const RowState& r = a.s.state(row);
  const BracketTest bracket(r, r.slot[a.base_rule_slot()]);
  const Row base = a.base_row(row);
  const int shift = r.bracket.shift;
  const auto impossible = [&](int t) { return a.s.tile_max(row, 0)[t] < bracket.least; };
  each_tile(
      a, base, a.by_warps(base),
      [&](auto type, int t, int count) {
        if (impossible(t)) return;
#pragma unroll 4
        for (int j = lane_id() * kWide; j < count; j += 32 * kWide) {
          const uint4 wide = wide_at(base.begin(t), j);
          float x[kWide];
          max_of_wide<type.value>(wide, x);
          if (fmaxf(x[0], x[1]) < bracket.least) continue;
          widen<type.value>(wide, x);
          append(a, row, base,
                 bracket.inside<kWide>(x) &
                     sampled(shift, static_cast<uint32_t>(t * kTile + j) / kWide),
                 [&](int i) { return t * kTile + j + i; });
        }
      },
      [&](int t) {
        if (impossible(t)) return;
        const Source source(base, t);
        const Tile map = map_of(base.vocab, t, source.aligned());
        uint32_t inside = 0;
        each_four(map, source, true,
                  [&](auto, int i, const float* x) { inside |= bracket.inside<4>(x) << i; });
        append(a, row, base, inside & sampled(shift, number_of(t)),
               [&](int i) { return t * kTile + map.at(i); });
      });
}

// What is known of the critical item: it lies behind what is taken, and is the first that is not
// open or before that.
struct Search {
  Cut taken, open;
  double below;  // mass of what is taken, roughly
  double above;  // and through the first that is not open
  double vague;  // what `below` may be wrong by, besides kShallowSlack
  int64_t critical;
  float critical_x;

  __device__ __forceinline__ bool asks(float x, int64_t v) const {
    return !taken.admits(x, v) && open.admits(x, v);
  }
  __device__ __forceinline__ void take(float x, int64_t v, double through) {
    taken = Cut::through(x, v);
    below = through;
  }
  __device__ __forceinline__ void leave(float x, int64_t v, double through) {
    open = Cut::before(x, v);
    above = through;
    critical = v;
    critical_x = x;
  }
};

// Whether a mass, roughly known, is clear of the capacity; where it is not its canonical sum
// decides.
__device__ __forceinline__ bool is_clear(const RowState& r, const Search& search, double mass) {
  return fabs(mass - r.bound) > mass * kShallowSlack + search.vague;
}

// Whether the mass through an element, which is roughly `through`, fits the capacity; moves the
// search to that side of it. For a whole block.
__device__ __forceinline__ bool try_element(const Kad& a, int64_t row, float x, int64_t v,
                                            double through, Search* search, float* weights,
                                            double* shared) {
  const RowState& r = a.s.state(row);
  if (!is_clear(r, *search, through))
    through = sum_here(a, row, 0, before(Cut::through(x, v)), a.base_rule_slot(), weights, shared);
  const bool fits = through <= r.bound;
  if (fits)
    search->take(x, v, through);
  else
    search->leave(x, v, through);
  return fits;
}

// Bisects the search over the `count` elements of the list; returns how many are still in question.
// Of a list of all that is in question (shift 0): none. Of a sample, whose sums tell roughly what
// the row's are: few, between two elements that nobody has tried. For a whole block.
__device__ __forceinline__ int bisect_list(const Kad& a, int64_t row, int count, int shift,
                                           Search* search, float* weights, double* shared) {
  constexpr uint32_t kMostTries = 24;  // of a sample
  static_assert(kListed <= 32 * kThreads && kListed <= kTile, "a bit and a weight each");
  TTA_SHARED_ARRAY(float, x, kListed);
  TTA_SHARED_ARRAY(int32_t, id, kListed);
  TTA_SHARED(int, pivot);
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot(), me = static_cast<int>(threadIdx.x);
  const float inv_temperature = r.slot[slot].inv_temperature;
  uint32_t left = 0;   // of this thread's elements: bit k is number me + k kThreads
  uint32_t tried = 0;  // of a sample: too close to the capacity
  double sum = 0.0;
  const auto weigh = [&](uint32_t bits) {
    for (; bits; bits &= bits - 1) {
      const int i = me + (__ffs(static_cast<int>(bits)) - 1) * kThreads;
      const double w = canonical_weight(a.s, row, slot, inv_temperature, x[i], id[i]);
      weights[i] = static_cast<float>(w);
      sum += w;
    }
  };
  for (int i = me; i < count; i += kThreads) {
    x[i] = a.s.list_x(row)[i];
    id[i] = a.s.list_id(row)[i];
    left |= 1u << (i / kThreads);
  }
  weigh(left);
  double each = 1.0, margin = 0.0;
  int enough = 0;
  if (shift) {
    const double mass = search->above - search->below, all = block_reduce(sum, Sum());
    const double deviation = kTrust * 0.5 * sqrt(static_cast<double>(count));
    each = all > 0.0 ? mass / all : 0.0;
    margin = deviation * mass / static_cast<double>(count);
    const int room = kListed * 5 / 8 >> shift;
    enough = static_cast<int>(2.5 * deviation);
    enough = enough > room ? enough : room;
  }
  bool moved = false;
#pragma unroll 1
  for (uint32_t tries = 0;; ++tries) {
    const int here = __popc(left & ~tried), earlier = block_scan(here);
    const int all = block_reduce(here, Sum());
    if (all <= enough || (shift && moved && tries >= kMostTries)) return all;
    // Any of them: lists have an order of their own, with which a fixed choice may be in step.
    int rank = static_cast<int>(__umulhi(static_cast<uint32_t>(all), (tries + 1u) * 0x9e3779b1u)) -
               earlier;
    if (rank >= 0 && rank < here) {
      uint32_t rest = left & ~tried;
      for (; rank > 0; --rank) rest &= rest - 1;
      pivot = me + (__ffs(static_cast<int>(rest)) - 1) * kThreads;
    }
    __syncthreads();
    const int at = pivot;
    const uint32_t mine = at % kThreads == me ? 1u << (at / kThreads) : 0u;
    const float pivot_x = x[at];
    const int32_t pivot_id = id[at];
    const Cut cut = Cut::before(pivot_x, pivot_id);
    uint32_t lower = mine;  // through the pivot
    sum = mine ? static_cast<double>(weights[at]) : 0.0;
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int bit = __ffs(static_cast<int>(rest)) - 1, i = me + bit * kThreads;
      if (!cut.admits(x[i], id[i])) continue;
      lower |= 1u << bit;
      sum += static_cast<double>(weights[i]);
    }
    const double through = search->below + each * block_reduce(sum, Sum());
    bool fits = through <= r.bound;
    if (shift) {
      const bool last = !moved && tries >= kMostTries;
      if (!last && fabs(through - r.bound) <= margin) {
        tried |= mine;
        continue;
      }
      moved = true;
      if (fits)
        search->take(pivot_x, pivot_id, through);
      else
        search->leave(pivot_x, pivot_id, through);
    } else {
      const bool clear = is_clear(r, *search, through);
      fits = try_element(a, row, pivot_x, pivot_id, through, search, weights, shared);
      if (!clear) weigh(left);  // the sum's weights took their place
    }
    left &= fits ? ~lower : lower & ~mine;
  }
}

// Masses of what is behind `taken`.
struct PartMasses {
  double low;      // before `low`
  double between;  // from there on before `high`
};

// One reading of a row: the masses of its parts, roughly, and every 2^shift-th element between
// `low` and `high` in the list. For a whole block.
__device__ __forceinline__ PartMasses part_row(const Kad& a, int64_t row, const Cut& taken,
                                               const Cut& low, const Cut& high, int shift) {
  __syncthreads();  // every thread has read what was listed before
  if (threadIdx.x == 0) a.s.state(row).bracket.listed = 0;
  __syncthreads();
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  const Row base_row = a.base_row(row);
  PartMasses found = {0.0, 0.0};
#pragma unroll 1
  for (int t = 0; t < a.s.tiles; ++t) {
    const float max = a.s.tile_max(row, 0)[t];
    const TileTest nothing(before(taken), t, max), lower(before(low), t, max),
        inner(before(high), t, max);
    if (nothing.uniform && nothing.all) continue;
    const Source base(base_row, t);
    const Tile map = map_of(a.base.vocab, t, base.aligned());
    uint32_t listed = 0;
    each_four(map, base, !nothing.parted && !lower.parted && !inner.parted,
              [&](auto read, int i, const float* x) {
                constexpr bool kPlain = decltype(read)::kPlain;
                bool out[4], in_low[4], in[4];
                nothing.four<kPlain>(x, map, i, out);
                lower.four<kPlain>(x, map, i, in_low);
                inner.four<kPlain>(x, map, i, in);
                bool any = false;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  in[k] = in[k] && !out[k];
                  any |= in[k];
                }
                if (!any) return;
                float w[4], sum = 0.0f, low_sum = 0.0f;
                weigh_four(x, p.max, p.inv_temperature, w);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                  sum += in[k] ? w[k] : 0.0f;
                  low_sum += in[k] && in_low[k] ? w[k] : 0.0f;
                  if (in[k] && !in_low[k]) listed |= 1u << (i + k);
                }
                found.between += static_cast<double>(sum - low_sum);
                found.low += static_cast<double>(low_sum);
              });
    append(a, row, base_row, listed & sampled(shift, number_of(t)),
           [&](int i) { return t * kTile + map.at(i); });
  }
  found.low = block_reduce(found.low, Sum());
  found.between = block_reduce(found.between, Sum());
  return found;
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, float* weights,
                                                double* shared) {
  const RowState& r = a.s.state(row);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  // Impossible tokens weigh nothing and are in no list.
  Search search = {Cut::through(-kInfinity, kNoLimit - 1),
                   Cut::all(),
                   r.bracket.below,
                   r.bracket.above,
                   r.bracket.vague,
                   -1,
                   kInfinity};
  uint32_t count = r.bracket.listed;
  int shift = r.bracket.shift;
  if (count > kListed || shift) {  // the row is to be read again: the bracket's ends as logits
    const BracketTest bracket(r, p);
    const auto place = [&](float x) { return band_place(depth_of(x, p)); };
    search.taken = up_to_last(p.max, [&](float x) { return place(x) > bracket.deep; });
    search.open = up_to_last(p.max, [&](float x) { return place(x) >= bracket.shallow; });
  }
  for (;;) {
    if (count > kListed && shift == 0) shift = shift_of(count);  // any sample leads on
    const int listed = static_cast<int>(count < kListed ? count : kListed);
    Search guess = search;
    const int left = bisect_list(a, row, listed, shift, &guess, weights, shared);
    if (shift == 0) return guess;
    const int next = shift_of(static_cast<double>(left) * (1 << shift));
    const Cut low = guess.taken;
    const PartMasses part = part_row(a, row, search.taken, low, guess.open, next);
    const double through = search.below + part.low;
    bool between = true;
    if (low.x != search.taken.x || low.id != search.taken.id)
      between = try_element(a, row, low.x, low.id - 1, through, &search, weights, shared);
    if (between && guess.critical != search.critical) {
      const float x = guess.critical_x;
      const int64_t v = guess.critical;
      const double w = canonical_weight(a.s, row, a.base_rule_slot(), p.inv_temperature, x, v);
      between = !try_element(a, row, x, v, through + part.between + w, &search, weights, shared);
    }
    if (between)
      shift = next;
    else  // it is elsewhere
      part_row(a, row, search.taken, search.taken, search.open, shift);
    count = r.bracket.listed;
  }
}

// ---- stages ------------------------------------------------------------------------------------

// Op: a Kad whose seeks_cut(row) tells which rows are searched; kSingle: batch rows have one
// position.
template <class Op>
__global__ void __launch_bounds__(kThreads, 6) cut_histogram_kernel(const Op given) {
  const Op a = Op::kSingle ? single(given) : given;
  TTA_SHARED_ARRAY(uint4, counts, kCounters / 4);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  band_masses(a, row, counts);
  if (last_to_arrive(a.arrivals + row, gridDim.x)) bracket_bands(a, row);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 3) cut_collect_kernel(const Op given) {
  const Op a = Op::kSingle ? single(given) : given;
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  collect(a, row);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  const Search found = find_critical(a, row, reinterpret_cast<float*>(weights4), shared);
  if (threadIdx.x) return;
  const int64_t v = found.critical;
  const float x = found.critical_x;
  Deferral& d = a.s.state(row).deferral;
  d.critical = v;
  d.critical_x = x;
  d.cut = a.rule.critical == kInclude ? Cut::through(x, v) : Cut::before(x, v);
}

// For rules that statistics alone do not resolve.
template <class Op>
void launch_cut(const Op& a, dim3 grid, cudaStream_t stream) {
  if (a.rule.rule == kOptimal) TTA_LAUNCH((cut_distance_kernel<Op>), grid, kThreads, 0, stream, a);
  if (!a.s.with_cut) return;
  TTA_LAUNCH((cut_histogram_kernel<Op>), grid, kThreads, 0, stream, a);
  TTA_LAUNCH((cut_collect_kernel<Op>), grid, kThreads, 0, stream, a);
}

}  // namespace cuda
}  // namespace tta
