// The cut of the greedy knapsack over a row: its critical item, found without sorting.
//
// 1. `cut_histogram`: the mass of 4096 bands of depth below the row's maximum, in integers, so that
//    blocks may add in any order. Bands that surely fit the capacity, and those that surely do not,
//    leave a bracket of one or two, with the mass below it.
// 2. `cut_collect`: what lies inside the bracket is listed.
// 3. The last block bisects the list. Approximate masses answer wherever they clear the capacity by
//    more than their error bound; otherwise the canonical sum S of the candidate decides, so the
//    result is the one the definition gives.
// A list that overflows (thousands of logits within two bands, 4% of a nat) is replaced by a sample
// of the row, which the last block bisects by S alone, then by what lies between two neighbours of
// the sample: exact, for 10 to 35 readings of the row by that block.
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
  double below = 0.0;
  // `mass` lies in all bands from the deepest to any of `from` .. `to`.
  const auto judge = [&](double mass, int from, int to) {
    if (mass * (1.0 + kBandSlack) + kVague <= r.bound) {
      low = to;
      below = mass;
    }
    if (mass * (1.0 - kBandSlack) - kVague > r.bound) high = from > high ? from : high;
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
    r.bracket.below = below;
    r.bracket.vague = kVague + deep_sum * kBandSlack;
  }
}

// Appends every stride-th of a thread's elements of a row to its list, where there is room: bit i
// of `inside` is element id_of(i). Counts them all.
template <class IdOf>
__device__ __forceinline__ void append(const Kad& a, int64_t row, const Row& base, uint32_t inside,
                                       uint32_t stride, const IdOf& id_of) {
  if (!inside) return;
  uint32_t i = atomicAdd(&a.s.state(row).bracket.listed, static_cast<uint32_t>(__popc(inside)));
  for (; inside; inside &= inside - 1, ++i) {
    const uint32_t to = i / stride;
    if (to >= kListed) return;
    if (i % stride) continue;
    const int32_t v = id_of(__ffs(static_cast<int>(inside)) - 1);
    a.s.list_x(row)[to] = base.at(v);
    a.s.list_id(row)[to] = v;
  }
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

// Lists what this block's tiles have inside the bracket. Few elements are as likely: where a warp
// looks at eight at a time, their largest tells most eights apart.
__device__ __forceinline__ void collect(const Kad& a, int64_t row) {
  const RowState& r = a.s.state(row);
  const BracketTest bracket(r, r.slot[a.base_rule_slot()]);
  const Row base = a.base_row(row);
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
          append(a, row, base, bracket.inside<kWide>(x), 1,
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
        append(a, row, base, inside, 1, [&](int i) { return t * kTile + map.at(i); });
      });
}

// What is known of the critical item: it lies behind what is taken, and is the first that is not
// open or before that.
struct Search {
  Cut taken, open;
  double below;  // mass of what is taken, roughly
  double vague;  // what that may be wrong by, besides kShallowSlack
  int64_t critical;
  float critical_x;

  __device__ __forceinline__ bool asks(float x, int64_t v) const {
    return !taken.admits(x, v) && open.admits(x, v);
  }
};

// S(cut), the canonical sum. For a whole block.
__device__ __forceinline__ double exact_mass(const Kad& a, int64_t row, const Cut& cut,
                                             float* weights, double* shared) {
  return sum_here(a, row, 0, before(cut), a.base_rule_slot(), weights, shared);
}

// Bisects the search over the `count` elements of the list until none is in question; every step
// leaves at least the pivot behind. `complete`: the list has all that is in question, so that what
// is known of the mass below and the list's own weights answer where they are clear.
__device__ __forceinline__ void bisect_list(const Kad& a, int64_t row, int count, bool complete,
                                            Search* search, float* weights, double* shared) {
  TTA_SHARED_ARRAY(float, x, kListed);
  TTA_SHARED_ARRAY(int32_t, id, kListed);
  TTA_SHARED(int, pivot);
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot(), me = static_cast<int>(threadIdx.x);
  const float inv_temperature = r.slot[slot].inv_temperature;
  for (int i = me; i < count; i += kThreads) {
    x[i] = a.s.list_x(row)[i];
    id[i] = a.s.list_id(row)[i];
  }
  __syncthreads();
  for (;;) {
    int here = 0;
    for (int i = me; i < count; i += kThreads) here += search->asks(x[i], id[i]);
    const int earlier = block_scan(here);
    const int left = block_reduce(here, Sum());
    if (!left) return;
    int rank = left / 2 - earlier;  // of the pivot among this thread's
    for (int i = me; i < count; i += kThreads)
      if (search->asks(x[i], id[i]) && rank-- == 0) pivot = i;
    __syncthreads();
    const Cut cut = Cut::through(x[pivot], id[pivot]);
    double through = 0.0, slack = 0.0;
    if (complete) {
      double sum = 0.0;
      for (int i = me; i < count; i += kThreads)
        if (!search->taken.admits(x[i], id[i]) && cut.admits(x[i], id[i]))
          sum += canonical_weight(a.s, row, slot, inv_temperature, x[i], id[i]);
      through = search->below + block_reduce(sum, Sum());
      slack = through * kShallowSlack + search->vague;
    }
    bool fits = complete && through + slack <= r.bound;
    if (!fits && (!complete || through - slack <= r.bound)) {
      through = exact_mass(a, row, cut, weights, shared);
      fits = through <= r.bound;
    }
    if (fits) {
      search->below = through;
      search->taken = cut;
    } else {
      search->critical = id[pivot];
      search->critical_x = x[pivot];
      search->open = Cut::before(x[pivot], id[pivot]);
    }
    __syncthreads();
  }
}

// Lists every stride-th element in question; how many are. For a whole block.
__device__ __forceinline__ uint32_t list_row(const Kad& a, int64_t row, const Search& search,
                                             uint32_t stride) {
  __syncthreads();  // every thread has read what was listed before
  if (threadIdx.x == 0) a.s.state(row).bracket.listed = 0;
  __syncthreads();
  const Row base_row = a.base_row(row);
#pragma unroll 1
  for (int t = 0; t < a.s.tiles; ++t) {
    const Source base(base_row, t);
    const Tile map = map_of(a.base.vocab, t, base.aligned());
    uint32_t inside = 0;
#pragma unroll 1
    for (int i = 0; i < kPerThread; i += 4) {
      float x[4];
      ReadPart()(base, map, i, x);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (search.asks(x[k], static_cast<int64_t>(t) * kTile + map.at(i + k)))
          inside |= 1u << (i + k);
    }
    append(a, row, base_row, inside, stride, [&](int i) { return t * kTile + map.at(i); });
  }
  __syncthreads();
  return a.s.state(row).bracket.listed;
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, float* weights,
                                                double* shared) {
  // Impossible tokens weigh nothing and are in no list.
  Search search = {Cut::through(-kInfinity, kNoLimit - 1), Cut::all(), 0.0, 0.0, -1, kInfinity};
  const RowState& r = a.s.state(row);
  uint32_t count = r.bracket.listed, stride = 1;
  if (count <= kListed) {
    search.below = r.bracket.below;
    search.vague = r.bracket.vague;
  }
  for (;;) {
    if (count > kListed) {
      count = list_row(a, row, search, 1);
      stride = count / kListed + 1;
      if (stride > 1) list_row(a, row, search, stride);
    }
    const bool complete = stride == 1;
    bisect_list(a, row, static_cast<int>((count + stride - 1) / stride), complete, &search, weights,
                shared);
    if (complete) return search;
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
