// The ids of a block of units: from a thread's cache, or merged and put there.
#pragma once

#include "cache.h"

namespace encoder {

template <class Id>
class Units {
 public:
  static constexpr size_t kSlack = 16;  // ids behind the last one that may be overwritten

  explicit Units(const Model& model) : model_(model) {}

  // Writes the ids of `count` units, the first of them from byte `begin` of a padded text on; where the ids end.
  Id* encode(const Byte* text, size_t begin, const size_t* ends, size_t count, Id* out);

 private:
  using Short = Table<Id, 16>;
  using Medium = Table<Id, 32>;
  using Long = Table<Id, 128>;
  static constexpr Id kElsewhere = Short::kIds + 1;  // count of a short unit with more ids than fit: see medium_

  Id* short_missed(const Byte* unit, size_t size, typename Short::Entry* bucket, const typename Short::Key& key,
                   Id* out);
  Id* longer(const Byte* unit, size_t size, Id* out);
  void merge(const Byte* unit, size_t size);
  template <class Larger>
  static Id* copied(Larger& table, const Byte* unit, size_t size, Id* out);
  template <class Larger>
  bool remember(Larger& table, const Byte* unit, size_t size) const;

  const Model& model_;
  Merger merger_;
  std::vector<int32_t> ids_;  // of the unit merged last
  Short short_{20};           // 2^20 entries: 32 MB
  Medium medium_{17};         // 8 MB
  Long long_{13};             // 2 MB
};

template <class Id>
Id* Units<Id>::encode(const Byte* text, size_t begin, const size_t* ends, size_t count, Id* out) {
  typename Short::Key keys[kBlock];
  typename Short::Entry* buckets[kBlock];
  size_t start = begin;
  for (size_t i = 0; i < count; start = ends[i++]) {  // all buckets first: memory answers while the next are found
    const size_t size = ends[i] - start;
    if (size <= Short::kLongest) {
      keys[i] = Short::Key::of(text + start, size);
      buckets[i] = short_.bucket(keys[i].hash());
      __builtin_prefetch(buckets[i]);
    } else if (size <= Medium::kLongest) {
      __builtin_prefetch(medium_.bucket(Medium::Key::of(text + start, size).hash()));
    }
  }
  start = begin;
  for (size_t i = 0; i < count; start = ends[i++]) {
    const size_t size = ends[i] - start;
    if (size > Short::kLongest) {
      out = longer(text + start, size, out);
      continue;
    }
    const auto* entry = Short::find(buckets[i], keys[i]);
    if (entry && entry->count != kElsewhere) {
      std::memcpy(out, entry->ids, sizeof entry->ids);
      out += entry->count;
    } else {
      out = short_missed(text + start, size, buckets[i], keys[i], out);
    }
  }
  return out;
}

template <class Id>
Id* Units<Id>::short_missed(const Byte* unit, size_t size, typename Short::Entry* bucket,
                            const typename Short::Key& key, Id* out) {
  const bool is_elsewhere = bucket->key == key;
  if (is_elsewhere)
    if (Id* end = copied(medium_, unit, size, out)) return end;
  merge(unit, size);
  if (ids_.size() <= Short::kIds)
    Short::insert(bucket, key, ids_.data(), ids_.size());
  else if (remember(medium_, unit, size) && !is_elsewhere)
    Short::insert(bucket, key, nullptr, 0)->count = kElsewhere;
  return std::copy(ids_.begin(), ids_.end(), out);
}

// A unit is in the smaller table that has room for its bytes and its ids.
template <class Id>
Id* Units<Id>::longer(const Byte* unit, size_t size, Id* out) {
  if (Id* end = copied(medium_, unit, size, out)) return end;
  if (Id* end = copied(long_, unit, size, out)) return end;
  merge(unit, size);
  if (!remember(medium_, unit, size)) remember(long_, unit, size);
  return std::copy(ids_.begin(), ids_.end(), out);
}

template <class Id>
void Units<Id>::merge(const Byte* unit, size_t size) {
  ids_.clear();
  model_.encode_unit(unit, size, merger_, ids_);
}

template <class Id>
template <class Larger>
Id* Units<Id>::copied(Larger& table, const Byte* unit, size_t size, Id* out) {
  if (size > Larger::kLongest) return nullptr;
  const auto key = Larger::Key::of(unit, size);
  const auto* entry = Larger::find(table.bucket(key.hash()), key);
  return entry ? std::copy(entry->ids, entry->ids + entry->count, out) : nullptr;
}

template <class Id>
template <class Larger>
bool Units<Id>::remember(Larger& table, const Byte* unit, size_t size) const {
  if (size > Larger::kLongest || ids_.size() > Larger::kIds) return false;
  const auto key = Larger::Key::of(unit, size);
  Larger::insert(table.bucket(key.hash()), key, ids_.data(), ids_.size());
  return true;
}

}  // namespace encoder
