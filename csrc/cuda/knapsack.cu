// greedy_knapsack: the 0-1 knapsack by falling density profit / weight, for any profits and
// weights, without sorting (csrc/cpu/knapsack.cpp is the definition).
//
// Problem: B rows of V items. S(v), the canonical float64 sum of the weights ordered at or before
// v, decides what is taken; the critical item is the first whose S exceeds the capacity.
// Thread map: in every stage a block of kThreads a tile of 4096 items, four neighbours a thread at
// a time (single ones, kThreads apart, where a row is not aligned to 16 bytes); the block that
// arrives last at a row decides for the row.
//
// Stages, one launch each; blocks whose row needs nothing return at once.
//   1 survey    validity, the range of the keys
//   2 tally     weights of 4096 bands of keys, in integers; the bands around the capacity bracket
//               the critical item (rows of one tile skip this)
//   3 list      up to 4096 items of the bracket are listed, usually a few hundred; the last block
//               tallies the list again until a few are left, then tries them one by one
//   4 select    `selected`, used and value
// A list that overflows (thousands of equal densities among others, or densities much closer to one
// another than their range tells) is first shortened by the last block, which tallies the row
// again: a factor of up to 4096 a pass, ties by id.
//
// A density is a float64 quotient, but rows are read in float32. The key of an item is the float32
// quotient: it never falls where the density rises, and items of one density have one key, as
// different quotients are at least 2^-48 apart. Stages 3 and 4 do not divide: with fl(c w) rounded
// to nearest, p > fl(c w) implies p / w > c, and p < fl(c w) implies p / w < c, so that two
// products an item answer for all but those next to the cut; only these are divided in float64.
//
// Integers count units of 2^-37 capacities or less (more below 2^-108, where factors end). They
// answer where they clear the capacity by more than their error (Items::slack); otherwise S itself
// is summed, by the last block, a warp a tile.
//
// Bytes a row: 8 V from DRAM and V written; 8 V from L2, where it fits, in each later stage.
// Determinism: integer sums have no order, S has the canonical one, and the critical item is
// unique; the order in which items are listed changes nothing.

#include "cuda/knapsack_critical.cuh"

