// greedy_knapsack: the 0-1 knapsack by falling density profit / weight, for any profits and
// weights, without sorting (csrc/cpu/knapsack.cpp is the definition).
//
// Problem: B rows of V items. S(v), the canonical float64 sum of the weights ordered at or before
// v, decides what is taken; the critical item is the first whose S exceeds the capacity.
// Thread map: in every stage a block of kThreads a tile of 4096 items (tile.cuh); the block that
// arrives last at a row decides for the row.
//
// Stages, one launch each; blocks whose row needs nothing return at once.
//   1 survey    validity, the weight of all items, the range of the densities
//   2 tally     weights of 4096 bands of density, in integers; the bands around the capacity
//               bracket the critical item (rows of one tile skip this)
//   3 list      up to 4096 items of the bracket are listed, usually a few hundred; the last block
//               tallies the list again until a few are left, then tries them one by one
//   4 select    `selected`, used and value
// A list that overflows (thousands of equal densities, or densities much closer to one another than
// their range tells) is first shortened by the last block, which tallies the row again: a factor
// of up to 4096 a pass, ties by id.
//
// Integers count units of 2^-42 capacities, rounded down; no item that fits is heavier than 2^42 of
// them, and 2^20 items stay below 2^62. They answer where they clear the capacity by more than
// their error (slack_of); otherwise S itself is summed, by the last block, a warp a tile.
//
// Bytes a row: 8 V from DRAM and V written; 8 V from L2, where it fits, in each later stage.
// Determinism: integer sums have no order, S has the canonical one, and the critical item is
// unique; the order in which items are listed changes nothing.

#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace tta {
namespace cuda {
namespace {

constexpr int kBands = 4096;
constexpr int kBandBits = 12;
constexpr int kBandsEach = kBands / kThreads;
constexpr int kBlocks = 512 / kThreads;  // of one multiprocessor, at least
constexpr int kListed = 4096;
constexpr uint64_t kWhole = uint64_t{1} << 42;  // units in the capacity

// Bound of |S - units| in units, for a sum S near the capacity: of n items each loses less than one
// unit to rounding down and 2^-9 to the rounded factor; the float64 sum is off by less than
// 2^9 * 2^-53 * 2^42 < 1, and the comparison is made a little stricter.
__device__ __forceinline__ uint64_t slack_of(int64_t n) { return 2 * static_cast<uint64_t>(n) + 8; }

// Where an item stands: falling code, then rising id. A code is the density's bit pattern less what
// the row's densities have in common: 0 for density 0, 1 for the lowest other one.
struct alignas(16) Place {
  uint64_t code;
  int32_t id;
  __device__ __forceinline__ bool before(const Place& other) const {
    return code > other.code || (code == other.code && id < other.id);
  }
};

// Positive quotients of float32 numbers are normal float64 numbers, whose bits rise with them.
__device__ __forceinline__ uint64_t density_bits(float profit, float weight) {
  return static_cast<uint64_t>(
      __double_as_longlong(div_rn(static_cast<double>(profit), static_cast<double>(weight))));
}

// The items of a row that may hold the critical one: a range of codes or, when that is one code, of
// ids. `before`: units of everything ordered before the bracket.
struct Bracket {
  uint64_t top, bottom;  // inclusive, like the ids
  int32_t first, last;
  uint64_t before;

