// greedy_knapsack: the critical item of a row, found without sorting (knapsack.cu): canonical sums,
// tallies of units in bands, and the searches that they answer.
#pragma once

#include "cuda/knapsack_items.cuh"

namespace tta {
namespace cuda {

// The items of a row that may hold the critical one: a range of codes or, when that is one code, of
// ids. `before`: units of everything ordered before the bracket.
struct ItemBracket {
  uint64_t top, bottom;  // inclusive, like the ids
  int32_t first, last;
  uint64_t before;

  __device__ __forceinline__ bool ties() const { return top == bottom; }
  __device__ __forceinline__ bool holds(const Place& x) const {
    return x.code <= top && x.code >= bottom && x.id >= first && x.id <= last;
  }
  __device__ __forceinline__ uint64_t range() const {
    return ties() ? static_cast<uint64_t>(last - first) : top - bottom;
  }
  // Bands are 2^shift codes or ids wide, fewer than kBands of them.
  __device__ __forceinline__ int shift() const {
    const int bits = 64 - __clzll(static_cast<long long>(range()));
    return bits > kBandBits ? bits - kBandBits : 0;
  }
  __device__ __forceinline__ int band(const Place& x) const {
    return static_cast<int>((ties() ? static_cast<uint64_t>(x.id - first) : top - x.code) >>
                            shift());
  }
  __device__ __forceinline__ ItemBracket narrowed(int low, int high, uint64_t units) const {
    ItemBracket b = *this;
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
  __device__ __forceinline__ bool progress_from(const ItemBracket& old) const {
    return (ties() && !old.ties()) || range() <= old.range() / 2;
  }
};

// S of what comes before `end`: a warp a tile, whose lane l holds the virtual lanes 4 l .. 4 l + 3
// in registers. For a whole block.
__device__ __forceinline__ double sum_before(const Items& items, const Place& end) {
  TTA_SHARED_ARRAY(double, of_tile, kMaxTiles);
  constexpr int kAhead = 4;
  const Prefix prefix(end);
  const int tiles = tiles_of(items.n), n = static_cast<int>(items.n);
  for (int t = warp_id(); t < tiles; t += kWarps) {
    double lane[4] = {0.0, 0.0, 0.0, 0.0};
    const int last = (t + 1) * kTile < n ? (t + 1) * kTile : n;
#pragma unroll 1
    for (int first = t * kTile + 4 * lane_id(); first < last; first += kAhead * kLanes) {
      float p[kAhead][4], w[kAhead][4];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) items.read_near(first + k * kLanes, last, p[k], w[k]);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        bool in[4];
        prefix.hold(items, first + k * kLanes, 1, p[k], w[k], in);
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (in[c]) lane[c] = add_rn(lane[c], static_cast<double>(w[k][c]));
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

// Whether everything that competes fits.
__device__ __forceinline__ bool all_fits(const Items& items) {
  return sum_before(items, everything(items)) <= items.capacity;
}

// ---- tallies: units of weight in bands ---------------------------------------------------------

// Where a band lies for threads that read kBandsEach neighbours each: those are kThreads apart, so
// that a warp reads consecutive words.
__device__ __forceinline__ int slot_of(int band) {
  const uint32_t b = static_cast<uint32_t>(band);
  return static_cast<int>(b % kBandsEach * kThreads + b / kBandsEach);
}

// Counters in shared memory for up to 4096 items: their parts do not carry.
struct alignas(16) Tally {
  uint32_t coarse[kBands], fine[kBands];

  __device__ __forceinline__ void clear() {
    const uint4 zeros = make_uint4(0u, 0u, 0u, 0u);
    const int me = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int k = 0; k < kBandsEach / 4; ++k) {
      reinterpret_cast<uint4*>(coarse)[me + k * kThreads] = zeros;
      reinterpret_cast<uint4*>(fine)[me + k * kThreads] = zeros;
    }
    __syncthreads();
  }
  __device__ __forceinline__ void add(int i, const Units& units) {
    atomicAdd(&coarse[i], units.coarse);
    atomicAdd(&fine[i], static_cast<uint32_t>(units.fine));
  }
  __device__ __forceinline__ uint64_t at(int i) const {
    return Units{coarse[i], static_cast<int32_t>(fine[i])}.all();
  }
  // Adds the bands to those of the row, which lie in slots.
  __device__ __forceinline__ void add_to(uint64_t* total) const {
#pragma unroll 1
    for (int k = 0; k < kBandsEach / 4; ++k) {
      const int i = 4 * (static_cast<int>(threadIdx.x) + k * kThreads);
      const uint4 a = *reinterpret_cast<const uint4*>(coarse + i);
      const uint4 b = *reinterpret_cast<const uint4*>(fine + i);
      if (!(a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w)) continue;
      const uint32_t high[4] = {a.x, a.y, a.z, a.w}, low[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (const uint64_t units = Units{high[c], static_cast<int32_t>(low[c])}.all())
          atomicAdd(reinterpret_cast<unsigned long long*>(total + slot_of(i + c)),
                    static_cast<unsigned long long>(units));
    }
  }
};

// The bands that may hold the critical item, from the first that does not surely fit to the first
// that surely does not; `before`: units of what lies before the first, `total` of everything.
struct OpenBands {
  int low, high;
  uint64_t before, total;
};

// `units_at` reads a slot. There is such a band, unless the total surely fits. For a whole block.
template <class Read>
__device__ __forceinline__ OpenBands open_bands(const Items& items, uint64_t before,
                                                const Read& units_at) {
  TTA_SHARED(uint64_t, before_low);
  TTA_SHARED(uint64_t, total);
  const int i = static_cast<int>(threadIdx.x);
  const uint64_t slack = items.slack();
  uint64_t sum = 0;
  for (int k = 0; k < kBandsEach; ++k) sum += units_at(k * kThreads + i);
  uint64_t through = before + block_scan(sum), before_mine = 0;
  int low = kBands, high = kBands - 1;
  for (int k = 0; k < kBandsEach; ++k) {
    const uint64_t prior = through;
    through += units_at(k * kThreads + i);
    if (low == kBands && through + slack > items.whole) {
      low = i * kBandsEach + k;
      before_mine = prior;
    }
    if (high == kBands - 1 && through > items.whole + slack) high = i * kBandsEach + k;
  }
  const int lowest = block_reduce(low, Min());
  high = block_reduce(high, Min());
  if (low == lowest && low < kBands) before_low = before_mine;
  if (lowest == kBands && i == 0) before_low = 0;
  if (i == kThreads - 1) total = through;
  __syncthreads();
  return {lowest, high, before_low, total};
}

template <class Read>
__device__ __forceinline__ ItemBracket narrow(const ItemBracket& bracket, const Items& items,
                                              const Read& units_at) {
  const OpenBands bands = open_bands(items, bracket.before, units_at);
  return bracket.narrowed(bands.low, bands.high, bands.before);
}

// ---- the critical item -------------------------------------------------------------------------

// The critical item by S alone: a search over codes, then over ids.
__device__ __forceinline__ Place bisect_by_sums(const Items& items, const ItemBracket& bracket) {
  uint64_t fits = bracket.top + 1, open = bracket.bottom;
  int32_t low = bracket.first - 1, high = bracket.last;
  for (;;) {
    const bool codes = fits - open > 1;
    if (!codes && high - low <= 1) return {open, high};
    const Place middle = {codes ? open + (fits - open) / 2 : open,
                          codes ? static_cast<int32_t>(items.n) : low + (high - low) / 2 + 1};
    const bool taken = sum_before(items, middle) <= items.capacity;
    if (codes)
      (taken ? fits : open) = middle.code;
    else
      (taken ? low : high) = middle.id - 1;
  }
}

// The list, of which thread i looks after the items i + k kThreads.
struct List {
  static_assert(kListedItems <= 32 * kThreads, "a bit each");
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
      const Place place = {code_of(__ldg(items.profit + id), w), id};
      if (!use(place, w)) alive &= ~(1u << k);
    }
  }
};

// Tallies the list until a few items are left. For a whole block.
__device__ __forceinline__ void narrow_list(const Items& items, ItemBracket* bracket, List* list,
                                            Tally* tally) {
  constexpr int kFew = 4;
  for (;;) {
    if (block_reduce(list->left(), Sum()) <= kFew) return;
    tally->clear();
    list->each(items, [&](const Place& place, float w) {
      tally->add(slot_of(bracket->band(place)), items.units(w));
      return true;
    });
    __syncthreads();
    const ItemBracket next = narrow(*bracket, items, [&](int slot) { return tally->at(slot); });
    const bool progress = next.progress_from(*bracket);
    *bracket = next;
    list->each(items, [&](const Place& place, float) { return next.holds(place); });
    if (!progress) return;
  }
}

// Tries one listed item after the other, from the middle; every step drops at least that one.
__device__ __forceinline__ Place try_listed(const Items& items, const ItemBracket& bracket,
                                            List* list) {
  TTA_SHARED(Place, chosen);
  const uint64_t slack = items.slack();
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
      if (!pivot.before(place)) units += items.units(w).all();
      return true;
    });
    const uint64_t through = before + block_reduce(units, Sum());
    const bool taken = through + slack <= items.whole ||
                       (through <= items.whole + slack &&
                        sum_before(items, {pivot.code, pivot.id + 1}) <= items.capacity);
    if (taken)
      before = through;
    else
      critical = pivot;
    list->each(items, [&](const Place& place, float) {
      return taken ? pivot.before(place) : place.before(pivot);
    });
  }
}

