// The cut of the greedy knapsack over a row: its critical item, found without sorting.
//
// 1. `cut_histogram`: the mass of 4096 bands of depth below the row's maximum, in integers, so that
//    blocks may add in any order. Bands that surely fit the capacity, and those that surely do not,
//    leave a bracket of one or two, 2% of a nat each, with the mass below it.
// 2. `cut_collect`: what lies inside the bracket is listed.
// 3. The last block bisects the list. Approximate masses answer wherever they clear the capacity by
//    more than their error bound; otherwise the canonical sum S of the candidate decides, so the
//    result is the one the definition gives. Of a second sum only tiles are read whose part in it
//    has changed.
// Where the bracket holds thousands of elements the second stage does not list them: it notes how
// many each tile has and between which logits, and divides the bracket into 1024 bands of its own.
// Equal elements are a matter of counting: a division tells how many fit, the tiles' numbers where
// the next one is, and only that tile is read. Of others the bands leave some dozens, which the
// last block lists in one reading of the row; it goes on dividing where even these are thousands.
//
// Thread map: a block's tiles one after another, four elements a thread at a time; of 16-bit
// elements, where a block has four, a warp each, eight elements a thread at a time.
// Passes: the base row twice, from L2 where it fits; a third time by the last block where the bands
// of a bracket are listed, and once more, most of it, where a canonical sum decides. Bytes a row:
// 2 s V (3 s V, 4 s V) + the bands a block touches.
#pragma once

#include "cuda/cut_search.cuh"
#include "cuda/distance.cuh"

namespace tta {
namespace cuda {

// Lists what this block's tiles have inside the bracket, or surveys them. Few elements are as
// likely: where a warp looks at eight at a time, their largest tells most eights apart.
__device__ __forceinline__ void collect(const Kad& a, int64_t row, uint4* counts4) {
  const CutBracket& b = a.s.state(row).bracket;
  const Between ends = {b.least, b.most};
  if (b.dense) return survey(a, row, ends, a.first_tile(), a.end_tile(), counts4);
  const Row base = a.base_row(row);
  each_tile(
      a, base, a.by_warps(base),
      [&](auto type, int t, int count) {
        if (a.s.tile_max(row, 0)[t] < ends.least) return;
#pragma unroll 4
        for (int j = lane_id() * kWide; j < count; j += 32 * kWide) {
          const uint4 wide = wide_at(base.begin(t), j);
          float x[kWide];
          max_of_wide<type.value>(wide, x);
          if (fmaxf(x[0], x[1]) < ends.least) continue;
          widen<type.value>(wide, x);
          uint32_t inside = 0;
#pragma unroll
          for (int k = 0; k < kWide; ++k)
            if (ends.holds(x[k])) inside |= 1u << k;
          append(a, row, base, inside, [&](int i) { return t * kTile + j + i; });
        }
      },
      [&](int t) { list_tile(a, row, base, t, ends); });
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, uint4* counts4,
                                                double* shared) {
  RowState& r = a.s.state(row);
  float* weights = reinterpret_cast<float*>(counts4);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  const Row base = a.base_row(row);
  Search search = {r.bracket.below, r.bracket.vague, -1, kInfinity};
  Between ends = {r.bracket.least, r.bracket.most};
  bool surveyed = r.bracket.dense, listed = !surveyed && r.bracket.listed <= kListed;
  while (!listed) {
    const Fine fine(a, p, ends);
    if (!surveyed) {
      for (int i = static_cast<int>(threadIdx.x); i < kFine; i += kThreads)
        a.s.histogram(row)[i] = 0;
#pragma unroll 1
      for (int t = 0; t < a.s.tiles; t += a.span)
        survey(a, row, ends, t, t + a.span < a.s.tiles ? t + a.span : a.s.tiles, counts4);
      __syncthreads();
    }
    const Found all = found_of_row(a, row);
    if (all.equal()) {
      search_equal(a, row, all, &search, shared);
      return search;
    }
    const double unit = fine.unit(a, p.max);
    // Where weights differ much the rounding to the unit is no part of each.
    if (!fine.narrow) search.vague += unit * all.count;
    const Bands bands = find_bands<kFine>(
        a.s.histogram(row), search.below, 0.0, r.bound, shallow_slack(a), search.vague,
        [=](int, uint64_t units) { return static_cast<double>(units) * unit; });
    search.below = bands.below;
    ends = between_bands(fine.p, bands.shallow, bands.deep, kFine);
    ends = {fmaxf(ends.least, all.least), fminf(ends.most, all.most)};
    if (threadIdx.x == 0) r.bracket.listed = 0;
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < a.s.tiles; ++t) list_tile(a, row, base, t, ends);
    __syncthreads();
    surveyed = false;
    listed = r.bracket.listed <= kListed;
    if (listed || r.bracket.listed < static_cast<uint32_t>(all.count)) continue;
    // Masses tell nothing about any of them: a half is decided by its sum.
    const int64_t low = ordered_bits(all.least), high = ordered_bits(all.most);
    const float middle = from_ordered_bits(static_cast<int32_t>(low + (high - low) / 2));
    Sums sums = {a, row, shared};
    const double sum = sums.before_cut(Cut{middle, kNoLimit}, [](int) { return true; });
    const bool fits = sum <= r.bound;
    if (fits) search.below = sum;
    ends = {fits ? next_above(middle) : all.least, fits ? all.most : middle};
  }
  search_list(a, row, static_cast<int>(r.bracket.listed), &search, weights, shared);
  return search;
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
__global__ void __launch_bounds__(kThreads, 4) cut_collect_kernel(const Op given) {
  const Op a = Op::kSingle ? single(given) : given;
  TTA_SHARED_ARRAY(uint4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  collect(a, row, weights4);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  const Search found = find_critical(a, row, weights4, shared);
  if (threadIdx.x) return;
  RowState& r = a.s.state(row);
  r.deferral.critical = found.critical;
  r.deferral.critical_x = found.critical_x;
  r.deferral.cut = found.cut(a);
  r.summed = found.summed && a.same_temperature;
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
