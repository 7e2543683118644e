// F32, F16 and BF16: one weight a block, rounded to nearest even.
#include <bit>
#include <cstring>

#include "quantize/blocks.h"
#include "quantize/half.h"

namespace moesaic::quantize {

void quantize_f32(const float* x, const float* /*importance*/, std::int64_t cols, std::uint8_t* out) {
    std::memcpy(out, x, static_cast<std::size_t>(cols) * sizeof(float));
}

void quantize_f16(const float* x, const float* /*importance*/, std::int64_t cols, std::uint8_t* out) {
    for (std::int64_t i = 0; i < cols; ++i) store_half(x[i], out + 2 * i);
}

void quantize_bf16(const float* x, const float* /*importance*/, std::int64_t cols, std::uint8_t* out) {
    for (std::int64_t i = 0; i < cols; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(x[i]);
        const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
        out[2 * i] = static_cast<std::uint8_t>(rounded & 0xffU);
        out[2 * i + 1] = static_cast<std::uint8_t>(rounded >> 8);
    }
}

}  // namespace moesaic::quantize
