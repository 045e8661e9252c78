// Byte-level BPE behind a split pattern: tiktoken's ranks, and tokenizer.json files of that kind.
#pragma once

#include <string>
#include <unordered_map>

#include "split.h"

namespace encoder {

// One line of a merge list: these two tokens become that one.
struct MergeLine {
  int32_t left, right, merged;
};

class ByteLevel : public Model {
 public:
  // `tokens` by id, without the special ones, which are empty; every byte is one. No `merges`: any two tokens merge
  // that are a token together, the lowest id first. `whole_units`: a unit that is a token is that one, whatever the
  // merges would make of it.
  ByteLevel(const std::vector<std::string>& tokens, const std::vector<MergeLine>& merges, bool whole_units,
            Split split);

  void normalize(std::string_view text, Text& out) const override;
  size_t cut(const Text& text, size_t begin, size_t* ends, bool& sure) const override;

 protected:
  void spell(const Byte* unit, size_t size, Symbols& symbols) const override;
  void write(int32_t symbol, const Byte* bytes, size_t size, std::vector<int32_t>& ids) const override;
  int32_t whole(const Byte* unit, size_t size) const override;

 private:
  // Both set merges_; the ids of the tokens that no merges make.
  std::vector<int32_t> learn(const std::vector<std::string>& tokens);
  std::vector<int32_t> take(const std::vector<std::string>& tokens, const std::vector<MergeLine>& merges);

  std::unordered_map<std::string, int32_t> unmade_;  // tokens that the merges do not make of their bytes
  Split split_;
  int32_t byte_ids_[256];
};

}  // namespace encoder
