// The rows of a KAD operator: what every stage is given, and how a launch fills it in.
#pragma once

#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace tta {
namespace cuda {

// What every stage of the KAD family is given.
struct Kad {
  static constexpr bool kSingle = true;  // a batch row has one position: see single
  Logits base, proxy;
  RuleSpec rule;
  InvalidRow* invalid = nullptr;
  Scratch s;
  uint32_t* arrivals = nullptr;
  float* nodes = nullptr;  // of the base's tiles; null: masked sums go by all elements
  int64_t rows = 0;        // batch rows times positions
  int64_t positions = 1;   // K + 1 in verification
  uint32_t inverse = 0;    // 2^32 / positions, rounded up; 0 for one position
  int64_t param_row_stride = 1, param_position_stride = 0;
  bool same_temperature = true;
  // Of the launch: the row of its first line of blocks, and how the statistics share a row's tiles.
  uint32_t first_row = 0, first_batch_row = 0;
  int span = 1, columns = 0;

  // This block's.
  __device__ __forceinline__ uint32_t row() const { return first_row + blockIdx.y; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(blockIdx.x); }
  // Of a stage whose blocks share a row's tiles.
  __device__ __forceinline__ int first_tile() const { return column() * span; }
  __device__ __forceinline__ int end_tile() const {
    return first_tile() + span < s.tiles ? first_tile() + span : s.tiles;
  }
  // Whether warps take the tiles of this block, in wide loads (tile.cuh).
  __device__ __forceinline__ bool by_warps(const Row& logits) const {
    return span == kWarps && logits.dtype != kFloat32 && logits.vocab % kWide == 0 &&
           reinterpret_cast<uintptr_t>(logits.data) % sizeof(uint4) == 0;
  }
  // Of a statistics stage.
  __device__ __forceinline__ int model() const { return tile() >= columns; }
  __device__ __forceinline__ int column() const { return tile() - model() * columns; }

  // A product in place of a division: exact, as the rows of a launch and the positions have 16
  // bits.
  __device__ __forceinline__ int64_t batch_row(int64_t row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    return inverse ? first_batch_row + __umulhi(r - first_row, inverse) : r;
  }
  __device__ __forceinline__ int64_t position(int64_t row) const {
    return row - batch_row(row) * positions;
  }
  __device__ __forceinline__ Row base_row(int64_t row) const {
    return Row(base, batch_row(row), position(row));
  }
  __device__ __forceinline__ Row proxy_row(int64_t row) const {
    return Row(proxy, batch_row(row), position(row));
  }
  __device__ __forceinline__ int64_t param_index(int64_t row) const {
    return batch_row(row) * param_row_stride + position(row) * param_position_stride;
  }
  __device__ __forceinline__ double param(int64_t row) const {
    return rule.param[param_index(row)];
  }
  __device__ __forceinline__ bool valid_param(int64_t row) const {
    return rule.valid_param(param_index(row));
  }
  __device__ __forceinline__ int base_rule_slot() const {
    return same_temperature ? kBaseSlot : kBaseRuleSlot;
  }
  __device__ __forceinline__ bool seeks_cut(int64_t row) const {
    return s.state(row).valid && s.state(row).step == kSeeksCut;
  }
  __device__ __forceinline__ float* nodes_of(int64_t row, int t) const {
    return nodes + (row * s.tiles + t) * kNodes;
  }
  __device__ __forceinline__ void note(int64_t row, int64_t tensor) const {
    report(invalid, row, tensor);
  }
};

// With TTA_CUDA_TYPED kernels know the dtype of their logits: there is one of each, chosen at the
// launch. Without, and where base and proxy differ, they ask.
template <class Op, int kType>
struct Typed : Op {
  explicit Typed(const Op& a) : Op(a) {}
};
template <class Op>
__device__ __forceinline__ const Op& known(const Op& a) {
  return a;
}
template <class Op, int kType>
__device__ __forceinline__ Op known(const Typed<Op, kType>& a) {
  Op op = a;
  op.base.dtype = op.proxy.dtype = kType;
  return op;
}
template <class Op, class Run>
cudaError_t with_dtype(const Op& a, const Run& run) {
#if defined(TTA_CUDA_TYPED)
  if (!a.proxy.data || a.proxy.dtype == a.base.dtype) {
    if (a.base.dtype == kFloat32) return run(Typed<Op, kFloat32>(a));
    if (a.base.dtype == kFloat16) return run(Typed<Op, kFloat16>(a));
    return run(Typed<Op, kBFloat16>(a));
  }
#endif
  return run(a);
}

// A kernel's arguments where batch rows have one position, which the compiler is to know.
template <class Op>
__device__ __forceinline__ Op single(Op a) {
  a.positions = 1;
  a.inverse = 0;
  return a;
}

__device__ __forceinline__ float base_probability(const Kad& a, const RowState& r, int64_t row,
                                                  int64_t v) {
  return r.slot[kBaseSlot].probability(a.base_row(row).at(v));
}
__device__ __forceinline__ float proxy_probability(const Kad& a, const RowState& r, int64_t row,
                                                   int64_t v) {
  return r.slot[kProxySlot].probability(a.proxy_row(row).at(v));
}

// mu(v), of a resolved rule.
__device__ __forceinline__ double mu_of(const Kad& a, const Deferral& d, int64_t row, int64_t v) {
  if (d.admits((d.by_proxy ? a.proxy_row(row) : a.base_row(row)).at(v), v)) return 1.0;
  return v == d.critical ? d.fraction : 0.0;
}

// ---- launches ----------------------------------------------------------------------------------

// Scratch memory of rows: with nodes, where sampling and rule have one temperature.
inline size_t scratch_of(const DeferralArgs& a, int64_t rows, bool with_cut, bool with_nodes) {
  const int tiles = tiles_of(a.base.vocab);
  with_nodes = with_nodes && a.rule.inv_temperature == a.rule.inv_rule_temperature;
  return static_cast<size_t>(rows) *
         (Scratch::bytes_of_row(tiles, with_cut) +
          (with_nodes ? static_cast<size_t>(tiles) * kNodes * sizeof(float) : 0));
}

inline void fill(Kad* k, const DeferralArgs& a, const Launch& launch, bool with_cut) {
  k->base = a.base;
  k->proxy = a.proxy;
  k->rule = a.rule;
  k->invalid = a.invalid;
  k->arrivals = launch.arrivals;
  k->same_temperature = a.rule.inv_temperature == a.rule.inv_rule_temperature;
  k->s.base = static_cast<char*>(launch.scratch);
  k->s.tiles = tiles_of(a.base.vocab);
  k->s.with_cut = with_cut;
  k->s.row_bytes = static_cast<int64_t>(Scratch::bytes_of_row(k->s.tiles, with_cut));
}

// Behind the rows of the scratch memory, as scratch_of counts them.
inline void place_nodes(Kad* k, int64_t rows) {
  if (k->same_temperature) k->nodes = reinterpret_cast<float*>(k->s.base + rows * k->s.row_bytes);
}

// Shares the tiles of `rows` rows among blocks.
inline void share_tiles(Kad* k, int64_t rows, const Launch& launch) {
  k->rows = rows;
  k->span = span_of(k->s.tiles, rows, launch.width);
  k->columns = columns_of(k->s.tiles, k->span);
}

}  // namespace cuda
}  // namespace tta
