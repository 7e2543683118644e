// TQ1_0, TQ2_0: 256 weights of -d, 0 or d. Meant for models trained ternary, whose weights survive exactly; others are
// rounded with the least squared error, which is found without trying scales.
#include <algorithm>
#include <cmath>
#include <utility>

#include "quantize/blocks.h"
#include "quantize/half.h"

namespace moesaic::quantize {
namespace {

constexpr int kBlock = 256;

// The d with the least squared error. The weights that become +-d are the k largest for some k, d is their mean
// magnitude, and the error falls by (sum of w |x|)^2 / (sum of w); the best k is found by going through all.
float best_scale(const float* x, const float* importance) {
    std::pair<float, float> items[kBlock];  // magnitude, importance
    for (int i = 0; i < kBlock; ++i) items[i] = {std::fabs(x[i]), importance == nullptr ? 1.0F : importance[i]};
    std::sort(items, items + kBlock, [](const auto& a, const auto& b) { return a.first > b.first; });
    double sum = 0.0, weight = 0.0, best_gain = 0.0, best = 0.0;
    for (const auto& [magnitude, w] : items) {
        sum += static_cast<double>(w) * magnitude;
        weight += w;
        if (sum * sum > best_gain * weight) {
            best_gain = sum * sum / weight;
            best = sum / weight;
        }
    }
    return round_to_half(static_cast<float>(best));
}

// 0, 1 or 2 for -d, 0 or d.
unsigned trit(float x, float d) {
    if (!(std::fabs(x) > 0.5F * d)) return 1;
    return x < 0.0F ? 0 : 2;
}

// Five trits make a number below 243; scaled to 256 so that multiplying by 3 moves the next trit into the upper bits.
std::uint8_t pack_trits(const float* x, float d, int stride, int count) {
    unsigned number = 0;
    for (int n = 0; n < 5; ++n) number = 3 * number + (n < count ? trit(x[n * stride], d) : 0U);
    return static_cast<std::uint8_t>((number * 256 + 242) / 243);
}

const float* advance(const float* importance, std::int64_t offset) {
    return importance == nullptr ? nullptr : importance + offset;
}

}  // namespace

// qs:48 (weights 32 apart in the first 160, 16 apart in the next 80 share a byte) qh:4 (4 apart in the last 16) d:f16
void quantize_tq1_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    for (std::int64_t block = 0; block < cols / kBlock; ++block, x += kBlock, out += 54) {
        const float d = best_scale(x, advance(importance, block * kBlock));
        for (int i = 0; i < 32; ++i) out[i] = pack_trits(x + i, d, 32, 5);
        for (int i = 0; i < 16; ++i) out[32 + i] = pack_trits(x + 160 + i, d, 16, 5);
        for (int i = 0; i < 4; ++i) out[48 + i] = pack_trits(x + 240 + i, d, 4, 4);
        store_half(d, out + 52);
    }
}

// qs:64 (runs of 128 weights, those 32 apart share a byte) d:f16
void quantize_tq2_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out) {
    for (std::int64_t block = 0; block < cols / kBlock; ++block, x += kBlock, out += 66) {
        const float d = best_scale(x, advance(importance, block * kBlock));
        for (int byte = 0; byte < 64; ++byte) {
            const float* first = x + byte / 32 * 128 + byte % 32;
            unsigned bits = 0;
            for (int k = 0; k < 4; ++k) bits |= trit(first[32 * k], d) << (2 * k);
            out[byte] = static_cast<std::uint8_t>(bits);
        }
        store_half(d, out + 64);
    }
}

}  // namespace moesaic::quantize
