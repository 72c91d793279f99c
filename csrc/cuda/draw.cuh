// Draws from a row whose statistics are known, and its largest logit.
#pragma once

#include "cuda/row.cuh"

namespace tta {
namespace cuda {

// First element of the tile whose scaled prefix passes `target`; the last one of non-zero weight if
// none does. Weights are taken as multiples of 2^-40, so integers hold the prefixes exactly and the
// order of their additions is free: 32 neighbours a thread first, read in turns that no two lanes
// take from one bank, then a lane an element of the thread in whose range the prefix passes.
// Weights beyond the row are 0 or terms of an impossible token. For a whole block.
__device__ __forceinline__ int find_in_tile(const float* weights, double scale, double before,
                                            double target) {
  constexpr int kNone = kThreads;
  TTA_SHARED_ARRAY(int64_t, warp_total, kWarps);
  TTA_SHARED_ARRAY(int64_t, start, kThreads);
  TTA_SHARED_ARRAY(int, first_passing, kWarps);
  TTA_SHARED_ARRAY(int, last_nonzero, kWarps);
  const int me = static_cast<int>(threadIdx.x);
  Quanta quanta;
#pragma unroll 4
  for (int turn = 0; turn < 8; ++turn) {
    const int four = me * 8 + (turn + lane_id()) % 8;
    const float4 w = *reinterpret_cast<const float4*>(weights + four * 4);
    quanta.add(w.x), quanta.add(w.y), quanta.add(w.z), quanta.add(w.w);
  }
  const int64_t mine = quanta.sum();
  int64_t through = warp_scan(mine);
  if (lane_id() == 31) warp_total[warp_id()] = through;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w < warp_id()) through += warp_total[w];
  start[me] = through - mine;
  const auto passes = [&](int64_t prefix) {
    const double mass = mul_rn(mul_rn(static_cast<double>(prefix), 0x1p-40), scale);
    return add_rn(before, mass) > target;
  };
  const unsigned nonzero = __ballot_sync(kFullWarp, mine != 0);
  const unsigned passing = __ballot_sync(kFullWarp, mine != 0 && passes(through));
  if (lane_id() == 0) {
    first_passing[warp_id()] = passing ? warp_id() * 32 + __ffs(passing) - 1 : kNone;
    last_nonzero[warp_id()] = nonzero ? warp_id() * 32 + 31 - __clz(nonzero) : 0;
  }
  __syncthreads();
  int first = kNone, last = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    first = first_passing[w] < first ? first_passing[w] : first;
    last = last_nonzero[w] > last ? last_nonzero[w] : last;
  }
  const int owner = first < kNone ? first : last;
  const int64_t here = Quanta::of(weights[owner * 32 + lane_id()]);
  const int64_t prefix = start[owner] + warp_scan(here);
  const unsigned some = __ballot_sync(kFullWarp, here != 0);
  const unsigned past = __ballot_sync(kFullWarp, here != 0 && passes(prefix));
  const int at = first < kNone ? __ffs(past) - 1 : some ? 31 - __clz(some) : 0;
  __syncthreads();  // before anybody writes the weights or these numbers again
  return owner * 32 + at;
}

// The tile in which the cumulative mass passes `target`, the mass before it, and the target to look
// for inside: beyond the end by rounding means the last token.
struct TileChoice {
  int t;
  double before, target;
};

// Every warp by itself: no barriers.
template <class Mass>
__device__ __forceinline__ TileChoice choose_tile(const double* cum, int tiles, double target,
                                                  Mass mass) {
  for (int first = 0; first < tiles; first += 32) {
    const int i = first + lane_id();
    const unsigned passing = __ballot_sync(kFullWarp, i < tiles && cum[i] > target);
    if (!passing) continue;
    const int t = first + __ffs(passing) - 1;
    return {t, t ? cum[t - 1] : 0.0, target};
  }
  int last = 0;
  for (int first = 0; first < tiles; first += 32) {
    const int i = first + lane_id();
    const unsigned some = __ballot_sync(kFullWarp, i < tiles && mass(i) > 0.0);
    if (some) last = first + 31 - __clz(some);
  }
  return {last, 0.0, static_cast<double>(kInfinity)};
}

