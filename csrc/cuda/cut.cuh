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
// Passes: the base row twice, from L2 where it fits; where the bracket is to be divided three
// times, and a fourth one by the last block. Bytes a row: 2 s V (3 s V, 4 s V) + the bands a block
// touches.
#pragma once

#include "cuda/cut_search.cuh"
#include "cuda/distance.cuh"

namespace tta {
namespace cuda {

__device__ __forceinline__ BracketTest test_of(const RowState& r, const SlotNumbers& p) {
  const CutBracket& b = r.bracket;
  return BracketTest(p, b.low, b.high, kBuckets, b.least, b.most);
}

// Lists what this block's tiles have inside the bracket, or surveys them. Few elements are as
// likely: where a warp looks at eight at a time, their largest tells most eights apart.
__device__ __forceinline__ void collect(const Kad& a, int64_t row, uint4* counts4) {
  const RowState& r = a.s.state(row);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  const BracketTest bracket = test_of(r, p);
  if (r.bracket.dense)
    return survey(a, row, bracket, false, Fine(p, bracket.least, bracket.most), a.first_tile(),
                  a.end_tile(), counts4);
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
          append(a, row, base, bracket.inside<kWide>(x), [&](int i) { return t * kTile + j + i; });
        }
      },
      [&](int t) {
        if (impossible(t)) return;
        const Source source(base, t);
        const Tile map = map_of(base.vocab, t, source.aligned());
        uint32_t inside = 0;
        each_four(map, source, true,
                  [&](auto, int i, const float* x) { inside |= bracket.inside<4>(x) << i; });
        append(a, row, base, inside, [&](int i) { return t * kTile + map.at(i); });
      });
}

// For the last block after `collect`.
__device__ __forceinline__ Search find_critical(const Kad& a, int64_t row, uint4* counts4,
                                                double* shared) {
  RowState& r = a.s.state(row);
  float* weights = reinterpret_cast<float*>(counts4);
  const SlotNumbers p = r.slot[a.base_rule_slot()];
  BracketTest test = test_of(r, p);
  Search search = {r.bracket.below, r.bracket.vague};
  bool surveyed = r.bracket.dense, listed = !surveyed && r.bracket.listed <= kListed;
  Fine fine(p, test.least, test.most);
  while (!listed) {
    Found all;
    if (surveyed) {
      all = found_of_row(a, row);
      if (all.equal()) {
        search_equal(a, row, all, &search, weights, shared);
        return search;
      }
      const double unit = fine.unit(p.max);
      // Of weights that differ much the rounding to the unit is no part of their own.
      if (!fine.narrow) search.vague += unit * all.count;
      const Bands bands = find_bands<kFine>(
          a.s.histogram(row), search.below, 0.0, r.bound, kShallowSlack, search.vague,
          [=](int, uint64_t units) { return static_cast<double>(units) * unit; });
      search.below = bands.below;
      test = BracketTest(fine.p, bands.shallow, bands.deep, kFine, all.least, all.most);
    }
    __syncthreads();  // every thread has read what is begun anew
    if (threadIdx.x == 0) r.bracket.listed = 0;
    for (int i = static_cast<int>(threadIdx.x); !surveyed && i < kFine; i += kThreads)
      a.s.histogram(row)[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < a.s.tiles; t += kMostSpan)
      survey(a, row, test, surveyed, fine, t, t + kMostSpan < a.s.tiles ? t + kMostSpan : a.s.tiles,
             counts4);
    listed = surveyed && r.bracket.listed <= kListed;
    if (surveyed && !listed) {
      Found part = found_of_row(a, row);
      if (part.count == all.count && !part.equal()) {  // all of them are vague: a half by its sum
        const int64_t least = ordered_bits(part.least), most = ordered_bits(part.most);
        const float middle = from_ordered_bits(static_cast<int32_t>(least + (most - least) / 2));
        Sums sums = {a, row, weights, shared};
        const double sum = sums.before_cut(Cut{middle, kNoLimit}, [](int) { return true; });
        if (sum <= r.bound) {
          search.below = sum;
          part.least = next_above(middle);
        } else {
          part.most = middle;
        }
      }
      test = BracketTest(p, 0, kLastBand, kBuckets, part.least, part.most);
      fine = Fine(p, part.least, part.most);
    }
    surveyed = !surveyed;
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
__global__ void __launch_bounds__(kThreads, 5) cut_collect_kernel(const Op given) {
  const Op a = Op::kSingle ? single(given) : given;
  TTA_SHARED_ARRAY(uint4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  collect(a, row, weights4);
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  const Search found = find_critical(a, row, weights4, shared);
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
