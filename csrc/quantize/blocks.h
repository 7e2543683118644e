// The quantisers of every format: float32 weights of one row in, that format's blocks out.
//
// Byte layouts are ggml's (ggml-common.h of llama.cpp). `importance` weighs the squared error of each column (nullptr:
// all alike). Inputs are finite and below the format's limit; quantize.cpp checks that. Know nothing of threads or
// files.
#pragma once

#include <cstdint>

namespace moesaic::quantize {

using RowQuantizer = void (*)(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);

void quantize_f32(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_f16(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_bf16(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);

void quantize_q4_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q4_1(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q5_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q5_1(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q8_0(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);

void quantize_q2_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q3_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q4_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q5_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_q6_k(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);

void quantize_iq4_nl(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_iq4_xs(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);
void quantize_mxfp4(const float* x, const float* importance, std::int64_t cols, std::uint8_t* out);

}  // namespace moesaic::quantize