namespace tta {
namespace cuda {
namespace {

constexpr int kBlocks = 512 / kThreads;  // of one multiprocessor, at least

struct Or {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// Tiles left to right, known to every thread; of_tile(t) is the sum of tile t.
template <class Read>
__device__ __forceinline__ double sum_of_tiles(int tiles, const Read& of_tile) {
  TTA_SHARED_ARRAY(double, sums, kMaxTiles);
  for (int t = static_cast<int>(threadIdx.x); t < tiles; t += kThreads) sums[t] = of_tile(t);
  __syncthreads();
  double total = 0.0;
  for (int t = 0; t < tiles; ++t) total = add_rn(total, sums[t]);
  __syncthreads();
  return total;
}

// ---- stages ------------------------------------------------------------------------------------

// Of unsigned numbers, known to every thread; `low` the smallest, the others the largest.
__device__ __forceinline__ void block_extremes(uint32_t* largest, uint32_t* low, uint32_t* high) {
  TTA_SHARED_ARRAY(uint32_t, part, 3 * kWarps);
  const uint32_t warp[3] = {__reduce_max_sync(kFullWarp, *largest),
                            __reduce_min_sync(kFullWarp, *low),
                            __reduce_max_sync(kFullWarp, *high)};
  if (lane_id() == 0)
#pragma unroll
    for (int k = 0; k < 3; ++k) part[3 * warp_id() + k] = warp[k];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    *largest = Max()(*largest, part[3 * w]);
    *low = Min()(*low, part[3 * w + 1]);
    *high = Max()(*high, part[3 * w + 2]);
  }
}

// What is wrong with a tile's items, and their largest key less 1, infinite and undefined quotients
// (of weight 0, among others) left out.
__device__ __forceinline__ uint32_t look_closely(const Items& items, int t, uint32_t* high) {
  uint32_t flags = 0, largest = 0;
  items.fours<1>(t, [&](int, int, const float* p, const float* w) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (!(p[c] >= 0.0f && p[c] < kInfinity)) flags |= kBadProfit;
      if (!(w[c] >= 0.0f && w[c] < kInfinity)) flags |= kBadWeight;
      const uint32_t key = device::scalar_bits(div_rn(p[c], w[c])) - 1;
      largest = Max()(largest, key < kTopKey - 1 ? key : 0u);
    }
  });
  *high = block_reduce(largest, Max());
  return block_reduce(flags, Or());
}

__device__ __forceinline__ void range_of_codes(const Items& items, int t, uint64_t* lowest,
                                               uint64_t* highest) {
  items.each(t, [&](const Place& place, float) {
    *lowest = Min()(*lowest, place.code);
    *highest = Max()(*highest, place.code);
  });
  *lowest = block_reduce(*lowest, Min());
  *highest = block_reduce(*highest, Max());
}

// The factors of the units: powers of two that turn the limit into less than 2^kCoarseBits and
// what is left after the integer part into an integer below 2^(kFineBits - 1).
__device__ __forceinline__ void set_units(double capacity, SackState* r) {
  const uint32_t bits = device::scalar_bits(r->limit);
  const int above = 32 - __clz(static_cast<int>(bits));  // the highest one's place
  const int exponent = above > 23 ? static_cast<int>(bits >> 23) - 126 : above - 149;
  // Below 2^-108 the first factor would exceed the range of float32.
  const int missing = exponent < kCoarseBits - 127 ? kCoarseBits - 127 - exponent : 0;
  const int coarse = kCoarseBits - exponent - missing;
  const int fine = missing <= kCoarseBits ? kFineBits : missing - 1;
  r->coarse = device::scalar_from_bits(static_cast<uint32_t>(coarse + 127) << 23);
  r->fine = device::scalar_from_bits(static_cast<uint32_t>(fine + 127) << 23);
  r->whole = static_cast<uint64_t>(
      mul_rn(mul_rn(capacity, static_cast<double>(r->coarse)), static_cast<double>(r->fine)));
}

__global__ void __launch_bounds__(kThreads, kBlocks) knapsack_survey_kernel(const Sack a) {
  const int64_t row = a.row();
  const int t = a.tile();
  const int i = static_cast<int>(threadIdx.x);
  const Items items(a, row);
  TileNote* notes = a.notes(row);
  if (a.tiles > 1) {
    uint64_t* tallies = a.tallies(row);
    for (int k = t * kThreads + i; k < kBands; k += a.tiles * kThreads) tallies[k] = 0;
  }
  // The bits of negative, infinite and undefined numbers are kTopKey or more: of a weight, or of a
  // quotient because of its profit. One less makes a key of 0 the largest, no part of the range.
  uint32_t largest = 0, low = ~0u, high = 0;
  items.fours<4>(t, [&](int, int, const float* p, const float* w) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t key = device::scalar_bits(div_rn(p[c], w[c]));
      largest = Max()(largest, device::scalar_bits(w[c]));
      high = Max()(high, key);
      low = Min()(low, key - 1);
    }
  });
  block_extremes(&largest, &low, &high);
  uint32_t flags = 0;
  if (largest >= kTopKey || high >= kTopKey)
    flags = look_closely(items, t, &high);
  else if (high)
    --high;
  uint64_t lowest = ~uint64_t{0}, highest = 0;
  if (high > low)
    flags |= kMixed;
  else
    range_of_codes(items, t, &lowest, &highest);
  if (i == 0) {
    TileNote& note = notes[t];
    note.lowest = lowest;
    note.highest = highest;
    note.low = low;
    note.high = high;
    note.flags = flags;
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  for (int k = i; k < a.tiles; k += kThreads) {
    lowest = Min()(lowest, notes[k].lowest);
    highest = Max()(highest, notes[k].highest);
    low = Min()(low, notes[k].low);
    high = Max()(high, notes[k].high);
    flags |= notes[k].flags;
  }
  lowest = block_reduce(lowest, Min());
  highest = block_reduce(highest, Max());
  low = block_reduce(low, Min());
  high = block_reduce(high, Max());
  flags = block_reduce(flags, Or());
  if (i) return;
  SackState& r = a.state(row);
  const bool bad = (flags & (kBadProfit | kBadWeight)) != 0;
  if (bad) report(a.invalid, row, flags & kBadProfit ? 0 : 1);
  r.limit = items.limit;
  // No sum of 2^20 float32 numbers reaches 2^148.
  const bool all = items.limit == 0.0f || items.capacity >= 0x1p148;
  r.status = bad || !(items.capacity >= 0.0) ? kInvalid : all ? kTakesAll : kSeeksCritical;
  r.critical = {highest, -1};
  r.equal = !(flags & kMixed) && lowest == highest;
  const uint32_t top = r.equal ? kIdKeys : high + 1;
  const uint32_t range = r.equal ? static_cast<uint32_t>(items.n) - 1 : high > low ? high - low : 0;
  // The last band is for what lies below the range: worthless items.
  const int bits = 32 - __clz(static_cast<int>(range));
  r.shift = bits < kBandBits ? 0 : bits - kBandBits;
  if (range >> r.shift > kBands - 2) ++r.shift;
  r.top = a.tiles > 1 ? top : kTopKey;
  r.bottom = 0;
  r.before = 0;
  r.listed = 0;
  if (r.status == kSeeksCritical) set_units(items.capacity, &r);
}

