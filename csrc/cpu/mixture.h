// Log-linear mixtures: score = base + sum_e beta_e (expert_e - anti_e), read tile by tile like a
// stored row, so that drawing from a mixture is the same code as drawing from a model.
// Row normalisers cancel in the softmax, so no logarithm is needed. Included once per instruction
// set, after cpu/row.h.

namespace tta {
namespace TTA_ISA {

struct Mixture {
  const MixtureArgs* args = nullptr;
};

TTA_INLINE const char* mixture_row(const Logits& x, int64_t expert, int64_t row) {
  return static_cast<const char*>(x.data) +
         (expert * x.batch_stride + row * x.row_stride) * dtype_bytes(x.dtype);
}

// One term into `out`. An expert and its anti-expert that both rule a token out say nothing about
// it, and a token the base rules out stays out; NaN and +inf anywhere make the score NaN, which the
// canonical sum reports.
static void add_term(float* out, const float* base, const float* expert, const float* anti,
                     float beta, int count) {
  const F b = set1(beta), low = set1(-kInfinity), high = set1(kInfinity);
  const F nan = set1(std::numeric_limits<float>::quiet_NaN());
  for (int j = 0; j < count; j += kWidth) {
    const F e = load(expert + j);
    M finite = less(e, high);
    F difference = e;
    if (anti) {
      const F a = load(anti + j);
      finite = mask_and(finite, less(a, high));
      difference = select(mask_and(equal(e, low), equal(a, low)), set1(0.0f), sub(e, a));
    }
    const F before = load(out + j);
    const M ruled_out = mask_and(equal(load(base + j), low), equal(before, low));
    const F score = select(ruled_out, low, fma(b, difference, before));
    store(out + j, select(finite, score, nan));
  }
}

static void load_mixture(const Mixture& mixture, int64_t row, int64_t begin, int count,
                         float* out) {
  const MixtureArgs& a = *mixture.args;
  alignas(64) float base[kTile];
  alignas(64) float expert[kTile];
  alignas(64) float anti[kTile];
  const int padded = (count + kWidth - 1) / kWidth * kWidth;
  load_raw(mixture_row(a.base, 0, row), a.base.dtype, begin, count, base);
  alignas(64) float score[kTile];
  for (int j = count; j < padded; ++j) base[j] = expert[j] = anti[j] = 0.0f;
  for (int j = 0; j < padded; ++j) score[j] = base[j];
  for (int64_t e = 0; e < a.experts; ++e) {
    if (a.beta[e] == 0.0f) continue;
    load_raw(mixture_row(a.expert, e, row), a.expert.dtype, begin, count, expert);
    if (a.anti.data) load_raw(mixture_row(a.anti, e, row), a.anti.dtype, begin, count, anti);
    add_term(score, base, expert, a.anti.data ? anti : nullptr, a.beta[e], padded);
  }
  std::memcpy(out, score, static_cast<size_t>(count) * sizeof(float));
}

// The first tensor of which bad(data, x) is true, 1 + 2 experts if there is none.
template <class Bad>
static int64_t first_tensor(const Mixture& mixture, int64_t row, Bad bad) {
  const MixtureArgs& a = *mixture.args;
  const int64_t tensors = 1 + (a.anti.data ? 2 : 1) * a.experts;
  for (int64_t i = 0; i < tensors; ++i) {
    const bool is_base = i == 0, is_expert = i >= 1 && i <= a.experts;
    const int64_t e = is_base ? 0 : is_expert ? i - 1 : i - 1 - a.experts;
    const Logits& x = is_base ? a.base : is_expert ? a.expert : a.anti;
    if (!is_base && a.beta[e] == 0.0f) continue;
    if (bad(mixture_row(x, e, row), x)) return i;
  }
  return 1 + 2 * a.experts;
}

// Each model has a token that it does not rule out. Only pairs can hide that one has none: where
// both rule all out they say nothing. The first token tells, as a rule.
static bool all_have_a_token(const Mixture& mixture, int64_t row) {
  const auto empty = [](const char* data, const Logits& x) {
    for (int64_t v = 0; v < x.vocab; ++v)
      if (element(data, x.dtype, v) != -kInfinity) return false;
    return true;
  };
  return !mixture.args->anti.data ||
         first_tensor(mixture, row, empty) == 1 + 2 * mixture.args->experts;
}

// A row found invalid: which tensor is to blame.
static int64_t blame(const Mixture& mixture, int64_t row) {
  return first_tensor(mixture, row, [](const char* data, const Logits& x) {
    bool finite = false;
    for (int64_t v = 0; v < x.vocab; ++v) {
      const float value = element(data, x.dtype, v);
      if (!(value < kInfinity)) return true;
      finite = finite || value != -kInfinity;
    }
    return !finite;
  });
}

}  // namespace TTA_ISA
}  // namespace tta
