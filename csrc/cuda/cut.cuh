// The cut of the greedy knapsack over a row: its critical item, found without sorting.
//
// 1. `cut_histogram`: the mass of 4096 bands of depth below the row's maximum, in integers, so that
//    blocks may add in any order. Bands that surely fit the capacity, and those that surely do not,
//    leave a bracket of one or two.
// 2. `cut_collect`: what lies below the bracket is added up, what lies inside is listed.
// 3. The last block bisects the list. Approximate masses answer wherever they clear the capacity by
//    more than their error bound; otherwise the canonical sum S of the candidate decides, so the
//    result is the one the definition gives.
// A list that overflows (thousands of logits within two bands, 4% of a nat) is replaced by a sample
// of the row, which the last block bisects by S alone, then by what lies between two neighbours of
// the sample: exact, for 10 to 35 readings of the row by that block.
//
// Passes: the base row twice, from L2 where it fits. Bytes a row: 2 s V + the bands a tile touches.
#pragma once

#include "cuda/kad.cuh"

namespace tta {
namespace cuda {

constexpr float kBandsPerNat = static_cast<float>(kBuckets) / 88.0f;  // exp(-88) is 0
constexpr double kBandUnit = 0x1p-19;  // of a band's integers: 4096 weights < 1.02 fit 32 bits
// Bounds of the relative error of a band's mass: rounding to the unit, and of the exponents'
// arguments near 88, these and the canonical ones.
constexpr double kBandSlack = 0x1p-14;
// Of a sum of canonical weights added in another order, against S.
constexpr double kListSlack = 0x1p-17;

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

// One tile's share. `counts` (shared, kBuckets) is left dirty.
__device__ __forceinline__ void band_masses(const Kad& a, int64_t row, int t, uint32_t* counts) {
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
  const Source base(a.base_row(row), t);
  const Tile map = map_of(a.base.vocab, t, base.aligned());
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
      const float units = fma_rn(fma_rn(r, 0x1p18f, 0x1p19f), r, 0x1p19f + 0x1p23f);
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
  // All that is asked of the last band is whether it is empty.
  if (last) atomicAdd(&counts[kLastBand], 1u);
  __syncthreads();
  uint64_t* total = a.s.histogram(row);
  for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += kThreads)
    if (counts[i])
      atomicAdd(reinterpret_cast<unsigned long long*>(total + i),
                static_cast<unsigned long long>(counts[i]));
}

// Brackets the critical item by the bands' masses, deepest first. For a whole block.
__device__ __forceinline__ void bracket_bands(const Kad& a, int64_t row) {
  constexpr int kEach = kBuckets / kThreads;
  RowState& r = a.s.state(row);
  const uint64_t* total = a.s.histogram(row);
  // This thread's bands, from the deepest thread 0 on.
  const int first = kBuckets - 1 - static_cast<int>(threadIdx.x) * kEach;
  double sum = 0.0;
  for (int k = 0; k < kEach; ++k) {
    const int band = first - k;
    const double unit = static_cast<double>(exp_of(-band_depth(band))) * kBandUnit;
    sum += static_cast<double>(total[band]) * unit;
  }
  const double scanned = block_scan(sum);
  // Beyond a depth of 86, where weights near 2^-126 become 0, canonical ones differ from these: by
  // less than 2^20 exp(-86).
  bool tail = false;
  for (int k = 0; k < kEach; ++k)
    tail = tail || (first - k >= kBuckets * 86 / 88 && total[first - k] != 0);
  const double vague = __syncthreads_or(tail) ? 1e-31 : 0.0;
  int low = kBuckets, high = -1;
  double mass = scanned;
  for (int k = 0; k < kEach; ++k) {
    const int band = first - k;
    const double unit = static_cast<double>(exp_of(-band_depth(band))) * kBandUnit;
    mass += static_cast<double>(total[band]) * unit;
    if (mass * (1.0 + kBandSlack) + vague <= r.bound) low = band < low ? band : low;
    if (mass * (1.0 - kBandSlack) - vague > r.bound) high = band > high ? band : high;
  }
  low = block_reduce(low, Min());    // the shallowest band that surely fits
  high = block_reduce(high, Max());  // the deepest one that surely does not
  if (threadIdx.x == 0) {
    r.bracket_low = high < 0 ? 0 : high;                        // shallow end of the bracket
    r.bracket_high = low >= kBuckets ? kBuckets - 1 : low - 1;  // deep end
    r.listed = 0;
  }
}

// Appends every stride-th of a tile's elements to the row's list, where there is room: bit i of
// `inside` is a thread's element i. Counts them all. For a whole block.
__device__ __forceinline__ void list_elements(const Kad& a, int64_t row, int t, const Tile& map,
                                              uint32_t inside, uint32_t stride) {
  TTA_SHARED(uint32_t, begin);
  const uint32_t mine = static_cast<uint32_t>(__popc(inside));
  const uint32_t earlier = block_scan(mine);
  if (threadIdx.x == kThreads - 1) begin = atomicAdd(&a.s.state(row).listed, earlier + mine);
  __syncthreads();
  const Row base = a.base_row(row);
  for (uint32_t i = begin + earlier; inside; inside &= inside - 1, ++i) {
    const uint32_t to = i / stride;
    if (to >= kListed) return;
    if (i % stride) continue;
    const int32_t v = t * kTile + map.at(__ffs(static_cast<int>(inside)) - 1);
    a.s.list_x(row)[to] = base.at(v);
    a.s.list_id(row)[to] = v;
  }
}

// One tile: the mass below the bracket, roughly, and the list of what is inside.
// A thread adds its 32 weights in float32: with the canonical sum's own 38 additions an element
// passes through at most 69 roundings, 2^-17.8 of the sum.
__device__ __forceinline__ void collect(const Kad& a, int64_t row, int t) {
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot();
  const SlotNumbers p = r.slot[slot];
  const float shallow = kBandZero + static_cast<float>(r.bracket_low);
  const float deep =
      r.bracket_high < kLastBand ? kBandZero + static_cast<float>(r.bracket_high) : kLastPlace;
  const float m = a.s.tile_max(row, 0)[t];
  double* mass = a.s.mass(row, 0) + t;
  if (band_place(depth_of(m, p)) > deep) {  // wholly below
    if (threadIdx.x == 0)
      *mass = mul_rn(static_cast<double>(a.s.tile_sum(row, slot)[t]), a.s.scale(row, slot)[t]);
    return;
  }
  const Source base(a.base_row(row), t);
  const Tile map = map_of(a.base.vocab, t, base.aligned());
  float below = 0.0f;
  uint32_t inside = 0;
  each_four(map, base, true, [&](auto, int, const float* x) {
    float w[4];
    weigh_four(x, m, p.inv_temperature, w);
    inside >>= 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float place = band_place(depth_of(x[k], p));
      below = add_rn(below, place > deep ? w[k] : 0.0f);
      inside |= place >= shallow && place <= deep ? 1u << (28 + k) : 0u;
    }
  });
  list_elements(a, row, t, map, inside, 1);
  const double sum = block_reduce(static_cast<double>(below), Sum());
  if (threadIdx.x == 0) *mass = mul_rn(sum, a.s.scale(row, slot)[t]);
}

// What is known of the critical item: it lies behind what is taken, and is the first that is not
// open or before that.
struct Search {
  Cut taken, open;
  double below;  // mass of what is taken, roughly
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
      slack = through * kListSlack;
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
#pragma unroll 1
  for (int t = 0; t < a.s.tiles; ++t) {
    const Source base(a.base_row(row), t);
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
    list_elements(a, row, t, map, inside, stride);
  }
  __syncthreads();
  return a.s.state(row).listed;
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, float* weights,
                                                double* shared) {
  // Impossible tokens weigh nothing and are in no list.
  Search search = {Cut::through(-kInfinity, kNoLimit - 1), Cut::all(), 0.0, -1, kInfinity};
  uint32_t count = a.s.state(row).listed, stride = 1;
  if (count <= kListed) search.below = sum_of_masses(a.s, row, 0, shared);
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
  TTA_SHARED_ARRAY(uint32_t, counts, kBuckets);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  band_masses(a, row, a.tile(), counts);
  if (last_to_arrive(a.arrivals + row, gridDim.x)) bracket_bands(a, row);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 3) cut_collect_kernel(const Op a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  collect(a, row, a.tile());
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