  __device__ __forceinline__ bool ties() const { return top == bottom; }
  __device__ __forceinline__ bool holds(uint64_t code, int32_t id) const {
    return code <= top && code >= bottom && id >= first && id <= last;
  }
  __device__ __forceinline__ uint64_t range() const {
    return ties() ? static_cast<uint64_t>(last - first) : top - bottom;
  }
  // Bands are 2^shift codes or ids wide, fewer than kBands of them.
  __device__ __forceinline__ int shift() const {
    const int bits = 64 - __clzll(static_cast<long long>(range()));
    return bits > kBandBits ? bits - kBandBits : 0;
  }
  __device__ __forceinline__ int band(uint64_t code, int32_t id) const {
    return static_cast<int>((ties() ? static_cast<uint64_t>(id - first) : top - code) >> shift());
  }
  __device__ __forceinline__ Bracket narrowed(int low, int high, uint64_t units) const {
    Bracket b = *this;
    const uint64_t begin = static_cast<uint64_t>(low) << shift();
    uint64_t end = ((static_cast<uint64_t>(high) + 1) << shift()) - 1;
    end = end < range() ? end : range();
    if (ties()) {
      b.first = first + static_cast<int32_t>(begin);
      b.last = first + static_cast<int32_t>(end);
    } else {
      b.top = top - begin;
      b.bottom = top - end;
    }
    b.before = units;
    return b;
  }
  // Worth another round: at most half as wide, or down to ties.
  __device__ __forceinline__ bool progress_from(const Bracket& old) const {
    return (ties() && !old.ties()) || range() <= old.range() / 2;
  }
};

struct Or {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// What a tile tells about itself: survey and, later, the sums over the taken items.
struct TileNote {
  double weight, value;
  uint64_t lowest, highest;  // bits of the positive densities
  uint32_t flags;
};
enum Flag : uint32_t { kBadProfit = 1, kBadWeight = 2, kWorthless = 4 };

enum Status : int32_t { kInvalid, kTakesAll, kOpen };

struct RowState {
  Bracket bracket;
  uint64_t lowest;        // subtracted from density bits
  double units_a_weight;  // 2^42 / capacity
  Place critical;
  uint32_t listed;
  int32_t status;
};

__host__ __device__ constexpr size_t padded(size_t n) { return (n + 255) / 256 * 256; }

size_t bytes_of_row(int tiles) {
  return padded(sizeof(RowState)) + padded(static_cast<size_t>(tiles) * sizeof(TileNote)) +
         (tiles > 1 ? kBands * sizeof(uint64_t) : 0) + kListed * sizeof(int32_t);
}

struct Sack : KnapsackArgs {
  char* scratch = nullptr;
  int64_t row_bytes = 0;
  uint32_t* arrivals = nullptr;
  int tiles = 0;

  __device__ __forceinline__ char* at(int64_t row) const { return scratch + row * row_bytes; }
  __device__ __forceinline__ RowState& state(int64_t row) const {
    return *reinterpret_cast<RowState*>(at(row));
  }
  __device__ __forceinline__ TileNote* notes(int64_t row) const {
    return reinterpret_cast<TileNote*>(at(row) + padded(sizeof(RowState)));
  }
  __device__ __forceinline__ int32_t* list(int64_t row) const {
    return reinterpret_cast<int32_t*>(at(row) + padded(sizeof(RowState)) +
                                      padded(static_cast<size_t>(tiles) * sizeof(TileNote)));
  }
  __device__ __forceinline__ uint64_t* tallies(int64_t row) const {
    return reinterpret_cast<uint64_t*>(list(row) + kListed);
  }
};

// One row's items and what the survey found out about them.
struct Items {
  const float* profit;
  const float* weight;
  int64_t n;
  double capacity;
  bool vector;  // both rows aligned to 16 bytes
  uint64_t lowest = 0;
  double units_a_weight = 0.0;

