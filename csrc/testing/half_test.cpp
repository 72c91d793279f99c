// binary16 and bfloat16 conversions: every 16-bit pattern, every rounding boundary, and the
// processor's own instructions where it has them.

#include <cmath>
#include <vector>

#include "testing/check.h"
#include "testing/functions.h"

namespace tta {
namespace testing {
namespace {

constexpr int kPatterns = 1 << 16;

// The value of a half by its definition.
double half_value(int h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double magnitude = exponent ? std::ldexp(1024.0 + mantissa, exponent - 25)
                                    : std::ldexp(static_cast<double>(mantissa), -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

bool half_is_nan(int h) { return (h & 0x7fff) > 0x7c00; }

// Nearest half, ties to even, by trying neighbours of the rounded-down one.
uint16_t nearest_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00);
  int low = 0, high = 0x7c00;  // half_value(low) <= magnitude < half_value(high)
  while (high - low > 1) {
    const int mid = (low + high) / 2;
    (half_value(mid) <= magnitude ? low : high) = mid;
  }
  const double down = magnitude - half_value(low), up = half_value(high) - magnitude;
  const int nearest = down < up || (down == up && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(sign | nearest);
}

void half_to_float_all() {
  for (int h = 0; h < kPatterns; ++h) {
    const float got = half_to_float(static_cast<uint16_t>(h));
    if (half_is_nan(h)) {
      CHECK(got != got, "half %04x: %a", h, got);
      CHECK(std::signbit(got) == (h >> 15 == 1), "half %04x loses its sign", h);
    } else if ((h & 0x7fff) == 0x7c00) {
      CHECK(std::isinf(got) && std::signbit(got) == (h >> 15 == 1), "half %04x: %a", h, got);
    } else {
      CHECK(got == half_value(h) && std::signbit(got) == (h >> 15 == 1), "half %04x: %a", h, got);
      CHECK(float_to_half(got) == h, "half %04x comes back as %04x", h, float_to_half(got));
    }
  }
}

void float_to_half_boundaries() {
  Random random(1);
  for (int h = 0; h <= 0x7c00; ++h) {
    // The half, the midpoint to the next one, and the floats beside each.
    const float value = h == 0x7c00 ? 65536.0f : static_cast<float>(half_value(h));
    const float next = h >= 0x7bff ? 65536.0f : static_cast<float>(half_value(h + 1));
    const float middle = value + (next - value) * 0.5f;
    for (const float x : {value, std::nextafterf(value, 1e9f), std::nextafterf(value, -1e9f),
                          middle, std::nextafterf(middle, 1e9f), std::nextafterf(middle, -1e9f),
                          value + (next - value) * static_cast<float>(random.uniform())}) {
      CHECK(float_to_half(x) == nearest_half(x), "%a: %04x, want %04x", x, float_to_half(x),
            nearest_half(x));
      CHECK(float_to_half(-x) == nearest_half(-x), "%a: %04x, want %04x", -x, float_to_half(-x),
            nearest_half(-x));
    }
  }
}

// Nearest bfloat16 by comparing with its two neighbours, as above.
void bfloat16_all() {
  for (int64_t b = 0; b < 0x7f80; ++b) {
    const uint16_t pattern = static_cast<uint16_t>(b);
    const float value = bfloat16_to_float(pattern);
    CHECK(bits_of(value) == static_cast<uint32_t>(b) << 16, "bfloat16 %04x: %a", pattern, value);
    const uint32_t low = static_cast<uint32_t>(b) << 16;
    for (const uint32_t rest : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint16_t up = static_cast<uint16_t>(rest > 0x8000 || (rest == 0x8000 && b % 2));
      for (const uint32_t sign : {0u, 0x80000000u}) {
        const uint16_t want = static_cast<uint16_t>((sign >> 16) + pattern + up);
        const uint16_t got = float_to_bfloat16(float_of(sign | low | rest));
        CHECK(got == want, "%08x: %04x, want %04x", sign | low | rest, got, want);
      }
    }
  }
  for (const uint32_t sign : {0u, 0x80000000u}) {
    CHECK(float_to_bfloat16(float_of(sign | 0x7f800000u)) == ((sign >> 16) | 0x7f80u), "inf");
    for (uint32_t nan = 0x7f800001u; nan <= 0x7fffffffu; nan += 4093) {
      const uint16_t got = float_to_bfloat16(float_of(sign | nan));
      CHECK((got & 0x7fff) > 0x7f80, "NaN %08x becomes %04x", sign | nan, got);
    }
  }
}

// The vector loads of an instruction set against the integer arithmetic, at every alignment.
void loads_agree(const Functions& f) {
  std::vector<uint16_t> pattern(kPatterns);
  for (int h = 0; h < kPatterns; ++h) pattern[h] = static_cast<uint16_t>(h);
  std::vector<float> got(kPatterns);
  for (int offset = 0; offset < 2; ++offset) {
    const int n = kPatterns - offset;
    f.load_half(pattern.data() + offset, n, got.data());
    for (int i = 0; i < n; ++i)
      CHECK(bits_of(got[i]) == bits_of(half_to_float(pattern[i + offset])), "%s: half %04x: %08x",
            f.name, i + offset, bits_of(got[i]));
    f.load_bfloat16(pattern.data() + offset, n, got.data());
    for (int i = 0; i < n; ++i)
      CHECK(bits_of(got[i]) == static_cast<uint32_t>(i + offset) << 16, "%s: bfloat16 %04x: %08x",
            f.name, i + offset, bits_of(got[i]));
  }
}

#if TTA_X86_64
__attribute__((target("f16c"))) uint16_t hardware_half(float x) {
  return static_cast<uint16_t>(
      _mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
}

void hardware_agrees() {
  for (int64_t u = 0; u <= 0xffffffffll; u += 509) {
    const float x = float_of(static_cast<uint32_t>(u));
    const uint16_t got = float_to_half(x), want = hardware_half(x);
    CHECK(got == want, "%08x: %04x, the processor says %04x", bits_of(x), got, want);
  }
}
#endif

}  // namespace
}  // namespace testing
}  // namespace tta

int main() {
  using namespace tta::testing;
  half_to_float_all();
  float_to_half_boundaries();
  bfloat16_all();
  for (int level = 0; level <= best_level(); ++level) loads_agree(functions(level));
#if TTA_X86_64
  if (best_level() >= tta::kAvx2) hardware_agrees();  // kAvx2 implies F16C
#endif
  return finish("half_test");
}
