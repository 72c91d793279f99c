// The knapsack's histograms: the mass of bands of depth below a maximum, and the bands that may
// hold the critical item. cut.cuh says what for.
#pragma once

#include "cuda/masked_sum.cuh"

namespace tta {
namespace cuda {

constexpr float kBandsPerNat = static_cast<float>(kBuckets) / 88.0f;  // exp(-88) is 0
// Of a band's integers, times the tiles of a block: 4096 weights < 1.1 of each fit 32 bits.
constexpr double kBandUnit = 0x1p-19;
static_assert(kTile * 1.1 / kBandUnit < 0x1p32, "a block's counters");
// Bounds of the error of a band's mass against the canonical weights', relative: at a depth d 5 d
// 2^-24 for the exponents' arguments on both sides, and besides 2^-20 for polynomials, 38 2^-24 for
// the canonical sum's own additions, and for the rounding to the unit a half of it over a weight of
// .95 or more. kBandSlack is more than all of this.
constexpr double kDepthSlack = 5 * 0x1p-24, kBandSlack = 0x1p-14;
__device__ __forceinline__ double band_unit(const Kad& a) { return kBandUnit * a.span; }
__device__ __forceinline__ double shallow_slack(const Kad& a) {
  return (16 + 38) * 0x1p-24 + 0x1.1p-20 * a.span;
}
// A weight of 1 as bits of a float that are the integer: of a unit of 2^-149.
__device__ __forceinline__ float one_of(const Kad& a) {
  return device::scalar_from_bits((1u << 19) >> (a.span / 2));
}
// And absolute: beyond a depth of 86, where weights near 2^-126 become 0 and, in the end, none is
// counted, canonical masses differ from the bands' by less than 2^20 exp(-86).
constexpr double kVague = 1e-31;

constexpr int kCounters = kBuckets + 32;
constexpr int kFine = 1024;  // bands of a bracket, in the place of the row's
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

__device__ __forceinline__ float logit_of(const SlotNumbers& p, int band) {
  const double depth = static_cast<double>(band) * (1.0 / static_cast<double>(kBandsPerNat));
  return static_cast<float>(static_cast<double>(p.max) -
                            depth / static_cast<double>(p.inv_temperature));
}

// Adds some weights to `counts` (shared, kCounters); those beyond the last band (kVague) to
// counters that nobody reads, one for each lane of the warps: rows may have many impossible tokens.
template <int kCount>
__device__ __forceinline__ void count_bands(const float* x, const SlotNumbers& p, float one,
                                            uint32_t* counts) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float depth = depth_of(x[k], p);
    const float place = fminf(band_place(depth), place_of(kBuckets + lane_id()));
    // exp(r) relative to the band's middle, |r| < 0.011: 1 + r + r^2 / 2, to 3e-7. In units of
    // 2^-149: the bits of so small a number are the integer (subnormal: nothing may flush it).
    const float r = fma_rn(sub_rn(place, kBandZero), 1.0f / (kBandsPerNat * kBandStep), -depth);
    const float units = fma_rn(fma_rn(r, 0.5f * one, one), r, one);
    atomicAdd(&counts[device::scalar_bits(place) - device::scalar_bits(kBandZero)],
              device::scalar_bits(units));
  }
}

// For a whole block: its counters set to zero, and added to those of the row.
template <int kCount>
__device__ __forceinline__ void clear_counts(uint4* counts4) {
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kCount / 4; i += kThreads)
    counts4[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
}
template <int kCount>
__device__ __forceinline__ void add_counts(const uint4* counts4, uint64_t* total) {
  __syncthreads();
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kCount / 4; i += kThreads) {
    const uint4 four = counts4[i];
    const uint32_t count[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (count[k])
        atomicAdd(reinterpret_cast<unsigned long long*>(total + i * 4 + k),
                  static_cast<unsigned long long>(count[k]));
  }
}

// The share of this block's tiles.
__device__ __forceinline__ void band_masses(const Kad& a, int64_t row, uint4* counts4) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(counts4);
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  const Row base = a.base_row(row);
  const float one = one_of(a);
  clear_counts<kCounters>(counts4);
  each_tile(
      a, base, a.by_warps(base),
      [&](auto type, int t, int count) {
#pragma unroll 2
        for (int j = lane_id() * kWide; j < count; j += 32 * kWide) {
          float x[kWide];
          widen<type.value>(wide_at(base.begin(t), j), x);
          count_bands<kWide>(x, p, one, counts);
        }
      },
      [&](int t) {
        const Source source(base, t);
        const Tile map = map_of(base.vocab, t, source.aligned());
        each_four(map, source, true,
                  [&](auto, int, const float* x) { count_bands<4>(x, p, one, counts); });
      });
  add_counts<kBuckets>(counts4, a.s.histogram(row));
}

