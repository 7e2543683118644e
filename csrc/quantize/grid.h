// Grids of levels that a scale multiplies. A grid rounds to its nearest level and numbers its levels from zero.
#pragma once

#include <cstdint>

#include "quantize/lanes.h"

namespace moesaic::quantize {

// Levels -half..half-1.
struct UniformGrid {
    float half;
    float largest() const { return half; }
    float nearest(float v) const { return round_small(clamp(v, -half, half - 1.0F)); }
    // The unsigned number that stands for a level.
    std::uint8_t code(float level) const { return static_cast<std::uint8_t>(level + half); }
};

// The sixteen unequal levels of IQ4_NL and IQ4_XS: dense where Gaussian weights are (values of ggml's kvalues_iq4nl).
struct NonlinearGrid {
    static constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    float largest() const { return -kLevels[0]; }
    float nearest(float v) const {
        float level = kLevels[0];
        for (int j = 1; j < 16; ++j) {
            const float middle = 0.5F * (kLevels[j - 1] + kLevels[j]);
            level = v > middle ? kLevels[j] : level;
        }
        return level;
    }
    std::uint8_t code(float level) const {
        int found = 0;
        for (int j = 1; j < 16; ++j) found += level >= kLevels[j] ? 1 : 0;
        return static_cast<std::uint8_t>(found);
    }
};

}  // namespace moesaic::quantize
