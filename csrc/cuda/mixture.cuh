// Log-linear mixtures: score = base + sum_e beta_e (expert_e - anti_e), computed in registers, tile
// by tile, wherever a stored row would be read. Row normalisers cancel in the softmax.
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
    const char* at = data(x, expert) + static_cast<int64_t>(t) * kTile * element_bytes(x.dtype);
    if (x.dtype == kFloat32)
      read_part<kFloat32>(at, tile, i, out);
    else if (x.dtype == kFloat16)
      read_part<kFloat16>(at, tile, i, out);
    else
      read_part<kBFloat16>(at, tile, i, out);
  }

  // An expert and its anti-expert that both rule a token out say nothing about it, and a token the
  // base rules out stays out; NaN and +inf anywhere make the score NaN, which the sum reports.
  __device__ __forceinline__ void load(int t, Tile* tile) const {
    place(tile, a.base.vocab, t, aligned());
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      float base[4];
      float* score = tile->x + i;
      part(a.base, 0, t, *tile, i, base);
#pragma unroll
      for (int k = 0; k < 4; ++k) score[k] = base[k];
#pragma unroll 1
      for (int64_t e = 0; e < a.experts; ++e) {
        const float beta = a.beta[e];
        if (beta == 0.0f) continue;
        float expert[4], anti[4];
        part(a.expert, e, t, *tile, i, expert);
        if (a.anti.data) part(a.anti, e, t, *tile, i, anti);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          score[k] = term(base[k], score[k], beta, expert[k], a.anti.data ? &anti[k] : nullptr);
      }
      // Beyond the row every model reads -inf: whatever came of it there, it is no token.
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (tile->at(i + k) >= tile->count) score[k] = -kInfinity;
    }
  }

  __device__ __forceinline__ static float term(float base, float score, float beta, float expert,
                                               const float* anti) {
    bool finite = expert < kInfinity;
    float difference = expert;
    if (anti) {
      finite = finite && *anti < kInfinity;
      difference = expert == -kInfinity && *anti == -kInfinity ? 0.0f : sub_rn(expert, *anti);
    }
    const bool ruled_out = base == -kInfinity && score == -kInfinity;
    const float sum = ruled_out ? -kInfinity : fma_rn(beta, difference, score);
    return finite ? sum : kNaN;
  }
};

}  // namespace cuda
}  // namespace tta
