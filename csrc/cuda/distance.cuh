// The total variation of p and q, sum max(p - q, 0), for the one rule that asks for it (kOptimal).
//
// Thread map: a block's tiles one after another, four elements a thread at a time; p and q rounded
// to float32, their difference too, then the canonical sum. Passes: both rows once more, from L2
// where they fit. The last block resolves the rule.
#pragma once

#include "cuda/divide.cuh"
#include "cuda/masked_sum.cuh"
#include "cuda/rules.cuh"

namespace tta {
namespace cuda {

// A tile's part, into query 0. For a whole block.
__device__ __forceinline__ void put_distance(const Kad& a, int64_t row, int t, float* weights) {
  const RowState& r = a.s.state(row);
  const Source base(a.base_row(row), t), proxy(a.proxy_row(row), t);
  const Tile map = map_of(a.base.vocab, t, base.aligned() && proxy.aligned());
  const SlotNumbers p = r.slot[kBaseRuleSlot], q = r.slot[kProxyRuleSlot];
  const DivideBy pz(p.z), qz(q.z);
  const auto share = [](const DivideBy& z, float w) {
    return z.exception() ? z.quotient<true>(w) : z.quotient<false>(w);
  };
  each_four(map, base, proxy, true, [&](auto read, int i, const float* x) {
    float y[4], kept[4], moved[4];
    read(proxy, map, i, y);
    weigh_four(x, p.max, p.inv_temperature, kept);
    weigh_four(y, q.max, q.inv_temperature, moved);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      kept[k] = fmaxf(sub_rn(share(pz, kept[k]), share(qz, moved[k])), 0.0f);
    put_four(map, i, kept, weights);
  });
  __syncthreads();
  if (warp_id() == summing_warp(t)) {
    const float sum = canonical_sum(weights, map.count);
    if (lane_id() == 0) a.s.mass(row, 0)[t] = static_cast<double>(sum);
  }
  __syncthreads();
}

// Op, kSingle: as in cut.cuh.
template <class Op>
__global__ void __launch_bounds__(kThreads, 4) cut_distance_kernel(const Op given) {
  const Op a = Op::kSingle ? single(given) : given;
  TTA_SHARED_ARRAY(float4, weights4, kTile / 4);
  TTA_SHARED_ARRAY(double, shared, kMaxTiles);
  const uint32_t row = a.row();
  if (!a.seeks_cut(row)) return;
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t)
    put_distance(a, row, t, reinterpret_cast<float*>(weights4));
  if (!last_to_arrive(a.arrivals + row, gridDim.x)) return;
  RowState& r = a.s.state(row);
  const Deferral found = resolve(a, row, r.slot[kBaseRuleSlot], r.slot[kProxyRuleSlot],
                                 sum_of_masses(a.s, row, 0, shared));
  if (threadIdx.x == 0) r.deferral = found;
}

}  // namespace cuda
}  // namespace tta
