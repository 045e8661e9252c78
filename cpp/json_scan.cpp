#include "json_scan.h"

#include <algorithm>
#include <cstring>

namespace json {

namespace {

constexpr Byte kSpace = ' ';  // what is below is a control character, which no string may have

bool is_continuation(Byte byte) { return (byte & 0xC0) == 0x80; }

int hex_digit(Byte byte) {
  if (byte >= '0' && byte <= '9') return byte - '0';
  const Byte lower = byte | 0x20;
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// The number of four hexadecimal digits.
uint32_t hex_number(const Byte* at) {
  uint32_t number = 0;
  for (int i = 0; i < 4; ++i) number = number << 4 | static_cast<uint32_t>(hex_digit(at[i]));
  return number;
}

// What stands for itself behind a backslash or is short for a control character; 0 for anything else.
Byte short_escape(Byte byte) {
  switch (byte) {
    case '"': case '\\': case '/': return byte;
    case 'b': return '\b';
    case 'f': return '\f';
    case 'n': return '\n';
    case 'r': return '\r';
    case 't': return '\t';
    default: return 0;
  }
}

Byte* write_utf8(uint32_t code, Byte* out) {
  if (code < 0x80) {
    *out++ = static_cast<Byte>(code);
    return out;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  *out++ = static_cast<Byte>((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
  for (int i = more - 1; i >= 0; --i) *out++ = static_cast<Byte>(0x80 | (code >> 6 * i & 0x3F));
  return out;
}

// The next byte that is a quote, a backslash or a control character; `high` collects the highest bit of what is passed.
const Byte* skip_ordinary(const Byte* at, const Byte* end, bool& high) {
#if defined(__SSE2__)
  const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\'), control = _mm_set1_epi8(kSpace - 1);
  for (; end - at >= 16; at += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i marks = _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, backslash));
    const __m128i controls = _mm_cmpeq_epi8(_mm_min_epu8(bytes, control), bytes);
    const auto found = static_cast<unsigned>(_mm_movemask_epi8(_mm_or_si128(marks, controls)));
    const auto highs = static_cast<unsigned>(_mm_movemask_epi8(bytes));
    if (found) {
      high |= (highs & (found - 1) & ~found) != 0;
      return at + __builtin_ctz(found);
    }
    high |= highs != 0;
  }
#endif
  for (; at != end && *at >= kSpace && *at != '"' && *at != '\\'; ++at) high |= *at >= 0x80;
  return at;
}

// Copies up to the next backslash; where it is, or the end. Up to 16 bytes more are written than are copied.
const Byte* copy_plain(const Byte* at, const Byte* end, Byte*& out) {
#if defined(__SSE2__)
  const __m128i backslash = _mm_set1_epi8('\\');
  for (; end - at >= 16; at += 16, out += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    if (const auto found = static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, backslash)))) {
      out += __builtin_ctz(found);
      return at + __builtin_ctz(found);
    }
  }
#endif
  while (at != end && *at != '\\') *out++ = *at++;
  return at;
}

}  // namespace

bool is_utf8(const Byte* at, const Byte* end) {
  while (at != end) {
    const Byte first = *at;
    if (first < 0x80) {
      uint64_t eight;
      for (++at; end - at >= 8; at += 8) {
        std::memcpy(&eight, at, 8);
        if (eight & 0x8080808080808080) break;
      }
      continue;
    }
    const int more = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    if (first < 0xC2 || first > 0xF4 || end - at <= more) return false;
    Byte lowest = 0x80, highest = 0xBF;  // of the second byte
    if (first == 0xE0) lowest = 0xA0;
    if (first == 0xED) highest = 0x9F;
    if (first == 0xF0) lowest = 0x90;
    if (first == 0xF4) highest = 0x8F;
    if (at[1] < lowest || at[1] > highest) return false;
    for (int i = 2; i <= more; ++i)
      if (!is_continuation(at[i])) return false;
    at += 1 + more;
  }
  return true;
}

Byte* unescape(const String& string, Byte* out) {
  const Byte *at = string.begin, *const end = string.end;
  while ((at = copy_plain(at, end, out)) != end) {
    if (at[1] != 'u') {
      *out++ = short_escape(at[1]);
      at += 2;
      continue;
    }
    uint32_t code = hex_number(at + 2);
    at += 6;
    if (code >= 0xDC00 && code < 0xE000) return nullptr;
    if (code >= 0xD800 && code < 0xDC00) {
      if (end - at < 6 || at[0] != '\\' || at[1] != 'u') return nullptr;
      const uint32_t low = hex_number(at + 2);
      if (low < 0xDC00 || low >= 0xE000) return nullptr;
      code = 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
      at += 6;
    }
    out = write_utf8(code, out);
  }
  return out;
}

bool Scanner::string(String& found) {
  if (!take('"')) return false;
  bool high = false;
  found = {at_, at_, false};
  while ((at_ = skip_ordinary(at_, end_, high)) != end_) {
    if (*at_ == '"') {
      found.end = at_++;
      return !high || is_utf8(found.begin, found.end);
    }
    if (!escape()) return false;
    found.escaped = true;
  }
  return false;
}

bool Scanner::escape() {
  if (!take('\\') || at_ == end_) return false;
  const Byte kind = *at_++;
  if (kind != 'u') return short_escape(kind) != 0;
  if (end_ - at_ < 4) return false;
  const bool is_hex = std::all_of(at_, at_ + 4, [](Byte byte) { return hex_digit(byte) >= 0; });
  at_ += 4;
  return is_hex;
}

bool Scanner::value(int depth) {
  if (depth > kDepth || at_ == end_) return false;
  String ignored;
  switch (*at_) {
    case '"': return string(ignored);
    case 't': return literal("true");
    case 'f': return literal("false");
    case 'n': return literal("null");
    case '[': ++at_; return list(']', [&] { return value(depth + 1); });
    case '{': ++at_; return list('}', [&] {
        if (!string(ignored)) return false;
        skip_spaces();
        if (!take(':')) return false;
        skip_spaces();
        return value(depth + 1);
      });
    default: return number();
  }
}

template <class Element>
bool Scanner::list(Byte close, Element element) {
  skip_spaces();
  if (take(close)) return true;
  do {
    skip_spaces();
    if (!element()) return false;
    skip_spaces();
  } while (take(','));
  return take(close);
}

bool Scanner::number() {
  const Byte* const begin = at_;
  take('-');
  if (!take('0') && !digits()) return false;
  if (take('.') && !digits()) return false;
  if (take('e') || take('E')) {
    if (!take('+')) take('-');
    if (!digits()) return false;
  }
  return static_cast<size_t>(at_ - begin) <= kDigits;
}

bool Scanner::digits() {
  const Byte* const begin = at_;
  while (at_ != end_ && *at_ >= '0' && *at_ <= '9') ++at_;
  return at_ != begin;
}

bool Scanner::literal(const char* name) {
  const auto size = static_cast<std::ptrdiff_t>(std::strlen(name));
  if (end_ - at_ < size || std::memcmp(at_, name, static_cast<size_t>(size)) != 0) return false;
  at_ += size;
  return true;
}

}  // namespace json
