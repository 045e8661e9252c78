// The index of a .bin/.idx dataset: where each sequence starts, and whether an index fits its .bin.
#include <stdexcept>
#include <string>

#include "arrays.h"

namespace {

using std::to_string;

constexpr int64_t kMaxBytes = int64_t{1} << 62;  // far from an overflow

// The byte at which each sequence starts, the first one at `start`.
Output<int64_t> byte_pointers(Input<int32_t> sizes, int64_t item_bytes, int64_t start) {
  Buffer<int64_t> pointers(sizes.shape(0));
  {
    nb::gil_scoped_release release;
    int64_t position = start;
    for (size_t i = 0; i < pointers.size(); ++i) {
      pointers[i] = position;
      position += sizes.data()[i] * item_bytes;
    }
  }
  return pointers.move_to_numpy();
}

void check_sequences(const Input<int32_t>& sizes, const Input<int64_t>& pointers, int64_t item_bytes, int64_t bin_bytes) {
  int64_t position = 0;
  for (size_t i = 0; i < sizes.shape(0); ++i) {
    const int64_t size = sizes.data()[i], pointer = pointers.data()[i];
    if (size < 0) throw std::invalid_argument("sequence " + to_string(i) + " has " + to_string(size) + " tokens");
    if (pointer != position)
      throw std::invalid_argument("sequence " + to_string(i) + " starts at byte " + to_string(pointer) +
                                  ", but the sizes before it say byte " + to_string(position));
    position += size * item_bytes;
    if (position > kMaxBytes) throw std::invalid_argument("the index describes more than 2^62 bytes of tokens");
  }
  if (position != bin_bytes)
    throw std::invalid_argument("the index describes " + to_string(position) + " bytes of tokens, but the .bin has " +
                                to_string(bin_bytes));
}

void check_documents(const Input<int64_t>& documents, int64_t num_sequences) {
  if (documents.shape(0) == 0) throw std::invalid_argument("the document index is empty, but has to start with 0");
  int64_t before = 0;
  for (size_t i = 0; i < documents.shape(0); ++i) {
    const int64_t first = documents.data()[i];
    if (i == 0 && first != 0)
      throw std::invalid_argument("the document index starts with " + to_string(first) + ", but has to start with 0");
    if (first < before)
      throw std::invalid_argument("document " + to_string(i) + " starts at sequence " + to_string(first) +
                                  ", before document " + to_string(i - 1) + " at sequence " + to_string(before));
    before = first;
  }
  if (before != num_sequences)
    throw std::invalid_argument("the document index ends at sequence " + to_string(before) + ", but there are " +
                                to_string(num_sequences) + " sequences");
}

// Throws with the first thing that is wrong with an index.
void check_index(Input<int32_t> sizes, Input<int64_t> pointers, Input<int64_t> documents, int64_t item_bytes,
                 int64_t bin_bytes) {
  nb::gil_scoped_release release;
  if (sizes.shape(0) != pointers.shape(0))
    throw std::invalid_argument(to_string(sizes.shape(0)) + " sizes, but " + to_string(pointers.shape(0)) + " pointers");
  check_sequences(sizes, pointers, item_bytes, bin_bytes);
  check_documents(documents, static_cast<int64_t>(sizes.shape(0)));
}

}  // namespace

void bind_indexed(nb::module_& m) {
  m.def("byte_pointers", &byte_pointers, nb::arg("sizes"), nb::arg("item_bytes"), nb::arg("start") = 0);
  m.def("check_index", &check_index, nb::arg("sizes"), nb::arg("pointers"), nb::arg("documents"), nb::arg("item_bytes"),
        nb::arg("bin_bytes"));
}
