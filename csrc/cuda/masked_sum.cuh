// Masked sums: the mass of what a set defers, and of what it keeps.
#pragma once

#include "cuda/read.cuh"
#include "cuda/rules.cuh"
#include "cuda/statistics.cuh"

namespace tta {
namespace cuda {

__device__ __forceinline__ Deferral before(const Cut& cut) {
  return {cut, -1, 0.0, kInfinity, false, false};
}

// The canonical sum of a tile's positive terms, or of its negative ones' sizes.
template <bool kNegative>
__device__ __forceinline__ float canonical_sum_of_sign(const float* weights, int count) {
  const auto add = [](float sum, float w) {
    return add_flush(sum, fmaxf(kNegative ? -w : w, 0.0f));
  };
  return canonical_sum_by<float>(add, weights, count);
}

// ---- by nodes ----------------------------------------------------------------------------------
//
// Few tokens are likely, and of most rules these are all that lies on one side of the cut in a
// tile. Of the tree that adds a tile's 128 virtual lanes, the first sums (nodes: lanes l and l +
// 64) are kept from the statistics; a masked sum then makes those anew that hold one of the few,
// and takes the others as they are. By a warp a tile, whose lanes have two nodes each (fold_nodes).

constexpr int kMostNodes = kNodes / 2;  // that are made anew; all elements where there are more
constexpr int kNodesAtOnce = 16;        // a virtual lane a thread
static_assert(2 * kNodesAtOnce * kGroups * kWarps == kTile, "in the place of a tile's weights");

// Nodes of a tile: bit 16 i + l is node i of lane l in a fold, or of lane 16 + l.
struct Nodes {
  uint32_t lower, upper;

  __device__ __forceinline__ bool any() const { return (lower | upper) != 0; }
  __device__ __forceinline__ int count() const { return __popc(lower) + __popc(upper); }
  __device__ __forceinline__ bool has(int i) const {
    const uint32_t mine = lane_id() < 16 ? lower : upper;
    return (mine >> (16 * i + lane_id() % 16) & 1u) != 0;
  }
  // How many are taken before this lane's i-th.
  __device__ __forceinline__ int before(int i) const {
    const uint32_t below = (1u << (16 * i + lane_id() % 16)) - 1;
    return lane_id() < 16 ? __popc(lower & below) : __popc(lower) + __popc(upper & below);
  }
  // Removes the first: its virtual lanes are the number returned and kNodes more.
  __device__ __forceinline__ int take() {
    const bool low = lower != 0;
    const int bit = __ffs(static_cast<int>(low ? lower : upper)) - 1;
    if (low)
      lower &= lower - 1;
    else
      upper &= upper - 1;
    return bit % 16 * 4 + bit / 16 + (low ? 0 : 2);
  }
};

// Those with an element that is not below `end`, in a tile of `count` elements. For a warp, a lane
// of which has the four virtual lanes that it adds up in the canonical sum.
template <int kType>
__device__ __forceinline__ Nodes find_nodes(const char* data, int count, float end) {
  float m[4];  // the largest of each virtual lane
  const int first = lane_id() * 4;
  if (count < kTile || !aligned_to_four(data, kType)) {
#pragma unroll
    for (int c = 0; c < 4; ++c) m[c] = -kInfinity;
#pragma unroll 4
    for (int place = first; place < count; place += kLanes)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (place + c < count) m[c] = fmaxf(m[c], read_one<kType>(data, place + c));
  } else if constexpr (kType == kFloat32) {
    constexpr int kAtOnce = 16;
#pragma unroll
    for (int c = 0; c < 4; ++c) m[c] = -kInfinity;
#pragma unroll 1
    for (int j = first; j < kTile; j += kAtOnce * kLanes) {
      float x[kAtOnce][4];
#pragma unroll
      for (int g = 0; g < kAtOnce; ++g) read_four<kType>(data, j + g * kLanes, x[g]);
#pragma unroll
      for (int g = 0; g < kAtOnce; ++g)
#pragma unroll
        for (int c = 0; c < 4; ++c) m[c] = fmaxf(m[c], x[g][c]);
      // Of a flat row the first half tells that no node is without one.
      if (__all_sync(kFullWarp, fminf(fminf(m[0], m[1]), fminf(m[2], m[3])) >= end)) break;
    }
  } else {
    const uint2* const mine = reinterpret_cast<const uint2*>(data) + lane_id();
    uint2 most = __ldg(mine);
#pragma unroll 16
    for (int g = 1; g < kGroups; ++g) {
      const uint2 word = __ldg(mine + g * 32);
      most.x = max_or_nan_of_pairs<kType>(most.x, word.x);
      most.y = max_or_nan_of_pairs<kType>(most.y, word.y);
    }
    widen<kType>(most.x, m);
    widen<kType>(most.y, m + 2);
  }
  uint32_t lanes[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) lanes[c] = __ballot_sync(kFullWarp, m[c] >= end);
  const auto folded = [&](int c) { return lanes[c] | lanes[c] >> 16 | lanes[c] << 16; };
  return {(folded(0) & 0xffffu) | (folded(1) & 0xffff0000u),
          (folded(2) & 0xffffu) | (folded(3) & 0xffff0000u)};
}

// Where the weight of an element of group g in the c-th virtual lane lies, so that neither warps
// that write a virtual lane nor threads that read one each, in fours, meet in a bank.
__device__ __forceinline__ int node_place(int c, int g) { return c * kGroups + (g ^ c % 8 * 4); }

// This lane's elements of a node, one of each of its virtual lanes; -inf beyond the row.
template <int kType>
struct NodePair {
  int place[2];
  float x[2], y[2];  // base and judged

