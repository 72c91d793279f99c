// greedy_knapsack: the items of a row, their order and units, and what a row has taught so far
// (knapsack.cu).
#pragma once

#include "cuda/launch.h"
#include "cuda/tile.cuh"

namespace tta {
namespace cuda {

constexpr int kBands = 4096;
constexpr int kBandBits = 12;
constexpr int kBandsEach = kBands / kThreads;
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

inline size_t bytes_of_row(int tiles) {
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
  return static_cast<double>(near) > capacity
             ? device::scalar_from_bits(device::scalar_bits(near) - 1)
             : near;
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
    above = device::scalar_from_bits(key < kTopKey ? key + 1 : kTopKey);
    below = device::scalar_from_bits(key ? key - 1 : 0);
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

}  // namespace cuda
}  // namespace tta
