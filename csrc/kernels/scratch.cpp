#include "kernels/scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace moesaic {

namespace {

constexpr std::size_t kKeptFrom = std::size_t{1} << 20;   // smaller blocks are malloc's business
constexpr std::size_t kHugePage = std::size_t{2} << 20u;  // blocks of this size and more lie on huge pages
constexpr std::size_t kKeptTo = std::size_t{64} << 20u;  // what takes more computes long enough to pay for fresh memory
constexpr int kMaxKept = 8;

struct Block {
    void* memory = nullptr;
    std::size_t bytes = 0;
};

// Blocks that a thread may take again, at most kMaxKept of at most kKeptTo bytes.
class Store {
  public:
    ~Store() {
        for (Block& block : kept_) std::free(block.memory);
    }

    // The smallest block that fits and is not far too large; none: no memory.
    Block take(std::size_t bytes) {
        Block* best = nullptr;
        for (Block& block : kept_) {
            const bool fits = block.memory != nullptr && block.bytes >= bytes && block.bytes / 4 <= bytes;
            if (fits && (best == nullptr || block.bytes < best->bytes)) best = &block;
        }
        return best == nullptr ? Block{} : std::exchange(*best, Block{});
    }

    // The smallest of all gives way where there are too many.
    void keep(Block block) {
        Block* least =
            std::min_element(kept_, kept_ + kMaxKept, [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
        if (least->bytes < block.bytes) std::swap(*least, block);
        std::free(block.memory);
    }

  private:
    Block kept_[kMaxKept];
};

// Threads that end while others' arrays still come back find no store.
thread_local Store* current = nullptr;

Store& store() {
    struct Owner {
        Store store;
        Owner() { current = &store; }
        ~Owner() { current = nullptr; }
    };
    static thread_local Owner owner;
    return owner.store;
}

}  // namespace

void* take_scratch(std::size_t& bytes) {
    if (bytes == 0) return nullptr;
    const std::size_t unit = bytes >= kHugePage ? kHugePage : 64;
    const std::size_t rounded = (bytes + unit - 1) / unit * unit;
    if (rounded >= kKeptFrom) {
        const Block kept = store().take(rounded);
        if (kept.memory != nullptr) {
            bytes = kept.bytes;
            return kept.memory;
        }
    }
    void* memory = std::aligned_alloc(unit, rounded);
    if (memory == nullptr) throw std::bad_alloc();
    if (unit == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);  // a wish
    bytes = rounded;
    return memory;
}

void return_scratch(void* memory, std::size_t bytes) noexcept {
    if (bytes >= kKeptFrom && bytes <= kKeptTo && current != nullptr) {
        current->keep({memory, bytes});
    } else {
        std::free(memory);
    }
}

}  // namespace moesaic
