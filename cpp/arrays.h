// NumPy arrays in and out of the helpers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <memory>

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
  explicit Buffer(size_t size) : size_(size), data_(new T[size]) {}

  T* data() { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

  // Leaves the buffer empty; `columns` > 0 makes rows of that many.
  Output<T> move_to_numpy(size_t columns = 0) {
    T* data = data_.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    if (columns == 0) return Output<T>(data, {size_}, owner);
    return Output<T>(data, {size_ / columns, columns}, owner);
  }

 private:
  size_t size_;
  std::unique_ptr<T[]> data_;
};