  __device__ __forceinline__ NodePair(const Source& base, const Source& judged, int count,
                                      bool by_proxy, int node) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      place[half] = lane_id() * kLanes + half * kNodes + node;
      const bool inside = place[half] < count;
      x[half] = inside ? read_one<kType>(base.data, place[half]) : -kInfinity;
      y[half] = inside && by_proxy ? read_one<kType>(judged.data, place[half]) : x[half];
    }
  }
};

// Takes kNodesAtOnce nodes or fewer and weighs their elements, a group a lane; kept ones are
// negative, or nothing where they are not wanted. Returns how many nodes; followed by a barrier of
// the warp. `lowest`: of the kept logits.
template <int kType, bool kWithKept>
__device__ __forceinline__ int weigh_nodes(const Source& base, const Source& judged, int count,
                                           const TileTest& test, bool by_proxy, Nodes* left,
                                           float reference, float inv_temperature, float* weights,
                                           float* lowest) {
  const int made = left->count() < kNodesAtOnce ? left->count() : kNodesAtOnce;
  NodePair<kType> next(base, judged, count, by_proxy, left->take());
#pragma unroll 1
  for (int i = 0; i < made; ++i) {
    const NodePair<kType> now = next;
    if (i + 1 < made)  // underway while these are used
      next = NodePair<kType>(base, judged, count, by_proxy, left->take());
    device::F w[2];
    bool in[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      in[half] = test.one<false>(now.y[half], now.place[half]);
      if (!in[half] && now.place[half] < count) *lowest = fminf(*lowest, now.x[half]);
      w[half].v =
          fmaxf(mul_rn(sub_rn(now.x[half], reference), inv_temperature), device::kExpTermLow);
    }
    device::exp_term_pack<2>(w);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      weights[node_place(2 * i + half, lane_id())] = in[half]    ? w[half].v
                                                     : kWithKept ? -w[half].v
                                                                 : 0.0f;
  }
  __syncwarp();
  return made;
}

// What this lane has in the folds of what is deferred and of what is kept.
struct NodeSums {
  float deferred[2], kept[2];
};

// Adds up the virtual lanes of the `made` nodes that were weighed last, a virtual lane a thread,
// and gives them to the lanes that fold them; `earlier` were weighed before them.
template <bool kWithKept>
__device__ __forceinline__ void sum_nodes(const float* weights, const Nodes& found, int earlier,
                                          int made, NodeSums* to) {
  float deferred = 0.0f, kept = 0.0f;
  if (lane_id() < 2 * made) {
#pragma unroll
    for (int g = 0; g < kGroups; g += 4) {
      const float4 v = *reinterpret_cast<const float4*>(weights + node_place(lane_id(), g));
      const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        deferred = add_flush(deferred, kWithKept ? fmaxf(w[k], 0.0f) : w[k]);
        if (kWithKept) kept = add_flush(kept, fmaxf(-w[k], 0.0f));
      }
    }
  }
  deferred = add_rn(deferred, __shfl_down_sync(kFullWarp, deferred, 1));
  if (kWithKept) kept = add_rn(kept, __shfl_down_sync(kFullWarp, kept, 1));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = found.before(i) - earlier;
    const bool mine = found.has(i) && at >= 0 && at < made;
    const float deferred_sum = __shfl_sync(kFullWarp, deferred, 2 * at & 31);
    if (mine) to->deferred[i] = deferred_sum;
    if (!kWithKept) continue;
    const float kept_sum = __shfl_sync(kFullWarp, kept, 2 * at & 31);
    if (mine) to->kept[i] = kept_sum;
  }
  __syncwarp();
}

