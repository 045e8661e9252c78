// NumPy's legacy RandomState, as far as Megatron's index needs it: seeding by one number, and shuffle().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>

class LegacyRandom {
 public:
  // NumPy's seeding by an integer is the one the C++ standard fixes for mt19937.
  explicit LegacyRandom(uint32_t seed) : engine_(seed) {}

  // Fisher-Yates from the end downwards. The positions do not depend on the values, so a block of them is drawn first
  // and its memory asked for, which hides most of the cache misses of a long array.
  template <typename T>
  void shuffle(T* values, size_t count) {
    constexpr size_t kBlock = 256;
    uint32_t positions[kBlock];
    for (size_t last = count; last > 1;) {
      const size_t block = std::min(kBlock, last - 1);
      for (size_t i = 0; i < block; ++i) {
        positions[i] = below_or_equal(static_cast<uint32_t>(last - 1 - i));
        __builtin_prefetch(&values[positions[i]], 1);
      }
      for (size_t i = 0; i < block; ++i) std::swap(values[--last], values[positions[i]]);
    }
  }

 private:
  // Uniform in [0, max] by masked rejection: draw with the smallest mask that covers max until it is not above it.
  uint32_t below_or_equal(uint32_t max) {
    uint32_t mask = max;
    for (int shift : {1, 2, 4, 8, 16}) mask |= mask >> shift;
    uint32_t value;
    do value = static_cast<uint32_t>(engine_()) & mask;
    while (value > max);
    return value;
  }

  std::mt19937 engine_;
};
