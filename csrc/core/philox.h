// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11),
// and the one map from logical indices to counters that every backend of tta_ext uses.
//
// A random number is a pure function of (seed, tag, sequence, position, iteration, rollout, draw):
// no thread, block, lane or batch index ever enters, so results do not depend on how work is split.
// tta_ext/rng.py documents the same map for Python.
#pragma once

#include "core/config.h"

namespace tta {

enum Stream : uint32_t {
  kBase = 0,      // draw from p
  kProxy = 1,     // draw from q that replaces a rejected token
  kSplit = 2,     // the critical item's own coin
  kDraft = 3,     // draft tokens of speculative decoding
  kVerify = 4,    // acceptance of a draft token
  kResidual = 5,  // draw from max(pi - q, 0)
  kBonus = 6,     // the token after a fully accepted draft
  kNoise = 7,     // Gaussian pre-logit noise
  kReward = 8,    // reserved for stochastic rewards
  kUser = 9,      // free for callers
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct Philox4 {
  uint32_t x[4];
};

TTA_INLINE Philox4 philox4x32(Philox4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.x[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.x[2];
    c = Philox4{{static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ k0, static_cast<uint32_t>(p1),
                 static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// Fourth counter word: tag (4 bits) | iteration (12) | rollout (16).
TTA_INLINE uint32_t counter_word3(uint32_t tag, uint32_t iteration, uint32_t rollout) {
  return (tag << 28) | (iteration << 16) | rollout;
}

// The uniform of a draw: word 0 of its block times 2^-32, exact in float64, in [0, 1).
TTA_INLINE double philox_uniform(uint64_t seed, uint32_t draw, uint32_t position, uint32_t sequence,
                                 uint32_t word3) {
  const Philox4 block = philox4x32(Philox4{{draw, position, sequence, word3}},
                                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return static_cast<double>(block.x[0]) * 0x1p-32;
}

}  // namespace tta
