// exp, log and the Gaussian pair: monotone, accurate, and the same bits on every instruction set.
//
//   math_test                a strided walk over the floats (seconds)
//   math_test --exhaustive   every float (minutes)

#include <algorithm>
#include <cmath>
#include <vector>

#include "testing/check.h"
#include "testing/functions.h"

namespace tta {
namespace testing {
namespace {

constexpr int64_t kBlock = 1 << 12;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kTiny = -0x1.5d589ep+6f;  // the first float above ln 2^-126: exp is 0 below

// Position of a float in their order, -0 just below +0; and back.
int64_t rank_of(float x) {
  const uint32_t u = bits_of(x);
  return u >> 31 ? -static_cast<int64_t>(u & 0x7fffffffu) - 1 : static_cast<int64_t>(u);
}
float float_at(int64_t rank) {
  return float_of(rank < 0 ? 0x80000000u | static_cast<uint32_t>(-rank - 1)
                           : static_cast<uint32_t>(rank));
}

// Distance from the true value in units of the last place of a float of its size.
double ulps(float got, double want) {
  const int exponent = std::max(std::ilogb(want), -126);
  return std::fabs(static_cast<double>(got) - want) / std::ldexp(1.0, exponent - 23);
}

// Every other instruction set gives the bits of the scalar values y of `function` at x.
void same_bits(const char* what, void (*Functions::*function)(const float*, int64_t, float*),
               const std::vector<float>& x, const std::vector<float>& y, int64_t n) {
  std::vector<float> other(n);
  for (int level = 1; level <= best_level(); ++level) {
    const Functions& f = functions(level);
    (f.*function)(x.data(), n, other.data());
    if (!std::memcmp(other.data(), y.data(), n * sizeof(float))) continue;
    for (int64_t i = 0; i < n; ++i)
      CHECK(bits_of(other[i]) == bits_of(y[i]), "%s: %s(%a) = %a, scalar %a", f.name, what, x[i],
            other[i], y[i]);
  }
}

// Walks exp upwards over the floats with ranks first, first + stride, ... <= last.
void walk_exp(int64_t first, int64_t last, int64_t stride) {
  std::vector<float> x(kBlock), y(kBlock);
  float before = 0.0f;
  double worst = 0.0;
  float worst_at = 0.0f;
  for (int64_t rank = first; rank <= last;) {
    int64_t n = 0;
    for (; n < kBlock && rank <= last; ++n, rank += stride) x[n] = float_at(rank);
    functions(0).exp(x.data(), n, y.data());
    same_bits("exp", &Functions::exp, x, y, n);
    for (int64_t i = 0; i < n; ++i) {
      CHECK(y[i] >= before, "exp(%a) = %a after %a", x[i], y[i], before);
      before = y[i];
      if (x[i] < kTiny) {
        CHECK(bits_of(y[i]) == 0, "exp(%a) = %a", x[i], y[i]);
        continue;
      }
      const double error = ulps(y[i], std::exp(static_cast<double>(x[i])));
      if (error > worst) {
        worst = error;
        worst_at = x[i];
      }
    }
  }
  std::printf("exp: at most %.4f ulp off, at %a\n", worst, worst_at);
  CHECK(worst <= 1.02, "exp is %.4f ulp off at %a", worst, worst_at);
}

// The floats around the steps of the range reduction, and at the tops of the binades below 0, where
// the steps of x are smallest against those of its exponential.
void walk_seams() {
  std::vector<int64_t> centre;
  for (int n = -126; n <= 126; ++n)
    centre.push_back(rank_of(static_cast<float>((n + 0.5) * std::log(2.0))));
  for (int n = 1; n <= 24; ++n) centre.push_back(rank_of(-std::ldexp(1.0f, -n)));
  std::vector<float> x, y;
  for (const int64_t rank : centre) {
    x.clear();
    for (int64_t r = rank - 20000; r <= rank + 20000; ++r) x.push_back(float_at(r));
    const int64_t n = static_cast<int64_t>(x.size());
    y.resize(x.size());
    functions(0).exp(x.data(), n, y.data());
    same_bits("exp", &Functions::exp, x, y, n);
    for (int64_t i = 1; i < n; ++i)
      CHECK(y[i] >= y[i - 1], "exp(%a) = %a after %a", x[i], y[i], y[i - 1]);
  }
}

// What a sum that flushes subnormals makes of the terms is exp, over the ranks up to that of -0.
void walk_exp_terms(const Functions& f, int64_t first, int64_t stride) {
  std::vector<float> x(kBlock), y(kBlock), term(kBlock);
  const int64_t last = rank_of(-0.0f);
  for (int64_t at = first; at <= last;) {
    int64_t n = 0;
    for (; n < kBlock && at <= last; ++n, at += stride) x[n] = float_at(at);
    functions(0).exp(x.data(), n, y.data());
    f.exp_term(x.data(), n, term.data());
    for (int64_t i = 0; i < n; ++i) {
      const float flushed = std::fabs(term[i]) < std::numeric_limits<float>::min() ? 0.0f : term[i];
      CHECK(bits_of(flushed) == bits_of(y[i]), "%s: a term of %a is %a, exp %a", f.name, x[i],
            term[i], y[i]);
    }
  }
}

void exp_special(const Functions& f, int64_t stride) {
  const float x[] = {-kInf, std::nextafterf(kTiny, -kInf), kTiny, -0.0f, 0.0f, -1e30f};
  const float want[] = {0.0f, 0.0f, 0x1.00004cp-126f, 1.0f, 1.0f, 0.0f};
  float y[6];
  f.exp(x, 6, y);
  for (int i = 0; i < 6; ++i)
    CHECK(bits_of(y[i]) == bits_of(want[i]), "%s: exp(%a) = %a", f.name, x[i], y[i]);
  // Every NaN, whatever its sign and payload.
  std::vector<float> nan(kBlock), out(kBlock);
  for (const uint32_t sign : {0u, 0x80000000u}) {
    for (int64_t u = 0x7f800001; u <= 0x7fffffff;) {
      int64_t n = 0;
      for (; n < kBlock && u <= 0x7fffffff; ++n, u += stride)
        nan[n] = float_of(sign | static_cast<uint32_t>(u));
      f.exp(nan.data(), n, out.data());
      for (int64_t i = 0; i < n; ++i)
        CHECK(out[i] != out[i], "%s: exp of NaN %08x = %a", f.name, bits_of(nan[i]), out[i]);
    }
    nan[0] = float_of(sign | 0x7fffffffu);
    f.exp(nan.data(), 1, out.data());
    CHECK(out[0] != out[0], "%s: exp of NaN %08x = %a", f.name, bits_of(nan[0]), out[0]);
  }
}

void walk_log(int64_t stride) {
  std::vector<float> x(kBlock), y(kBlock);
  double worst = 0.0;
  float worst_at = 0.0f;
  const int64_t last = rank_of(std::numeric_limits<float>::max());
  // Near 1 every float counts: it is where Box-Muller's radius is smallest.
  const int64_t dense_first = rank_of(1.0f - 0x1p-9f), dense_last = rank_of(1.0f + 0x1p-9f);
  for (int64_t rank = rank_of(0x1p-126f); rank <= last;) {
    int64_t n = 0;
    for (; n < kBlock && rank <= last; ++n) {
      x[n] = float_at(rank);
      const bool dense = rank >= dense_first && rank < dense_last;
      const int64_t next = rank + (dense ? 1 : stride);
      rank = rank < dense_first && next > dense_first ? dense_first : next;
    }
    functions(0).log(x.data(), n, y.data());
    same_bits("log", &Functions::log, x, y, n);
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] == 1.0f) {
        CHECK(y[i] == 0.0f, "log(1) = %a", y[i]);
        continue;
      }
      const double error = ulps(y[i], std::log(static_cast<double>(x[i])));
      if (error > worst) {
        worst = error;
        worst_at = x[i];
      }
    }
  }
  std::printf("log: at most %.4f ulp off, at %a\n", worst, worst_at);
  CHECK(worst <= 1.0, "log is %.4f ulp off at %a", worst, worst_at);
}

