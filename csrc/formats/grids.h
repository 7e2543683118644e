// The codebooks of ggml's IQ1, IQ2 and IQ3 formats, shared by all instruction sets.
#pragma once

#include "isa/codebook.h"

namespace moesaic {

// Numbers of entries in tiles where these are not those of the published grid (scripts/number_grids.py).
template <int N>
struct GridNumbers {
    uint16_t places[N];   // in the published grid, by number
    uint16_t numbers[N];  // by place
};
extern const GridNumbers<512> kIq2XsNumbers;
extern const GridNumbers<1024> kIq2SNumbers;
extern const GridNumbers<512> kIq3SNumbers;

// 64 plus one of 8, 25, 43.
extern const Codebook8<256> kIq2XxsGrid;
extern const Codebook8<512> kIq2XsGrid;
extern const Codebook8<1024> kIq2SGrid;
// 5 plus 4 times one of -1, 0, 1: IQ1_S and IQ1_M.
extern const Codebook8<2048> kIq1Grid;
// 64 plus one of 4, 12, 20, 28, 36, 44, 52, 62.
extern const Codebook4<256> kIq3XxsGrid;
// 64 plus one of 1, 3, 5, 7, 9, 11, 13, 15.
extern const Codebook4<512> kIq3SGrid;

}  // namespace moesaic
