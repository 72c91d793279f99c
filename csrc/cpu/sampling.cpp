// categorical_sample, and sampling from or writing out a log-linear mixture of models
// (implicit_reward: proxy tuning, ensembles, contrast).
//
// One pass over each row: tile statistics, then the inverse CDF re-reads one tile. Mixtures compute
// their scores tile by tile from every model's row, in L1, and are never stored:
// (1 + 2 experts) rows read once per pass, nothing written but the token.

#define TTA_TARGET_FILE "cpu/sampling.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/denormals.h"
#include "cpu/kad.h"

namespace tta {
namespace TTA_ISA {

static int64_t pick(const Row& row, const Stats& s, const KeySpec& key, int64_t b, uint32_t stream,
                    uint32_t number) {
  if (!key.do_sample) return first_of_value(row, s, s.max);
  const double u =
      philox_uniform(seed_bits(key.seed), number, static_cast<uint32_t>(key.position[b]),
                     static_cast<uint32_t>(key.sequence[b]), key.word3(stream, b));
  return draw(row, s, u);
}

static void categorical_rows(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const CategoricalArgs& a = *static_cast<const CategoricalArgs*>(context);
  Stats s;
  for (int64_t b = begin; b < end; ++b) {
    const Row row = row_of(a.logits, b);
    if (row_stats(row, a.inv_temperature, &s)) {
      a.token[b] = pick(row, s, a.key, b, a.stream, a.draw);
    } else {
      a.token[b] = -1;
      a.invalid->note(b, kBaseLogits);
    }
  }
}

static void write_probs(const Row& row, const Stats& s, float* out) {
  alignas(64) float scratch[kTile];
  alignas(64) float p[kTile];
  for (int t = 0; t < s.tiles; ++t) {
    const Tile tile = load_tile(row, t, scratch);
    write_probabilities(tile, s, p);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    const int64_t left = row.vocab - begin;
    std::memcpy(out + begin, p, static_cast<size_t>(left < kTile ? left : kTile) * sizeof(float));
  }
}

static void mixture_rows(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const MixtureArgs& a = *static_cast<const MixtureArgs*>(context);
  const Mixture mixture{&a};
  Stats s;
  for (int64_t b = begin; b < end; ++b) {
    Row row;
    row.vocab = a.base.vocab;
    row.mixture = &mixture;
    row.index = b;
    const bool valid = row_stats(row, a.inv_temperature, &s) && all_have_a_token(mixture, b);
    if (!valid) a.invalid->note(b, blame(mixture, b));
    if (a.token) {
      a.token[b] = valid ? pick(row, s, a.key, b, kBase, 0) : -1;
    } else if (valid) {
      write_probs(row, s, a.probs + b * a.probs_stride);
    } else {
      for (int64_t v = 0; v < row.vocab; ++v)
        a.probs[b * a.probs_stride + v] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

void categorical_sample(const CategoricalArgs& a, const Parallel& parallel) {
  parallel.run(a.batch, parallel.grain, categorical_rows, const_cast<CategoricalArgs*>(&a));
}
void implicit_reward(const MixtureArgs& a, const Parallel& parallel) {
  parallel.run(a.batch, parallel.grain, mixture_rows, const_cast<MixtureArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void categorical_sample(const CategoricalArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(categorical_sample, a, parallel)
}
void implicit_reward(const MixtureArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(implicit_reward, a, parallel)
}
#endif

}  // namespace tta
