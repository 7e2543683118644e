// BF16: the upper half of a single. Tiles hold pairs of k, [16 rows][2], as bf16 dot products and AMX take them; the
// last k of an odd number of columns is [16 rows].
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

struct BF16 {
    static constexpr const char* kName = "BF16";
    static constexpr int kGgmlType = 30, kBlock = 1, kBlockBytes = 2;
    static constexpr bool kQuantized = false;
    static constexpr Field kFields[] = {{0, 2, 2}};
    static constexpr int kPairBytes = 4;
    static constexpr Field kPairFields[] = {{0, 4, 4}};

    static void dequantize(const uint8_t* block, float* y) {
        *y = bits_to_float(static_cast<uint32_t>(load_u16(block)) << 16);
    }

#ifdef MOESAIC_ISA
    static constexpr int kStep = 2;
    MOESAIC_INLINE void load_weights(const uint8_t* tile, vf* w) {
        load_bf16_pairs(reinterpret_cast<const uint16_t*>(tile), w[0], w[1]);
    }
    MOESAIC_INLINE vf load_last(const uint8_t* tile) { return load_bf16(reinterpret_cast<const uint16_t*>(tile)); }
#endif
};

}  // namespace
}  // namespace moesaic
