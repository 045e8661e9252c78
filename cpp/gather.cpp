// Moving a tensor's bytes from files into a buffer: rectangles of elements, each side with strides of its own.
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include <sys/uio.h>
#include <unistd.h>

#include "arrays.h"

namespace {

using std::to_string;

// Element (i, j) of a rectangle is at byte from + i * from_row + j * from_column of a file, and at byte
// to + i * to_row + j * to_column of the buffer.
struct Move {
  int64_t file, rows, columns, item_bytes, from, from_row, from_column, to, to_row, to_column;
};
constexpr size_t FIELDS = sizeof(Move) / sizeof(int64_t);
constexpr int64_t SCRATCH_BYTES = 1 << 20;
constexpr int64_t TILE = 128;
constexpr int64_t LINE_BYTES = 64;
constexpr int64_t MAX_IOVECS = 512;

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void fail(ssize_t got) {
  if (got < 0) throw std::system_error(errno, std::generic_category());
  throw std::runtime_error("the file ended before its last tensor");
}

void read_at(int file, uint8_t* to, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t got = pread(file, to, static_cast<size_t>(bytes), offset);
    if (got <= 0) {
      if (got < 0 && errno == EINTR) continue;
      fail(got);
    }
    to += got, offset += got, bytes -= got;
  }
}

