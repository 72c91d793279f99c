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
// Passes: the base row twice, from L2 where it fits. Bytes a row: 2 s V + the bands a block
// touches.
#pragma once

#include "cuda/kad.cuh"

namespace tta {
namespace cuda {

constexpr float kBandsPerNat = static_cast<float>(kBuckets) / 88.0f;  // exp(-88) is 0
constexpr int kMostSpan = 4;           // tiles that a block takes at most (launch.h)
constexpr double kBandUnit = 0x1p-17;  // of a band's integers: 16384 weights < 1.02 fit 32 bits
static_assert(kMostSpan * kTile * 1.02 / kBandUnit < 0x1p32, "a block's counters");
// Bounds of the error of a band's mass against the canonical weights', relative, at a depth d:
// 2^-18 for the rounding to the unit, 2^-20 for polynomials, 5 d 2^-24 for the exponents' arguments
// on both sides. With the canonical sum's own 38 additions, up to a depth of 24, and of any.
constexpr double kShallowSlack = 0x1p-16, kBandSlack = 0x1p-14;
constexpr int kShallowBands = kBuckets * 24 / 88;

constexpr int kLastBand = kBuckets - 1;  // everything from there on
constexpr float kBandZero = 0x1.8p23f;   // floats around it are the integers
constexpr float kLastPlace = std::numeric_limits<float>::max();  // of what weighs anything

__device__ __forceinline__ float depth_of(float x, const SlotNumbers& p) {
  return mul_rn(sub_rn(p.max, x), p.inv_temperature);
}
// kBandZero + the nearest band; rises as the logit falls, beyond the last band too.
__device__ __forceinline__ float band_place(float depth) {
  return fma_rn(depth, kBandsPerNat, kBandZero);
}
__device__ __forceinline__ uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ __forceinline__ float band_depth(int band) {
  return mul_rn(static_cast<float>(band), 1.0f / kBandsPerNat);
}

// Adds a tile's weights to `counts` (shared, kBuckets); true: this thread saw the last band.
__device__ __forceinline__ bool count_tile(const Row& row, int t, const SlotNumbers& p,
                                           uint32_t* counts) {
  const Source base(row, t);
  const Tile map = map_of(row.vocab, t, base.aligned());
  bool last = false;  // this thread saw the last band
  each_four(map, base, true, [&](auto, int, const float* x) {
    float depth[4], place[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      depth[k] = depth_of(x[k], p);
      place[k] = band_place(depth[k]);
    }
    const auto count = [&](int k) {
      // exp(r) relative to the band's middle, |r| < 0.011: 1 + r + r^2 / 2, to 3e-7. In units,
      // beside 2^23, whose low bits are then the integer.
      const float r = fma_rn(sub_rn(place[k], kBandZero), 1.0f / kBandsPerNat, -depth[k]);
      const float units = fma_rn(fma_rn(r, 0x1p16f, 0x1p17f), r, 0x1p17f + 0x1p23f);
      atomicAdd(&counts[float_bits(place[k]) - float_bits(kBandZero)],
                float_bits(units) - float_bits(0x1p23f));
    };
    constexpr float kEnd = kBandZero + kLastBand;
    if (fmaxf(fmaxf(place[0], place[1]), fmaxf(place[2], place[3])) < kEnd) {
#pragma unroll
      for (int k = 0; k < 4; ++k) count(k);
      return;
    }
    for (int k = 0; k < 4; ++k) {
      if (place[k] < kEnd)
        count(k);
      else
        last = last || depth[k] < kInfinity;
    }
  });
  return last;
}

// The share of this block's tiles.
__device__ __forceinline__ void band_masses(const Kad& a, int64_t row, uint4* counts4) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(counts4);
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  const Row base = a.base_row(row);
  const int me = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = me; i < kBuckets / 4; i += kThreads) counts4[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  bool last = false;
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t) last = count_tile(base, t, p, counts) || last;
  // All that is asked of the last band is whether it is empty.
  if (last) atomicAdd(&counts[kLastBand], 1u);
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

// Brackets the critical item by the bands' masses, deepest first. Leaves the mass below the bracket
// in RowState::mass, and in `kept` what it may be wrong by, besides kShallowSlack of all sums of
// it. For a whole block.
__device__ __forceinline__ void bracket_bands(const Kad& a, int64_t row) {
  constexpr int kEach = kBuckets / kThreads;
  RowState& r = a.s.state(row);
  const uint64_t* total = a.s.histogram(row);
  // This thread's bands, from the deepest thread 0 on.
  const int first = kBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;
  const auto mass_of = [&](int band) {
    return static_cast<double>(total[band]) *
           (static_cast<double>(exp_of(-band_depth(band))) * kBandUnit);
  };
  double sum = 0.0, deep_sum = 0.0;
  bool tail = false;
#pragma unroll 8
  for (int k = 0; k < kEach; ++k) {
    const int band = first - k;
    const double mass = mass_of(band);
    sum += mass;
    deep_sum += band >= kShallowBands ? mass : 0.0;
    tail = tail || (band >= kBuckets * 86 / 88 && total[band] != 0);
  }
  const double scanned = block_scan(sum);
  // Beyond a depth of 86, where weights near 2^-126 become 0, canonical ones differ from these: by
  // less than 2^20 exp(-86).
  const double vague = __syncthreads_or(tail) ? 1e-31 : 0.0;
  int low = kBuckets, high = -1;
  double mass = scanned, below = 0.0;
#pragma unroll 8
  for (int k = 0; k < kEach; ++k) {
    const int band = first - k;
    mass += mass_of(band);
    if (mass * (1.0 + kBandSlack) + vague <= r.bound) {
      low = band;
      below = mass;
    }
    if (mass * (1.0 - kBandSlack) - vague > r.bound) high = band > high ? band : high;
  }
  low = block_reduce(low, Min());      // the shallowest band that surely fits
  high = block_reduce(high, Max());    // the deepest one that surely does not
  below = block_reduce(below, Max());  // through `low`
  deep_sum = block_reduce(deep_sum, Sum());
  if (threadIdx.x == 0) {
    r.bracket_low = high < 0 ? 0 : high;                        // shallow end of the bracket
    r.bracket_high = low >= kBuckets ? kBuckets - 1 : low - 1;  // deep end
    r.listed = 0;
    r.mass = below;
    r.kept = vague + deep_sum * kBandSlack;
  }
}

// Appends every stride-th of a thread's elements of a tile to the row's list, where there is room:
// bit i of `inside` is element i. Counts them all.
__device__ __forceinline__ void append(const Kad& a, int64_t row, int t, const Row& base,
                                       const Tile& map, uint32_t inside, uint32_t stride) {
  if (!inside) return;
  uint32_t i = atomicAdd(&a.s.state(row).listed, static_cast<uint32_t>(__popc(inside)));
  for (; inside; inside &= inside - 1, ++i) {
    const uint32_t to = i / stride;
    if (to >= kListed) return;
    if (i % stride) continue;
    const int32_t v = t * kTile + map.at(__ffs(static_cast<int>(inside)) - 1);
    a.s.list_x(row)[to] = base.at(v);
    a.s.list_id(row)[to] = v;
  }
}

// Lists what this block's tiles have inside the bracket.
__device__ __forceinline__ void collect(const Kad& a, int64_t row) {
  const RowState& r = a.s.state(row);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  const bool endless = r.bracket_high == kLastBand;
  const float shallow = kBandZero + static_cast<float>(r.bracket_low);
  const float deep = endless ? kLastPlace : kBandZero + static_cast<float>(r.bracket_high);
  // The logits between which all of that lies: the bracket and half a band on either side.
  const auto logit_of = [&](int band) {
    const double depth = static_cast<double>(band) * (1.0 / static_cast<double>(kBandsPerNat));
    return static_cast<float>(static_cast<double>(p.max) -
                              depth / static_cast<double>(p.inv_temperature));
  };
  const float most = r.bracket_low > 0 ? logit_of(r.bracket_low - 1) : kInfinity;
  const float least = endless ? -kInfinity : logit_of(r.bracket_high + 1);
  const Row base_row = a.base_row(row);
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t) {
    if (a.s.tile_max(row, 0)[t] < least) continue;
    const Source base(base_row, t);
    const Tile map = map_of(a.base.vocab, t, base.aligned());
    uint32_t inside = 0;
    each_four(map, base, true, [&](auto, int i, const float* x) {
      bool any = false;
#pragma unroll
      for (int k = 0; k < 4; ++k) any |= (x[k] >= least) & (x[k] <= most);
      if (!any) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float place = band_place(depth_of(x[k], p));
        if (place >= shallow && place <= deep) inside |= 1u << (i + k);
      }
    });
    append(a, row, t, base_row, map, inside, 1);
  }
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
  if (threadIdx.x == 0) a.s.state(row).listed = 0;
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
    append(a, row, t, base_row, map, inside, stride);
  }
  __syncthreads();
  return a.s.state(row).listed;
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, float* weights,
                                                double* shared) {
  // Impossible tokens weigh nothing and are in no list.
  Search search = {Cut::through(-kInfinity, kNoLimit - 1), Cut::all(), 0.0, 0.0, -1, kInfinity};
  const RowState& r = a.s.state(row);
  uint32_t count = r.listed, stride = 1;
  if (count <= kListed) {
    search.below = r.mass;
    search.vague = r.kept;
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

// Op: a Kad whose seeks_cut(row) tells which rows are searched.
template <class Op>
__global__ void __launch_bounds__(kThreads, 6) cut_histogram_kernel(const Op a) {
  TTA_SHARED_ARRAY(uint4, counts, kBuckets / 4);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  band_masses(a, row, counts);
  if (last_to_arrive(a.arrivals + row, gridDim.x)) bracket_bands(a, row);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 3) cut_collect_kernel(const Op a) {
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

template <class Op>
void launch_cut(const Op& a, dim3 grid, cudaStream_t stream) {
  TTA_LAUNCH((cut_histogram_kernel<Op>), grid, kThreads, 0, stream, a);
  TTA_LAUNCH((cut_collect_kernel<Op>), grid, kThreads, 0, stream, a);
}

}  // namespace cuda
}  // namespace tta
