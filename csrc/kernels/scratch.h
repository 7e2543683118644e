// Memory for one call, aligned to cache lines and not initialised.
//
// Large blocks come from a store of the calling thread and go back to it: the first touch of fresh memory costs more
// than what many calls compute on it.
#pragma once

#include <cstddef>

namespace moesaic {

// At least `bytes` of memory, aligned to cache lines; says in `bytes` how much there is. Throws std::bad_alloc.
void* take_scratch(std::size_t& bytes);
// `bytes` as take_scratch() said. Any thread may return what another has taken.
void return_scratch(void* memory, std::size_t bytes) noexcept;

template <class T>
class AlignedArray {
  public:
    explicit AlignedArray(std::size_t size = 0) { reserve(size); }
    ~AlignedArray() { return_scratch(data_, bytes_); }
    AlignedArray(AlignedArray&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
        other.data_ = nullptr;
        other.bytes_ = 0;
    }
    AlignedArray& operator=(AlignedArray&&) = delete;

    // Room for `size` elements; the contents are lost when it grows.
    T* reserve(std::size_t size) {
        if (size * sizeof(T) <= bytes_) return data_;
        return_scratch(data_, bytes_);
        data_ = nullptr;
        bytes_ = 0;
        std::size_t bytes = size * sizeof(T);
        data_ = static_cast<T*>(take_scratch(bytes));
        bytes_ = bytes;
        return data_;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace moesaic
