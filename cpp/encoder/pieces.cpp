// SentencePiece's BPE: U+2581, its mark for a space, is a space here, in the pieces and in a text that has it written.
//
// A text is cut wherever no piece of the vocabulary has the two bytes side by side, never inside a character: no merge
// can cross such a place.
#include "pieces.h"

#include <cstring>
#include <functional>
#include <stdexcept>
#include <unordered_map>

namespace encoder {

namespace {

constexpr std::string_view kMark = "\xE2\x96\x81";  // U+2581
constexpr uint32_t kCodePoints = 0x110000;

// Copies a text with every U+2581 as a space; where the copy ends.
Byte* copy_unmarked(std::string_view text, Byte* out) {
  while (!text.empty()) {
    const size_t plain = std::min(text.find(kMark), text.size());
    std::memcpy(out, text.data(), plain);
    out += plain;
    if (plain == text.size()) break;
    *out++ = ' ';
    text.remove_prefix(plain + kMark.size());
  }
  return out;
}

// Where the table of cuts has this byte behind the one before it.
template <class Char>
size_t pair_of(const Char* at) {
  return static_cast<size_t>(static_cast<Byte>(at[-1])) << 8 | static_cast<Byte>(at[0]);
}

std::string unmarked(const std::string& piece) {
  std::string copy(piece.size(), '\0');
  Byte* const bytes = reinterpret_cast<Byte*>(copy.data());
  copy.resize(static_cast<size_t>(copy_unmarked(piece, bytes) - bytes));
  return copy;
}

// The rank of each piece's score: equal for equal scores, which merge from left to right.
std::vector<uint32_t> ranks_of(const std::vector<float>& scores) {
  std::vector<float> sorted = scores;
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  std::vector<uint32_t> ranks;
  for (const float score : scores)
    ranks.push_back(static_cast<uint32_t>(
        std::lower_bound(sorted.begin(), sorted.end(), score, std::greater<float>()) - sorted.begin()));
  return ranks;
}

}  // namespace

Pieces::Pieces(const std::vector<std::string>& pieces, const std::vector<float>& scores, PieceRules rules)
    : rules_(std::move(rules)), cuts_(1 << 16, 1), symbol_of_(kCodePoints, kUnknown) {
  if (rules_.byte_ids.empty()) fused_id_ = rules_.unknown_id;
  std::vector<std::string> spelled;
  for (const std::string& piece : pieces) spelled.push_back(unmarked(piece));
  take_own(spelled);
  for (const std::string& piece : spelled)
    for (size_t i = 1; i < piece.size(); ++i) cuts_[pair_of(piece.data() + i)] = 0;
  for (size_t before = 0; before < 256; ++before)
    for (size_t continuing = 0x80; continuing < 0xC0; ++continuing) cuts_[before << 8 | continuing] = 0;
  add_characters(spelled);
  learn_merges(spelled, ranks_of(scores));
}

// The pieces that a user defined are of no merge.
void Pieces::take_own(std::vector<std::string>& pieces) {
  for (const int32_t id : rules_.own) {
    std::string piece;
    pieces.at(static_cast<size_t>(id)).swap(piece);
    starts_own_[static_cast<Byte>(piece.at(0))] = true;
    own_id_.emplace(piece, id);
    own_.push_back(std::move(piece));
  }
  std::sort(own_.begin(), own_.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
}

// The longest one at each place, from left to right.
void Pieces::find_own(Text& text) const {
  text.fixed.clear();
  if (own_.empty()) return;
  const std::string_view all(reinterpret_cast<const char*>(text.data()), text.size());
  for (size_t i = 0; i < all.size(); ++i) {
    if (!starts_own_[static_cast<Byte>(all[i])]) continue;
    for (const std::string& piece : own_)
      if (all.compare(i, piece.size(), piece) == 0) {
        text.fixed.push_back({i, i + piece.size()});
        i += piece.size() - 1;
        break;
      }
  }
}

int32_t Pieces::whole(const Byte* unit, size_t size) const {
  if (own_.empty()) return kUnknown;
  const auto found = own_id_.find(std::string(reinterpret_cast<const char*>(unit), size));
  return found == own_id_.end() ? kUnknown : found->second;
}

// The characters of all pieces get symbols: the id of the piece that they are, or one of their own.
void Pieces::add_characters(const std::vector<std::string>& pieces) {
  std::unordered_map<std::string_view, int32_t> id_of;
  for (size_t id = 0; id < pieces.size(); ++id)
    if (!pieces[id].empty() && !id_of.emplace(pieces[id], static_cast<int32_t>(id)).second)
      throw std::invalid_argument("two pieces have the text " + pieces[id]);
  num_pieces_ = static_cast<int32_t>(pieces.size());
  int32_t next_symbol = num_pieces_;
  for (const std::string& piece : pieces)
    for (size_t i = 0, size; i < piece.size(); i += size) {
      size = character_bytes(static_cast<Byte>(piece[i]));
      const auto found = id_of.emplace(std::string_view(piece).substr(i, size), next_symbol);
      if (found.second) ++next_symbol;
      symbol_of_[code_point(reinterpret_cast<const Byte*>(piece.data()) + i)] = found.first->second;
    }
}

void Pieces::normalize(std::string_view text, Text& out) const {
  out.close(normalized(text, out.reserve(text.size() + 1)));
  find_own(out);
}

// What SentencePiece's normalizer does with the identity rule; a U+2581 that is written out is no space to it yet.
Byte* Pieces::normalized(std::string_view text, Byte* const start) const {
  if (rules_.merge_spaces) text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  if (text.empty()) return start;
  Byte* end = start;
  if (rules_.dummy_prefix) *end++ = ' ';
  if (!rules_.merge_spaces) return copy_unmarked(text, end);
  while (!text.empty()) {
    const size_t run = std::min(text.find(' '), text.size() - 1) + 1;
    end = copy_unmarked(text.substr(0, run), end);
    text.remove_prefix(run);
    text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  }
  while (end > start && end[-1] == ' ') --end;
  return end;
}

size_t Pieces::cut(const Text& text, size_t begin, size_t* ends, bool&) const {
  const auto fixed = std::partition_point(text.fixed.begin(), text.fixed.end(),
                                          [begin](const Text::Span& span) { return span.end <= begin; });
  if (fixed != text.fixed.end() && fixed->begin == begin) {
    ends[0] = fixed->end;
    return 1;
  }
  const size_t stop = fixed != text.fixed.end() ? fixed->begin : text.size();
  const Byte* const bytes = text.data();
  size_t count = 0, i = begin + 1;
  for (; i < stop && count < kBlock; ++i) {
    ends[count] = i;  // overwritten unless it is one
    count += cuts_[pair_of(bytes + i)];
  }
  if (i >= stop && count < kBlock) ends[count++] = stop;
  return count;
}

void Pieces::spell(const Byte* unit, size_t size, Symbols& symbols) const {
  for (size_t i = 0; i < size; i += character_bytes(unit[i]))
    symbols.push_back({symbol_of_[code_point(unit + i)], static_cast<uint32_t>(i)});
}

void Pieces::write(int32_t symbol, const Byte* bytes, size_t size, std::vector<int32_t>& ids) const {
  if (symbol >= 0 && symbol < num_pieces_) return ids.push_back(symbol);
  if (rules_.byte_ids.empty()) return ids.push_back(rules_.unknown_id);
  if (*bytes == ' ') {
    bytes = reinterpret_cast<const Byte*>(kMark.data());
    size = kMark.size();
  }
  for (size_t i = 0; i < size; ++i) ids.push_back(rules_.byte_ids[bytes[i]]);
}

}  // namespace encoder
