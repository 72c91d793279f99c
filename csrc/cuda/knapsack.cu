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

#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace tta {
namespace cuda {
namespace {

constexpr int kBands = 4096;
constexpr int kBandBits = 12;
constexpr int kBandsEach = kBands / kThreads;
constexpr int kBlocks = 512 / kThreads;  // of one multiprocessor, at least
constexpr int kListedItems = 4096;
constexpr uint32_t kTopKey = 0x7f800000u;        // of an infinite quotient
constexpr uint32_t kIdKeys = 1u << 20;           // above all ids
constexpr int kCoarseBits = 19, kFineBits = 19;  // of a weight in units

// Where an item stands: falling code, then rising id. A code is the density's bit pattern, which
// rises with it: positive quotients of float32 numbers are normal float64 numbers.
struct alignas(16) Place {
  uint64_t code;
  int32_t id;
  int32_t padding;  // written with the rest, as copies read all 16 bytes
  __device__ __forceinline__ bool before(const Place& other) const {
    return code > other.code || (code == other.code && id < other.id);
  }
};

__device__ __forceinline__ uint64_t code_of(float profit, float weight) {
  if (!(profit > 0.0f)) return 0;
  return static_cast<uint64_t>(
      __double_as_longlong(div_rn(static_cast<double>(profit), static_cast<double>(weight))));
}

// A weight in units, coarse * 2^kFineBits + fine, to half a unit.
struct Units {
  uint32_t coarse;
  int32_t fine;
  __device__ __forceinline__ uint64_t all() const {
    return (static_cast<uint64_t>(coarse) << kFineBits) +
           static_cast<uint64_t>(static_cast<int64_t>(fine));
  }
};

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

struct Or {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

// What a tile tells about itself: survey and, later, the sums over the taken items.
struct TileNote {
  double weight, value;
  uint64_t lowest, highest;  // codes, of a tile without kMixed
  uint32_t low, high;        // keys less 1
  uint32_t flags;
};
enum Flag : uint32_t { kBadProfit = 1, kBadWeight = 2, kMixed = 4 };  // kMixed: several keys

enum Status : int32_t { kInvalid, kTakesAll, kSeeksCritical };

struct SackState {
  Place critical;
  uint64_t whole;        // units in the capacity
  uint64_t before;       // units of everything ordered before the bracket
  uint32_t top, bottom;  // keys of the bracket, inclusive
  int32_t shift;         // of the keys, to a band
  float limit;           // the heaviest weight that fits
  float coarse, fine;    // factors of the units
  uint32_t listed;
  int32_t status;
  bool equal;  // one density for all: keys are ids
};

__host__ __device__ constexpr size_t padded(size_t n) { return (n + 255) / 256 * 256; }

size_t bytes_of_row(int tiles) {
  return padded(sizeof(SackState)) + padded(static_cast<size_t>(tiles) * sizeof(TileNote)) +
         (tiles > 1 ? kBands * sizeof(uint64_t) : 0) + kListedItems * sizeof(int32_t);
}

struct Sack : KnapsackArgs {
  char* scratch = nullptr;
  int64_t row_bytes = 0;
  uint32_t* arrivals = nullptr;
  int tiles = 0;
  int64_t first_row = 0;  // of this launch

