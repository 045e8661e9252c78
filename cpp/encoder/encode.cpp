// Encoders of texts into token ids. Several threads may call one at a time, each with a cache of its own.
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../arrays.h"
#include "bytes.h"
#include "pieces.h"
#include "units.h"

namespace {

using encoder::kBlock;

// Strings end to end in `bytes`, each from its offset to the next one's.
struct Strings {
  const char* bytes;
  const int64_t* offsets;
  size_t count;

  Strings(const Input<uint8_t>& bytes, const Input<int64_t>& offsets)
      : bytes(reinterpret_cast<const char*>(bytes.data())), offsets(offsets.data()), count(offsets.shape(0) - 1) {
    if (offsets.shape(0) == 0 || offsets.data()[0] != 0)
      throw std::invalid_argument("the offsets have to start with 0");
    for (size_t i = 0; i < count; ++i)
      if (this->offsets[i] > this->offsets[i + 1]) throw std::invalid_argument("the offsets have to grow");
    if (this->offsets[count] > static_cast<int64_t>(bytes.shape(0)))
      throw std::invalid_argument("the offsets go beyond the bytes");
  }
  size_t size(size_t i) const { return static_cast<size_t>(offsets[i + 1] - offsets[i]); }
  std::string_view operator[](size_t i) const { return {bytes + offsets[i], size(i)}; }
  std::vector<std::string> all() const {
    std::vector<std::string> copies;
    for (size_t i = 0; i < count; ++i) copies.emplace_back((*this)[i]);
    return copies;
  }
};

// Ids that go before and after each text.
struct Marks {
  Input<int32_t> before, after;
};

// Ids, growing; what is not yet written is not touched.
template <class Id>
class Ids {
 public:
  Id* reserve(size_t more) {
    if (size_ + more > capacity_) {
      capacity_ = std::max(size_ + more, capacity_ + capacity_ / 2);
      void* grown = std::realloc(data_.get(), capacity_ * sizeof(Id));
      if (!grown) throw std::bad_alloc();
      (void)data_.release();
      data_.reset(static_cast<Id*>(grown));
    }
    return data_.get() + size_;
  }
  void close(const Id* end) { size_ = static_cast<size_t>(end - data_.get()); }
  void cut_back(size_t size) { size_ = size; }
  Id* data() { return data_.get(); }
  size_t size() const { return size_; }

  // Leaves nothing here; the memory is no larger than the ids.
  std::unique_ptr<Buffer<Id>> move_to_buffer() {
    Id* const data = static_cast<Id*>(std::realloc(data_.get(), std::max<size_t>(1, size_ * sizeof(Id))));
    if (!data) throw std::bad_alloc();
    (void)data_.release();
    return std::make_unique<Buffer<Id>>(data, size_);
  }

 private:
  struct Free {
    void operator()(Id* data) const { std::free(data); }
  };
  std::unique_ptr<Id, Free> data_;
  size_t size_ = 0, capacity_ = 0;
};

// What a thread keeps from one batch to the next.
template <class Id>
class Worker {
 public:
  explicit Worker(const encoder::Model& model) : model_(model), units_(model) {}

  // Appends the ids of a text between the marks, if it has any; how many with the marks. -1 and none where a character
  // is not known to be classed rightly.
  int64_t encode(std::string_view text, const Marks& marks, Ids<Id>& ids) {
    const size_t before = ids.size();
    ids.close(copy(marks.before, ids.reserve(marks.before.shape(0))));
    const size_t first = ids.size();
    const bool sure = append(text, ids);
    if (model_.fused_id() != encoder::kUnknown) fuse(ids, first);
    if (!sure || ids.size() == first) {
      ids.cut_back(before);
      return sure ? 0 : -1;
    }
    ids.close(copy(marks.after, ids.reserve(marks.after.shape(0))));
    return static_cast<int64_t>(ids.size() - before);
  }

 private:
  bool append(std::string_view text, Ids<Id>& ids) {
    bool sure = true;
    size_t ends[kBlock];
    model_.normalize(text, text_);
    for (size_t begin = 0; begin < text_.size() && sure;) {
      const size_t count = model_.cut(text_, begin, ends, sure), bytes = ends[count - 1] - begin;
      Id* const out = ids.reserve(bytes * model_.ids_per_byte() + units_.kSlack);
      ids.close(units_.encode(text_.data(), begin, ends, count, out));
      begin = ends[count - 1];
    }
    return sure;
  }

  static Id* copy(const Input<int32_t>& marks, Id* out) {
    for (size_t i = 0; i < marks.shape(0); ++i) *out++ = static_cast<Id>(marks.data()[i]);
    return out;
  }