  __device__ __forceinline__ Items(const Sack& a, int64_t row)
      : profit(a.profit + row * a.profit_stride),
        weight(a.weight + row * a.weight_stride),
        n(a.items),
        capacity(a.capacity[row]),
        vector((reinterpret_cast<uintptr_t>(profit) | reinterpret_cast<uintptr_t>(weight)) % 16 ==
               0) {}
  __device__ __forceinline__ Items(const Sack& a, int64_t row, const RowState& r) : Items(a, row) {
    lowest = r.lowest;
    units_a_weight = r.units_a_weight;
  }
  __device__ __forceinline__ int in_tile(int t) const {
    const int64_t left = n - static_cast<int64_t>(t) * kTile;
    return left < kTile ? static_cast<int>(left) : kTile;
  }
  // Calls use(at, i, profits, weights) for a tile's elements i .. i + 3 of this thread, -inf beyond
  // the row; kAhead such fours are read at a time.
  template <int kAhead, class Use>
  __device__ __forceinline__ void fours(int t, const Use& use) const {
    Tile at;
    place(&at, n, t, vector);
    const char* profits = reinterpret_cast<const char*>(profit + static_cast<int64_t>(t) * kTile);
    const char* weights = reinterpret_cast<const char*>(weight + static_cast<int64_t>(t) * kTile);
#pragma unroll kAhead
    for (int i = 0; i < kPerThread; i += 4) {
      float p[4], w[4];
      read_part<kFloat32>(profits, at, i, p);
      read_part<kFloat32>(weights, at, i, w);
      use(at, i, p, w);
    }
  }
  // Calls use(i, id, profit, weight) for the items that compete.
  template <class Use>
  __device__ __forceinline__ void each(int t, const Use& use) const {
    fours<2>(t, [&](const Tile& at, int i, const float* p, const float* w) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (competes(w[k])) use(i + k, t * kTile + at.at(i + k), p[k], w[k]);
    });
  }
  // Not heavier than the capacity; beyond the row (-inf) and NaN: false.
  __device__ __forceinline__ bool eligible(float w) const {
    return w >= 0.0f && static_cast<double>(w) <= capacity;
  }
  // Has a density: what is eligible but weighs nothing is taken without a question.
  __device__ __forceinline__ bool competes(float w) const { return w > 0.0f && eligible(w); }
  __device__ __forceinline__ uint64_t code(float p, float w) const {
    return p > 0.0f ? density_bits(p, w) - lowest + 1 : 0;
  }
  __device__ __forceinline__ uint64_t units(float w) const {
    return static_cast<uint64_t>(mul_rn(static_cast<double>(w), units_a_weight));
  }
};

// ---- canonical float64 sums --------------------------------------------------------------------

// Of a tile's values in shared memory, in the first thread of the warp. After a barrier.
__device__ __forceinline__ double tile_sum(const float* values, int count) {
  double lane[4] = {0.0, 0.0, 0.0, 0.0};
  const int groups = (count + kLanes - 1) / kLanes;
#pragma unroll 4
  for (int g = 0; g < groups; ++g) {
    const float4 x = *reinterpret_cast<const float4*>(values + g * kLanes + lane_id() * 4);
    lane[0] = add_rn(lane[0], static_cast<double>(x.x));
    lane[1] = add_rn(lane[1], static_cast<double>(x.y));
    lane[2] = add_rn(lane[2], static_cast<double>(x.z));
    lane[3] = add_rn(lane[3], static_cast<double>(x.w));
  }
  return fold(lane);
}

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

// S of `through`: a warp a tile, whose lane l holds the virtual lanes 4 l .. 4 l + 3 in registers.
// For a whole block.
__device__ __forceinline__ double sum_through(const Items& items, const Place& through) {
  TTA_SHARED_ARRAY(double, of_tile, kMaxTiles);
  const int tiles = tiles_of(items.n);
  for (int t = warp_id(); t < tiles; t += kWarps) {
    double lane[4] = {0.0, 0.0, 0.0, 0.0};
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const int64_t end = begin + kTile < items.n ? begin + kTile : items.n;
#pragma unroll 2
    for (int64_t group = begin; group < end; group += kLanes) {
      const int64_t j = group + lane_id() * 4;
      float p[4], w[4];
      if (items.vector && j + 4 <= end) {
        read_four<kFloat32>(reinterpret_cast<const char*>(items.profit), j, p);
        read_four<kFloat32>(reinterpret_cast<const char*>(items.weight), j, w);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          p[k] = j + k < end ? __ldg(items.profit + j + k) : 0.0f;
          w[k] = j + k < end ? __ldg(items.weight + j + k) : 0.0f;
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (!items.competes(w[k])) continue;
        const Place place = {items.code(p[k], w[k]), static_cast<int32_t>(j + k)};
        if (!through.before(place)) lane[k] = add_rn(lane[k], static_cast<double>(w[k]));
      }
    }
    const double sum = fold(lane);
    if (lane_id() == 0) of_tile[t] = sum;
  }
  __syncthreads();
  double total = 0.0;
  for (int t = 0; t < tiles; ++t) total = add_rn(total, of_tile[t]);
  __syncthreads();
  return total;
}

// ---- tallies: units of weight in bands ---------------------------------------------------------

// 64-bit counters in shared memory as two halves, because shared memory adds 32 bits at a time. A
// thread's neighbouring bands lie kThreads apart, so that a warp reads consecutive words.
struct Tally {
  uint32_t low[kBands], high[kBands];

