// A SentencePiece BPE model with the identity normalizer.
#pragma once

#include <string>
#include <unordered_map>

#include "model.h"

namespace encoder {

// How SentencePiece prepares a text, and what it makes of a character that is no piece.
struct PieceRules {
  bool dummy_prefix;              // a space goes before the text
  bool merge_spaces;              // runs of spaces become one, those at the ends go
  int32_t unknown_id;             // of <unk>
  std::vector<int32_t> own;       // pieces that a user defined: found in a text before anything is merged
  std::vector<int32_t> byte_ids;  // 256 ids of <0x00> ... <0xFF>; none: unknown characters become <unk>
};

class Pieces : public Model {
 public:
  // `pieces` by id, without control, unknown and byte pieces, which are empty; the higher score merges first.
  Pieces(const std::vector<std::string>& pieces, const std::vector<float>& scores, PieceRules rules);

  void normalize(std::string_view text, Text& out) const override;
  size_t cut(const Text& text, size_t begin, size_t* ends, bool& sure) const override;
  size_t ids_per_byte() const override { return 3; }  // a space that is no piece is the three bytes of U+2581

 protected:
  void spell(const Byte* unit, size_t size, Symbols& symbols) const override;
  void write(int32_t symbol, const Byte* bytes, size_t size, std::vector<int32_t>& ids) const override;

 private:
  int32_t whole(const Byte* unit, size_t size) const override;
  void take_own(std::vector<std::string>& pieces);
  void find_own(Text& text) const;
  Byte* normalized(std::string_view text, Byte* start) const;
  void add_characters(const std::vector<std::string>& pieces);

  PieceRules rules_;
  int32_t num_pieces_ = 0;          // symbols from here on are characters of pieces that are none themselves
  std::vector<Byte> cuts_;          // by 256 * a byte + the next one: 1 where no piece has them side by side
  std::vector<int32_t> symbol_of_;  // by code point
  std::vector<std::string> own_;    // the longest first
  std::unordered_map<std::string, int32_t> own_id_;
  bool starts_own_[256] = {};  // by byte
};

}  // namespace encoder