// Rows that lie end to end in the file go straight to where they belong, many with one call.
void scatter_rows(int file, const Move& m, uint8_t* out) {
  const int64_t row_bytes = m.columns * m.item_bytes;
  std::vector<iovec> parts;
  for (int64_t i = 0; i < m.rows;) {
    const int64_t count = std::min(MAX_IOVECS, m.rows - i);
    parts.clear();
    for (int64_t k = 0; k < count; ++k)
      parts.push_back({out + m.to + (i + k) * m.to_row, static_cast<size_t>(row_bytes)});
    const ssize_t got = preadv(file, parts.data(), static_cast<int>(count), m.from + i * row_bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail(got);
    int64_t whole = got / row_bytes;
    if (got % row_bytes) {  // a short read in the middle of a row
      const int64_t had = got % row_bytes;
      read_at(file, out + m.to + (i + whole) * m.to_row + had, row_bytes - had, m.from + (i + whole) * row_bytes + had);
      ++whole;
    }
    i += whole;
  }
}

// Rows with gaps: spans of them are read with their gaps where these are small, else row by row.
void copy_rows(int file, const Move& m, uint8_t* out, std::vector<uint8_t>& scratch) {
  const int64_t row_bytes = m.columns * m.item_bytes;
  const int64_t at_once = m.from_row > 8 * row_bytes ? 1 : std::max<int64_t>(1, SCRATCH_BYTES / m.from_row);
  if (at_once == 1) {
    for (int64_t i = 0; i < m.rows; ++i) read_at(file, out + m.to + i * m.to_row, row_bytes, m.from + i * m.from_row);
    return;
  }
  for (int64_t i = 0; i < m.rows; i += at_once) {
    const int64_t count = std::min(at_once, m.rows - i), span = (count - 1) * m.from_row + row_bytes;
    scratch.resize(static_cast<size_t>(span));
    read_at(file, scratch.data(), span, m.from + i * m.from_row);
    for (int64_t k = 0; k < count; ++k)
      std::memcpy(out + m.to + (i + k) * m.to_row, scratch.data() + k * m.from_row, static_cast<size_t>(row_bytes));
  }
}

template <typename T>
void put(const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step, int64_t count) {
  for (int64_t k = 0; k < count; ++k, from += from_step, to += to_step) std::memcpy(to, from, sizeof(T));
}

void put_elements(int64_t item, const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step, int64_t count) {
  if (item == 2) put<uint16_t>(from, from_step, to, to_step, count);
  else if (item == 4) put<uint32_t>(from, from_step, to, to_step, count);
  else if (item == 8) put<uint64_t>(from, from_step, to, to_step, count);
  else put<uint8_t>(from, from_step, to, to_step, count);
}

// Anything else, a transposition above all: `tall` and `wide` are the file's own rows and columns.
void copy_elements(int file, const Move& m, uint8_t* out, std::vector<uint8_t>& scratch) {
  const bool swapped = m.from_row < m.from_column;
  const int64_t tall = swapped ? m.columns : m.rows, wide = swapped ? m.rows : m.columns;
  const int64_t from_tall = swapped ? m.from_column : m.from_row, from_wide = swapped ? m.from_row : m.from_column;
  const int64_t to_tall = swapped ? m.to_column : m.to_row, to_wide = swapped ? m.to_row : m.to_column;
  const int64_t segment = std::max<int64_t>(1, SCRATCH_BYTES / TILE / from_wide);  // elements of a row read at once
  for (int64_t t = 0; t < tall; t += TILE) {
    const int64_t rows = std::min(TILE, tall - t);
    for (int64_t w = 0; w < wide; w += segment) {
      const int64_t columns = std::min(segment, wide - w), span = (columns - 1) * from_wide + m.item_bytes;
      // An odd number of cache lines apart: at powers of two a column's elements would all fall into one set.
      const int64_t pitch = ((span + LINE_BYTES - 1) / LINE_BYTES | 1) * LINE_BYTES;
      scratch.resize(static_cast<size_t>(rows * pitch));
      for (int64_t r = 0; r < rows; ++r)
        read_at(file, scratch.data() + r * pitch, span, m.from + (t + r) * from_tall + w * from_wide);
      for (int64_t c = 0; c < columns; ++c)  // one column of the tile after the other: neighbours in the buffer
        put_elements(m.item_bytes, scratch.data() + c * from_wide, pitch, out + m.to + t * to_tall + (w + c) * to_wide,
                     to_tall, rows);
    }
  }
}

// The part of a move that falls into rows [first, last) of a buffer of rows of `row_bytes`.
bool clip(Move& m, int64_t first, int64_t last, int64_t row_bytes) {
  const int64_t step = m.to_row / row_bytes, row = m.to / row_bytes;
  const int64_t begin = row >= first ? 0 : (first - row + step - 1) / step;
  const int64_t end = row >= last ? 0 : std::min(m.rows, (last - row + step - 1) / step);
  if (begin >= end) return false;
  m.rows = end - begin;
  m.from += begin * m.from_row;
  m.to += begin * m.to_row - first * row_bytes;
  return true;
}

void check(const Move& m, size_t files, int64_t out_bytes) {
  const int64_t last = m.to + (m.rows - 1) * m.to_row + (m.columns - 1) * m.to_column + m.item_bytes;
  const bool fits = m.file >= 0 && m.file < static_cast<int64_t>(files) && m.columns > 0 && m.item_bytes > 0 &&
                    m.from >= 0 && m.from_row >= 0 && m.from_column > 0 && m.to >= 0 && m.to_column > 0 &&
                    last <= out_bytes;
  if (!fits) throw std::invalid_argument("a move does not fit the buffer of " + to_string(out_bytes) + " bytes");
}

void gather(Input<int64_t> moves, Input<int64_t> files, int64_t row_bytes, int64_t first_row, int64_t last_row,
            Bytes out) {
  nb::gil_scoped_release release;
  if (moves.shape(0) % FIELDS || row_bytes < 1) throw std::invalid_argument("moves are rows of 10 numbers");
  std::vector<uint8_t> scratch;
  for (size_t k = 0; k < moves.shape(0) / FIELDS; ++k) {
    Move m;
    std::memcpy(&m, moves.data() + k * FIELDS, sizeof(Move));
    if (m.rows < 1 || m.to_row < row_bytes || m.to < 0) throw std::invalid_argument("a move without rows");
    if (!clip(m, first_row, last_row, row_bytes)) continue;
    check(m, files.shape(0), static_cast<int64_t>(out.shape(0)));
    const int file = static_cast<int>(files.data()[m.file]);
    const int64_t bytes = m.columns * m.item_bytes;
    const bool in_rows = m.from_column == m.item_bytes && m.to_column == m.item_bytes;
    if (!in_rows) copy_elements(file, m, out.data(), scratch);
    else if (m.from_row == bytes && m.to_row == bytes) read_at(file, out.data() + m.to, m.rows * bytes, m.from);
    else if (m.from_row == bytes) scatter_rows(file, m, out.data());
    else copy_rows(file, m, out.data(), scratch);
  }
}

// The first element whose exponent bits are all set (NaN or infinite), or -1.
template <typename T>
int64_t first_with_exponent(const uint8_t* data, size_t count, T exponent) {
  constexpr size_t BLOCK = 4096;
  std::vector<T> block(BLOCK);
  for (size_t start = 0; start < count; start += BLOCK) {
    const size_t size = std::min(BLOCK, count - start);
    std::memcpy(block.data(), data + start * sizeof(T), size * sizeof(T));
    T found = 0;  // of the elements' own size, so that the compiler compares many at once
    for (size_t k = 0; k < size; ++k) found |= static_cast<T>((block[k] & exponent) == exponent ? ~T{0} : T{0});
    for (size_t k = 0; found && k < size; ++k)
      if ((block[k] & exponent) == exponent) return static_cast<int64_t>(start + k);
  }
  return -1;
}

int64_t first_nonfinite(nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> data,
                        int64_t item_bytes, int64_t exponent_bits) {
  nb::gil_scoped_release release;
  const size_t count = data.shape(0) / static_cast<size_t>(item_bytes);
  if (item_bytes == 2 && exponent_bits == 8) return first_with_exponent<uint16_t>(data.data(), count, 0x7f80);
  if (item_bytes == 2 && exponent_bits == 5) return first_with_exponent<uint16_t>(data.data(), count, 0x7c00);
  if (item_bytes == 4 && exponent_bits == 8) return first_with_exponent<uint32_t>(data.data(), count, 0x7f800000);
  if (item_bytes == 8 && exponent_bits == 11)
    return first_with_exponent<uint64_t>(data.data(), count, 0x7ff0000000000000);
  throw std::invalid_argument("no floating-point type of " + to_string(item_bytes) + " bytes with " +
                              to_string(exponent_bits) + " exponent bits");
}

}  // namespace

void bind_gather(nb::module_& m) {
  m.def("gather", &gather, nb::arg("moves"), nb::arg("files"), nb::arg("row_bytes"), nb::arg("first_row"),
        nb::arg("last_row"), nb::arg("out"));
  m.def("first_nonfinite", &first_nonfinite, nb::arg("data"), nb::arg("item_bytes"), nb::arg("exponent_bits"));
}
