// csrc/core and the row kernels of every instruction set as plain functions over arrays, for the
// C++ tests and for pytest. Include once in a program; `functions(level)` is the table of one set.
// Statistics of a row are recomputed in every call: these are for tests, not for speed.
#ifndef TTA_TESTING_FUNCTIONS_ONCE
#define TTA_TESTING_FUNCTIONS_ONCE

#include <cstdint>

#include "cpu/kernels.h"

namespace tta {
namespace testing {

// A row of `vocab` logits of type `dtype` (params.h).
struct RowView {
  const void* data;
  int dtype;
  int64_t vocab;
  float inv_temperature;
};

// What one pass over a row yields; the arrays hold one value a tile.
struct RowStats {
  bool valid;
  int tiles;
  float max;
  double z;
  float tile_max[256];
  float tile_sum[256];
  double scale[256];
};

// Everything ordered strictly before (x, id), by ascending logit, then id.
struct CutView {
  float x;
  int64_t id;
};

struct CriticalItem {
  int64_t id;  // -1: none
  float x;
};

struct Functions {
  const char* name;
  int level;
  int width;
  void (*exp)(const float* x, int64_t n, float* out);
  void (*exp_term)(const float* x, int64_t n, float* out);  // x <= 0, raised to kExpTermLow
  void (*log)(const float* x, int64_t n, float* out);
  void (*normal_pair)(const uint32_t* a, const uint32_t* b, int64_t n, float* cosine, float* sine);
  void (*noise)(uint64_t seed, uint32_t step, uint32_t sequence, uint32_t word3, int64_t begin,
                int64_t end, float* out);
  void (*load_half)(const uint16_t* x, int64_t n, float* out);
  void (*load_bfloat16)(const uint16_t* x, int64_t n, float* out);
  void (*stats)(const RowView& row, RowStats* out);
  void (*prefix_sum)(const RowView& row, const CutView* cut, int64_t n, double* out);
  void (*prefix_at_most)(const RowView& row, const CutView* cut, const double* bound, int64_t n,
                         bool* out);
  void (*knapsack_cut)(const RowView& row, const double* bound, int64_t n, CriticalItem* out);
  void (*draw)(const RowView& row, const double* u, int64_t n, int64_t* out);
  int (*find_in_tile)(const float* weights, int count, double scale, double before, double target);
  void (*divide)(const float* w, double z, int64_t n, float* out);  // n: a multiple of 4 width
  void (*probabilities)(const RowView& row, float* out);
  float (*probability)(const RowView& row, float x);
  CutView (*below_probability)(const RowView& row, double t, bool or_equal);
};

}  // namespace testing
}  // namespace tta
#endif

#define TTA_TARGET_FILE "testing/functions.h"
#include "cpu/foreach_isa.h"

// Each header builds on the one before.
// clang-format off
#include "cpu/row.h"
#include "cpu/knapsack_cut.h"
#include "cpu/mixture.h"
#include "cpu/noise.h"
// clang-format on

