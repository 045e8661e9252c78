// Megatron's GPT index, bit for bit: which documents in which order, where each sample starts, in which order samples
// are taken. Published as GPTDataset in megatron-core's datasets/gpt_dataset.py.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <future>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

#include "arrays.h"
#include "legacy_random.h"

namespace {

constexpr int64_t kMaxSeqLen = int64_t{1} << 30;
constexpr int64_t kMaxSamples = std::numeric_limits<uint32_t>::max() - 1;  // numbers are uint32, as in Megatron
constexpr int64_t kMaxTokens = int64_t{1} << 61;  // so that sums of an epoch and what is asked for stay inside int64

// How often the documents are repeated to give `num_samples` samples, neighbours sharing one token.
struct Epochs {
  int64_t count;
  bool last_apart;            // the last epoch is shuffled on its own
  int64_t shuffled_together;  // samples before it, or all
  int64_t num_samples;        // what `count` epochs hold
};

Epochs plan_epochs(int64_t tokens_per_epoch, int64_t seq_len, int64_t num_samples) {
  const int64_t wanted = num_samples * seq_len + 1;
  const int64_t count = std::max<int64_t>(1, (wanted + tokens_per_epoch - 1) / tokens_per_epoch);
  const int64_t total = (count * tokens_per_epoch - 1) / seq_len;
  if (count == 1) return {count, false, total, total};
  // An epoch of which less than 80 % is used would else be sampled thinly from all over: it is kept for the end.
  const int64_t before_last = ((count - 1) * tokens_per_epoch - 1) / seq_len;
  const int64_t per_epoch = (tokens_per_epoch - 1) / seq_len;
  const bool apart = num_samples - before_last < static_cast<int64_t>(0.80 * static_cast<double>(per_epoch));
  return {count, apart, apart ? before_last : total, total};
}

// Document numbers first..last-1, `epochs` times over.
void number_documents(int32_t* out, int64_t first, int64_t last, int64_t epochs) {
  const int64_t each = last - first;
  for (int64_t epoch = 0; epoch < epochs; ++epoch)
    std::iota(out + epoch * each, out + (epoch + 1) * each, static_cast<int32_t>(first));
}

// The lengths of documents first..last-1 in two bytes each, where that will do. They are looked up in random order, so
// a table a quarter as large comes from nearer memory.
class ShortLengths {
 public:
  ShortLengths(const int64_t* exact, int64_t first, int64_t last) : exact_(exact), first_(first), short_(last - first) {
    for (size_t i = 0; i < short_.size(); ++i)
      short_[i] = static_cast<uint16_t>(std::min<int64_t>(exact[first + static_cast<int64_t>(i)], kLong));
  }

  int64_t operator[](int32_t document) const {
    const uint16_t length = short_[document - first_];
    return length == kLong ? exact_[document] : length;
  }

  void prefetch(int32_t document) const { __builtin_prefetch(&short_[document - first_]); }

 private:
  static constexpr uint16_t kLong = std::numeric_limits<uint16_t>::max();  // as long or longer: `exact_` says it