template <bool kEqual>
__device__ __forceinline__ void tally_tile(const Items& items, uint32_t top, int shift, int t,
                                           Tally* tally) {
  items.fours<2>(t, [&](int at, int step, const float* p, const float* w) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t key = key_of<kEqual>(p[c], w[c], t * kTile + at + c * step);
      const int below = static_cast<int>(top - key);
      const int band = Max()(below, 0) >> shift;
      // What weighs nothing adds nothing, wherever.
      if (w[c] <= items.limit) tally->add(Min()(band, kBands - 1), items.units(w[c]));
    }
  });
}

__global__ void __launch_bounds__(kThreads, kBlocks) knapsack_tally_kernel(const Sack a) {
  TTA_SHARED(Tally, tally);
  const int64_t row = a.row();
  const int t = a.tile();
  SackState& r = a.state(row);
  if (r.status != kSeeksCritical) return;
  const Items items(a, row, r);
  uint64_t* tallies = a.tallies(row);
  tally.clear();
  if (r.equal)
    tally_tile<true>(items, r.top, r.shift, t, &tally);
  else
    tally_tile<false>(items, r.top, r.shift, t, &tally);
  __syncthreads();
  tally.add_to(tallies);
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  const OpenBands bands = open_bands(items, 0, [&](int slot) { return tallies[slot]; });
  const uint64_t slack = items.slack();
  const bool all =
      bands.total + slack <= items.whole || (bands.total <= items.whole + slack && all_fits(items));
  __syncthreads();
  if (threadIdx.x) return;
  if (all) r.status = kTakesAll;
  const uint32_t top = r.top;
  const uint32_t end = ((static_cast<uint32_t>(bands.high) + 1) << r.shift) - 1;
  r.top = bands.low ? top - (static_cast<uint32_t>(bands.low) << r.shift) : kTopKey;
  r.bottom = bands.high == kBands - 1 || end >= top ? 0 : top - end;
  r.before = bands.before;
}

// Lists a tile's items whose keys are in the bracket; counts them all.
template <bool kEqual>
__device__ __forceinline__ void list_tile(const Items& items, SackState* r, int t, int32_t* list) {
  const int me = static_cast<int>(threadIdx.x);
  const uint32_t top = r->top, bottom = r->bottom;
  uint32_t inside = 0;  // a bit each
  if (kEqual) {
    inside = ~0u;
  } else {
    const float above = device::scalar_from_bits(top < kTopKey ? top + 1 : kTopKey);
    const float below = device::scalar_from_bits(bottom ? bottom - 1 : 0);
    int first = 0;
    items.fours<4>(t, [&](int, int, const float* p, const float* w) {
      uint32_t four = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c)
        four |= static_cast<uint32_t>(!(p[c] > mul_rn(above, w[c])) & !(p[c] < mul_rn(below, w[c])))
                << c;
      inside |= four << first;
      first += 4;
    });
  }
  const auto id_of = [&](int bit) {
    const int at = bit / 4 * (4 * kThreads);
    return t * kTile + at + (items.vector ? 4 * me + bit % 4 : me + bit % 4 * kThreads);
  };
  for (uint32_t rest = inside; rest; rest &= rest - 1) {
    const int32_t id = id_of(__ffs(static_cast<int>(rest)) - 1);
    bool in = false;
    if (id < static_cast<int32_t>(items.n)) {
      const float w = __ldg(items.weight + id);
      const uint32_t key = key_of<kEqual>(__ldg(items.profit + id), w, id);
      in = items.competes(w) && key <= top && key >= bottom;
    }
    if (!in) inside &= ~(rest & (0u - rest));
  }
  if (!inside) return;
  uint32_t to = atomicAdd(&r->listed, static_cast<uint32_t>(__popc(inside)));
  for (; inside && to < kListedItems; inside &= inside - 1, ++to)
    list[to] = id_of(__ffs(static_cast<int>(inside)) - 1);
}

__global__ void __launch_bounds__(kThreads, kBlocks) knapsack_list_kernel(const Sack a) {
  TTA_SHARED(Tally, tally);
  const int64_t row = a.row();
  const int t = a.tile();
  SackState& r = a.state(row);
  if (r.status != kSeeksCritical) return;
  const Items items(a, row, r);
  if (r.equal)
    list_tile<true>(items, &r, t, a.list(row));
  else
    list_tile<false>(items, &r, t, a.list(row));
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  if (a.tiles == 1 && all_fits(items)) {
    if (threadIdx.x == 0) r.status = kTakesAll;
    return;
  }
  const Place critical = critical_item(a, row, items, &tally);
  if (threadIdx.x == 0) r.critical = critical;
}

