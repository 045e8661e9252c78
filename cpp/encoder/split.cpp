// The next unit of a text, as the patterns' alternatives find it, in their order. What they have in common:
//
//     (?i:'s|'t|'re|'ve|'m|'ll|'d)     contraction
//     [^\r\n\p{L}\p{N}]?\p{L}+         word, with one character before it
//     \p{N}{1,3}                       number
//      ?[^\s\p{L}\p{N}]+[\r\n]*        punctuation
//     \s*[\r\n]+|\s+(?!\S)|\s+         white space: up to the last newline, or all but the character before a word
//
// Marks (\p{M}) are neither letters nor numbers, so they are punctuation, but in tekken's words.
#include "split.h"

#include <stdexcept>
#include <string>

#include "unicode_classes.h"

namespace encoder {

namespace {

// Bits of a character's class.
constexpr Byte kUpper = 1, kLower = 2, kUncased = 4, kMark = 8, kNumber = 16, kWhite = 32, kNewline = 64, kOther = 128;
constexpr Byte kLetter = kUpper | kLower | kUncased, kSpaces = kWhite | kNewline, kPunctuation = kOther | kMark;
constexpr Byte kUnassigned = kOther | kUpper;  // in the Unicode of the table; a library may have a newer one

Byte bits_of(char name) {
  switch (name) {
    case 'U': return kUpper;
    case 'L': return kLower;
    case 'X': return kUncased;
    case 'M': return kMark;
    case 'N': return kNumber;
    case 'W': return kWhite;
    case 'R': return kNewline;
    case 'Q': return kUnassigned;
    default: return kOther;
  }
}

// The class of every code point.
const Byte* classes() {
  static const std::vector<Byte> table = [] {
    std::vector<Byte> made;
    made.reserve(0x110000);
    for (const char* at = kUnicodeClasses; *at;) {
      const char name = *at++;
      size_t run = 0;
      for (; *at >= '0' && *at <= '9'; ++at) run = 10 * run + static_cast<size_t>(*at - '0');
      made.insert(made.end(), run ? run : 1, bits_of(name));
    }
    return made;
  }();
  return table.data();
}

// What one pattern has otherwise than the others.
struct Gpt2 {
  static constexpr bool kContractions = true, kFoldCase = false, kAnyPrefix = false, kSpacedNumbers = true;
  static constexpr bool kNewlines = false, kCasedWords = false, kSlashes = false;
  static constexpr int kDigits = 0;  // no limit
};
struct Llama3 {
  static constexpr bool kContractions = true, kFoldCase = true, kAnyPrefix = true, kSpacedNumbers = false;
  static constexpr bool kNewlines = true, kCasedWords = false, kSlashes = false;
  static constexpr int kDigits = 3;
};
struct Qwen2 : Llama3 {
  static constexpr int kDigits = 1;
};
struct Tekken : Qwen2 {
  static constexpr bool kContractions = false, kCasedWords = true, kSlashes = true;
};

template <class Rules>
class Scanner {
 public:
  Scanner(const Text& text, bool& sure) : text_(text.data()), size_(text.size()), sure_(sure) {}

  size_t next(size_t i) {
    if (Rules::kContractions && text_[i] == '\'')
      if (const size_t size = contraction(i + 1)) return i + 1 + size;
    const size_t after = i + character_bytes(text_[i]);
    const Byte first = bits(i), second = bits(after);
    if (const size_t end = Rules::kCasedWords ? cased_word(i, after, first) : word(i, after, first, second)) return end;
    if (first & kNumber) return number(i);
    if (Rules::kSpacedNumbers && text_[i] == ' ' && second & kNumber) return number(after);
    if (first & kPunctuation) return punctuation(i);
    if (text_[i] == ' ' && second & kPunctuation) return punctuation(after);
    return white(i);
  }

 private:
  // The class of the character at i; none at the end.
  Byte bits(size_t i) {
    if (i >= size_) return 0;
    const Byte found = text_[i] < 0x80 ? classes_[text_[i]] : classes_[code_point(text_ + i)];
    if (found == kUnassigned) {
      sure_ = false;
      return kOther;
    }
    return found;
  }

