// The index of a .bin/.idx dataset: where each sequence starts, and whether an index fits its .bin.
#include <stdexcept>
#include <string>

#include "arrays.h"

namespace {

// Byte offset of each sequence: the running sum of the sizes before it.
Output<int64_t> byte_pointers(Input<int32_t> sizes, int64_t item_bytes) {
  Buffer<int64_t> pointers(sizes.shape(0));
  {
    nb::gil_scoped_release release;
    int64_t position = 0;
    for (size_t i = 0; i < sizes.shape(0); ++i) {
      pointers[i] = position;
      position += sizes.data()[i] * item_bytes;
    }
  }
  return pointers.move_to_numpy();
}

// Throws std::invalid_argument with the first thing that is wrong.
void check_sequences(Input<int32_t> sizes, Input<int64_t> pointers, int64_t item_bytes, int64_t bin_bytes) {
  int64_t position = 0;
  for (size_t i = 0; i < sizes.shape(0); ++i) {
    const int64_t size = sizes.data()[i], pointer = pointers.data()[i];
    if (size < 0) throw std::invalid_argument("sequence " + std::to_string(i) + " has " + std::to_string(size) + " tokens");
    if (pointer != position)
      throw std::invalid_argument("sequence " + std::to_string(i) + " starts at byte " + std::to_string(pointer) +
                                  ", but the sizes before it say byte " + std::to_string(position));
    position += size * item_bytes;
  }
  if (position != bin_bytes)
    throw std::invalid_argument("the index describes " + std::to_string(position) + " bytes of tokens, but the .bin has " +
                                std::to_string(bin_bytes));
}

void check_documents(Input<int64_t> documents, int64_t num_sequences) {
  const size_t count = documents.shape(0);
  if (count == 0) throw std::invalid_argument("the document index is empty, but it has to start with 0");
  int64_t before = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t first = documents.data()[i];
    if ((i == 0 && first != 0) || first < before)
      throw std::invalid_argument("document " + std::to_string(i) + " starts at sequence " + std::to_string(first) +
                                  ", but the one before it at " + std::to_string(before));
    before = first;
  }
  if (before != num_sequences)
    throw std::invalid_argument("the document index ends at sequence " + std::to_string(before) + ", but there are " +
                                std::to_string(num_sequences) + " sequences");
}

void check_index(Input<int32_t> sizes, Input<int64_t> pointers, Input<int64_t> documents, int64_t item_bytes,
                 int64_t bin_bytes) {
  nb::gil_scoped_release release;
  if (sizes.shape(0) != pointers.shape(0)) throw std::invalid_argument("sizes and pointers differ in length");
  check_sequences(sizes, pointers, item_bytes, bin_bytes);
  check_documents(documents, static_cast<int64_t>(sizes.shape(0)));
}

}  // namespace

void bind_indexed(nb::module_& m) {
  m.def("byte_pointers", &byte_pointers, nb::arg("sizes"), nb::arg("item_bytes"));
  m.def("check_index", &check_index, nb::arg("sizes"), nb::arg("pointers"), nb::arg("documents"), nb::arg("item_bytes"),
        nb::arg("bin_bytes"));
}
