// The one list of weight formats. A format is one header here and one row below, in the family of its likes.
//
// A header holds a struct with
//   kName, kGgmlType     name and number in ggml; from 1000 on, numbers of formats that GGUF files do not have
//   kBlock, kBlockBytes  weights and bytes of a block along a row
//   kFields              the block's parts in the order of the tile (layout.h); pack and unpack follow from it
//   dequantize()         one block to floats, the same operations in the same order as the reference: bit-exact
// and, where an instruction set is included before (MOESAIC_ISA), how 16 rows look to the kernels. Quantised formats
// give the weights of a tile as groups g of 32 k and quads i of 4 k, in the terms
//   value(row, k) = scale(s, k / kScaleGroup) * (q - zero) + offset(s, k / kScaleGroup),  zero = 2^kZeroShift or 0 (-1)
//   quad(tile, g, i)     16 rows x weights 4 i .. 4 i + 3 of group g as unsigned bytes q, at most kLargest in any
//   block;
//                        q may be 2^n times what the file has if scale() is as much smaller; scales of formats with
//                        offsets have at most 22 significant bits
//                        (kGroupPeriod: groups after which quad() repeats its instructions, if it does inside a block;
//                        largest(g): of the bytes of group g, if that is less than kLargest for some)
//   or, where a group is best made at once, group(tile, scales, g, quads): its 8 quads
//   or quad(tile, scales, g, i), if load_scales() has made something of the tile
//   plus_block(tile, ahead, x, sum): optional, sum + the products of a block with one token's groups x where that is
//                        quicker without quads, the same to the bit as with them; it prefetches the block at `ahead`
// A format may be another form of a file's: Source, and recode() from a block of it, with the same values.
// float formats give kStep columns of 16 weights: load_weights(tile, w); those in blocks, with float activations all
// the same, also load_scale(tile), by which a block's weights are multiplied.
#pragma once

#include "formats/bf16.h"
#include "formats/f16.h"
#include "formats/f32.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/iq1_m.h"
#include "formats/iq1_m_ternary.h"
#include "formats/iq1_s.h"
#include "formats/iq1_s_ternary.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/nvfp4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"
#include "formats/tq1_0.h"
#include "formats/tq2_0.h"

// Families are units of compilation (kernels/matmul_<family>.isa.cpp).
// clang-format off: one row a line
#define MOESAIC_FOR_EACH_FLOAT_FORMAT(X) \
    X(F32)                               \
    X(F16)                               \
    X(BF16)                              \
    X(FP8)                               \
    X(FP8_32)
#define MOESAIC_FOR_EACH_BLOCK32_FORMAT(X) \
    X(Q4_0)                                \
    X(Q4_1)                                \
    X(Q5_0)                                \
    X(Q5_1)                                \
    X(Q8_0)                                \
    X(IQ4_NL)                              \
    X(MXFP4)                               \
    X(NVFP4)
#define MOESAIC_FOR_EACH_K_QUANT_FORMAT(X) \
    X(Q2_K)                                \
    X(Q3_K)                                \
    X(Q4_K)                                \
    X(Q5_K)                                \
    X(Q6_K)                                \
    X(IQ4_XS)                              \
    X(TQ1_0)                               \
    X(TQ2_0)                               \
    X(IQ1_S_TERNARY)                       \
    X(IQ1_M_TERNARY)
#define MOESAIC_FOR_EACH_CODEBOOK_FORMAT(X) \
    X(IQ1_S)                                \
    X(IQ1_M)                                \
    X(IQ2_XXS)                              \
    X(IQ2_XS)                               \
    X(IQ2_S)                                \
    X(IQ3_XXS)                              \
    X(IQ3_S)
#define MOESAIC_FOR_EACH_GROUPED_FORMAT(X) \
    X(INT4_32_F16)                         \
    X(INT4_64_F16)                         \
    X(INT4_128_F16)                        \
    X(INT4_32_BF16)                        \
    X(INT4_64_BF16)                        \
    X(INT4_128_BF16)                       \
    X(UINT4_32_F16)                        \
    X(UINT4_64_F16)                        \
    X(UINT4_128_F16)                       \
    X(UINT4_32_BF16)                       \
    X(UINT4_64_BF16)                       \
    X(UINT4_128_BF16)
// clang-format on

#define MOESAIC_FOR_EACH_FORMAT(X)      \
    MOESAIC_FOR_EACH_FLOAT_FORMAT(X)    \
    MOESAIC_FOR_EACH_BLOCK32_FORMAT(X)  \
    MOESAIC_FOR_EACH_K_QUANT_FORMAT(X)  \
    MOESAIC_FOR_EACH_CODEBOOK_FORMAT(X) \
    MOESAIC_FOR_EACH_GROUPED_FORMAT(X)
