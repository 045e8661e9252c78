// The split patterns of byte-level BPE tokenizers, written out by hand: which part of a text is one unit.
#pragma once

#include "model.h"

namespace encoder {

// As Model::cut.
using Split = size_t (*)(const Text& text, size_t begin, size_t* ends, bool& sure);

// The split of a pattern by its name: gpt2, llama3, qwen2 or tekken; invalid_argument for another.
Split split_named(std::string_view name);

}  // namespace encoder