// The logits that are in question.
struct Between {
  float least, most;

  __device__ __forceinline__ bool holds(float x) const { return (x >= least) & (x <= most); }
};

// Those in bands `shallow` .. `deep` of so many below a maximum. For a whole block.
__device__ __forceinline__ Between between_bands(const SlotNumbers& p, int shallow, int deep,
                                                 int bands) {
  const float first = place_of(shallow);
  const float last = deep < bands - 1 ? place_of(deep) : bands == kBuckets ? kLastPlace : kInfinity;
  const auto place = [&](float x) { return band_place(depth_of(x, p)); };
  const Cut deeper = up_to_last(deep < bands - 1 ? logit_of(p, deep + 1) : -kInfinity,
                                logit_of(p, deep), p.max, [&](float x) { return place(x) > last; });
  const Cut through =
      up_to_last(logit_of(p, shallow), shallow > 0 ? logit_of(p, shallow - 1) : p.max, p.max,
                 [&](float x) { return place(x) >= first; });
  return {next_above(deeper.x), fminf(through.x, p.max)};
}

// The bands that may hold the critical item, and the masses before and through them, roughly.
struct Bands {
  int shallow, deep;
  double below, above;
  double moment;  // of this thread's share of those that are not shallower: mass times band
};

// Bands 0 .. kCount - 1 by their masses, deepest first; mass_of(band, units) is one's, and what is
// deeper than all of them weighs `below`. Sums are trusted to `slack` of themselves and `vague`.
// For a whole block.
template <int kCount, class MassOf>
__device__ __forceinline__ Bands find_bands(const uint64_t* total, double below, double above,
                                            double bound, double slack, double vague,
                                            const MassOf& mass_of) {
  constexpr int kEach = kCount / kThreads, kAtOnce = 8;
  // This thread's bands, from the deepest thread 0 on.
  const int first = kCount - 1 - static_cast<int>(threadIdx.x) * kEach;
  double sum = 0.0, moment = 0.0;
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
      moment += mass * (band - k);
    }
  }
  double mass = below + block_scan(sum);
  int low = kCount, high = -1;
  // `mass` lies in all bands from the deepest to any of `from` .. `to`.
  const auto judge = [&](int from, int to) {
    if (mass * (1.0 + slack) + vague <= bound) {
      low = to;
      below = mass;
    }
    if (mass * (1.0 - slack) - vague > bound && from > high) {
      high = from;
      above = mass;
    }
  };
  if (sum == 0.0) {
    judge(first, first - kEach + 1);
  } else {
#pragma unroll kAtOnce
    for (int band = first; band > first - kEach; --band) {
      mass += mass_of(band, total[band]);
      judge(band, band);
    }
  }
  low = block_reduce(low, Min());      // the shallowest band that surely fits
  high = block_reduce(high, Max());    // the deepest one that surely does not
  below = block_reduce(below, Max());  // through `low`
  above = block_reduce(above, Min());  // through `high`
  return {high < 0 ? 0 : high, low - 1, below, above, first >= high ? moment : 0.0};
}

// Leaves CutBracket to the next stage, and whether many elements lie above it; where thousands lie
// within it, the row's histogram is cleared for their bands. For a whole block.
__device__ __forceinline__ void bracket_bands(const Kad& a, int64_t row) {
  RowState& r = a.s.state(row);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  uint64_t* total = a.s.histogram(row);
  const double unit = band_unit(a);
  const Bands found = find_bands<kBuckets>(
      total, 0.0, p.z, r.bound, kBandSlack, kVague, [=](int band, uint64_t units) {
        return static_cast<double>(units) * (static_cast<double>(exp_of(-band_depth(band))) * unit);
      });
  // Bands reach half a step further.
  const double depths = (block_reduce(found.moment, Sum()) + found.above) / kBandsPerNat;
  // No element of the bracket weighs more than one of its shallowest band.
  const double most_weigh = static_cast<double>(exp_of(-band_depth(found.shallow)));
  const bool dense = found.above - found.below > kListed * most_weigh;
  const Between ends = between_bands(p, found.shallow, found.deep, kBuckets);
  // Of a band's mass, in its own units, each element is one.
  uint64_t kept = 0;
  for (int band = static_cast<int>(threadIdx.x); band < found.shallow; band += kThreads)
    kept += total[band];
  const double keeps = block_reduce(static_cast<double>(kept), Sum()) * unit;
  if (dense)
    for (int i = static_cast<int>(threadIdx.x); i < kFine; i += kThreads) total[i] = 0;
  if (threadIdx.x) return;
  r.keeps_many = keeps > static_cast<double>(kNodes * a.s.tiles);
  r.bracket = {found.below, kVague + depths * kDepthSlack, ends.least, ends.most, 0, dense};
}

}  // namespace cuda
}  // namespace tta