  // A line of blocks a row, a block a tile.
  __device__ __forceinline__ int64_t row() const { return first_row + blockIdx.y; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ char* at(int64_t row) const { return scratch + row * row_bytes; }
  __device__ __forceinline__ SackState& state(int64_t row) const {
    return *reinterpret_cast<SackState*>(at(row));
  }
  __device__ __forceinline__ TileNote* notes(int64_t row) const {
    return reinterpret_cast<TileNote*>(at(row) + padded(sizeof(SackState)));
  }
  __device__ __forceinline__ int32_t* list(int64_t row) const {
    return reinterpret_cast<int32_t*>(at(row) + padded(sizeof(SackState)) +
                                      padded(static_cast<size_t>(tiles) * sizeof(TileNote)));
  }
  __device__ __forceinline__ uint64_t* tallies(int64_t row) const {
    return reinterpret_cast<uint64_t*>(list(row) + kListedItems);
  }
};

// The largest float32 number that is not above the capacity: w fits iff w <= limit.
__device__ __forceinline__ float limit_of(double capacity) {
  const float near = __double2float_rn(capacity);
  return static_cast<double>(near) > capacity ? as_float(device::scalar_bits(near) - 1) : near;
}

__device__ __forceinline__ void spread(const float4& v, float* x) {
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// One row's items and what the survey found out about them.
struct Items {
  const float* profit;
  const float* weight;
  int64_t n;
  double capacity;
  bool vector;  // both rows aligned to 16 bytes
  float limit;
  float coarse = 0.0f, fine = 0.0f;
  uint64_t whole = 0;

  __device__ __forceinline__ Items(const Sack& a, int64_t row)
      : profit(a.profit + row * a.profit_stride),
        weight(a.weight + row * a.weight_stride),
        n(a.items),
        capacity(a.capacity[row]),
        vector((reinterpret_cast<uintptr_t>(profit) | reinterpret_cast<uintptr_t>(weight)) % 16 ==
               0),
        limit(limit_of(capacity)) {}
  __device__ __forceinline__ Items(const Sack& a, int64_t row, const SackState& r) : Items(a, row) {
    limit = r.limit;
    coarse = r.coarse;
    fine = r.fine;
    whole = r.whole;
  }
  __device__ __forceinline__ int in_tile(int t) const {
    const int left = static_cast<int>(n) - t * kTile;
    return left < kTile ? left : kTile;
  }
  // Calls use(at, step, profits, weights) for a tile's elements at, at + step .. at + 3 step of
  // this thread, zeros beyond the row; kAhead such fours are read at a time.
  template <int kAhead, class Use>
  __device__ __forceinline__ void fours(int t, const Use& use) const {
    constexpr int kStride = 4 * kThreads;
    const int count = in_tile(t), me = static_cast<int>(threadIdx.x);
    const float* profits = profit + static_cast<int64_t>(t) * kTile;
    const float* weights = weight + static_cast<int64_t>(t) * kTile;
    const float4* profits4 = reinterpret_cast<const float4*>(profits) + me;
    const float4* weights4 = reinterpret_cast<const float4*>(weights) + me;
    float p[4], w[4];
    if (vector && count == kTile) {
#pragma unroll 1
      for (int first = 4 * me; first < kTile; first += kAhead * kStride) {
        float4 ps[kAhead], ws[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          ps[k] = __ldg(profits4 + k * kThreads);
          ws[k] = __ldg(weights4 + k * kThreads);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          spread(ps[k], p);
          spread(ws[k], w);
          use(first + k * kStride, 1, p, w);
        }
        profits4 += kAhead * kThreads;
        weights4 += kAhead * kThreads;
      }
      return;
    }
    const int step = vector ? 1 : kThreads;
#pragma unroll 1
    for (int first = 0; first < count; first += kStride) {
      const int at = first + (vector ? 4 * me : me);
      if (vector && at + 4 <= count) {
        spread(__ldg(profits4 + first / 4), p);
        spread(__ldg(weights4 + first / 4), w);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool inside = at + c * step < count;
          p[c] = inside ? __ldg(profits + at + c * step) : 0.0f;
          w[c] = inside ? __ldg(weights + at + c * step) : 0.0f;
        }
      }
      use(at, step, p, w);
    }
  }
  // Calls use(place, weight) for a tile's items that compete.
  template <class Use>
  __device__ __forceinline__ void each(int t, const Use& use) const {
    fours<1>(t, [&](int at, int step, const float* p, const float* w) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (competes(w[c])) use(Place{code_of(p[c], w[c]), t * kTile + at + c * step}, w[c]);
    });
  }
  // Four neighbours of a row that ends at `end`, zeros beyond.
  __device__ __forceinline__ void read_near(int first, int end, float* p, float* w) const {
    if (vector && first + 4 <= end) {
      spread(__ldg(reinterpret_cast<const float4*>(profit + first)), p);
      spread(__ldg(reinterpret_cast<const float4*>(weight + first)), w);
      return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      p[c] = first + c < end ? __ldg(profit + first + c) : 0.0f;
      w[c] = first + c < end ? __ldg(weight + first + c) : 0.0f;
    }
  }
  // Has a density and is not heavier than the capacity; what weighs nothing is taken without a
  // question. NaN: false.
  __device__ __forceinline__ bool competes(float w) const { return w > 0.0f && w <= limit; }
  // The factors are powers of two, and what an integer part leaves of a product is exact.
  __device__ __forceinline__ Units units(float w) const {
    constexpr float kInteger = 0x1p23f, kSigned = 0x1.8p23f;  // their ulp is 1
    const float whole_part = fma_rn(w, coarse, kInteger);
    const float rest = fma_rn(w, coarse, sub_rn(kInteger, whole_part));
    const float fine_part = fma_rn(rest, fine, kSigned);
    return {device::scalar_bits(whole_part) - device::scalar_bits(kInteger),
            static_cast<int32_t>(device::scalar_bits(fine_part) - device::scalar_bits(kSigned))};
  }
  // Bound of |S - units| in units, for a sum S near the capacity: half a unit an item, and the
  // rounding of float64 sums.
  __device__ __forceinline__ uint64_t slack() const {
    return static_cast<uint64_t>(n) / 2 + 4 + (whole >> 44);
  }
};

// The items ordered before a place, among them all that weigh nothing.
struct Prefix {
  Place end;
  float above, below;  // next to its density, on either side

