// float16 as blocks store it: conversions without hardware support, exact and rounded to nearest even. The kernels have
// their own (formats/layout.h), which their unnamed namespaces keep out of here.
#pragma once

#include <bit>
#include <cstdint>

namespace moesaic::quantize {

// |v| at or above 65520 becomes infinity, as IEEE 754 rounds it.
inline std::uint16_t half_from_float(float v) {
    const auto bits = std::bit_cast<std::uint32_t>(v);
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    // Subnormal halves: adding 0.5 puts the last kept bit at 2^-24, so the addition itself rounds.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U;
    const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    const std::uint32_t normal = magnitude >= 0x477ff000U ? 0x7c00U : (rounded - 0x38000000U) >> 13;
    const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
    return static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000U ? 0x7e00U : finite));
}

inline float float_from_half(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000U) << 16;
    const std::uint32_t magnitude = h & 0x7fffU;
    const float subnormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24F;
    const std::uint32_t special = magnitude >= 0x7c00U ? 0x38000000U : 0U;  // infinity and NaN keep the top exponent
    const std::uint32_t normal = (magnitude << 13) + 0x38000000U + special;
    const std::uint32_t finite = magnitude < 0x400U ? std::bit_cast<std::uint32_t>(subnormal) : normal;
    return std::bit_cast<float>(sign | finite);
}

inline float round_to_half(float v) { return float_from_half(half_from_float(v)); }

// GGUF is little-endian on every machine.
inline void store_half(float v, std::uint8_t* out) {
    const std::uint16_t h = half_from_float(v);
    out[0] = static_cast<std::uint8_t>(h & 0xffU);
    out[1] = static_cast<std::uint8_t>(h >> 8);
}

}  // namespace moesaic::quantize
