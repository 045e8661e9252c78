// Merging the symbols of one unit: a scan for the best pair while they are few, a heap beyond.
#include "merges.h"

#include <algorithm>

namespace encoder {

namespace {

constexpr size_t kScanned = 64;  // symbols; the scan is quadratic, and has a place in a byte
constexpr uint32_t kNone = UINT32_MAX;
constexpr int32_t kMerged = -2;  // the symbol went into its left neighbour

void remove_merged(std::vector<Symbol>& symbols) {
  const auto is_merged = [](const Symbol& symbol) { return symbol.id == kMerged; };
  symbols.erase(std::remove_if(symbols.begin(), symbols.end(), is_merged), symbols.end());
}

}  // namespace

int MergeTable::bits_for(size_t capacity) {
  int bits = 4;
  while ((size_t{1} << bits) < 2 * capacity) ++bits;
  return bits;
}

MergeTable::MergeTable(int bits, int)
    : filter_(1 << 14), slots_(size_t{1} << bits), last_((size_t{1} << bits) - 1), shift_(64 - bits) {
  for (size_t i = 0; i <= last_; ++i) slots_[i] = {kEmpty, {kNoRank, 0}};
}

void MergeTable::add(int32_t left, int32_t right, Merge merge) {
  const uint64_t pair = key(left, right), hash = pair * kMultiplier;
  filter_[hash >> 50] |= uint64_t{1} << (hash >> 44 & 63);
  size_t i = hash >> shift_;
  while (slots_[i].pair != kEmpty && slots_[i].pair != pair) i = (i + 1) & last_;
  if (slots_[i].pair == kEmpty) slots_[i] = {pair, merge};
}

void Merger::merge(const MergeTable& table, std::vector<Symbol>& symbols) {
  if (symbols.size() < 2) return;
  if (symbols.size() <= kScanned)
    scan(table, symbols);
  else
    merge_by_heap(table, symbols);
}

void Merger::scan(const MergeTable& table, std::vector<Symbol>& symbols) {
  uint64_t order[kScanned];  // the rank of a symbol's merge with the next one, then its place
  int32_t merged[kScanned];
  Byte next[kScanned], previous[kScanned + 1];
  Symbol* const symbol = symbols.data();
  const size_t size = symbols.size();
  const auto look_up = [&](size_t i) {
    const Merge merge = next[i] < size ? table.find(symbol[i].id, symbol[next[i]].id) : Merge{kNoRank, 0};
    order[i] = static_cast<uint64_t>(merge.rank) << 8 | i;
    merged[i] = merge.id;
  };
  for (size_t i = 0; i < size; ++i) {
    next[i] = static_cast<Byte>(i + 1);
    previous[i + 1] = static_cast<Byte>(i);
    look_up(i);
  }
  for (;;) {
    uint64_t first = order[0];
    for (size_t i = 1; i < size; ++i) first = std::min(first, order[i]);
    if (first >> 8 == kNoRank) break;
    const size_t left = first & 255, right = next[left];
    symbol[left].id = merged[left];
    symbol[right].id = kMerged;
    order[right] = UINT64_MAX;
    next[left] = next[right];
    previous[next[right]] = static_cast<Byte>(left);
    look_up(left);
    if (left > 0) look_up(previous[left]);
  }
  remove_merged(symbols);
}

void Merger::propose(const MergeTable& table, const std::vector<Symbol>& symbols, uint32_t left, uint32_t right) {
  const int32_t left_id = symbols[left].id, right_id = symbols[right].id;
  const Merge merge = table.find(left_id, right_id);
  if (merge.rank == kNoRank) return;
  heap_.push_back({merge.rank, left, right, left_id, right_id, merge.id});
  std::push_heap(heap_.begin(), heap_.end());
}

void Merger::merge_by_heap(const MergeTable& table, std::vector<Symbol>& symbols) {
  const uint32_t size = static_cast<uint32_t>(symbols.size());
  heap_.clear();
  previous_.resize(size);
  next_.resize(size);
  for (uint32_t i = 0; i < size; ++i) {
    previous_[i] = i ? i - 1 : kNone;
    next_[i] = i + 1 < size ? i + 1 : kNone;
    if (i) propose(table, symbols, i - 1, i);
  }
  while (!heap_.empty()) {
    const Candidate best = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end());
    heap_.pop_back();
    const auto [rank, left, right, left_id, right_id, merged_id] = best;
    if (next_[left] != right || symbols[left].id != left_id || symbols[right].id != right_id) continue;  // of the past
    symbols[left].id = merged_id;
    symbols[right].id = kMerged;
    next_[left] = next_[right];
    if (next_[left] != kNone) previous_[next_[left]] = left;
    if (previous_[left] != kNone) propose(table, symbols, previous_[left], left);
    if (next_[left] != kNone) propose(table, symbols, left, next_[left]);
  }
  remove_merged(symbols);
}

}  // namespace encoder
