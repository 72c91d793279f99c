// The order of a vocabulary (ascending logit, ties by ascending id), sets that are intervals of it,
// and the constants of the canonical sum (cpu/canonical.h describes it).
#pragma once

#include <cstring>
#include <limits>

#include "core/config.h"
#include "core/rounding.h"

namespace tta {

constexpr int kTile = 4096;
constexpr int kLanes = 128;
constexpr int kMaxTiles = 256;  // V <= 2^20
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

TTA_INLINE int tiles_of(int64_t vocab) { return static_cast<int>((vocab + kTile - 1) / kTile); }

// The elements ordered strictly before (x, id).
struct Cut {
  float x = kInfinity;
  int64_t id = kNoLimit;
  TTA_HOST_DEVICE static Cut all() { return {}; }
  TTA_HOST_DEVICE static Cut none() { return {-kInfinity, 0}; }
  TTA_HOST_DEVICE static Cut before(float x, int64_t id) { return {x, id}; }
  TTA_HOST_DEVICE static Cut through(float x, int64_t id) { return {x, id + 1}; }
  TTA_HOST_DEVICE bool admits(float logit, int64_t v) const {
    return logit < x || (logit == x && v < id);
  }
};

TTA_INLINE int32_t ordered_bits(float x) {  // monotone in x, -0 and +0 apart
  int32_t i;
  std::memcpy(&i, &x, sizeof i);
  return i < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(i) - 1u) : i;
}
TTA_INLINE float from_ordered_bits(int32_t i) {
  i = i < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(i) - 1u) : i;
  float x;
  std::memcpy(&x, &i, sizeof x);
  return x;
}

// Rounded to a multiple of 2^-40: sums of up to 4096 such weights <= 1 are exact in float64, so the
// search inside a tile has one answer whatever the order of its additions.
constexpr double kQuantum = 6144.0;  // its ulp is 2^-40
TTA_INLINE double quantize_weight(double w) { return sub_rn(add_rn(w, kQuantum), kQuantum); }

// The same as an integer, of a weight w <= 1, for sums of up to 1024 of them: high 2^20 + low is w
// 2^40 to the nearest, ties to even. Two roundings by the ulp of a larger number, no conversions:
// what is left after the first is exact, and the second sees its tie as the sum would.
struct Quanta {
  uint32_t high = 0, low = 0;
  TTA_HOST_DEVICE void add(float w) {
    const float to_high = 12.0f, to_low = 0x1.8p-17f;  // ulps 2^-20, 2^-40
    const float upper = add_rn(w, to_high);
    const float lower = add_rn(sub_rn(w, sub_rn(upper, to_high)), to_low);
    high += bits_of(upper) - bits_of(to_high);
    low += bits_of(lower) - bits_of(to_low);
  }
  TTA_HOST_DEVICE int64_t sum() const {
    return static_cast<int64_t>(static_cast<int32_t>(high)) * (1 << 20) + static_cast<int32_t>(low);
  }
  TTA_HOST_DEVICE static int64_t of(float w) {
    Quanta q;
    q.add(w);
    return q.sum();
  }

 private:
  TTA_HOST_DEVICE static uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
  }
};

}  // namespace tta