  // Where the characters of these classes from i on end.
  size_t run(size_t i, Byte wanted) {
    for (;; i += character_bytes(text_[i])) {
      while (text_[i] - 1u < 0x7F && classes_[text_[i]] & wanted) ++i;  // ASCII but NUL, of which the padding is
      if (!(bits(i) & wanted)) return i;
    }
  }

  // The bytes of a contraction behind its apostrophe, 0 if there is none.
  size_t contraction(size_t i) const {
    const Byte fold = Rules::kFoldCase ? 0x20 : 0;
    const Byte a = text_[i] | fold, b = text_[i + 1] | fold;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 2;
    return Rules::kFoldCase && text_[i] == 0xC5 && text_[i + 1] == 0xBF ? 2 : 0;  // U+017F folds to s
  }

  static bool may_precede(Byte bits, Byte byte) {
    return Rules::kAnyPrefix ? bits & (kPunctuation | kWhite) : byte == ' ';
  }

  size_t word(size_t i, size_t after, Byte first, Byte second) {
    if (first & kLetter) return run(after, kLetter);
    return second & kLetter && may_precede(first, text_[i]) ? run(after, kLetter) : 0;
  }

  // tekken: P?A*B+|P?A+B* with A: all letters and marks but lower case, B: all but upper case, P: what may precede.
  size_t cased_word(size_t i, size_t after, Byte first) {
    const bool prefix = may_precede(first, text_[i]);
    if (const size_t end = prefix ? ends_lower(after) : 0) return end;
    if (const size_t end = ends_lower(i)) return end;
    if (const size_t end = prefix ? starts_upper(after) : 0) return end;
    return starts_upper(i);
  }

  // The end of A*B+ from i on, 0 if there is none: where no B follows all of A, the last of A that is also B is it.
  size_t ends_lower(size_t i) {
    size_t last_both = 0, end = i;
    for (Byte found; (found = bits(end)) & kNotLower;) {
      end += character_bytes(text_[end]);
      if (found & kNotUpper) last_both = end;
    }
    const size_t lower = run(end, kNotUpper);
    return lower > end ? lower : last_both;
  }

  size_t starts_upper(size_t i) {
    const size_t upper = run(i, kNotLower);
    return upper > i ? run(upper, kNotUpper) : 0;
  }

  size_t number(size_t i) {
    if (!Rules::kDigits) return run(i, kNumber);
    for (int digits = 0; digits < Rules::kDigits && bits(i) & kNumber; ++digits) i += character_bytes(text_[i]);
    return i;
  }

  size_t punctuation(size_t i) {
    i = run(i, kPunctuation);
    if (Rules::kNewlines)
      while (i < size_ && (text_[i] == '\r' || text_[i] == '\n' || (Rules::kSlashes && text_[i] == '/'))) ++i;
    return i;
  }

  size_t white(size_t i) {
    size_t end = i, last = i, behind_newline = 0;
    for (Byte found; (found = bits(end)) & kSpaces;) {
      last = end;
      end += character_bytes(text_[end]);
      if (found & kNewline) behind_newline = end;
    }
    if (Rules::kNewlines && behind_newline) return behind_newline;
    return end == size_ || last == i ? end : last;
  }

  static constexpr Byte kNotLower = kUpper | kUncased | kMark, kNotUpper = kLower | kUncased | kMark;
  const Byte* const classes_ = classes();
  const Byte* const text_;
  const size_t size_;
  bool& sure_;
};

template <class Rules>
size_t split(const Text& text, size_t begin, size_t* ends, bool& sure) {
  Scanner<Rules> scanner(text, sure);
  size_t count = 0;
  for (size_t end = begin; count < kBlock && end < text.size();) ends[count++] = end = scanner.next(end);
  return count;
}

}  // namespace

Split split_named(std::string_view name) {
  if (name == "gpt2") return split<Gpt2>;
  if (name == "llama3") return split<Llama3>;
  if (name == "qwen2") return split<Qwen2>;
  if (name == "tekken") return split<Tekken>;
  throw std::invalid_argument("no split pattern is called " + std::string(name));
}

}  // namespace encoder