// The mass of a tile that counts whole, or not at all, by the one thread that `writes`: it is not
// read. False: another.
template <bool kWithKept>
__device__ __forceinline__ bool whole_mass(const Kad& a, int64_t row, int t, int query, int slot,
                                           const TileTest& test, bool writes) {
  const double scale = a.s.scale(row, slot)[t];
  if (!test.uniform && scale != 0.0) return false;
  if (writes) {
    const double all = mul_rn(static_cast<double>(a.s.tile_sum(row, slot)[t]), scale);
    a.s.mass(row, query)[t] = test.all ? all : 0.0;
    if (kWithKept) a.s.mass(row, query + 1)[t] = test.all ? 0.0 : all;
  }
  return true;
}

// The base's canonical mass, at one slot's temperature, of what a set defers in a tile, into
// `query` of the scratch memory; and of what it keeps, the critical item included, into the next.
// For a whole block.
template <bool kWithKept>
__device__ __forceinline__ void tile_mass(const Kad& a, int64_t row, int t, int query,
                                          const Deferral& set, int slot, float* weights) {
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  if (whole_mass<kWithKept>(a, row, t, query, slot, test, threadIdx.x == 0)) return;
  const double scale = a.s.scale(row, slot)[t];
  double* deferred_mass = a.s.mass(row, query) + t;
  double* kept_mass = a.s.mass(row, query + kWithKept) + t;
  const float m = a.s.tile_max(row, 0)[t];
  const float inv = slot < 2 ? a.rule.inv_temperature : a.rule.inv_rule_temperature;
  const Source base(a.base_row(row), t);
  const Source judged = set.by_proxy ? Source(a.proxy_row(row), t) : base;
  const Tile map = map_of(a.base.vocab, t, base.aligned() && judged.aligned());
  const auto weigh = [&](auto unit_temperature) {
    each_four(map, base, judged, true, [&](auto read, int i, const float* x) {
      float w[4];
      bool in[4];
      terms_of_four<unit_temperature.value>(x, m, inv, w);
      judge_four(test, set.by_proxy, judged, read, map, i, x, in);
      // With kept ones wanted too, the sign tells them apart.
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = in[k] ? w[k] : kWithKept ? -w[k] : 0.0f;
      put_four(map, i, w, weights);
    });
  };
  if (inv == 1.0f)
    weigh(std::true_type());
  else
    weigh(std::false_type());
  __syncthreads();
  if (warp_id() == 0) {
    const float sum = kWithKept ? canonical_sum_of_sign<false>(weights, map.count)
                                : canonical_sum<true>(weights, map.count);
    if (lane_id() == 0) *deferred_mass = mul_rn(static_cast<double>(sum), scale);
  } else if (kWithKept && warp_id() == 1) {
    const float sum = canonical_sum_of_sign<true>(weights, map.count);
    if (lane_id() == 0) *kept_mass = mul_rn(static_cast<double>(sum), scale);
  }
}

// The canonical sum of what a test takes of a tile's `count` elements, in the first lane of the
// warp that adds it up: each lane has four virtual lanes.
template <int kType, bool kUnitTemperature>
__device__ __forceinline__ float warp_sum(const char* data, int count, const TileTest& test,
                                          float reference, float inv_temperature) {
  float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const auto add = [&](auto plain, const float* x, int place) {
    float w[4];
    terms_of_four<kUnitTemperature>(x, reference, inv_temperature, w);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float weight = opaque(w[c]);  // or it would be made anew behind a branch
      if (test.one<plain.value>(x[c], place + c)) lane[c] = add_flush(lane[c], weight);
    }
  };
  const bool fours = aligned_to_four(data, kType);
  const int whole = fours && !test.parted ? count / kLanes * kLanes : 0;
  int place = lane_id() * 4;
