// NumPy's legacy RandomState, as far as Megatron's index needs it: seeding by one number, and shuffle().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

class LegacyRandom {
 public:
  // Knuth's seeding of MT19937, which NumPy takes for an integer.
  explicit LegacyRandom(uint32_t seed) {
    state_[0] = seed;
    for (uint32_t k = 1; k < kSize; ++k) state_[k] = 1812433253u * (state_[k - 1] ^ (state_[k - 1] >> 30)) + k;
  }

  // Fisher-Yates from the end downwards. The positions do not depend on the values, so they are drawn a block ahead: the
  // memory of one block is asked for while that of the block before is swapped, which hides most of the cache misses of
  // a long array. It comes no nearer than the second-level cache, which waits for more lines at once than the first.
  template <typename T>
  void shuffle(T* values, size_t count) {
    Block now, ahead;
    size_t undrawn = count, last = count;
    for (draw(now, undrawn); now.size > 0; std::swap(now, ahead)) {
      draw(ahead, undrawn);
      for (size_t i = 0; i < now.size; ++i) {
        __builtin_prefetch(&values[ahead.positions[i]], 0, 2);
        std::swap(values[--last], values[now.positions[i]]);
      }
    }
  }

 private:
  static constexpr size_t kSize = 624, kShift = 397, kBlock = 64;

  struct Block {
    size_t size = 0;
    uint32_t positions[kBlock] = {};
  };

  // The smallest 2^k - 1 that is not below `max`.
  static uint32_t covering(uint32_t max) {
    for (int shift : {1, 2, 4, 8, 16}) max |= max >> shift;
    return max;
  }

  // The positions for the next of the first `undrawn` places, from the last one down; none for place 0 alone.
  void draw(Block& block, size_t& undrawn) {
    block.size = 0;
    if (undrawn < 2) return;
    const uint32_t max = static_cast<uint32_t>(undrawn - 1), mask = covering(max);
    block.size = std::min<size_t>(kBlock, max - (mask >> 1));  // so many maxima have the same mask
    draw(block.positions, block.size, max, mask);
    undrawn -= block.size;
  }

  // One number for each of max, max - 1, ...: uniform from 0 to it, by masked rejection. Whether a number is taken moves
  // the place of the next one, and no branch: half of all guesses would be wrong.
  void draw(uint32_t* positions, size_t count, uint32_t max, uint32_t mask) {
    for (size_t i = 0; i < count;) {
      if (next_ == kSize) refill();
      for (; i < count && next_ < kSize; ++next_) {
        const uint32_t value = ready_[next_] & mask;
        positions[i] = value;
        i += value <= max - static_cast<uint32_t>(i);
      }
    }
  }

  static uint32_t twisted(uint32_t upper, uint32_t lower) {
    const uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
    return (mixed >> 1) ^ (-(mixed & 1u) & 0x9908b0dfu);
  }

  // MT19937's next 624 numbers; the loops are apart so that the compiler works on several numbers at once.
  void refill() {
    for (size_t k = 0; k < kSize - kShift; ++k) state_[k] = state_[k + kShift] ^ twisted(state_[k], state_[k + 1]);
    for (size_t k = kSize - kShift; k < kSize - 1; ++k)
      state_[k] = state_[k + kShift - kSize] ^ twisted(state_[k], state_[k + 1]);
    state_[kSize - 1] = state_[kShift - 1] ^ twisted(state_[kSize - 1], state_[0]);
    for (size_t k = 0; k < kSize; ++k) {
      uint32_t value = state_[k];
      value ^= value >> 11;
      value ^= (value << 7) & 0x9d2c5680u;
      value ^= (value << 15) & 0xefc60000u;
      ready_[k] = value ^ (value >> 18);
    }
    next_ = 0;
  }

  uint32_t state_[kSize], ready_[kSize];
  size_t next_ = kSize;
};