  __device__ __forceinline__ static int slot(int band) {
    return band % kBandsEach * kThreads + band / kBandsEach;
  }
  __device__ __forceinline__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kBands; i += kThreads) low[i] = high[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(int band, uint64_t units) {
    const uint32_t part = static_cast<uint32_t>(units);
    const uint32_t old = atomicAdd(&low[slot(band)], part);
    const uint32_t carry = static_cast<uint32_t>(old + part < part);
    const uint32_t rest = static_cast<uint32_t>(units >> 32) + carry;
    if (rest) atomicAdd(&high[slot(band)], rest);
  }
  __device__ __forceinline__ uint64_t at(int slot) const {
    return static_cast<uint64_t>(high[slot]) << 32 | low[slot];
  }
};

__device__ __forceinline__ void tally_tile(const Items& items, const Bracket& bracket, int t,
                                           Tally* tally) {
  items.each(t, [&](int, int32_t id, float p, float w) {
    const uint64_t code = items.code(p, w);
    if (bracket.holds(code, id)) tally->add(bracket.band(code, id), items.units(w));
  });
}

// The bands that may hold the critical item, from the first that does not surely fit to the first
// that surely does not; `units_at` reads a slot. For a whole block.
template <class Read>
__device__ __forceinline__ Bracket narrow(const Bracket& bracket, int64_t n, const Read& units_at) {
  TTA_SHARED(uint64_t, before_low);
  const int i = static_cast<int>(threadIdx.x);
  const uint64_t slack = slack_of(n);
  uint64_t sum = 0;
  for (int k = 0; k < kBandsEach; ++k) sum += units_at(k * kThreads + i);
  uint64_t through = bracket.before + block_scan(sum), before = 0;
  int low = kBands, high = kBands - 1;
  for (int k = 0; k < kBandsEach; ++k) {
    const uint64_t prior = through;
    through += units_at(k * kThreads + i);
    if (low == kBands && through + slack > kWhole) {
      low = i * kBandsEach + k;
      before = prior;
    }
    if (high == kBands - 1 && through > kWhole + slack) high = i * kBandsEach + k;
  }
  // There is such a band: the whole bracket does not fit.
  const int lowest = block_reduce(low, Min());
  high = block_reduce(high, Min());
  if (low == lowest) before_low = before;
  __syncthreads();
  return bracket.narrowed(lowest, high, before_low);
}

// ---- the critical item -------------------------------------------------------------------------

// Lists a tile's items inside the bracket; counts them all. For a whole block.
__device__ __forceinline__ void list_tile(const Items& items, const Bracket& bracket, int t,
                                          uint32_t* listed, int32_t* list) {
  TTA_SHARED(uint32_t, begin);
  uint32_t inside = 0;
  items.each(t, [&](int i, int32_t id, float p, float w) {
    if (bracket.holds(items.code(p, w), id)) inside |= 1u << i;
  });
  const uint32_t mine = static_cast<uint32_t>(__popc(inside));
  const uint32_t earlier = block_scan(mine);
  if (threadIdx.x == kThreads - 1) begin = atomicAdd(listed, earlier + mine);
  __syncthreads();
  uint32_t to = begin + earlier;
  Tile at;
  place(&at, items.n, t, items.vector);
  for (; inside; inside &= inside - 1, ++to)
    if (to < kListed) list[to] = t * kTile + at.at(__ffs(static_cast<int>(inside)) - 1);
}

// The critical item by S alone: a search over codes, then over ids.
__device__ __forceinline__ Place bisect_by_sums(const Items& items, const Bracket& bracket) {
  uint64_t fits = bracket.top + 1, open = bracket.bottom;
  while (fits - open > 1) {
    const uint64_t mid = open + (fits - open) / 2;
    const Place all = {mid, static_cast<int32_t>(items.n)};
    (sum_through(items, all) <= items.capacity ? fits : open) = mid;
  }
  int32_t low = bracket.first - 1, high = bracket.last;
  while (high - low > 1) {
    const int32_t mid = low + (high - low) / 2;
    (sum_through(items, {open, mid}) <= items.capacity ? low : high) = mid;
  }
  return {open, high};
}

// The list, of which thread i looks after the items i + k kThreads.
struct List {
  static_assert(kListed <= 32 * kThreads, "a bit each");
  const int32_t* ids;
  int count;
  uint32_t alive;  // of this thread's items

