// Byte-pair merges: which two neighbouring symbols become one, in what order, and the merging itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory.h"

namespace encoder {

using Byte = uint8_t;

constexpr uint32_t kNoRank = UINT32_MAX;
constexpr int32_t kUnknown = -1;  // a symbol that no merge takes

struct Merge {
  uint32_t rank;  // lower ones go first; kNoRank: these two do not merge
  int32_t id;     // of the symbol they become
};

// A piece of a unit: its bytes reach to the next symbol's.
struct Symbol {
  int32_t id;
  uint32_t begin;
};

// (left, right) -> merge: open addressing, with a filter before it, because most pairs do not merge.
class MergeTable {
 public:
  explicit MergeTable(size_t capacity = 0) : MergeTable(bits_for(capacity), 0) {}

  // Of two merges for one pair the first stands.
  void add(int32_t left, int32_t right, Merge merge);

  Merge find(int32_t left, int32_t right) const {
    const uint64_t pair = key(left, right), hash = pair * kMultiplier;
    if (!(filter_[hash >> 50] >> (hash >> 44 & 63) & 1)) return {kNoRank, 0};
    for (size_t i = hash >> shift_;; i = (i + 1) & last_)
      if (slots_[i].pair == pair || slots_[i].pair == kEmpty) return slots_[i].merge;
  }

 private:
  struct Slot {
    uint64_t pair;
    Merge merge;
  };
  MergeTable(int bits, int);
  static int bits_for(size_t capacity);
  static constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15, kEmpty = UINT64_MAX;
  static uint64_t key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  std::vector<uint64_t> filter_;  // 2^20 bits
  LargeArray<Slot> slots_;
  size_t last_;  // of the slots
  int shift_;
};

// Merges symbols in place, the best rank first and the leftmost of equals, as every BPE library does.
// An object holds scratch memory, so a thread has its own.
class Merger {
 public:
  void merge(const MergeTable& table, std::vector<Symbol>& symbols);

  std::vector<Symbol> symbols;  // for whoever calls merge: memory that is there already

 private:
  struct Candidate {
    uint32_t rank, left, right;
    int32_t left_id, right_id, merged_id;
    // A heap's top is its greatest: the one to merge first.
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
  };
  void scan(const MergeTable& table, std::vector<Symbol>& symbols);
  void merge_by_heap(const MergeTable& table, std::vector<Symbol>& symbols);
  void propose(const MergeTable& table, const std::vector<Symbol>& symbols, uint32_t left, uint32_t right);
  std::vector<Candidate> heap_;
  std::vector<uint32_t> previous_, next_;
};

}  // namespace encoder
