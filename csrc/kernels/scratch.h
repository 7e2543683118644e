// Memory for one call, aligned to cache lines and not initialised.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace moesaic {

template <class T>
class AlignedArray {
  public:
    explicit AlignedArray(std::size_t size = 0) { reserve(size); }
    ~AlignedArray() { std::free(data_); }
    AlignedArray(AlignedArray&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
        other.data_ = nullptr;
        other.capacity_ = 0;
    }
    AlignedArray& operator=(AlignedArray&&) = delete;

    // Room for `size` elements; the contents are lost when it grows.
    T* reserve(std::size_t size) {
        if (size <= capacity_) return data_;
        std::free(data_);
        capacity_ = 0;
        const std::size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (data_ == nullptr) throw std::bad_alloc();
        capacity_ = size;
        return data_;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    std::size_t capacity_ = 0;
};

}  // namespace moesaic
