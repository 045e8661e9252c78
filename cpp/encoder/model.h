// What an encoder knows of a tokenizer: how a text is cut into units, and which ids a unit has.
//
// No merge crosses the ends of a unit, so each is encoded on its own, and one seen before is looked up.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "merges.h"

namespace encoder {

constexpr size_t kPadding = 128; // zero bytes behind a text, which may be read
constexpr size_t kBlock = 128;   // units that are cut, then looked up, at once

// A text as it is cut, with its padding; the memory stays for the next text.
class Text {
 public:
  Byte* reserve(size_t size) {
    if (bytes_.size() < size + kPadding) bytes_.resize(size + kPadding);
    return bytes_.data();
  }
  void close(const Byte* end) {
    size_ = static_cast<size_t>(end - bytes_.data());
    std::fill_n(bytes_.data() + size_, kPadding, Byte{0});
  }
  const Byte* data() const { return bytes_.data(); }
  size_t size() const { return size_; }

  struct Span {
    size_t begin, end;
  };
  std::vector<Span> fixed;  // in order: units that are one as they are

 private:
  std::vector<Byte> bytes_ = std::vector<Byte>(kPadding);
  size_t size_ = 0;
};

// Bytes of the character of valid UTF-8 that starts with this one.
inline size_t character_bytes(Byte first) { return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4; }

// A character of valid UTF-8, behind which three more bytes can be read.
inline uint32_t code_point(const Byte* at) {
  const uint32_t first = at[0];
  if (first < 0x80) return first;
  if (first < 0xE0) return (first & 31) << 6 | (at[1] & 63);
  if (first < 0xF0) return (first & 15) << 12 | (at[1] & 63) << 6 | (at[2] & 63);
  return (first & 7) << 18 | (at[1] & 63) << 12 | (at[2] & 63) << 6 | (at[3] & 63);
}

// Shared by all threads; nothing changes once it is made.
class Model {
 public:
  virtual ~Model() = default;

  // The text, in valid UTF-8, as the vocabulary spells it.
  virtual void normalize(std::string_view text, Text& out) const = 0;

  // The ends of the next units, kBlock at most, from byte `begin` on; how many they are. Turns `sure` to false at a
  // character that libraries class differently.
  virtual size_t cut(const Text& text, size_t begin, size_t* ends, bool& sure) const = 0;

  // Appends the ids of a unit.
  void encode_unit(const Byte* unit, size_t size, Merger& merger, std::vector<int32_t>& ids) const;

  // The most ids that one byte of a unit becomes.
  virtual size_t ids_per_byte() const { return 1; }

  // The id of which a run in a text becomes a single one: SentencePiece's <unk>. kUnknown: none.
  int32_t fused_id() const { return fused_id_; }

 protected:
  using Symbols = std::vector<Symbol>;

  // The symbols that merging starts from.
  virtual void spell(const Byte* unit, size_t size, Symbols& symbols) const = 0;
  // Appends the ids of a merged symbol.
  virtual void write(int32_t symbol, const Byte* bytes, size_t size, std::vector<int32_t>& ids) const = 0;
  // Sets merges_: a token by id (empty: none that merges make), its rank. The ids of tokens that no merges make.
  std::vector<int32_t> learn_merges(const std::vector<std::string>& tokens, const std::vector<uint32_t>& ranks);
  // The id of a unit that is one token whatever the merges would make of it, or kUnknown.
  virtual int32_t whole(const Byte*, size_t) const { return kUnknown; }

  // The symbols that a text merges to.
  void merge(const Byte* text, size_t size, Merger& merger, Symbols& symbols) const;

  MergeTable merges_;
  int32_t fused_id_ = kUnknown;

 private:
  void write_all(const Symbols& symbols, size_t count, const Byte* text, size_t size, std::vector<int32_t>& ids) const;
  bool encode_in_windows(const Byte* unit, size_t size, Merger& merger, std::vector<int32_t>& ids) const;
  bool stay_apart(const Byte* text, size_t first, size_t size, Merger& merger) const;
};

}  // namespace encoder