  const int64_t* exact_;
  int64_t first_;
  Buffer<uint16_t> short_;
};

// Sample k starts at token k * seq_len of the documents laid end to end: as (position in `documents`, token in it). Of
// the documents from `position` up to `last`, before which there are `before` tokens; sample 0 is known.
template <typename Place>
void walk(Buffer<Place>& samples, const Buffer<int32_t>& documents, size_t position, size_t last, int64_t before,
          const ShortLengths& lengths, int64_t seq_len) {
  constexpr size_t kAhead = 32;
  const int64_t sample = std::max<int64_t>(1, (before + seq_len - 1) / seq_len);
  Place* next = samples.data() + 2 * sample;
  const Place* end = samples.data() + samples.size();
  for (int64_t start = sample * seq_len; position < last && next < end; ++position) {
    if (position + kAhead < last) lengths.prefetch(documents[position + kAhead]);
    const int64_t after = before + lengths[documents[position]];
    for (; start < after && next < end; start += seq_len)
      *next++ = static_cast<Place>(position), *next++ = static_cast<Place>(start - before);
    before = after;
  }
}

struct Tokens {
  int64_t all, longest;  // of the documents together, of the longest
};

Tokens checked_tokens(const Input<int64_t>& lengths, int64_t first, int64_t last, int64_t seq_len, int64_t num_samples) {
  if (seq_len < 1 || num_samples < 1) throw std::invalid_argument("seq_len and num_samples have to be 1 or more");
  if (seq_len >= kMaxSeqLen || num_samples >= kMaxSamples)
    throw std::invalid_argument("more than 2^32 - 2 samples, or longer than 2^30 - 1 tokens, do not fit the index");
  if (first < 0 || last > static_cast<int64_t>(lengths.shape(0)) || first > last)
    throw std::invalid_argument("documents " + std::to_string(first) + " to " + std::to_string(last) + " are not among the " +
                                std::to_string(lengths.shape(0)) + " documents");
  Tokens tokens{0, 0};
  for (int64_t i = first; i < last; ++i) {
    const int64_t length = lengths.data()[i];
    if (length < 0) throw std::invalid_argument("document " + std::to_string(i) + " has a negative length");
    if (__builtin_add_overflow(tokens.all, length, &tokens.all) || tokens.all > kMaxTokens)
      throw std::invalid_argument("the documents hold more than 2^61 tokens");
    tokens.longest = std::max(tokens.longest, length);
  }
  if (tokens.all == 0) throw std::invalid_argument("the documents hold no tokens");
  return tokens;
}

using Index = std::tuple<Output<int32_t>, nb::ndarray<nb::numpy>, Output<uint32_t>>;

template <typename Place>
Index laid_out(const Input<int64_t>& lengths, int64_t tokens, const Epochs& epochs, int64_t first, int64_t last,
               int64_t seq_len, uint32_t seed) {
  Buffer<int32_t> documents((last - first) * epochs.count);
  Buffer<Place> samples(2 * (epochs.num_samples + 1));
  Buffer<uint32_t> order(epochs.num_samples);
  {
    nb::gil_scoped_release release;
    LegacyRandom random(seed);  // one generator through all shuffles, in this order
    const int64_t each = last - first, together = (epochs.count - (epochs.last_apart ? 1 : 0)) * each;
    const int64_t apart = (epochs.last_apart ? 1 : 0) * each;
    // A second thread makes ready what this one has no need of yet, then walks through the documents that are in order.
    auto ready = std::async(std::launch::async, [&] {
      number_documents(documents.data() + together, first, last, apart / each);
      std::iota(order.data(), order.data() + order.size(), 0u);
      return ShortLengths(lengths.data(), first, last);
    });
    number_documents(documents.data(), first, last, together / each);
    random.shuffle(documents.data(), together);
    const ShortLengths shorts = ready.get();
    samples[0] = samples[1] = 0;
    auto walked = std::async(std::launch::async, [&] { walk(samples, documents, 0, together, 0, shorts, seq_len); });
    random.shuffle(documents.data() + together, apart);
    auto walked_apart = std::async(std::launch::async, [&] {
      walk(samples, documents, together, together + apart, together / each * tokens, shorts, seq_len);
    });
    random.shuffle(order.data(), epochs.shuffled_together);
    random.shuffle(order.data() + epochs.shuffled_together, epochs.num_samples - epochs.shuffled_together);
    walked.get();
    walked_apart.get();
  }
  return {documents.move_to_numpy(), nb::ndarray<nb::numpy>(samples.move_to_numpy(2)), order.move_to_numpy()};
}

Index gpt_index(Input<int64_t> lengths, int64_t first, int64_t last, int64_t seq_len, int64_t num_samples, uint32_t seed) {
  Tokens tokens;
  {
    nb::gil_scoped_release release;
    tokens = checked_tokens(lengths, first, last, seq_len, num_samples);
  }
  const Epochs epochs = plan_epochs(tokens.all, seq_len, num_samples);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (epochs.num_samples >= kMaxSamples || last > kMost)
    throw std::invalid_argument("more than 2^32 - 2 samples or 2^31 - 1 documents do not fit the index");
  // As in Megatron: half the memory, but for places that do not fit.
  const bool narrow = std::max((last - first) * epochs.count, tokens.longest) <= kMost;
  return (narrow ? laid_out<int32_t> : laid_out<int64_t>)(lengths, tokens.all, epochs, first, last, seq_len, seed);
}

}  // namespace

void bind_gpt_index(nb::module_& m) {
  m.def("gpt_index", &gpt_index, nb::arg("lengths"), nb::arg("first"), nb::arg("last"), nb::arg("seq_len"),
        nb::arg("num_samples"), nb::arg("seed"));
}
