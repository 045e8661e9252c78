// Reading samples: seq_len + 1 tokens of the shuffled documents laid end to end, straight from the mapped .bin.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arrays.h"

namespace {

using std::to_string;

using AnyTokens = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = std::tuple<Output<int64_t>, Output<int32_t>, Output<int64_t>>;

using Places = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A dataset and Megatron's index over it. Nothing in them is trusted: a file can change under its map.
struct Index {
  Input<int64_t> starts;     // the token at which each document starts, and the end
  Input<int32_t> documents;  // in the order of the epochs
  Places samples;            // pairs, int32 or int64: position in `documents`, token in that document
  Input<uint32_t> order;
  int64_t num_tokens;
};

struct Span {
  int64_t first, last;
};

// The tokens of the document at a position in the order of the epochs.
Span document_at(const Index& index, int64_t position) {
  if (position < 0 || position >= static_cast<int64_t>(index.documents.shape(0)))
    throw std::invalid_argument("a sample asks for document " + to_string(position) + " of an index of " +
                                to_string(index.documents.shape(0)));
  const int64_t number = index.documents.data()[position];
  if (number < 0 || number + 1 >= static_cast<int64_t>(index.starts.shape(0)))
    throw std::invalid_argument("the index names document " + to_string(number) + ", which the dataset has not");
  const Span span{index.starts.data()[number], index.starts.data()[number + 1]};
  if (span.first < 0 || span.first > span.last || span.last > index.num_tokens)
    throw std::invalid_argument("document " + to_string(number) + " is outside the tokens");
  return span;
}

int64_t place_at(const Index& index, int64_t number) {
  const void* places = index.samples.data();
  return index.samples.itemsize() == sizeof(int32_t) ? static_cast<const int32_t*>(places)[number]
                                                     : static_cast<const int64_t*>(places)[number];
}

int64_t sample_at(const Index& index, int64_t wanted) {
  if (wanted < 0 || wanted >= static_cast<int64_t>(index.order.shape(0)))
    throw std::invalid_argument("there is no sample " + to_string(wanted) + " among " + to_string(index.order.shape(0)));
  const int64_t sample = index.order.data()[wanted];
  if (2 * sample + 1 >= static_cast<int64_t>(index.samples.shape(0)))
    throw std::invalid_argument("the order names sample " + to_string(sample) + ", which the index has not");
  return sample;
}

// A token that was stored as a floating-point number; what is no token becomes -1, which no model takes.
template <typename T>
int64_t widened(T token) {
  if constexpr (std::is_floating_point_v<T>)
    return token >= 0 && token < T{1ull << 53} ? static_cast<int64_t>(token) : -1;
  else
    return token;
}

// One sample into `row`; appends the places in it, but 0, at which a document starts.
template <typename T>
void read_sample(const T* tokens, const Index& index, int64_t sample, int64_t* row, int64_t length,
                 std::vector<int32_t>& boundaries) {
  const size_t before = boundaries.size();
  int64_t position = place_at(index, 2 * sample), offset = place_at(index, 2 * sample + 1);
  for (int64_t filled = 0;;) {
    const Span span = document_at(index, position);
    if (offset < 0 || offset > span.last - span.first)
      throw std::invalid_argument("sample " + to_string(sample) + " starts outside its document");
    const int64_t count = std::min(span.last - span.first - offset, length - filled);
    std::transform(tokens + span.first + offset, tokens + span.first + offset + count, row + filled, widened<T>);
    filled += count;
    if (filled == length) return;
    const bool known = boundaries.size() > before && boundaries.back() == filled;  // an empty document between
    if (filled > 0 && !known) boundaries.push_back(static_cast<int32_t>(filled));
    ++position, offset = 0;
  }
}

template <typename T>
Rows read_rows(const AnyTokens& tokens, const Index& index, const Input<int64_t>& wanted, int64_t seq_len) {
  const int64_t length = seq_len + 1;
  Buffer<int64_t> rows(wanted.shape(0) * length), ends(wanted.shape(0));
  std::vector<int32_t> boundaries;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < wanted.shape(0); ++i) {
      const int64_t sample = sample_at(index, wanted.data()[i]);
      read_sample(static_cast<const T*>(tokens.data()), index, sample, rows.data() + i * length, length, boundaries);
      ends[i] = static_cast<int64_t>(boundaries.size());
    }
  }
  Buffer<int32_t> flat(boundaries.size());
  std::copy(boundaries.begin(), boundaries.end(), flat.data());
  return {rows.move_to_numpy(static_cast<size_t>(length)), flat.move_to_numpy(), ends.move_to_numpy()};
}

Rows read_samples(AnyTokens tokens, Input<int64_t> starts, Input<int32_t> documents, Places samples,
                  Input<uint32_t> order, Input<int64_t> wanted, int64_t seq_len) {
  if (seq_len < 1 || seq_len >= 1 << 30) throw std::invalid_argument("seq_len has to be 1 to 2^30 - 1");
  if (samples.dtype() != nb::dtype<int32_t>() && samples.dtype() != nb::dtype<int64_t>())
    throw std::invalid_argument("samples have to be int32 or int64");
  const Index index{starts, documents, samples, order, static_cast<int64_t>(tokens.shape(0))};
  const nb::dlpack::dtype type = tokens.dtype();
  if (type == nb::dtype<uint16_t>()) return read_rows<uint16_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<int32_t>()) return read_rows<int32_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<uint8_t>()) return read_rows<uint8_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<int8_t>()) return read_rows<int8_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<int16_t>()) return read_rows<int16_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<int64_t>()) return read_rows<int64_t>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<float>()) return read_rows<float>(tokens, index, wanted, seq_len);
  if (type == nb::dtype<double>()) return read_rows<double>(tokens, index, wanted, seq_len);
  throw std::invalid_argument("tokens of this type are not read");
}

}  // namespace

void bind_samples(nb::module_& m) {
  m.def("read_samples", &read_samples, nb::arg("tokens"), nb::arg("starts"), nb::arg("documents"), nb::arg("samples"),
        nb::arg("order"), nb::arg("wanted"), nb::arg("seq_len"));
}