__global__ void __launch_bounds__(kThreads, kBlocks) knapsack_select_kernel(const Sack a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(float4, profits4, kTile / 4);
  float* weights = reinterpret_cast<float*>(weights4);
  float* profits = reinterpret_cast<float*>(profits4);
  const int64_t row = a.row();
  const int t = a.tile();
  const SackState& r = a.state(row);
  const int32_t status = r.status;
  Items items(a, row, r);
  if (status == kInvalid) items.limit = kNaN;  // nothing fits
  const Prefix taken(status == kSeeksCritical ? r.critical : everything(items));
  TileNote* notes = a.notes(row);
  bool* out = a.selected + row * a.selected_stride + static_cast<int64_t>(t) * kTile;
  const bool whole_words = items.vector && reinterpret_cast<uintptr_t>(out) % 4 == 0;
  const int count = items.in_tile(t);
  items.fours<4>(t, [&](int at, int step, const float* p, const float* w) {
    bool in[4];
    taken.hold(items, t * kTile + at, step, p, w, in);
    uint32_t word = 0;
    float kept_weight[4], kept_profit[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      kept_weight[c] = in[c] ? w[c] : 0.0f;
      kept_profit[c] = in[c] ? p[c] : 0.0f;
      if (in[c]) word |= 1u << 8 * c;
    }
    if (step == 1) {
      *reinterpret_cast<float4*>(weights + at) =
          make_float4(kept_weight[0], kept_weight[1], kept_weight[2], kept_weight[3]);
      *reinterpret_cast<float4*>(profits + at) =
          make_float4(kept_profit[0], kept_profit[1], kept_profit[2], kept_profit[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        weights[at + c * step] = kept_weight[c];
        profits[at + c * step] = kept_profit[c];
      }
    }
    if (whole_words && at + 4 <= count) {
      *reinterpret_cast<uint32_t*>(out + at) = word;
      return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (at + c * step < count) out[at + c * step] = (word >> 8 * c & 1u) != 0;
  });
  __syncthreads();
  if (warp_id() < 2) {
    const auto add = [](double sum, float x) { return add_rn(sum, static_cast<double>(x)); };
    const double sum = canonical_sum_by<double>(add, warp_id() ? profits : weights, count);
    if (lane_id() == 0) (warp_id() ? notes[t].value : notes[t].weight) = sum;
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  const double used = sum_of_tiles(a.tiles, [&](int k) { return notes[k].weight; });
  const double value = sum_of_tiles(a.tiles, [&](int k) { return notes[k].value; });
  if (threadIdx.x) return;
  if (status == kInvalid) {
    a.used[row] = a.value[row] = a.upper_bound[row] = static_cast<double>(kNaN);
    a.critical_index[row] = -2;
    return;
  }
  double part = 0.0;
  if (status == kSeeksCritical) {
    const int64_t c = taken.end.id;
    const double density = div_rn(static_cast<double>(__ldg(items.profit + c)),
                                  static_cast<double>(__ldg(items.weight + c)));
    part = mul_rn(sub_rn(items.capacity, used), density);
  }
  a.used[row] = used;
  a.value[row] = value;
  a.upper_bound[row] = add_rn(value, part);
  a.critical_index[row] = status == kSeeksCritical ? taken.end.id : -1;
}

}  // namespace

Need need_of(const KnapsackArgs& a) {
  return {static_cast<size_t>(a.batch) * bytes_of_row(tiles_of(a.items)), a.batch};
}

cudaError_t greedy_knapsack(const KnapsackArgs& a, const Launch& launch) {
  if (!a.batch) return cudaSuccess;
  Sack sack;
  static_cast<KnapsackArgs&>(sack) = a;
  sack.tiles = tiles_of(a.items);
  sack.scratch = static_cast<char*>(launch.scratch);
  sack.row_bytes = static_cast<int64_t>(bytes_of_row(sack.tiles));
  sack.arrivals = launch.arrivals;
  for (int64_t first = 0; first < a.batch; first += kMostRows) {
    sack.first_row = first;
    const dim3 grid = grid_of(sack.tiles, a.batch - first);
    TTA_LAUNCH((knapsack_survey_kernel), grid, kThreads, 0, launch.stream, sack);
    if (sack.tiles > 1) TTA_LAUNCH((knapsack_tally_kernel), grid, kThreads, 0, launch.stream, sack);
    TTA_LAUNCH((knapsack_list_kernel), grid, kThreads, 0, launch.stream, sack);
    TTA_LAUNCH((knapsack_select_kernel), grid, kThreads, 0, launch.stream, sack);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
