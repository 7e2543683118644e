// F32: IEEE single precision. Tile [1][16 rows].
#pragma once

#include "formats/layout.h"

namespace moesaic {
namespace {

struct F32 {
    static constexpr const char* kName = "F32";
    static constexpr int kGgmlType = 0, kBlock = 1, kBlockBytes = 4;
    static constexpr bool kQuantized = false;
    static constexpr Field kFields[] = {{0, 4, 4}};

    static void dequantize(const uint8_t* block, float* y) { memcpy(y, block, sizeof(float)); }

#ifdef MOESAIC_ISA
    static constexpr int kStep = 1;
    MOESAIC_INLINE void load_weights(const uint8_t* tile, vf* w) { w[0] = load(reinterpret_cast<const float*>(tile)); }
#endif
};

}  // namespace
}  // namespace moesaic