  __device__ __forceinline__ List(const int32_t* list, int listed) : ids(list), count(listed) {
    const int mine = (listed - static_cast<int>(threadIdx.x) + kThreads - 1) / kThreads;
    alive = mine <= 0 ? 0u : mine >= 32 ? ~0u : (1u << mine) - 1u;
  }
  __device__ __forceinline__ int left() const { return __popc(alive); }
  // Calls use(place, weight) for each; false drops the item.
  template <class Use>
  __device__ __forceinline__ void each(const Items& items, const Use& use) {
    for (uint32_t rest = alive; rest; rest &= rest - 1) {
      const int k = __ffs(static_cast<int>(rest)) - 1;
      const int32_t id = ids[k * kThreads + static_cast<int>(threadIdx.x)];
      const float w = __ldg(items.weight + id);
      const Place place = {items.code(__ldg(items.profit + id), w), id};
      if (!use(place, w)) alive &= ~(1u << k);
    }
  }
};

// Tallies the list until a few items are left. For a whole block.
__device__ __forceinline__ void narrow_list(const Items& items, Bracket* bracket, List* list,
                                            Tally* tally) {
  constexpr int kFew = 4;
  for (;;) {
    if (block_reduce(list->left(), Sum()) <= kFew) return;
    tally->clear();
    list->each(items, [&](const Place& place, float w) {
      tally->add(bracket->band(place.code, place.id), items.units(w));
      return true;
    });
    __syncthreads();
    const Bracket next = narrow(*bracket, items.n, [&](int slot) { return tally->at(slot); });
    const bool progress = next.progress_from(*bracket);
    *bracket = next;
    list->each(items, [&](const Place& place, float) { return next.holds(place.code, place.id); });
    if (!progress) return;
  }
}

// Tries one listed item after the other, from the middle; every step drops at least that one.
__device__ __forceinline__ Place bisect_list(const Items& items, const Bracket& bracket,
                                             List* list) {
  TTA_SHARED(Place, chosen);
  const uint64_t slack = slack_of(items.n);
  uint64_t before = bracket.before;
  Place critical = {0, -1};
  for (;;) {
    const int here = list->left();
    const int earlier = block_scan(here);
    const int left = block_reduce(here, Sum());
    if (!left) return critical;
    int rank = left / 2 - earlier;  // of the pivot among this thread's
    if (rank >= 0 && rank < here)
      list->each(items, [&](const Place& place, float) {
        if (rank-- == 0) chosen = place;
        return true;
      });
    __syncthreads();
    const Place pivot = chosen;
    if (left == 1 && critical.id < 0) return pivot;
    uint64_t units = 0;
    list->each(items, [&](const Place& place, float w) {
      if (!pivot.before(place)) units += items.units(w);
      return true;
    });
    const uint64_t through = before + block_reduce(units, Sum());
    const bool taken = through + slack <= kWhole ||
                       (through <= kWhole + slack && sum_through(items, pivot) <= items.capacity);
    if (taken)
      before = through;
    else
      critical = pivot;
    list->each(items, [&](const Place& place, float) {
      return taken ? pivot.before(place) : place.before(pivot);
    });
  }
}

// For the last block, after the row's items inside the bracket were listed.
__device__ __forceinline__ Place find_critical(const Sack& a, int64_t row, const Items& items,
                                               Tally* tally) {
  RowState& r = a.state(row);
  int32_t* list = a.list(row);
  Bracket bracket = r.bracket;
  uint32_t count = r.listed;
  while (count > kListed) {
    tally->clear();
    for (int t = 0; t < a.tiles; ++t) tally_tile(items, bracket, t, tally);
    __syncthreads();
    const Bracket next = narrow(bracket, items.n, [&](int slot) { return tally->at(slot); });
    if (!next.progress_from(bracket)) return bisect_by_sums(items, next);
    bracket = next;
    if (threadIdx.x == 0) r.listed = 0;
    __syncthreads();
    for (int t = 0; t < a.tiles; ++t) list_tile(items, bracket, t, &r.listed, list);
    __syncthreads();
    count = r.listed;
  }
  List listed(list, static_cast<int>(count));
  narrow_list(items, &bracket, &listed, tally);
  return bisect_list(items, bracket, &listed);
}

// ---- stages ------------------------------------------------------------------------------------

__device__ __forceinline__ void note_invalid(const Sack& a, int64_t row, int tensor) {
  if (a.invalid)
    atomicMin(reinterpret_cast<long long*>(a.invalid->code()),
              static_cast<long long>(InvalidRow::encode(row, tensor)));
}

__global__ void __launch_bounds__(kThreads, kBlocks) survey_kernel(const Sack a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  float* weights = reinterpret_cast<float*>(weights4);
  const int64_t row = blockIdx.x / a.tiles;
  const int t = static_cast<int>(blockIdx.x % a.tiles);
  const int i = static_cast<int>(threadIdx.x);
  const Items items(a, row);
  TileNote* notes = a.notes(row);
  if (a.tiles > 1) {
    uint64_t* tallies = a.tallies(row);
    for (int k = t * kThreads + i; k < kBands; k += a.tiles * kThreads) tallies[k] = 0;
  }
  uint64_t lowest = ~uint64_t{0}, highest = 0;
  uint32_t flags = 0;
  items.fours<4>(t, [&](const Tile& at, int k, const float* p, const float* w) {
    float kept[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (at.at(k + c) < at.count) {
        if (!(p[c] >= 0.0f && p[c] < kInfinity)) flags |= kBadProfit;
        if (!(w[c] >= 0.0f && w[c] < kInfinity)) flags |= kBadWeight;
      }
      const bool competes = items.competes(w[c]);
      kept[c] = competes ? w[c] : 0.0f;
      if (!competes) continue;
      if (p[c] > 0.0f) {
        const uint64_t bits = density_bits(p[c], w[c]);
        lowest = bits < lowest ? bits : lowest;
        highest = bits > highest ? bits : highest;
      } else {
        flags |= kWorthless;
      }
    }
    put_four(at, k, kept, weights);
  });
  __syncthreads();
  if (warp_id() == 0) {
    const double sum = tile_sum(weights, items.in_tile(t));
    if (lane_id() == 0) notes[t].weight = sum;
  }
  lowest = block_reduce(lowest, Min());
  highest = block_reduce(highest, Max());
  flags = block_reduce(flags, Or());
  if (i == 0) {
    notes[t].lowest = lowest;
    notes[t].highest = highest;
    notes[t].flags = flags;
  }
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  for (int k = i; k < a.tiles; k += kThreads) {
    lowest = notes[k].lowest < lowest ? notes[k].lowest : lowest;
    highest = notes[k].highest > highest ? notes[k].highest : highest;
    flags |= notes[k].flags;
  }
  lowest = block_reduce(lowest, Min());
  highest = block_reduce(highest, Max());
  flags = block_reduce(flags, Or());
  const double total = sum_of_tiles(a.tiles, [&](int k) { return notes[k].weight; });
  if (i) return;
  RowState& r = a.state(row);
  const bool positive = highest != 0, bad = (flags & (kBadProfit | kBadWeight)) != 0;
  if (bad) note_invalid(a, row, flags & kBadProfit ? 0 : 1);
  if (bad || !(items.capacity >= 0.0))
    r.status = kInvalid;
  else
    r.status = total <= items.capacity ? kTakesAll : kOpen;
  r.bracket.top = positive ? highest - lowest + 1 : 0;
  r.bracket.bottom = flags & kWorthless ? 0 : 1;
  r.bracket.first = 0;
  r.bracket.last = static_cast<int32_t>(a.items) - 1;
  r.bracket.before = 0;
  r.lowest = lowest;
  r.units_a_weight = div_rn(static_cast<double>(kWhole), items.capacity);
  r.listed = 0;
}

__global__ void __launch_bounds__(kThreads, kBlocks) tally_kernel(const Sack a) {
  TTA_SHARED(Tally, tally);
  const int64_t row = blockIdx.x / a.tiles;
  const int t = static_cast<int>(blockIdx.x % a.tiles);
  RowState& r = a.state(row);
  if (r.status != kOpen) return;
  const Items items(a, row, r);
  uint64_t* tallies = a.tallies(row);
  tally.clear();
  tally_tile(items, r.bracket, t, &tally);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBands; i += kThreads)
    if (const uint64_t units = tally.at(i))
      atomicAdd(reinterpret_cast<unsigned long long*>(tallies + i),
                static_cast<unsigned long long>(units));
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  const Bracket next = narrow(r.bracket, a.items, [&](int slot) { return tallies[slot]; });
  __syncthreads();
  if (threadIdx.x == 0) r.bracket = next;
}

__global__ void __launch_bounds__(kThreads, kBlocks) list_kernel(const Sack a) {
  TTA_SHARED(Tally, tally);
  const int64_t row = blockIdx.x / a.tiles;
  const int t = static_cast<int>(blockIdx.x % a.tiles);
  RowState& r = a.state(row);
  if (r.status != kOpen) return;
  const Items items(a, row, r);
  list_tile(items, r.bracket, t, &r.listed, a.list(row));
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  const Place critical = find_critical(a, row, items, &tally);
  if (threadIdx.x == 0) r.critical = critical;
}

__global__ void __launch_bounds__(kThreads, kBlocks) select_kernel(const Sack a) {
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(float4, profits4, kTile / 4);
  float* weights = reinterpret_cast<float*>(weights4);
  float* profits = reinterpret_cast<float*>(profits4);
  const int64_t row = blockIdx.x / a.tiles;
  const int t = static_cast<int>(blockIdx.x % a.tiles);
  const RowState& r = a.state(row);
  const int32_t status = r.status;
  const Place critical = status == kOpen ? r.critical : Place{0, -1};
  const Items items(a, row, r);
  TileNote* notes = a.notes(row);
  bool* out = a.selected + row * a.selected_stride + static_cast<int64_t>(t) * kTile;
  const bool whole_words = items.vector && reinterpret_cast<uintptr_t>(out) % 4 == 0;
  items.fours<4>(t, [&](const Tile& at, int k, const float* p, const float* w) {
    uint32_t word = 0;
    float kept_weight[4], kept_profit[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bool taken = status != kInvalid && items.eligible(w[c]);
      if (taken && status == kOpen && w[c] > 0.0f)
        taken = Place{items.code(p[c], w[c]), t * kTile + at.at(k + c)}.before(critical);
      kept_weight[c] = taken ? w[c] : 0.0f;
      kept_profit[c] = taken ? p[c] : 0.0f;
      if (taken) word |= 1u << 8 * c;
    }
    put_four(at, k, kept_weight, weights);
    put_four(at, k, kept_profit, profits);
    if (whole_words && at.at(k) + 4 <= at.count) {
      *reinterpret_cast<uint32_t*>(out + at.at(k)) = word;
      return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (at.at(k + c) < at.count) out[at.at(k + c)] = (word >> 8 * c & 1u) != 0;
  });
  __syncthreads();
  if (warp_id() < 2) {
    const double sum = tile_sum(warp_id() ? profits : weights, items.in_tile(t));
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
  if (status == kOpen) {
    const int64_t c = critical.id;
    const double density = div_rn(static_cast<double>(__ldg(items.profit + c)),
                                  static_cast<double>(__ldg(items.weight + c)));
    part = mul_rn(sub_rn(items.capacity, used), density);
  }
  a.used[row] = used;
  a.value[row] = value;
  a.upper_bound[row] = add_rn(value, part);
  a.critical_index[row] = critical.id;
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
  const unsigned grid = static_cast<unsigned>(a.batch * sack.tiles);
  TTA_LAUNCH((survey_kernel), grid, kThreads, 0, launch.stream, sack);
  if (sack.tiles > 1) TTA_LAUNCH((tally_kernel), grid, kThreads, 0, launch.stream, sack);
  TTA_LAUNCH((list_kernel), grid, kThreads, 0, launch.stream, sack);
  TTA_LAUNCH((select_kernel), grid, kThreads, 0, launch.stream, sack);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
