// A scanner over JSON text, one line at a time: what it takes, Python's json.loads takes too, and finds the same in it.
// Not the other way round: NaN, deep nesting and long numbers are refused here, and a line's end ends everything.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace json {

using Byte = unsigned char;

// Whether bytes are UTF-8 as Python's strict codec has it: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(const Byte* at, const Byte* end);

// The bytes between the quotes of a string, not yet unescaped.
struct String {
  const Byte *begin, *end;
  bool escaped;  // has a backslash
};

// Writes a string that was scanned, unescaped; where it ends, nullptr for half of a surrogate pair. Writes up to kSlack
// bytes more than the string has, escaped as it is.
constexpr size_t kSlack = 16;
Byte* unescape(const String& string, Byte* out);

class Scanner {
 public:
  Scanner(const Byte* at, const Byte* end) : at_(at), end_(end) {}

  const Byte* at() const { return at_; }
  bool at_line_end() const { return at_ == end_ || *at_ == '\n'; }
  bool sees(Byte byte) const { return at_ != end_ && *at_ == byte; }

  // Each goes behind what it is called after, and says whether that was there.
  bool take(Byte byte) { return sees(byte) && (++at_, true); }
  void skip_spaces() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  bool string(String& found);  // valid UTF-8 and escapes
  bool value(int depth = 0);

 private:
  static constexpr int kDepth = 100;     // Python goes to about 1000, less where it is called from deep inside
  static constexpr size_t kDigits = 600;  // Python's limit of integers is 4300, or what the environment says above 640

  // Calls `element` for each of a list that `close` ends; the opening bracket is behind.
  template <class Element>
  bool list(Byte close, Element element);
  bool number();
  bool literal(const char* name);
  bool digits();
  bool escape();

  const Byte *at_, *end_;
};

}  // namespace json