// A root by an approximation of its inverse, which a GPU may have a few units off either way. A
// factor of 4 changes exponents alone.
void walk_roots(int64_t stride) {
  constexpr int kOff = 8;
  for (int64_t rank = rank_of(1.0f); rank < rank_of(4.0f); rank += stride) {
    const float x = float_at(rank), want = std::sqrt(x);
    const int64_t inverse = rank_of(static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))));
    for (int off = -kOff; off <= kOff; ++off) {
      const float got = scalar::sqrt_by(x, float_at(inverse + off));
      CHECK(bits_of(got) == bits_of(want), "the root of %a by its inverse and %d units is %a", x,
            off, got);
    }
  }
}

// The pair factors into a radius (first word) and an angle (second), each of 2^23 values.
void walk_normals(const Functions& f, const Functions& reference, int64_t stride) {
  std::vector<uint32_t> a(kBlock), b(kBlock);
  std::vector<float> c(kBlock), s(kBlock), scalar_c(kBlock), scalar_s(kBlock);
  double worst_radius = 0.0, worst_angle = 0.0;
  Random random(5);
  for (int turn = 0; turn < 2; ++turn) {
    for (int64_t word = 0; word < 1 << 23;) {
      int64_t n = 0;
      for (; n < kBlock && word < 1 << 23; ++n, word += stride) {
        const uint32_t low = static_cast<uint32_t>(random.next()) & 511u;  // must not matter
        const uint32_t other = static_cast<uint32_t>(random.next());
        a[n] = turn ? other : (static_cast<uint32_t>(word) << 9) | low;
        b[n] = turn ? (static_cast<uint32_t>(word) << 9) | low : other;
      }
      f.normal_pair(a.data(), b.data(), n, c.data(), s.data());
      reference.normal_pair(a.data(), b.data(), n, scalar_c.data(), scalar_s.data());
      for (int64_t i = 0; i < n; ++i) {
        CHECK(bits_of(c[i]) == bits_of(scalar_c[i]) && bits_of(s[i]) == bits_of(scalar_s[i]),
              "%s: normal_pair(%08x, %08x) = %a %a, scalar %a %a", f.name, a[i], b[i], c[i], s[i],
              scalar_c[i], scalar_s[i]);
        if (&f != &reference) continue;
        const double u1 = (2.0 * (a[i] >> 9) + 1.0) * 0x1p-24;
        const double turns = (2.0 * (b[i] >> 9) + 1.0) * 0x1p-24;
        const double radius = std::sqrt(-2.0 * std::log(u1));
        const double angle = 2.0 * 3.14159265358979323846 * turns;
        const double want_c = radius * std::cos(angle), want_s = radius * std::sin(angle);
        worst_radius = std::max(worst_radius, std::fabs(std::hypot(c[i], s[i]) / radius - 1.0));
        worst_angle = std::max(worst_angle, std::max(std::fabs(c[i] - want_c) / std::fabs(want_c),
                                                     std::fabs(s[i] - want_s) / std::fabs(want_s)));
      }
    }
  }
  if (&f != &reference) return;
  std::printf("normal_pair: radius within %.2f, either normal within %.2f units of 2^-24\n",
              worst_radius * 0x1p24, worst_angle * 0x1p24);
  CHECK(worst_radius <= 4 * 0x1p-24, "%s: radius off by %g", f.name, worst_radius);
  CHECK(worst_angle <= 6 * 0x1p-24, "%s: normals off by %g", f.name, worst_angle);
}

