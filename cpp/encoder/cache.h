// The units seen before and their ids: tables of fixed size, so that memory is bounded whatever the corpus.
#pragma once

#include <cstring>
#include <utility>

#include "memory.h"
#include "model.h"

namespace encoder {

inline uint64_t load(const Byte* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// The bits of a word's first bytes.
constexpr uint64_t low_bytes(size_t count) { return count < 8 ? (uint64_t{1} << 8 * count) - 1 : UINT64_MAX; }

// The high half of a product, mixed with the low one.
inline uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a ^ 0x9E3779B97F4A7C15) * (b ^ 0xD6E8FEB86659FD93);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Units of kBytes - 1 bytes at most. Buckets of two entries, the one used last in front; the other makes room.
template <class Id, size_t kBytes>
class Table {
 public:
  struct Key {  // the unit, zeros, and in the last byte its length
    uint64_t words[kBytes / 8];

    // Reads kBytes bytes.
    static Key of(const Byte* unit, size_t size) {
      Key key;
      for (size_t i = 0; i < kBytes / 8; ++i)
        key.words[i] = load(unit + 8 * i) & low_bytes(size > 8 * i ? size - 8 * i : 0);
      key.words[kBytes / 8 - 1] |= static_cast<uint64_t>(size) << 56;
      return key;
    }
    bool operator==(const Key& other) const {
      uint64_t differing = 0;
      for (size_t i = 0; i < kBytes / 8; ++i) differing |= words[i] ^ other.words[i];
      return !differing;
    }
    uint64_t hash() const {
      uint64_t hash = 0;
      for (size_t i = 0; i < kBytes / 8; i += 2) hash = mix(words[i] ^ hash, words[i + 1]);
      return hash;
    }
  };
  static constexpr size_t kLongest = kBytes - 1, kIds = kBytes / sizeof(Id) - 1;
  struct Entry {
    Key key;
    Id ids[kIds];
    Id count;  // 0: empty
  };

  explicit Table(int bits) : entries_(size_t{1} << bits), shift_(64 - (bits - 1)) {}

  Entry* bucket(uint64_t hash) { return &entries_[2 * (hash >> shift_)]; }

  // The entry of a key, now in front; null if there is none.
  static const Entry* find(Entry* bucket, const Key& key) {
    if (bucket[0].key == key) return bucket;
    if (!(bucket[1].key == key)) return nullptr;
    std::swap(bucket[0], bucket[1]);
    return bucket;
  }

  static Entry* insert(Entry* bucket, const Key& key, const int32_t* ids, size_t count) {
    bucket[1] = bucket[0];
    bucket[0] = Entry{key, {}, static_cast<Id>(count)};
    for (size_t i = 0; i < count; ++i) bucket[0].ids[i] = static_cast<Id>(ids[i]);
    return bucket;
  }

 private:
  LargeArray<Entry> entries_;
  int shift_;
};

}  // namespace encoder