  __device__ __forceinline__ explicit Prefix(const Place& place) : end(place) {
    const double density = __longlong_as_double(static_cast<long long>(place.code));
    const uint32_t key = device::scalar_bits(__double2float_rn(density));
    above = as_float(key < kTopKey ? key + 1 : kTopKey);
    below = as_float(key ? key - 1 : 0);
  }
  // Which of the items id, id + step .. it holds. Two products answer, but for those whose
  // densities are next to the last.
  __device__ __forceinline__ void hold(const Items& items, int32_t id, int step, const float* p,
                                       const float* w, bool* in) const {
    bool unsure = false;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool fits = w[c] <= items.limit;
      in[c] = fits & (p[c] > mul_rn(above, w[c]));
      unsure |= in[c] != (fits & (p[c] >= mul_rn(below, w[c])));
    }
    if (!unsure) return;
    uint32_t held = 0;
#pragma unroll 1
    for (int c = 0; c < 4; ++c, id += step)
      if (id < static_cast<int32_t>(items.n) && holds(items, id)) held |= 1u << c;
#pragma unroll
    for (int c = 0; c < 4; ++c) in[c] = (held >> c & 1u) != 0;
  }
  __device__ __forceinline__ bool holds(const Items& items, int32_t id) const {
    const float w = __ldg(items.weight + id);
    if (!(w > 0.0f && w <= items.limit)) return w <= items.limit;
    return Place{code_of(__ldg(items.profit + id), w), id}.before(end);
  }
};

__device__ __forceinline__ Place everything(const Items& items) {
  return {0, static_cast<int32_t>(items.n)};
}

// The key of an item that competes.
template <bool kEqual>
__device__ __forceinline__ uint32_t key_of(float profit, float weight, int32_t id) {
  if (kEqual) return kIdKeys - static_cast<uint32_t>(id);
  return device::scalar_bits(div_rn(profit, weight)) & 0x7fffffffu;  // -0 counts as 0
}

// ---- canonical float64 sums --------------------------------------------------------------------

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

// ---- stages ------------------------------------------------------------------------------------

__device__ __forceinline__ void note_invalid(const Sack& a, int64_t row, int tensor) {
  if (a.invalid)
    atomicMin(reinterpret_cast<long long*>(a.invalid->code()),
              static_cast<long long>(InvalidRow::encode(row, tensor)));
}

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
  r->coarse = as_float(static_cast<uint32_t>(coarse + 127) << 23);
  r->fine = as_float(static_cast<uint32_t>(fine + 127) << 23);
  r->whole = static_cast<uint64_t>(
      mul_rn(mul_rn(capacity, static_cast<double>(r->coarse)), static_cast<double>(r->fine)));
}

__global__ void __launch_bounds__(kThreads, kBlocks) survey_kernel(const Sack a) {
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
  if (bad) note_invalid(a, row, flags & kBadProfit ? 0 : 1);
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

__global__ void __launch_bounds__(kThreads, kBlocks) tally_kernel(const Sack a) {
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
__device__ __forceinline__ void list_tile(const Sack& a, const Items& items, SackState* r, int t,
                                          int32_t* list) {
  const int me = static_cast<int>(threadIdx.x);
  const uint32_t top = r->top, bottom = r->bottom;
  uint32_t inside = 0;  // a bit each
  if (kEqual) {
    inside = ~0u;
  } else {
    const float above = as_float(top < kTopKey ? top + 1 : kTopKey);
    const float below = as_float(bottom ? bottom - 1 : 0);
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

__global__ void __launch_bounds__(kThreads, kBlocks) list_kernel(const Sack a) {
  TTA_SHARED(Tally, tally);
  const int64_t row = a.row();
  const int t = a.tile();
  SackState& r = a.state(row);
  if (r.status != kSeeksCritical) return;
  const Items items(a, row, r);
  if (r.equal)
    list_tile<true>(a, items, &r, t, a.list(row));
  else
    list_tile<false>(a, items, &r, t, a.list(row));
  if (!last_to_arrive(a.arrivals + row, static_cast<uint32_t>(a.tiles))) return;
  if (a.tiles == 1 && all_fits(items)) {
    if (threadIdx.x == 0) r.status = kTakesAll;
    return;
  }
  const Place critical = critical_item(a, row, items, &tally);
  if (threadIdx.x == 0) r.critical = critical;
}

__global__ void __launch_bounds__(kThreads, kBlocks) select_kernel(const Sack a) {
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
    TTA_LAUNCH((survey_kernel), grid, kThreads, 0, launch.stream, sack);
    if (sack.tiles > 1) TTA_LAUNCH((tally_kernel), grid, kThreads, 0, launch.stream, sack);
    TTA_LAUNCH((list_kernel), grid, kThreads, 0, launch.stream, sack);
    TTA_LAUNCH((select_kernel), grid, kThreads, 0, launch.stream, sack);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
