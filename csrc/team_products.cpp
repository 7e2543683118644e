#include "team_products.h"

#include <unistd.h>

namespace moesaic {

namespace {

// Where the system does not say how large the second-level cache of a core is, and how much of it may be filled ahead.
constexpr std::int64_t kUsualCache = 512 << 10, kShareAhead = 4;

}  // namespace

std::int64_t Ahead::budget() {
    static const std::int64_t bytes = [] {
        const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
        return (size > 0 ? std::int64_t{size} : kUsualCache) / kShareAhead;
    }();
    return bytes;
}

std::int64_t PanelRows::multiply(std::int64_t panel, int num_panels, const void* const* token, float* out,
                                 const std::uint8_t* next) const {
    const std::int64_t first = panel * kPanelRows, count = std::min(num_panels * kPanelRows, rows - first);
    matmul_table().formats[format->index].matmul(address(panel), num_panels, cols, token, 1, out, next);
    std::fill(out + num_panels * kPanelRows, out + kOutputStride, 0.0f);
    if (bias != nullptr) {
        for (std::int64_t r = 0; r < count; ++r) out[r] += bias[first + r];
    }
    return count;
}

void add_own_part(Ahead& ahead, const Team& team, std::span<const PanelRows> matrices) {
    std::int64_t total = 0, before = 0;
    for (const PanelRows& m : matrices) total += num_panels_of(m.rows);
    const WorkQueue::Range own = own_part(team, total);
    for (const PanelRows& m : matrices) {
        const std::int64_t count = num_panels_of(m.rows);
        const std::int64_t begin = std::max(own.begin - before, std::int64_t{0});
        const std::int64_t end = std::min(own.end - before, count);
        if (begin < end) ahead.add(m.address(begin), m.address(end) - m.address(begin));
        before += count;
    }
}

}  // namespace moesaic