#pragma unroll 2
  for (; place < whole; place += kLanes) {
    float x[4];
    read_four<kType>(data, place, x);
    add(std::true_type(), x, place);
  }
#pragma unroll 1
  for (; place < count; place += kLanes) {
    float x[4];
    if (fours && place + 4 <= count)
      read_four<kType>(data, place, x);
    else
#pragma unroll
      for (int c = 0; c < 4; ++c)
        x[c] = place + c < count ? read_one<kType>(data, place + c) : -kInfinity;
    add(std::false_type(), x, place);
  }
  return fold(lane);
}

// Into query 0, at one slot's temperature: the base's canonical mass of what lies before a cut in a
// tile. For a warp.
__device__ __forceinline__ void warp_mass_before(const Kad& a, int64_t row, int t, const Cut& cut,
                                                 int slot) {
  const float reference = a.s.tile_max(row, 0)[t];
  const TileTest test(before(cut), t, reference);
  if (whole_mass<false>(a, row, t, 0, slot, test, lane_id() == 0)) return;
  const Row base = a.base_row(row);
  const int count = map_of(base.vocab, t, true).count;
  const float inv = slot < 2 ? a.rule.inv_temperature : a.rule.inv_rule_temperature;
  const float sum = of_type(base.dtype, [&](auto type) {
    return inv == 1.0f ? warp_sum<type.value, true>(base.begin(t), count, test, reference, 1.0f)
                       : warp_sum<type.value, false>(base.begin(t), count, test, reference, inv);
  });
  if (lane_id() == 0)
    a.s.mass(row, 0)[t] = mul_rn(static_cast<double>(sum), a.s.scale(row, slot)[t]);
}

// The same by nodes, into queries 0 and 1 at the sampling temperature, and the lowest kept logit.
// For a warp; false where too many nodes hold an element of the cut's upper side. Rows of one type.
template <int kType, bool kWithKept>
__device__ __forceinline__ bool mass_by_nodes(const Kad& a, int64_t row, int t,
                                              const TileTest& test, bool by_proxy,
                                              const Source& base, const Source& judged,
                                              float* weights, float* lowest) {
  const int count = map_of(a.base.vocab, t, true).count;
  const Nodes found = find_nodes<kType>(judged.data, count, test.end);
  if (found.count() > kMostNodes) return false;
  // Of a node without such an element everything is on the lower side.
  const float2 whole = *reinterpret_cast<const float2*>(a.nodes_of(row, t) + first_node());
  const float2 none = make_float2(0.0f, 0.0f);
  const float2 deferred = test.upper ? none : whole, kept = test.upper ? whole : none;
  NodeSums sums = {{deferred.x, deferred.y}, {kept.x, kept.y}};
  const float reference = a.s.tile_max(row, 0)[t];
  Nodes left = found;
  for (int earlier = 0; left.any(); earlier += kNodesAtOnce) {
    const int made =
        weigh_nodes<kType, kWithKept>(base, judged, count, test, by_proxy, &left, reference,
                                      a.rule.inv_temperature, weights, lowest);
    sum_nodes<kWithKept>(weights, found, earlier, made, &sums);
  }
  const double scale = a.s.scale(row, kBaseSlot)[t];
  const auto put = [&](int query, const float* of_lane) {
    const float sum = fold_nodes(of_lane[0], of_lane[1]);
    if (lane_id() == 0) a.s.mass(row, query)[t] = mul_rn(static_cast<double>(sum), scale);
  };
  put(0, sums.deferred);
  if (kWithKept) put(1, sums.kept);
  return true;
}

enum Left : int { kMassLeft = 1, kLowestLeft = 2 };

// What a warp does of a tile's masses and its lowest kept logit; the rest is left to the block.
template <bool kWithKept>
__device__ __forceinline__ int warp_mass(const Kad& a, int64_t row, int t, const Deferral& set,
                                         const Row& base_row, const Row& judged_row, float* weights,
                                         float* lowest) {
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  const int lowest_left = test.uniform && test.all ? 0 : kLowestLeft;
  if (whole_mass<kWithKept>(a, row, t, 0, kBaseSlot, test, lane_id() == 0)) return lowest_left;
  bool done = false;
  if (judged_row.dtype == base_row.dtype) {
    const Source base(base_row, t), judged(judged_row, t);
    done = of_type(base.dtype, [&](auto type) {
      return mass_by_nodes<type.value, kWithKept>(a, row, t, test, set.by_proxy, base, judged,
                                                  weights, lowest);
    });
  }
  if (!done) return kMassLeft | lowest_left;
  return set.by_proxy ? lowest_left : 0;
}