// Shortens a bracket until its items can be listed, and lists them; false if it gets no shorter.
// By one block, over the whole row.
__device__ __forceinline__ bool list_again(const Sack& a, int64_t row, const Items& items,
                                           ItemBracket* bracket, Tally* tally) {
  SackState& r = a.state(row);
  int32_t* list = a.list(row);
  uint64_t* total = a.tallies(row);
  while (r.listed > kListedItems) {
    for (int i = static_cast<int>(threadIdx.x); i < kBands; i += kThreads) total[i] = 0;
    for (int t = 0; t < a.tiles; ++t) {
      tally->clear();
      items.each(t, [&](const Place& place, float w) {
        if (bracket->holds(place)) tally->add(bracket->band(place), items.units(w));
      });
      __syncthreads();
      tally->add_to(total);
      __syncthreads();
    }
    const ItemBracket next = narrow(*bracket, items, [&](int slot) { return total[slot]; });
    const bool progress = next.progress_from(*bracket);
    *bracket = next;
    if (!progress) return false;
    if (threadIdx.x == 0) r.listed = 0;
    __syncthreads();
    for (int t = 0; t < a.tiles; ++t)
      items.each(t, [&](const Place& place, float) {
        if (!next.holds(place)) return;
        const uint32_t to = atomicAdd(&r.listed, 1u);
        if (to < kListedItems) list[to] = place.id;
      });
    __syncthreads();
  }
  return true;
}

