// SHA-256 (FIPS 180-4) of one or two streams by the processor's SHA instructions.
//
// Each round waits for the one before, so that one stream leaves half of the unit idle: two, block by block, cost little
// more than one. Without the instructions there is no class here, and Python takes hashlib's.
#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include <nanobind/stl/string.h>

#include "arrays.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_SHA_CODE 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define HAS_SHA_CODE 0
#endif

#if HAS_SHA_CODE
namespace {

constexpr size_t BLOCK = 64;
constexpr size_t LENGTH_AT = BLOCK - 8;

alignas(16) constexpr uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The state as the instructions hold it: words A B E F in one register and C D G H in the other, the first one highest.
struct Words {
  __m128i abef, cdgh;
};

#define WITH_SHA __attribute__((target("sha,sse4.1"))) inline

WITH_SHA Words load(const uint32_t* state) {
  const __m128i abcd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state));
  const __m128i efgh = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4));
  const __m128i badc = _mm_shuffle_epi32(abcd, 0xB1), hgfe = _mm_shuffle_epi32(efgh, 0x1B);
  return {_mm_alignr_epi8(badc, hgfe, 8), _mm_blend_epi16(hgfe, badc, 0xF0)};
}

WITH_SHA void store(const Words& words, uint32_t* state) {
  const __m128i feba = _mm_shuffle_epi32(words.abef, 0x1B), dchg = _mm_shuffle_epi32(words.cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

// `count` blocks of each of N streams.
template <int N>
__attribute__((target("sha,sse4.1"))) void compress(std::array<uint32_t*, N> states,
                                                    std::array<const uint8_t*, N> data, size_t count) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  Words words[N];
  for (int n = 0; n < N; ++n) words[n] = load(states[n]);
  for (size_t block = 0; block < count; ++block) {
    Words before[N];
    __m128i schedule[N][4];  // the last sixteen words of the message's schedule, four in each
    for (int n = 0; n < N; ++n) before[n] = words[n];
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(ROUND + 4 * group));
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        __m128i& w = schedule[n][group % 4];
        if (group < 4) {
          w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data[n] + 16 * group));
          w = _mm_shuffle_epi8(w, big_endian);
        } else {
          const __m128i last = schedule[n][(group + 3) % 4], second_last = schedule[n][(group + 2) % 4];
          w = _mm_sha256msg1_epu32(w, schedule[n][(group + 1) % 4]);
          w = _mm_sha256msg2_epu32(_mm_add_epi32(w, _mm_alignr_epi8(last, second_last, 4)), last);
        }
        const __m128i sum = _mm_add_epi32(w, constants);
        words[n].cdgh = _mm_sha256rnds2_epu32(words[n].cdgh, words[n].abef, sum);
        words[n].abef = _mm_sha256rnds2_epu32(words[n].abef, words[n].cdgh, _mm_shuffle_epi32(sum, 0x0E));
      }
    }
    for (int n = 0; n < N; ++n) {
      words[n].abef = _mm_add_epi32(words[n].abef, before[n].abef);
      words[n].cdgh = _mm_add_epi32(words[n].cdgh, before[n].cdgh);
      data[n] += BLOCK;
    }
  }
  for (int n = 0; n < N; ++n) store(words[n], states[n]);
}

class Sha256 {
 public:
  using Data = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

  void update(Data data) {
    nb::gil_scoped_release release;
    Rest rest = begin(data);
    compress<1>({state_.data()}, {rest.from}, rest.blocks);
    finish(rest, rest.blocks);
  }

  // Both streams, each by its own data.
  static void update_two(Sha256& a, Data data_a, Sha256& b, Data data_b) {
    if (&a == &b) throw std::invalid_argument("two streams are needed");
    nb::gil_scoped_release release;
    Rest of_a = a.begin(data_a), of_b = b.begin(data_b);
    const size_t both = std::min(of_a.blocks, of_b.blocks);
    compress<2>({a.state_.data(), b.state_.data()}, {of_a.from, of_b.from}, both);
    a.finish(of_a, both);
    b.finish(of_b, both);
  }

  std::string hexdigest() const {
    Sha256 end = *this;
    const uint64_t bits = 8 * total_;
    end.tail_[end.held_++] = 0x80;
    if (end.held_ > LENGTH_AT) {
      std::memset(end.tail_ + end.held_, 0, BLOCK - end.held_);
      compress<1>({end.state_.data()}, {end.tail_}, 1);
      end.held_ = 0;
    }
    std::memset(end.tail_ + end.held_, 0, LENGTH_AT - end.held_);
    for (size_t k = 0; k < 8; ++k) end.tail_[LENGTH_AT + k] = static_cast<uint8_t>(bits >> (56 - 8 * k));
    compress<1>({end.state_.data()}, {end.tail_}, 1);
    std::string text;
    for (uint32_t word : end.state_)
      for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
    return text;
  }

 private:
  struct Rest {
    const uint8_t* from;
    size_t blocks, bytes;
  };

  // Completes the block that earlier data began; what is left starts with whole blocks.
  Rest begin(const Data& data) {
    const uint8_t* from = data.data();
    size_t bytes = data.shape(0);
    total_ += bytes;
    if (held_ > 0) {
      const size_t taken = std::min(bytes, BLOCK - held_);
      std::memcpy(tail_ + held_, from, taken);
      held_ += taken, from += taken, bytes -= taken;
      if (held_ == BLOCK) {
        compress<1>({state_.data()}, {tail_}, 1);
        held_ = 0;
      }
    }
    return {from, bytes / BLOCK, bytes};
  }

  // The blocks that are not done yet, and the bytes after them, which wait for their block's end.
  void finish(const Rest& rest, size_t done) {
    compress<1>({state_.data()}, {rest.from + done * BLOCK}, rest.blocks - done);
    const size_t after = rest.bytes - rest.blocks * BLOCK;
    if (after > 0) std::memcpy(tail_ + held_, rest.from + rest.blocks * BLOCK, after);
    held_ += after;
  }

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t tail_[BLOCK];
  size_t held_ = 0;
  uint64_t total_ = 0;
};

}  // namespace
#endif

void bind_sha256(nb::module_& m) {
#if HAS_SHA_CODE
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_sha = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA) && __builtin_cpu_supports("sse4.1");
  if (has_sha) {
    nb::class_<Sha256>(m, "Sha256")
        .def(nb::init<>())
        .def("update", &Sha256::update, nb::arg("data"))
        .def("hexdigest", &Sha256::hexdigest)
        .def_static("update_two", &Sha256::update_two, nb::arg("a"), nb::arg("data_a"), nb::arg("b"), nb::arg("data_b"));
  }
#else
  (void)m;
#endif
}
