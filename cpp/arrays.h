// NumPy arrays in and out of the helpers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace nb = nanobind;

// An argument: one dimension, contiguous, on the CPU, never written to.
template <typename T>
using Input = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A result, whose memory NumPy owns.
template <typename T>
using Output = nb::ndarray<nb::numpy, T>;

// The memory of a result: filled without the GIL, handed to NumPy with it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size), data_(static_cast<T*>(allocate(size))) {}
  // Takes over what malloc gave.
  Buffer(T* data, size_t size) : size_(size), data_(data) {}

  T* data() { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

  // Leaves the buffer empty; `columns` > 0 makes rows of that many.
  Output<T> move_to_numpy(size_t columns = 0) {
    T* data = data_.release();
    nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
    if (columns == 0) return Output<T>(data, {size_}, owner);
    return Output<T>(data, {size_ / columns, columns}, owner);
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  // What is large comes in huge pages: it is walked through in random order, where small ones cost a look-up each time.
  static void* allocate(size_t size) {
    if (size > PTRDIFF_MAX / sizeof(T) - kHugePage) throw std::bad_alloc();
    const size_t bytes = size * sizeof(T), rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = bytes < kHugePage ? std::malloc(bytes + 1) : std::aligned_alloc(kHugePage, rounded);
    if (!data) throw std::bad_alloc();
    if (bytes >= kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // a wish: without it all is as right
    return data;
  }

  struct Free {
    void operator()(T* data) const { std::free(data); }
  };

  size_t size_;
  std::unique_ptr<T[], Free> data_;
};
