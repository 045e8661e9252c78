// Memory for tables that are read all over.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace encoder {

// Zeroed memory in large pages where the system has them: a look-up would otherwise often miss the TLB too.
template <class T>
class LargeArray {
 public:
  explicit LargeArray(size_t size) : data_(static_cast<T*>(std::aligned_alloc(kPage, rounded(size * sizeof(T))))) {
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    madvise(data_.get(), rounded(size * sizeof(T)), MADV_HUGEPAGE);
#endif
    std::memset(static_cast<void*>(data_.get()), 0, size * sizeof(T));
  }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  static constexpr size_t kPage = 2 << 20;
  static size_t rounded(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace encoder