  void fuse(Ids<Id>& ids, size_t before) const {
    const Id fused = static_cast<Id>(model_.fused_id());
    const auto both = [fused](Id a, Id b) { return a == fused && b == fused; };
    ids.close(std::unique(ids.data() + before, ids.data() + ids.size(), both));
  }

  const encoder::Model& model_;
  encoder::Units<Id> units_;
  encoder::Text text_;
};

class Encoder {
 public:
  virtual ~Encoder() = default;
  virtual nb::tuple encode(Input<uint8_t> bytes, Input<int64_t> offsets, Input<int32_t> before,
                           Input<int32_t> after) = 0;
};

template <class Id>
class EncoderOf : public Encoder {
 public:
  explicit EncoderOf(std::unique_ptr<encoder::Model> model) : model_(std::move(model)) {}

  nb::tuple encode(Input<uint8_t> bytes, Input<int64_t> offsets, Input<int32_t> before,
                   Input<int32_t> after) override {
    const Strings texts(bytes, offsets);
    const Marks marks{std::move(before), std::move(after)};
    Buffer<int64_t> sizes(texts.count);
    Ids<Id> ids;
    {
      nb::gil_scoped_release release;
      std::unique_ptr<Worker<Id>> worker = idle_worker();
      for (size_t i = 0; i < texts.count; ++i) sizes.data()[i] = worker->encode(texts[i], marks, ids);
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back(std::move(worker));
    }
    return nb::make_tuple(ids.move_to_buffer()->move_to_numpy(), sizes.move_to_numpy());
  }

 private:
  std::unique_ptr<Worker<Id>> idle_worker() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Worker<Id>>(*model_);
    std::unique_ptr<Worker<Id>> worker = std::move(idle_.back());
    idle_.pop_back();
    return worker;
  }

  std::unique_ptr<encoder::Model> model_;
  std::vector<std::unique_ptr<Worker<Id>>> idle_;
  std::mutex mutex_;  // over the idle ones
};

// Ids of 16 bits where all fit: half the memory to move.
std::unique_ptr<Encoder> encoder_of(std::unique_ptr<encoder::Model> model, size_t vocab_size) {
  if (vocab_size <= 1 << 16) return std::make_unique<EncoderOf<uint16_t>>(std::move(model));
  return std::make_unique<EncoderOf<int32_t>>(std::move(model));
}

std::unique_ptr<Encoder> piece_encoder(Input<uint8_t> pieces, Input<int64_t> offsets, Input<float> scores,
                                       bool dummy_prefix, bool merge_spaces, int32_t unknown_id,
                                       Input<int32_t> own, Input<int32_t> byte_ids) {
  const std::vector<std::string> all = Strings(pieces, offsets).all();
  if (scores.shape(0) != all.size()) throw std::invalid_argument("every piece has to have a score");
  if (byte_ids.shape(0) != 0 && byte_ids.shape(0) != 256) throw std::invalid_argument("bytes have to be 256 or none");
  encoder::PieceRules rules{dummy_prefix, merge_spaces, unknown_id, {}, {}};
  rules.own.assign(own.data(), own.data() + own.shape(0));
  rules.byte_ids.assign(byte_ids.data(), byte_ids.data() + byte_ids.shape(0));
  const std::vector<float> score(scores.data(), scores.data() + all.size());
  return encoder_of(std::make_unique<encoder::Pieces>(all, score, std::move(rules)), all.size());
}

std::unique_ptr<Encoder> byte_encoder(Input<uint8_t> tokens, Input<int64_t> offsets, Input<int32_t> merges,
                                      bool whole_units, const std::string& split) {
  const std::vector<std::string> all = Strings(tokens, offsets).all();
  std::vector<encoder::MergeLine> lines;
  for (size_t i = 0; i + 2 < merges.shape(0); i += 3)
    lines.push_back({merges.data()[i], merges.data()[i + 1], merges.data()[i + 2]});
  const encoder::Split split_function = encoder::split_named(split);
  return encoder_of(std::make_unique<encoder::ByteLevel>(all, lines, whole_units, split_function), all.size());
}

}  // namespace

void bind_encoder(nb::module_& m) {
  nb::class_<Encoder>(m, "Encoder")
      .def("encode", &Encoder::encode, nb::arg("texts"), nb::arg("offsets"), nb::arg("before"),
           nb::arg("after"));
  m.def("piece_encoder", &piece_encoder, nb::arg("pieces"), nb::arg("offsets"), nb::arg("scores"),
        nb::arg("dummy_prefix"), nb::arg("merge_spaces"), nb::arg("unknown_id"), nb::arg("own"), nb::arg("byte_ids"));
  m.def("byte_encoder", &byte_encoder, nb::arg("tokens"), nb::arg("offsets"), nb::arg("merges"),
        nb::arg("whole_units"), nb::arg("split"));
}
