// A tile in memory: how a block or its warps read it, and which of its elements a set defers.
#pragma once

#include "cuda/kad.cuh"

namespace tta {
namespace cuda {

// One row's tile, to be read four elements a thread at a time: a whole one would not fit the
// registers beside the arithmetic.
struct Source {
  const char* data;
  int dtype;

  __device__ __forceinline__ Source(const Row& row, int t)
      : data(row.data + static_cast<int64_t>(t) * kTile * element_bytes(row.dtype)),
        dtype(row.dtype) {}
  __device__ __forceinline__ bool aligned() const { return aligned_to_four(data, dtype); }
};

// How each_four's loops read a thread's elements i .. i + 3; kPlain: in a whole aligned tile, about
// which nothing else needs to be asked either.
template <int kType>
struct ReadWhole {
  static constexpr bool kPlain = true;
  __device__ __forceinline__ void operator()(const Source& s, const Tile& map, int i,
                                             float* x) const {
    read_four<kType>(s.data, map.at(i), x);
  }
};
struct ReadPart {
  static constexpr bool kPlain = false;
  __device__ __forceinline__ void operator()(const Source& s, const Tile& map, int i,
                                             float* x) const {
    read_part(s.data, s.dtype, map, i, x);
  }
};

__device__ __forceinline__ Tile map_of(int64_t vocab, int t, bool vector) {
  Tile map;
  place(&map, vocab, t, vector);
  return map;
}

template <int kType, class Use>
__device__ __forceinline__ void each_four_of_whole(const Tile& map, const Source& source, Use use) {
  const ReadWhole<kType> read;
  float next[4];
  read(source, map, 0, next);
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    const float x[4] = {next[0], next[1], next[2], next[3]};
    if (i + 4 < kPerThread) read(source, map, i + 4, next);  // underway while these are used
    use(read, i, x);
  }
}

// use(read, i, x) for all of a thread's elements of a source, x: elements i .. i + 3; read(other,
// map, i, y) reads the other source's. `plain`: the caller has no question about single elements if
// the tile is whole and aligned; then it gets a loop without any.
template <class Use>
__device__ __forceinline__ void each_four(const Tile& map, const Source& source,
                                          const Source& other, bool plain, Use use) {
  const int dtype = source.dtype;
  plain = plain && map.vector && map.count == kTile && other.dtype == dtype;
  if (plain && dtype == kFloat32) return each_four_of_whole<kFloat32>(map, source, use);
  if (plain && dtype == kFloat16) return each_four_of_whole<kFloat16>(map, source, use);
  if (plain) return each_four_of_whole<kBFloat16>(map, source, use);
#pragma unroll 1
  for (int i = 0; i < kPerThread; i += 4) {
    const ReadPart read;
    float x[4];
    read(source, map, i, x);
    use(read, i, x);
  }
}
template <class Use>
__device__ __forceinline__ void each_four(const Tile& map, const Source& source, bool plain,
                                          Use use) {
  each_four(map, source, source, plain, use);
}

// The same with all loads of a whole tile under way at once, in a loop without turns: for what does
// little with an element. use(plain, i, x), `plain` a constant.
template <class Use>
__device__ __forceinline__ void each_four_stored(const Tile& map, const Source& source, bool plain,
                                                 const Use& use) {
  if (plain && map.vector && map.count == kTile) {
    of_type(source.dtype, [&](auto type) {
      const Stored<type.value> stored(source.data, map.first);
#pragma unroll
      for (int i = 0; i < kPerThread; i += 4) {
        float x[4];
        stored.four(i / 4, x);
        use(std::true_type(), i, x);
      }
    });
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    read_part(source.data, source.dtype, map, i, x);
    use(std::false_type(), i, x);
  }
}

// The tiles of this block: by_warp(type, t, elements) by a warp each, where there are
// Kad::by_warps, or by_block(t) one after another.
template <class ByWarp, class ByBlock>
__device__ __forceinline__ void each_tile(const Kad& a, const Row& row, bool warps,
                                          const ByWarp& by_warp, const ByBlock& by_block) {
  const int first = a.first_tile(), end = a.end_tile();
  if (!warps) {
#pragma unroll 1
    for (int t = first; t < end; ++t) by_block(t);
    return;
  }
  const int t = first + warp_id();
  if (t >= end) return;
  const int count = map_of(row.vocab, t, true).count;
  if (row.dtype == kFloat16)
    by_warp(Type<kFloat16>(), t, count);
  else
    by_warp(Type<kBFloat16>(), t, count);
}

// The least float greater than x; +inf is its own.
__device__ __forceinline__ float next_above(float x) {
  return x == kInfinity ? x : from_ordered_bits(ordered_bits(add_rn(x, 0.0f)) + 1);  // -0 as +0
}

// A deferral's test of one tile's elements: by one number, unless the cut's id lies in the tile and
// parts its ties.
struct TileTest {
  float end;  // what is less lies on the cut's lower side, the rest on its upper one
  float cut;
  int ties;  // where the tile is parted: those at smaller places are before the cut
  bool parted;
  bool upper;         // the cut's upper side is deferred, not the lower one
  bool uniform, all;  // all elements are deferred, or none is

  __device__ __forceinline__ TileTest(const Deferral& d, int t, float tile_max)
      : cut(d.cut.x), upper(d.upper) {
    const int64_t left = d.cut.id - static_cast<int64_t>(t) * kTile;
    parted = left >= 0 && left < kTile;
    ties = static_cast<int>(parted ? left : 0);
    end = left < kTile ? cut : next_above(cut);
    const bool whole = tile_max < end;
    uniform = whole || end == -kInfinity;
    all = whole != upper;
  }
  // The element at a place of the tile; kPlain: of one that is not parted.
  template <bool kPlain>
  __device__ __forceinline__ bool one(float x, int place) const {
    if (!kPlain && parted && x == cut) return (place < ties) != upper;
    return (x < end) != upper;
  }
  // A byte, 1 or 0, each of four elements at places of the tile.
  template <bool kPlain, class PlaceOf>
  __device__ __forceinline__ uint32_t bytes(const float* x, const PlaceOf& place_of) const {
    uint32_t word = upper ? 0x01010101u : 0u;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (x[k] < end) word ^= 1u << 8 * k;
    if (!kPlain && parted)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (x[k] == cut && place_of(k) < ties) word ^= 1u << 8 * k;
    return word;
  }
  // Elements i .. i + 3 of a thread.
  template <bool kPlain>
  __device__ __forceinline__ void four(const float* x, const Tile& map, int i, bool* in) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) in[k] = one<kPlain>(x[k], map.at(i + k));
  }
};

// Which of elements i .. i + 3 of a thread, whose base logits are x, a test defers; `judged`: the
// row it looks at, another one where `by_proxy`.
template <class Read>
__device__ __forceinline__ void judge_four(const TileTest& test, bool by_proxy,
                                           const Source& judged, Read read, const Tile& map, int i,
                                           const float* x, bool* in) {
  const auto judge = [&](const float* y) {
    if (test.parted)
      test.four<false>(y, map, i, in);
    else
      test.four<true>(y, map, i, in);
  };
  if (!by_proxy) return judge(x);
  float y[4];
  read(judged, map, i, y);
  judge(y);
}

}  // namespace cuda
}  // namespace tta