namespace tta {
namespace TTA_ISA {

using testing::CriticalItem;
using testing::CutView;
using testing::RowView;

// Whole vectors at a time, the rest through a padded buffer.
template <class From, class To, class Kernel>
static void testing_map(const From* x, int64_t n, To* out, From pad, Kernel kernel) {
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) kernel(x + j, out + j);
  if (j == n) return;
  From from[kWidth];
  To to[kWidth];
  for (int k = 0; k < kWidth; ++k) from[k] = j + k < n ? x[j + k] : pad;
  kernel(from, to);
  for (int k = 0; j + k < n; ++k) out[j + k] = to[k];
}

static void testing_exp(const float* x, int64_t n, float* out) {
  testing_map(x, n, out, 0.0f, [](const float* a, float* b) { store(b, exp(load(a))); });
}

static void testing_exp_term(const float* x, int64_t n, float* out) {
  testing_map(x, n, out, 0.0f, [](const float* a, float* b) {
    F y = max(load(a), set1(kExpTermLow));
    exp_term_pack<1>(&y);
    store(b, y);
  });
}

static void testing_log(const float* x, int64_t n, float* out) {
  testing_map(x, n, out, 1.0f, [](const float* a, float* b) { store(b, log(load(a))); });
}

static void testing_normal_pair(const uint32_t* a, const uint32_t* b, int64_t n, float* cosine,
                                float* sine) {
  for (int64_t j = 0; j < n; j += kWidth) {
    int32_t left[kWidth] = {}, right[kWidth] = {};
    float c[kWidth], s[kWidth];
    for (int k = 0; k < kWidth && j + k < n; ++k) {
      left[k] = static_cast<int32_t>(a[j + k]);
      right[k] = static_cast<int32_t>(b[j + k]);
    }
    F cos_part, sin_part;
    normal_pair(load_i(left), load_i(right), &cos_part, &sin_part);
    store(c, cos_part);
    store(s, sin_part);
    for (int k = 0; k < kWidth && j + k < n; ++k) {
      cosine[j + k] = c[k];
      sine[j + k] = s[k];
    }
  }
}

static void testing_noise(uint64_t seed, uint32_t step, uint32_t sequence, uint32_t word3,
                          int64_t begin, int64_t end, float* out) {
  const NoiseKey key(seed);
  const NoiseStream stream(key, step, sequence);
  noise_range(key, stream, stream.rollout(word3), begin, end, out);
}

static void testing_load_half(const uint16_t* x, int64_t n, float* out) {
  testing_map(x, n, out, uint16_t{0}, [](const uint16_t* a, float* b) { store(b, load_half(a)); });
}

static void testing_load_bfloat16(const uint16_t* x, int64_t n, float* out) {
  testing_map(x, n, out, uint16_t{0},
              [](const uint16_t* a, float* b) { store(b, load_bfloat16(a)); });
}

static Row testing_row(const RowView& view) {
  Row row;
  row.data = static_cast<const char*>(view.data);
  row.dtype = view.dtype;
  row.vocab = view.vocab;
  return row;
}

static void testing_stats(const RowView& view, testing::RowStats* out) {
  Stats s;
  out->valid = row_stats(testing_row(view), view.inv_temperature, &s);
  out->tiles = s.tiles;
  out->max = s.max;
  out->z = s.z;
  for (int t = 0; t < s.tiles; ++t) {
    out->tile_max[t] = s.tile_max[t];
    out->tile_sum[t] = s.tile_sum[t];
    out->scale[t] = out->valid ? s.scale[t] : 0.0;
  }
}

static void testing_prefix_sum(const RowView& view, const CutView* cut, int64_t n, double* out) {
  Stats s;
  const Row row = testing_row(view);
  float* const kept = room_for_weights(view.vocab);
  s.weights = kept;
  row_stats(row, view.inv_temperature, &s);
  for (int64_t i = 0; i < n; ++i) {
    s.weights = i % 2 ? kept : nullptr;
    out[i] = prefix_sum(row, s, Cut{cut[i].x, cut[i].id});
  }
}

static void testing_prefix_at_most(const RowView& view, const CutView* cut, const double* bound,
                                   int64_t n, bool* out) {
  Stats s;
  const Row row = testing_row(view);
  row_stats(row, view.inv_temperature, &s);
  for (int64_t i = 0; i < n; ++i)
    out[i] = prefix_at_most(row, s, Cut{cut[i].x, cut[i].id}, bound[i]);
}

static void testing_knapsack_cut(const RowView& view, const double* bound, int64_t n,
                                 CriticalItem* out) {
  Stats s;
  const Row row = testing_row(view);
  float* const kept = room_for_weights(view.vocab);
  s.weights = kept;
  row_stats(row, view.inv_temperature, &s);
  for (int64_t i = 0; i < n; ++i) {
    s.weights = nullptr;
    PrefixSum sum(row, s), again(row, s);
    const KnapsackCut cut = knapsack_cut(row, s, bound[i], &sum);
    s.weights = kept;
    const KnapsackCut same = knapsack_cut(row, s, bound[i], &again);
    out[i] = {same.critical == cut.critical ? cut.critical : -2, same.x};
  }
}

static void testing_draw(const RowView& view, const double* u, int64_t n, int64_t* out) {
  Stats s;
  const Row row = testing_row(view);
  row_stats(row, view.inv_temperature, &s);
  for (int64_t i = 0; i < n; ++i) out[i] = draw(row, s, u[i]);
}

static int testing_find_in_tile(const float* weights, int count, double scale, double before,
                                double target) {
  return find_in_tile(weights, count, scale, before, target);
}

static void testing_divide(const float* w, double z, int64_t n, float* out) {
  const DivideBy by(z);
  for (int64_t j = 0; j < n; j += kWidth) {
    F quotient = load(w + j);
    DivideBy::Doubt doubt = DivideBy::none();
    by.quickly<1>(&quotient, &doubt);
    store(out + j, by.doubts(doubt) ? by.exactly(load(w + j)) : quotient);
  }
}

static void testing_probabilities(const RowView& view, float* out) {
  alignas(64) float scratch[kTile];
  alignas(64) float p[kTile];
  Stats s;
  const Row row = testing_row(view);
  row_stats(row, view.inv_temperature, &s);
  for (int t = 0; t < s.tiles; ++t) {
    write_probabilities(load_tile(row, t, scratch), s, p);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    for (int64_t j = 0; j < kTile && begin + j < view.vocab; ++j) out[begin + j] = p[j];
  }
}

static float testing_probability(const RowView& view, float x) {
  Stats s;
  row_stats(testing_row(view), view.inv_temperature, &s);
  return s.probability(x);
}

static CutView testing_below_probability(const RowView& view, double t, bool or_equal) {
  Stats s;
  row_stats(testing_row(view), view.inv_temperature, &s);
  const Cut cut = below_probability(s, t, or_equal);
  return {cut.x, cut.id};
}

#define TTA_STRINGIZE(x) #x
#define TTA_NAME(x) TTA_STRINGIZE(x)
static const testing::Functions kFunctions = {TTA_NAME(TTA_ISA),
                                              TTA_ISA_LEVEL,
                                              kWidth,
                                              testing_exp,
                                              testing_exp_term,
                                              testing_log,
                                              testing_normal_pair,
                                              testing_noise,
                                              testing_load_half,
                                              testing_load_bfloat16,
                                              testing_stats,
                                              testing_prefix_sum,
                                              testing_prefix_at_most,
                                              testing_knapsack_cut,
                                              testing_draw,
                                              testing_find_in_tile,
                                              testing_divide,
                                              testing_probabilities,
                                              testing_probability,
                                              testing_below_probability};
#undef TTA_NAME
#undef TTA_STRINGIZE

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
namespace testing {

// The best level this machine runs.
inline int best_level() {
  const int active = active_isa();
  const int best = set_isa(kAvx512);
  set_isa(active);
  return best;
}

inline const Functions& functions(int level) {
#if TTA_X86_64
  if (level == kAvx512) return avx512::kFunctions;
  if (level == kAvx2) return avx2::kFunctions;
#endif
  (void)level;
  return scalar::kFunctions;
}

}  // namespace testing
#endif
}  // namespace tta
