// Log-linear mixtures: score = base + sum_e beta_e (expert_e - anti_e), computed tile by tile
// wherever a stored row would be read. Row normalisers cancel in the softmax.
#pragma once

#include "cuda/tile.cuh"

namespace tta {
namespace cuda {

struct MixtureRow {
  const MixtureArgs& a;
  int64_t row;

  __device__ __forceinline__ const char* data(const Logits& x, int64_t expert) const {
    return static_cast<const char*>(x.data) +
           (expert * x.batch_stride + row * x.row_stride) * element_bytes(x.dtype);
  }

  __device__ __forceinline__ const char* begin(const Logits& x, int64_t expert, int t) const {
    return data(x, expert) +
           static_cast<unsigned>(t) * static_cast<unsigned>(kTile * element_bytes(x.dtype));
  }

  __device__ __forceinline__ bool aligned() const {
    bool all = aligned_to_four(data(a.base, 0), a.base.dtype);
    for (int64_t e = 0; e < a.experts; ++e) {
      all = all && aligned_to_four(data(a.expert, e), a.expert.dtype);
      if (a.anti.data) all = all && aligned_to_four(data(a.anti, e), a.anti.dtype);
    }
    return all;
  }

  __device__ __forceinline__ void part(const Logits& x, int64_t expert, int t, const Tile& tile,
                                       int i, float* out) const {
    read_part(begin(x, expert, t), x.dtype, tile, i, out);
  }

  __device__ __forceinline__ Tile map(int t) const {
    Tile tile;
    place(&tile, a.base.vocab, t, aligned());
    return tile;
  }

  // An expert and its anti-expert that both rule a token out say nothing about it, and a token the
  // base rules out stays out; NaN and +inf anywhere make the score NaN, which the sum reports.
  __device__ __forceinline__ void four(int t, const Tile& tile, int i, float* score) const {
    float base[4];
    part(a.base, 0, t, tile, i, base);
#pragma unroll
    for (int k = 0; k < 4; ++k) score[k] = base[k];
#pragma unroll 1
    for (int64_t e = 0; e < a.experts; ++e)
      if (a.beta[e] != 0.0f) add(e, t, tile, i, base, score);
    // Beyond the row every model reads -inf: whatever came of it there, it is no token.
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tile.at(i + k) >= tile.count) score[k] = -kInfinity;
  }

  // Adds expert e to four scores.
  __device__ __forceinline__ void add(int64_t e, int t, const Tile& tile, int i, const float* base,
                                      float* score) const {
    const float beta = a.beta[e];
    const bool has_anti = a.anti.data != nullptr;
    float expert[4], anti[4] = {};
    part(a.expert, e, t, tile, i, expert);
    if (has_anti) part(a.anti, e, t, tile, i, anti);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      score[k] = term(base[k], score[k], beta, expert[k], has_anti, anti[k]);
  }

  __device__ __forceinline__ static float term(float base, float score, float beta, float expert,
                                               bool has_anti, float anti) {
    const bool finite = expert < kInfinity && (!has_anti || anti < kInfinity);
    const bool neither = has_anti && expert == -kInfinity && anti == -kInfinity;
    const float difference = neither ? 0.0f : has_anti ? sub_rn(expert, anti) : expert;
    const bool ruled_out = base == -kInfinity && score == -kInfinity;
    const float sum = ruled_out ? -kInfinity : fma_rn(beta, difference, score);
    return finite ? sum : kNaN;
  }
};

__device__ __forceinline__ void read_four(const MixtureRow& row, int t, const Tile& tile, int i,
                                          float* x) {
  row.four(t, tile, i, x);
}

// Adds an expert (less its anti-expert) to the staged scores of a whole aligned tile, where the sum
// is finite: it has seen nothing but finite numbers then, and is the one that `term` gives. All
// loads are under way at once. Returns the groups of four that hold another, left as they were.
template <int kType, bool kAnti>
__device__ __forceinline__ uint32_t add_finite(const MixtureRow& row, int64_t e, int t,
                                               const Tile& tile, float* scores) {
  const Stored<kType> expert(row.begin(row.a.expert, e, t), tile.first);
  const Stored<kType> anti(row.begin(kAnti ? row.a.anti : row.a.expert, e, t), tile.first);
  const float beta = row.a.beta[e];
  uint32_t left = 0;
#pragma unroll
  for (int g = 0; g < kPerThread / 4; ++g) {
    float score[4], x[4], y[4];
    take_four(tile, g * 4, scores, score);
    expert.four(g, x);
    if (kAnti) anti.four(g, y);
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      score[k] = fma_rn(beta, kAnti ? sub_rn(x[k], y[k]) : x[k], score[k]);
      largest = max_or_nan(largest, fabsf(score[k]));
    }
    if (largest < kInfinity)
      put_four(tile, g * 4, score, scores);
    else
      left |= 1u << g;
  }
  return left;
}

template <int kType>
__device__ __forceinline__ uint32_t add_finite(const MixtureRow& row, int64_t e, int t,
                                               const Tile& tile, float* scores) {
  return row.a.anti.data ? add_finite<kType, true>(row, e, t, tile, scores)
                         : add_finite<kType, false>(row, e, t, tile, scores);
}

// A tile's scores, as `stage` of a stored row puts its logits.
__device__ __forceinline__ void stage(const MixtureRow& row, int t, const Tile& tile, float* to) {
  const int dtype = row.a.expert.dtype;
  const bool alike = !row.a.anti.data || row.a.anti.dtype == dtype;
  if (tile.vector && tile.count == kTile && alike) {
    stage(Row(row.a.base, 0, row.row), t, tile, to);
#pragma unroll 1
    for (int64_t e = 0; e < row.a.experts; ++e) {
      if (row.a.beta[e] == 0.0f) continue;
      uint32_t left = dtype == kFloat32   ? add_finite<kFloat32>(row, e, t, tile, to)
                      : dtype == kFloat16 ? add_finite<kFloat16>(row, e, t, tile, to)
                                          : add_finite<kBFloat16>(row, e, t, tile, to);
#pragma unroll 1
      for (; left; left &= left - 1) {
        const int i = (__ffs(static_cast<int>(left)) - 1) * 4;
        float base[4], score[4];
        row.part(row.a.base, 0, t, tile, i, base);
        take_four(tile, i, to, score);
        row.add(e, t, tile, i, base, score);
        put_four(tile, i, score, to);
      }
    }
    return;
  }
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    row.four(t, tile, i, x);
    put_four(tile, i, x, to);
  }
}

}  // namespace cuda
}  // namespace tta
