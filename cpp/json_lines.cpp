// The documents of JSON lines, laid end to end without a Python object for each row.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "json_scan.h"

namespace {

using json::Byte;

class Rows {
 public:
  Rows(const std::vector<std::string>& keys, const std::string& separator)
      : keys_(keys), separator_(separator), found_(keys.size()) {}

  // The bytes that the documents of some lines may take.
  size_t most_bytes(const Byte* lines, size_t size) const {
    const size_t rows = keys_.size() == 1 ? 0 : 1 + static_cast<size_t>(std::count(lines, lines + size, Byte{'\n'}));
    return size + rows * (keys_.size() - 1) * separator_.size() + json::kSlack;
  }

  // Goes over whole lines, and writes their documents; where they end.
  Byte* read(const Byte* lines, const Byte* end, Byte* out) {
    const Byte* const begin = out;
    offsets_.push_back(0);
    for (const Byte *line = lines, *next; line != end; line = next, ++count_) {
      json::Scanner scanner(line, end);
      scanner.skip_spaces();
      if (scanner.at_line_end()) {
        next = after(scanner.at(), end);
        continue;
      }
      if (Byte* const written = row(scanner, out)) {
        out = written;
        next = after(scanner.at(), end);
      } else {
        const void* const found = std::memchr(line, '\n', static_cast<size_t>(end - line));
        next = found ? static_cast<const Byte*>(found) + 1 : end;
        odd_.insert(odd_.end(), {static_cast<int64_t>(offsets_.size()) - 1, count_, line - lines, next - lines});
      }
      offsets_.push_back(out - begin);
    }
    return out;
  }

  const std::vector<int64_t>& offsets() const { return offsets_; }
  const std::vector<int64_t>& odd() const { return odd_; }
  int64_t count() const { return count_; }

 private:
  static const Byte* after(const Byte* line_end, const Byte* end) { return line_end == end ? end : line_end + 1; }

  // Writes the document of a line that is an object with a text under each key, once; nullptr for any other line.
  Byte* row(json::Scanner& scanner, Byte* out) {
    for (auto& text : found_) text.begin = nullptr;
    if (!scanner.take('{')) return nullptr;
    do {
      if (!member(scanner)) return nullptr;
      scanner.skip_spaces();
    } while (scanner.take(','));
    if (!scanner.take('}')) return nullptr;
    scanner.skip_spaces();
    return scanner.at_line_end() ? joined(out) : nullptr;
  }

  // A key and its value; a key with a backslash may be one of ours in disguise.
  bool member(json::Scanner& scanner) {
    json::String name;
    scanner.skip_spaces();
    if (!scanner.string(name) || name.escaped) return false;
    scanner.skip_spaces();
    if (!scanner.take(':')) return false;
    scanner.skip_spaces();
    json::String* const text = wanted(name);
    if (!text) return scanner.value();
    return text->begin == nullptr && scanner.string(*text);
  }

  json::String* wanted(const json::String& name) {
    const auto size = static_cast<size_t>(name.end - name.begin);
    for (size_t i = 0; i < keys_.size(); ++i)
      if (keys_[i].size() == size && std::memcmp(keys_[i].data(), name.begin, size) == 0) return &found_[i];
    return nullptr;
  }

  Byte* joined(Byte* out) const {
    const Byte* const begin = out;
    for (const json::String& text : found_) {
      if (!text.begin) return nullptr;
      if (text.begin == text.end) continue;
      if (out != begin) out = std::copy(separator_.begin(), separator_.end(), out);
      out = json::unescape(text, out);
      if (!out) return nullptr;
    }
    return out;
  }

  const std::vector<std::string>& keys_;
  const std::string& separator_;
  std::vector<json::String> found_;  // by key
  std::vector<int64_t> offsets_, odd_;
  int64_t count_ = 0;  // of lines
};

Output<int64_t> array(const std::vector<int64_t>& numbers) {
  Buffer<int64_t> buffer(numbers.size());
  std::copy(numbers.begin(), numbers.end(), buffer.data());
  return buffer.move_to_numpy();
}

nb::tuple json_texts(Input<uint8_t> lines, const std::vector<std::string>& keys, const std::string& separator) {
  if (keys.empty()) throw std::invalid_argument("at least one key is needed");
  Rows rows(keys, separator);
  const Byte* const begin = lines.data();
  std::unique_ptr<Buffer<uint8_t>> texts;
  {
    nb::gil_scoped_release release;
    texts = std::make_unique<Buffer<uint8_t>>(rows.most_bytes(begin, lines.shape(0)));
    rows.read(begin, begin + lines.shape(0), texts->data());
  }
  return nb::make_tuple(texts->move_to_numpy(), array(rows.offsets()), array(rows.odd()), rows.count());
}

}  // namespace

void bind_json_lines(nb::module_& m) {
  m.def("json_texts", &json_texts, nb::arg("lines"), nb::arg("keys"), nb::arg("separator"));
}
