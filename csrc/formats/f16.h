// F16: IEEE half precision. Tile [1][16 rows].
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

struct F16 {
    static constexpr const char* kName = "F16";
    static constexpr int kGgmlType = 1, kBlock = 1, kBlockBytes = 2;
    static constexpr bool kQuantized = false;
    static constexpr Field kFields[] = {{0, 2, 2}};

    static void dequantize(const uint8_t* block, float* y) { *y = load_half(block); }

#ifdef MOESAIC_ISA
    static constexpr int kStep = 1;
    MOESAIC_INLINE void load_weights(const uint8_t* tile, vf* w) {
        w[0] = load_f16(reinterpret_cast<const uint16_t*>(tile));
    }
#endif
};

}  // namespace
}  // namespace moesaic