// The lowest kept logit of this thread's elements of a tile.
__device__ __forceinline__ float lowest_kept(const Kad& a, int64_t row, int t, const Deferral& set,
                                             const Row& base_row, const Row& judged_row) {
  float lowest = kInfinity;
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  if (test.uniform && test.all) return lowest;
  const Source base(base_row, t), judged(judged_row, t);
  const Tile map = map_of(a.base.vocab, t, base.aligned() && judged.aligned());
  each_four(map, base, judged, true, [&](auto read, int i, const float* x) {
    bool in[4];
    judge_four(test, set.by_proxy, judged, read, map, i, x, in);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (read.kPlain || map.at(i + k) < map.count)
        lowest = fminf(lowest, in[k] ? kInfinity : x[k]);
  });
  return lowest;
}

// The masses of the tiles of this block: by a warp each, and what these leave by all of them.
// kLowest: its lowest kept logit, into query 2 of its first tile.
template <bool kWithKept, bool kLowest>
__device__ __forceinline__ void block_masses(const Kad& a, int64_t row, const Deferral& set,
                                             float* weights) {
  static_assert(kMostSpan <= kWarps, "a warp a tile");
  TTA_SHARED_ARRAY(int, left, kWarps);
  const Row base = a.base_row(row);
  const Row judged = set.by_proxy ? a.proxy_row(row) : base;
  const bool by_nodes = a.nodes && !a.s.state(row).keeps_many;
  const int first = a.first_tile(), end = a.end_tile(), mine = first + warp_id();
  float lowest = kInfinity;
  if (mine < end) {
    int open = kMassLeft | kLowestLeft;
    if (by_nodes)
      open = warp_mass<kWithKept>(a, row, mine, set, base, judged,
                                  weights + warp_id() * (kTile / kWarps), &lowest);
    if (lane_id() == 0) left[warp_id()] = open;
  }
  __syncthreads();
#pragma unroll 1
  for (int t = first; t < end; ++t) {
    if (left[t - first] & kMassLeft) {
      // The knapsack's sets, of flat rows, in a loop that asks for neither.
      if (set.by_proxy || set.upper)
        tile_mass<kWithKept>(a, row, t, 0, set, kBaseSlot, weights);
      else
        tile_mass<kWithKept>(a, row, t, 0, before(set.cut), kBaseSlot, weights);
      __syncthreads();
    }
    if (kLowest && (left[t - first] & kLowestLeft))
      lowest = fminf(lowest, lowest_kept(a, row, t, set, base, judged));
  }
  if (kLowest) {
    lowest = block_reduce(lowest, Min());
    if (threadIdx.x == 0) a.s.mass(row, 2)[first] = static_cast<double>(lowest);
  }
}

// The deferred masses of the tiles of this block at the rule's temperature.
__device__ __forceinline__ void block_masses_at_rule(const Kad& a, int64_t row, int query,
                                                     const Deferral& set, float* weights) {
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t) {
    tile_mass<false>(a, row, t, query, set, kBaseRuleSlot, weights);
    __syncthreads();
  }
}

// What the critical item adds to the deferred mass at the two temperatures.
struct Share {
  double sampled, at_rule;
};

// Splits the critical item of a row, if it has one to split: its fraction fills the capacity beside
// `rule_sum`, the mass deferred before it at the rule's temperature. For one thread.
__device__ __forceinline__ Share split(const Kad& a, int64_t row, double rule_sum) {
  RowState& r = a.s.state(row);
  Deferral& d = r.deferral;
  if (d.critical < 0 || a.rule.critical != kSplitItem) return {0.0, 0.0};
  const double at_rule = canonical_weight(a.s, row, a.base_rule_slot(), a.rule.inv_rule_temperature,
                                          d.critical_x, d.critical);
  d.fraction = split_fraction(r.bound, rule_sum, at_rule);
  const double sampled =
      canonical_weight(a.s, row, kBaseSlot, a.rule.inv_temperature, d.critical_x, d.critical);
  return {mul_rn(d.fraction, sampled), mul_rn(d.fraction, at_rule)};
}

}  // namespace cuda
}  // namespace tta