// Inverse CDF at u in [0, 1) over a row whose `cum` is at hand. For a whole block.
template <class Reader>
__device__ __forceinline__ int64_t draw(const Reader& reader, const Scratch& s, int64_t row,
                                        int slot, int model, float inv_temperature, double z,
                                        double u, const double* cum, float* weights) {
  const TileChoice choice = choose_tile(cum, s.tiles, mul_rn(u, z), [&](int t) {
    return mul_rn(static_cast<double>(s.tile_sum(row, slot)[t]), s.scale(row, slot)[t]);
  });
  const float reference = s.tile_max(row, model)[choice.t];
  const double scale = s.scale(row, slot)[choice.t];
  const Tile tile = reader.map(choice.t);
  stage(reader, choice.t, tile, weights);
  weigh_staged(tile, reference, inv_temperature, weights);
  const int j = find_in_tile(weights, scale, choice.before, choice.target);
  return static_cast<int64_t>(choice.t) * kTile + j;
}

// The first of a thread's elements of a tile that equal `value`; kTile if there is none.
template <class Reader>
__device__ __forceinline__ int first_equal(const Reader& reader, int t, const Tile& tile,
                                           float value) {
  int first = kTile;
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    read_four(reader, t, tile, i, x);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tile.at(i + k) < tile.count && x[k] == value)
        first = tile.at(i + k) < first ? tile.at(i + k) : first;
  }
  return first;
}

template <int kType>
__device__ __forceinline__ int first_equal(const Stored<kType>& stored, const Tile& tile,
                                           float value) {
  int first = kTile;
#pragma unroll
  for (int g = kPerThread / 4 - 1; g >= 0; --g) {
    float x[4];
    stored.four(g, x);
#pragma unroll
    for (int k = 3; k >= 0; --k)
      if (x[k] == value) first = tile.first + g * kLanes + k;
  }
  return first;
}

// All loads of a whole aligned tile at once: one wait for L2, not eight.
__device__ __forceinline__ int first_equal(const Row& row, int t, const Tile& tile, float value) {
  if (!tile.vector || tile.count < kTile) return first_equal<Row>(row, t, tile, value);
  const char* data = row.begin(t);
  if (row.dtype == kFloat32) return first_equal(Stored<kFloat32>(data, tile.first), tile, value);
  if (row.dtype == kFloat16) return first_equal(Stored<kFloat16>(data, tile.first), tile, value);
  return first_equal(Stored<kBFloat16>(data, tile.first), tile, value);
}

// Lowest id of the row's largest logit.
template <class Reader>
__device__ __forceinline__ int64_t first_of_max(const Reader& reader, const Scratch& s, int64_t row,
                                                int model, float max) {
  int mine = kMaxTiles;
  for (int i = static_cast<int>(threadIdx.x); i < s.tiles; i += kThreads)
    if (s.tile_max(row, model)[i] == max && i < mine) mine = i;
  const int t = block_reduce(mine, Min());
  const int found = first_equal(reader, t, reader.map(t), max);
  return static_cast<int64_t>(t) * kTile + block_reduce(found, Min());
}

// The uniform of one decision about batch row b, `ahead` tokens after its position.
__device__ __forceinline__ double uniform_of(const KeySpec& key, int64_t b, int64_t ahead,
                                             uint32_t stream, uint32_t number = 0) {
  return philox_uniform(seed_bits(key.seed), number, static_cast<uint32_t>(key.position[b] + ahead),
                        static_cast<uint32_t>(key.sequence[b]), key.word3(stream, b));
}

}  // namespace cuda
}  // namespace tta
