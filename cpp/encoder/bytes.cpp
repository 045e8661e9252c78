#include "bytes.h"

#include <cstring>
#include <numeric>
#include <stdexcept>

namespace encoder {

ByteLevel::ByteLevel(const std::vector<std::string>& tokens, const std::vector<MergeLine>& merges, bool whole_units,
                     Split split)
    : split_(split) {
  std::fill_n(byte_ids_, 256, kUnknown);
  for (size_t id = 0; id < tokens.size(); ++id)
    if (tokens[id].size() == 1) byte_ids_[static_cast<Byte>(tokens[id][0])] = static_cast<int32_t>(id);
  for (int byte = 0; byte < 256; ++byte)
    if (byte_ids_[byte] == kUnknown) throw std::invalid_argument("byte " + std::to_string(byte) + " is no token");
  const std::vector<int32_t> unmade = merges.empty() ? learn(tokens) : take(tokens, merges);
  if (!whole_units) return;
  for (const int32_t id : unmade) unmade_.emplace(tokens[static_cast<size_t>(id)], id);
}

// The lowest id first.
std::vector<int32_t> ByteLevel::learn(const std::vector<std::string>& tokens) {
  std::vector<uint32_t> ranks(tokens.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  return learn_merges(tokens, ranks);
}

std::vector<int32_t> ByteLevel::take(const std::vector<std::string>& tokens, const std::vector<MergeLine>& merges) {
  merges_ = MergeTable(merges.size());
  for (size_t i = 0; i < merges.size(); ++i)
    merges_.add(merges[i].left, merges[i].right, {static_cast<uint32_t>(i), merges[i].merged});
  std::vector<int32_t> unmade;
  Merger merger;
  for (size_t id = 0; id < tokens.size(); ++id) {
    merge(reinterpret_cast<const Byte*>(tokens[id].data()), tokens[id].size(), merger, merger.symbols);
    if (merger.symbols.size() > 1) unmade.push_back(static_cast<int32_t>(id));
  }
  return unmade;
}

void ByteLevel::normalize(std::string_view text, Text& out) const {
  Byte* const start = out.reserve(text.size());
  if (!text.empty()) std::memcpy(start, text.data(), text.size());
  out.close(start + text.size());
}

size_t ByteLevel::cut(const Text& text, size_t begin, size_t* ends, bool& sure) const {
  return split_(text, begin, ends, sure);
}

void ByteLevel::spell(const Byte* unit, size_t size, Symbols& symbols) const {
  for (size_t i = 0; i < size; ++i) symbols.push_back({byte_ids_[unit[i]], static_cast<uint32_t>(i)});
}

void ByteLevel::write(int32_t symbol, const Byte*, size_t, std::vector<int32_t>& ids) const { ids.push_back(symbol); }

int32_t ByteLevel::whole(const Byte* unit, size_t size) const {
  if (unmade_.empty()) return kUnknown;
  const auto found = unmade_.find(std::string(reinterpret_cast<const char*>(unit), size));
  return found == unmade_.end() ? kUnknown : found->second;
}

}  // namespace encoder
