// Checks for the C++ tests: no framework, no exceptions. CHECK(condition, "printf format", ...)
// counts and reports a failure and goes on; `main` returns failures() != 0.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <cstring>

namespace tta {
namespace testing {

inline int64_t& failures() {
  static int64_t count = 0;
  return count;
}

constexpr int64_t kShownFailures = 40;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition) && ++::tta::testing::failures() <= kShownFailures) {  \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (0)

inline int finish(const char* name) {
  std::printf("%s: %s (%" PRId64 " failed checks)\n", name, failures() ? "FAILED" : "ok",
              failures());
  return failures() ? 1 : 0;
}

inline bool has_flag(int argc, char** argv, const char* flag) {
  for (int i = 1; i < argc; ++i)
    if (!std::strcmp(argv[i], flag)) return true;
  return false;
}

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

// Same bits, or both NaN.
inline bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// splitmix64: the tests' own random numbers, the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

}  // namespace testing
}  // namespace tta