// The range of the codes of the items in the bracket of keys. For a whole block.
__device__ __forceinline__ void find_codes(const Sack& a, int64_t row, const Items& items,
                                           ItemBracket* bracket) {
  const SackState& r = a.state(row);
  uint64_t top = 0, bottom = ~uint64_t{0};
  const auto look = [&](const Place& place, float w) {
    const uint32_t key = key_of<false>(__ldg(items.profit + place.id), w, place.id);
    if (key > r.top || key < r.bottom) return true;
    top = Max()(top, place.code);
    bottom = Min()(bottom, place.code);
    return true;
  };
  if (r.listed > kListedItems) {
    for (int t = 0; t < a.tiles; ++t) items.each(t, look);
  } else {
    List(a.list(row), static_cast<int>(r.listed)).each(items, look);
  }
  bracket->top = block_reduce(top, Max());
  bracket->bottom = block_reduce(bottom, Min());
}

// Before this, the row's items inside the bracket of keys were listed. For a whole block.
__device__ __forceinline__ Place critical_item(const Sack& a, int64_t row, const Items& items,
                                               Tally* tally) {
  const SackState& r = a.state(row);
  ItemBracket bracket = {r.critical.code, r.critical.code, 0, static_cast<int32_t>(items.n) - 1,
                         r.before};
  if (r.equal) {
    const int32_t last = static_cast<int32_t>(kIdKeys - r.bottom);
    bracket.first = r.top < kIdKeys ? static_cast<int32_t>(kIdKeys - r.top) : 0;
    bracket.last = last < bracket.last ? last : bracket.last;
  } else {
    find_codes(a, row, items, &bracket);
  }
  if (!list_again(a, row, items, &bracket, tally)) return bisect_by_sums(items, bracket);
  List listed(a.list(row), static_cast<int>(r.listed));
  narrow_list(items, &bracket, &listed, tally);
  return try_listed(items, bracket, &listed);
}

}  // namespace cuda
}  // namespace tta
