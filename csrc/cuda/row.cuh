// What a row has taught so far, in scratch memory between the blocks and launches that work on it.
//
// Every operator of the KAD family is a chain of stages. A stage is one launch with a block for
// each tile of each row (statistics: for one to four tiles); the block that arrives last at a row
// (`last_to_arrive`) merges what the tiles found, decides what can be decided, and leaves the rest
// to the next stage, whose blocks return at once for rows that need nothing more. No stage waits
// for the host, and the result of a row depends on nothing but the row.
#pragma once

#include "cuda/tile.cuh"

namespace tta {
namespace cuda {

// A model's row at one temperature: base and proxy at the sampling temperature, then at the rule's.
enum Slot : int {
  kBaseSlot = 0,
  kProxySlot = 1,
  kBaseRuleSlot = 2,
  kProxyRuleSlot = 3,
  kSlots = 4
};

struct SlotNumbers {
  double z;
  float max, inv_temperature;
  __device__ __forceinline__ float probability(float x) const {
    const float w = exp_of(mul_rn(sub_rn(x, max), inv_temperature));
    return static_cast<float>(div_rn(static_cast<double>(w), z));
  }
  TTA_INLINE float max_probability() const { return static_cast<float>(div_rn(1.0, z)); }
};

// A resolved rule: mu(v) = 1 exactly for the tokens the cut admits in the judging model's logits
// (or, `upper`, for those it does not), and `fraction` for the critical item.
struct Deferral {
  Cut cut;
  int64_t critical;
  double fraction;
  float critical_x;
  bool by_proxy, upper;

  __device__ __forceinline__ bool admits(float x, int64_t v) const {
    return cut.admits(x, v) != upper;
  }
};

// What the first stage of the knapsack's cut leaves to the second (cut.cuh).
struct CutBracket {
  double below;       // the mass below the bracket
  double vague;       // what that may be wrong by
  float least, most;  // logits of the bands that may hold the critical item
  uint32_t listed;    // candidates in the list, or as many as there would be with room
  bool dense;         // too many to be listed: they are in bands of their own
};

// D, and 1 - D summed from the kept tokens.
struct Masses {
  double deferred, kept;
};

// A token that was drawn before the knapsack's verdict on it is known.
struct DrawnToken {
  int64_t id;
  float x;
};

// Verification: what is known of a position.
struct Verdict {
  int64_t token;                 // the bonus token, or the greedy one
  bool base_valid, proxy_valid;  // the rows can be used
  bool stands;                   // the draft token is accepted
  bool deferred;                 // mu(token) = 1, or the bonus token is deferred
};

// Verification: where a batch row's walk along its draft ends, and what is to be drawn there.
enum EndDraw : int32_t { kNoDraw, kResidualDraw, kProxyDraw };
struct WalkEnd {
  int64_t position;
  EndDraw draw;
};

// What the next stage has to do: find the knapsack's cut, or its verdict on the drawn token, or
// draw from the proxy.
enum Step : int32_t { kDone, kSeeksCut, kSeeksVerdict, kWantsProxy };

struct RowState {
  SlotNumbers slot[kSlots];
  Deferral deferral;
  double bound;  // budget Z, of the knapsack
  union {
    CutBracket bracket;  // from one stage of the cut to the other
    Masses masses;       // from the masked sums on
    DrawnToken drawn;    // from the draw to the verdict, where there is neither
  };
  Step step;
  bool valid;   // everything the rule looks at can be used
  bool summed;  // query 0 has the tiles' masses before the cut: its search needed them
  // The knapsack keeps more tokens than all tiles have nodes: most would be made anew.
  bool keeps_many;
  Verdict verdict;
  WalkEnd end;  // in the first position of a batch row
};

constexpr int kQueries = 3;     // masked sums a stage can make of one row
constexpr int kBuckets = 4096;  // of the knapsack's histogram
constexpr int kListed = 3072;   // candidates that are listed at most

// Scratch memory of a batch of rows: RowState and the arrays over tiles side by side for each row.
struct Scratch {
  char* base = nullptr;
  int64_t row_bytes = 0;
  int tiles = 0;
  bool with_cut = false;

  static constexpr size_t kState = (sizeof(RowState) + 255) / 256 * 256;
  static constexpr size_t kEachTile =
      (2 + kSlots) * sizeof(float) + (kSlots + kQueries) * sizeof(double);

  TTA_HOST_DEVICE static size_t align(size_t n) { return (n + 255) / 256 * 256; }
  static size_t bytes_of_row(int tiles, bool with_cut) {
    const size_t n = align(kState + static_cast<size_t>(tiles) * kEachTile);
    return with_cut ? align(n + kBuckets * sizeof(uint64_t) +
                            kListed * (sizeof(float) + sizeof(int32_t)))
                    : n;
  }

  __device__ __forceinline__ char* at(int64_t row) const { return base + row * row_bytes; }
  __device__ __forceinline__ RowState& state(int64_t row) const {
    return *reinterpret_cast<RowState*>(at(row));
  }
  // Two maxima and kSlots sums a tile: 24 bytes, so that what follows is aligned.
  __device__ __forceinline__ float* tile_max(int64_t row, int model) const {
    return reinterpret_cast<float*>(at(row) + kState) + model * tiles;
  }
  __device__ __forceinline__ float* tile_sum(int64_t row, int slot) const {
    return tile_max(row, 2 + slot);
  }
  __device__ __forceinline__ double* scale(int64_t row, int slot) const {
    return reinterpret_cast<double*>(tile_max(row, 2 + kSlots)) + slot * tiles;
  }
  __device__ __forceinline__ double* mass(int64_t row, int query) const {
    return scale(row, kSlots + query);
  }
  __device__ __forceinline__ uint64_t* histogram(int64_t row) const {
    return reinterpret_cast<uint64_t*>(at(row) +
                                       align(kState + static_cast<size_t>(tiles) * kEachTile));
  }
  __device__ __forceinline__ float* list_x(int64_t row) const {
    return reinterpret_cast<float*>(histogram(row) + kBuckets);
  }
  __device__ __forceinline__ int32_t* list_id(int64_t row) const {
    return reinterpret_cast<int32_t*>(list_x(row) + kListed);
  }
};

}  // namespace cuda
}  // namespace tta
