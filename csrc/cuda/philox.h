// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
// Block b of four words is a function of (seed, b) alone: the same words as on the CPU.
#pragma once

#include "cuda/scalar.h"
#include "cuda/step_numbers.h"

namespace fastconv::cuda {

FC_INLINE void philox(uint64_t seed, uint64_t block, uint32_t (&words)[4]) {
  uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32), c = 0, d = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u, q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(p);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

FC_INLINE uint32_t random_word(uint64_t seed, uint64_t index) {
  uint32_t words[4];
  philox(seed, index / 4, words);
  const uint32_t which = static_cast<uint32_t>(index % 4);
  return which == 0 ? words[0] : which == 1 ? words[1] : which == 2 ? words[2] : words[3];
}

// An element is dropped where its random word lies below the threshold, and scaled otherwise.
struct DropRule {
  uint64_t seed, offset;
  const uint64_t* added;  // to seed and offset, in a graph; or null
  uint32_t threshold;
  double scale;
  bool all;  // p rounds to 1: everything is dropped
  FC_INLINE uint64_t seed_now() const { return added ? seed + added[0] : seed; }
  FC_INLINE uint64_t offset_now() const { return added ? offset + added[1] : offset; }
};
inline DropRule drop_rule(double p, uint64_t seed, uint64_t offset) {
  constexpr double kWords = 4294967296.0;  // 2^32 values of a random word
  const double threshold = p * kWords + 0.5;
  const bool all = threshold >= kWords;
  return {seed, offset, random_place(), all ? 0 : static_cast<uint32_t>(threshold), all ? 0 : 1 / (1 - p), all};
}

}  // namespace fastconv::cuda
