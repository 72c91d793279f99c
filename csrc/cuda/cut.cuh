// The cut of the greedy knapsack over a row: its critical item, found without sorting.
//
// 1. `cut_histogram`: the mass of 4096 bands of depth below the row's maximum, in integers, so that
//    blocks may add in any order. Bands that surely fit the capacity, and those that surely do not,
//    leave a bracket of one or two.
// 2. `cut_collect`: what lies below the bracket is added up, what lies inside is listed.
// 3. The last block bisects the list. Approximate masses answer wherever they clear the capacity by
//    more than their error bound; otherwise the canonical sum S of the candidate decides, so the
//    result is the one the definition gives.
// A list that overflows (a row of few distinct logits) is bisected over the floats and then the ids
// by S alone, in the last block: slow, exact, and rare.
//
// Passes: the base row twice, from L2 where it fits. Bytes a row: 2 s V + the bands a tile touches.
#pragma once

#include "cuda/kad.cuh"

namespace tta {
namespace cuda {

constexpr float kBandsPerNat = static_cast<float>(kBuckets) / 88.0f;  // exp(-88) is 0
constexpr double kBandUnit = 0x1p-19;  // of a band's integers: 4096 weights <= 1 fit 32 bits
// Bounds of the relative error of a band's mass: rounding to the unit, and of the exponent's
// argument near 88.
constexpr double kBandSlack = 0x1p-14;
// Of a sum of canonical weights added in another order, against S.
constexpr double kListSlack = 0x1p-17;

// Depth in bands: rises as the logit falls. -inf weighs nothing and is in no band.
__device__ __forceinline__ int band_of(float x, float max, float inv_temperature) {
  const float depth = mul_rn(mul_rn(sub_rn(max, x), inv_temperature), kBandsPerNat);
  return depth < static_cast<float>(kBuckets - 1) ? static_cast<int>(depth) : kBuckets - 1;
}

__device__ __forceinline__ float band_depth(int band) {
  return mul_rn(static_cast<float>(band), 1.0f / kBandsPerNat);
}

// One tile's share. `counts` (shared, kBuckets) is left dirty.
__device__ __forceinline__ void band_masses(const Kad& a, int64_t row, int t, uint32_t* counts) {
  const SlotNumbers p = a.s.state(row).slot[a.base_rule_slot()];
  for (int i = static_cast<int>(threadIdx.x); i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
  Tile tile;
  a.base_row(row).load(t, &tile);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (tile.x[i] == -kInfinity) continue;
    const int band = band_of(tile.x[i], p.max, p.inv_temperature);
    // Relative to the band's upper end, so that deep bands keep their digits.
    const float y = mul_rn(sub_rn(tile.x[i], p.max), p.inv_temperature);
    const float w = exp_of(fminf(add_rn(y, band_depth(band)), 0.0f));
    atomicAdd(&counts[band], static_cast<uint32_t>(mul_rn(w, 0x1p19f)));
  }
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

// One tile: the mass below the bracket, roughly, and the list of what is inside.
__device__ __forceinline__ void collect(const Kad& a, int64_t row, int t) {
  RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot();
  const SlotNumbers p = r.slot[slot];
  const int shallow = r.bracket_low, deep = r.bracket_high;
  const float m = a.s.tile_max(row, 0)[t];
  const double scale = a.s.scale(row, slot)[t];
  Tile tile;
  a.base_row(row).load(t, &tile);
  double below = 0.0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float x = tile.x[i];
    if (x == -kInfinity) continue;
    const int band = band_of(x, p.max, p.inv_temperature);
    if (band > deep) {
      below += static_cast<double>(exp_of(mul_rn(sub_rn(x, m), p.inv_temperature)));
    } else if (band >= shallow) {
      const uint32_t at = atomicAdd(&r.listed, 1u);
      if (at < kListed) {
        a.s.list_x(row)[at] = x;
        a.s.list_id(row)[at] = t * kTile + tile.at(i);
      }
    }
  }
  below = block_reduce(below, Sum());
  if (threadIdx.x == 0) a.s.mass(row, 0)[t] = below * scale;
}

struct Critical {
  int64_t id;
  float x;
};

// S(cut) <= bound, by the canonical sum. For a whole block.
__device__ __forceinline__ bool fits(const Kad& a, int64_t row, const Cut& cut, float* weights,
                                     double* shared) {
  const Query q = before(cut, a.base_rule_slot());
  return sum_here(a, row, 0, q, weights, shared) <= a.s.state(row).bound;
}

// The critical item by S alone: the smallest logit whose ties do not all fit, then the first id of
// them that does not.
__device__ __forceinline__ Critical bisect_by_sums(const Kad& a, int64_t row, float* weights,
                                                   double* shared) {
  int64_t low = ordered_bits(-kInfinity);  // fits: impossible tokens weigh nothing
  int64_t high = ordered_bits(a.s.state(row).slot[kBaseSlot].max);
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    const float x = from_ordered_bits(static_cast<int32_t>(mid));
    (fits(a, row, Cut{x, kNoLimit}, weights, shared) ? low : high) = mid;
  }
  const float x = from_ordered_bits(static_cast<int32_t>(high));
  int64_t id_low = -1, id_high = a.base.vocab - 1;
  while (id_high - id_low > 1) {
    const int64_t mid = id_low + (id_high - id_low) / 2;
    (fits(a, row, Cut::through(x, mid), weights, shared) ? id_low : id_high) = mid;
  }
  return {id_high, a.base_row(row).at(id_high)};
}

// Bisection of the list: every step leaves at least the pivot behind.
__device__ __forceinline__ Critical bisect_list(const Kad& a, int64_t row, float* weights,
                                                double* shared) {
  TTA_SHARED_ARRAY(float, x, kListed);
  TTA_SHARED_ARRAY(int32_t, id, kListed);
  TTA_SHARED(int, pivot);
  const RowState& r = a.s.state(row);
  const int slot = a.base_rule_slot(), me = static_cast<int>(threadIdx.x);
  const float inv_temperature = r.slot[slot].inv_temperature;
  const int count = static_cast<int>(r.listed);
  for (int i = me; i < count; i += kThreads) {
    x[i] = a.s.list_x(row)[i];
    id[i] = a.s.list_id(row)[i];
  }
  __syncthreads();
  double below = r.bracket_mass;
  Cut taken = Cut::none(), open = Cut::all();  // what surely fits; what is still in question
  Critical critical = {-1, kInfinity};
  for (;;) {
    int here = 0;
    for (int i = me; i < count; i += kThreads)
      here += !taken.admits(x[i], id[i]) && open.admits(x[i], id[i]);
    const int earlier = block_scan(here);
    const int left = block_reduce(here, Sum());
    if (!left) return critical;
    int rank = left / 2 - earlier;  // of the pivot among this thread's
    for (int i = me; i < count; i += kThreads)
      if (!taken.admits(x[i], id[i]) && open.admits(x[i], id[i]) && rank-- == 0) pivot = i;
    __syncthreads();
    const Cut cut = Cut::through(x[pivot], id[pivot]);
    double sum = 0.0;
    for (int i = me; i < count; i += kThreads)
      if (!taken.admits(x[i], id[i]) && cut.admits(x[i], id[i]))
        sum += canonical_weight(a.s, row, slot, inv_temperature, x[i], id[i]);
    const double through = below + block_reduce(sum, Sum());
    const double slack = through * kListSlack;
    if (through + slack <= r.bound ||
        (through - slack <= r.bound && fits(a, row, cut, weights, shared))) {
      below = through;
      taken = cut;
    } else {
      critical = {id[pivot], x[pivot]};
      open = Cut::before(x[pivot], id[pivot]);
    }
    __syncthreads();
  }
}

// For the last block after `collect`.
__device__ __forceinline__ Critical find_critical(const Kad& a, int64_t row, float* weights,
                                                  double* shared) {
  RowState& r = a.s.state(row);
  if (r.listed > kListed) return bisect_by_sums(a, row, weights, shared);
  const double below = sum_of_masses(a.s, row, 0, shared);
  if (threadIdx.x == 0) r.bracket_mass = below;
  __syncthreads();
  return bisect_list(a, row, weights, shared);
}

}  // namespace cuda
}  // namespace tta
