// Encoding one unit, in bounded memory whatever its length; and the merges that a vocabulary has.
//
// Tokens t1 ... tn are what BPE makes of their text if, for each i, it makes ti, ti+1 of the text of these two alone:
// until the first merge across one of these borders, each token grows as if it were alone with its neighbour, so the
// two alone would have had that merge as well. So a long unit is encoded window by window: the front half of a
// window's tokens stands if its last one stays apart from the first of the window that starts behind it.
#include "model.h"

#include <numeric>

namespace encoder {

namespace {

constexpr size_t kWindow = 4096;  // bytes
constexpr int kTries = 16;        // borders tried for one window before the unit is merged whole

// The bytes of a window: no character is broken.
size_t window_bytes(const Byte* text, size_t left) {
  if (left <= kWindow) return left;
  size_t size = kWindow;
  while ((text[size] & 0xC0) == 0x80) --size;
  return size;
}

}  // namespace

// Whatever text a token is found in, the last merge that makes it is the last one of its bytes alone: see above. So the
// two tokens before that merge are the only ones that ever become it, and shorter tokens decide which they are.
std::vector<int32_t> Model::learn_merges(const std::vector<std::string>& tokens, const std::vector<uint32_t>& ranks) {
  std::vector<size_t> shortest_first(tokens.size());
  std::iota(shortest_first.begin(), shortest_first.end(), size_t{0});
  std::stable_sort(shortest_first.begin(), shortest_first.end(),
                   [&](size_t a, size_t b) { return tokens[a].size() < tokens[b].size(); });
  merges_ = MergeTable(tokens.size());
  std::vector<int32_t> unmade;
  Merger merger;
  Symbols symbols;
  for (const size_t id : shortest_first) {
    merge(reinterpret_cast<const Byte*>(tokens[id].data()), tokens[id].size(), merger, symbols);
    if (symbols.size() == 2)
      merges_.add(symbols[0].id, symbols[1].id, {ranks[id], static_cast<int32_t>(id)});
    else if (symbols.size() > 2)
      unmade.push_back(static_cast<int32_t>(id));
  }
  return unmade;
}

void Model::encode_unit(const Byte* unit, size_t size, Merger& merger, std::vector<int32_t>& ids) const {
  if (const int32_t id = whole(unit, size); id != kUnknown) return ids.push_back(id);
  if (size > kWindow && encode_in_windows(unit, size, merger, ids)) return;
  Symbols& symbols = merger.symbols;
  merge(unit, size, merger, symbols);
  write_all(symbols, symbols.size(), unit, size, ids);
}

void Model::merge(const Byte* text, size_t size, Merger& merger, Symbols& symbols) const {
  symbols.clear();
  spell(text, size, symbols);
  merger.merge(merges_, symbols);
}

void Model::write_all(const Symbols& symbols, size_t count, const Byte* text, size_t size,
                      std::vector<int32_t>& ids) const {
  for (size_t i = 0; i < count; ++i) {
    const size_t end = i + 1 < symbols.size() ? symbols[i + 1].begin : size;
    write(symbols[i].id, text + symbols[i].begin, end - symbols[i].begin, ids);
  }
}

bool Model::encode_in_windows(const Byte* unit, size_t size, Merger& merger, std::vector<int32_t>& ids) const {
  const size_t ids_before = ids.size();
  const Byte *window = unit, *const end = unit + size;
  size_t bytes = window_bytes(window, size);
  Symbols tokens, following;
  merge(window, bytes, merger, tokens);
  while (window + bytes < end) {
    size_t kept = tokens.size() / 2, next_bytes = 0;
    const Byte* next = nullptr;
    for (int tries = 0; tries < kTries && kept > 0; ++tries, --kept) {
      next = window + tokens[kept].begin;
      next_bytes = window_bytes(next, static_cast<size_t>(end - next));
      merge(next, next_bytes, merger, following);
      const size_t last = tokens[kept].begin - tokens[kept - 1].begin;
      const size_t first = following.size() > 1 ? following[1].begin : next_bytes;
      if (stay_apart(next - last, last, last + first, merger)) break;
      next = nullptr;
    }
    if (!next) {
      ids.resize(ids_before);
      return false;
    }
    write_all(tokens, kept, window, bytes, ids);
    window = next;
    bytes = next_bytes;
    tokens.swap(following);
  }
  write_all(tokens, tokens.size(), window, bytes, ids);
  return true;
}

// Whether a text of `size` bytes becomes two tokens, of which the first has `first` bytes.
bool Model::stay_apart(const Byte* text, size_t first, size_t size, Merger& merger) const {
  Symbols& symbols = merger.symbols;
  merge(text, size, merger, symbols);
  return symbols.size() == 2 && symbols[1].begin == first;
}

}  // namespace encoder