// Vectorised Philox and the interleaving of its normals against one block at a time.
void noise_blocks_agree(const Functions& f, const Functions& reference) {
  const uint64_t seed = 0x0123456789abcdefull;
  const uint32_t word3 = counter_word3(kNoise, 77, 65535);
  std::vector<float> got(1000);
  for (const int64_t length : {1, 3, 4, 31, 64, 65, 257, 1000}) {
    const int64_t begin = 8;
    f.noise(seed, 12, 0xfffffff0u, word3, begin, begin + length, got.data());
    for (int64_t d = begin; d < begin + length; ++d) {
      const Philox4 block =
          philox4x32(Philox4{{static_cast<uint32_t>(d / 4), 12, 0xfffffff0u, word3}},
                     static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
      const int pair = static_cast<int>(d % 4) / 2;
      float c, s;
      reference.normal_pair(&block.x[2 * pair], &block.x[2 * pair + 1], 1, &c, &s);
      const float want = d % 2 ? s : c;
      CHECK(bits_of(got[d - begin]) == bits_of(want), "%s: dimension %d of %d: %a, want %a", f.name,
            static_cast<int>(d), static_cast<int>(length), got[d - begin], want);
    }
  }
}

void philox_known_answers() {
  struct Case {
    Philox4 counter;
    uint32_t k0, k1;
    Philox4 want;
  };
  const uint32_t ones = 0xffffffffu;
  const Case cases[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{ones, ones, ones, ones}},
       ones,
       ones,
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0xa4093822u,
       0x299f31d0u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}}};
  for (const Case& c : cases) {
    const Philox4 got = philox4x32(c.counter, c.k0, c.k1);
    for (int i = 0; i < 4; ++i)
      CHECK(got.x[i] == c.want.x[i], "word %d: %08x, want %08x", i, got.x[i], c.want.x[i]);
  }
}

}  // namespace
}  // namespace testing
}  // namespace tta

int main(int argc, char** argv) {
  using namespace tta::testing;
  const bool exhaustive = has_flag(argc, argv, "--exhaustive");
  philox_known_answers();
  walk_exp(rank_of(-kInf), rank_of(88.0f), exhaustive ? 1 : 769);
  walk_exp(rank_of(kTiny) - 100000, rank_of(kTiny) + 100000, 1);
  walk_seams();
  walk_log(exhaustive ? 1 : 769);
  walk_roots(exhaustive ? 1 : 61);
  for (int level = 0; level <= best_level(); ++level) {
    exp_special(functions(level), exhaustive ? 1 : 61);
    walk_exp_terms(functions(level), rank_of(-kInf), exhaustive ? 1 : 769);
    walk_exp_terms(functions(level), rank_of(kTiny) - 100000, 1009);
    walk_normals(functions(level), functions(0), exhaustive ? 1 : 7);
    noise_blocks_agree(functions(level), functions(0));
  }
  return finish("math_test");
}
