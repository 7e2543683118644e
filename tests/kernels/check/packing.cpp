// Packing keeps every bit, values are those of the format's own dequantize(), quantisers stay near what they are given.
#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "parts.h"
#include "quantize/quantize.h"
#include "samples.h"

namespace check {

using moesaic::FormatInfo;

namespace {

// Any bytes at all, in rows further apart than they are long.
void check_round_trip(Report& report, const FormatInfo& format, std::int64_t rows, std::int64_t cols) {
    const std::int64_t row_bytes = format.row_bytes(cols), stride = row_bytes + 13;
    Random random(static_cast<std::uint64_t>(rows * cols));
    std::vector<std::uint8_t> wide(static_cast<std::size_t>(rows * stride)), back;
    for (std::uint8_t& byte : wide) byte = static_cast<std::uint8_t>(random.bits());
    const AlignedBytes packed = aligned_bytes(format.packed_bytes(rows, cols));
    moesaic::pack_matrix(format, rows, cols, wide.data(), stride, packed.get());
    back.resize(static_cast<std::size_t>(rows * row_bytes));
    moesaic::unpack_matrix(format, rows, cols, packed.get(), back.data());
    bool same = true;
    for (std::int64_t r = 0; r < rows; ++r) {
        same &= std::equal(&back[r * row_bytes], &back[r * row_bytes] + row_bytes, &wide[r * stride]);
    }
    report.expect(same, text("pack and unpack ", format.name, " ", rows, " x ", cols));
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_values(Report& report, const FormatInfo& format, std::int64_t rows, std::int64_t cols) {
    const Matrices m(format, rows, cols, 1, 7);
    const std::string name = text(format.name, " ", rows, " x ", cols);
    std::vector<float> all(m.values.size());
    moesaic::dequantize_matrix(format, rows, cols, m.raw.data(), all.data());
    report.expect(same_bits(all, m.values), "dequantize " + name);
    const std::vector<std::int64_t> ids = {0, rows - 1, rows / 2, 0};
    std::vector<float> some(ids.size() * cols), expected;
    for (std::int64_t id : ids) expected.insert(expected.end(), &m.values[id * cols], &m.values[id * cols] + cols);
    moesaic::gather_rows(format, rows, cols, m.packed.get(), ids.data(), 4, some.data());
    report.expect(same_bits(some, expected), "gather_rows " + name);
    for (std::int64_t bad : {std::int64_t{-1}, rows}) {
        bool refused = false;
        try {
            moesaic::gather_rows(format, rows, cols, m.packed.get(), &bad, 1, some.data());
        } catch (const std::out_of_range&) {
            refused = true;
        }
        report.expect(refused, text("gather_rows ", name, " refuses row ", bad));
    }
}

// What is recoded while it is packed keeps its values.
void check_recoding(Report& report, const FormatInfo& format, std::int64_t rows, std::int64_t cols) {
    const FormatInfo& source = moesaic::format_info(format.recodes);
    const Matrices m(source, rows, cols, 1, 9);
    const AlignedBytes packed = aligned_bytes(format.packed_bytes(rows, cols));
    moesaic::pack_matrix(format, rows, cols, m.raw.data(), source.row_bytes(cols), packed.get(), source);
    std::vector<std::uint8_t> blocks(static_cast<std::size_t>(rows * format.row_bytes(cols)));
    moesaic::unpack_matrix(format, rows, cols, packed.get(), blocks.data());
    std::vector<float> values(m.values.size());
    moesaic::dequantize_matrix(format, rows, cols, blocks.data(), values.data());
    report.expect(same_bits(values, m.values), text("recode ", source.name, " as ", format.name));
}

// Weights with a few outliers come back with an error that so many bits explain: about 1.7 x 2^-bits of their size for
// integers with a scale, more for eight bits with an exponent.
void check_quantiser(Report& report, const FormatInfo& format, bool weighted) {
    const std::int64_t rows = 5, cols = 3 * std::max(format.block, 64), row_bytes = format.row_bytes(cols);
    Random random(11);
    std::vector<float> x = normals(random, rows * cols, 0.02), importance;
    for (std::int64_t i = 0; i < rows; ++i) x[i * cols + i] *= 3.0f;
    for (std::int64_t k = 0; weighted && k < cols; ++k) importance.push_back(static_cast<float>(random.uniform()));
    std::vector<std::uint8_t> blocks(static_cast<std::size_t>(rows * row_bytes));
    auto quantise = [&] {
        return moesaic::quantize::quantize_rows(format.ggml_type, rows, cols, row_bytes, x.data(),
                                                weighted ? importance.data() : nullptr, blocks.data());
    };
    const std::string name = text("quantise ", format.name, weighted ? " by importance" : "");
    report.expect(quantise() == -1, name + ": weights are accepted");
    std::vector<float> values(x.size());
    moesaic::dequantize_matrix(format, rows, cols, blocks.data(), values.data());
    double error = 0.0, size = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        error += std::pow(static_cast<double>(values[i]) - x[i], 2);
        size += std::pow(static_cast<double>(x[i]), 2);
    }
    const double bits = 8.0 * format.block_bytes / format.block, found = std::sqrt(error / size);
    report.expect(found <= 3.0 * std::exp2(-bits) + 0.03, text(name, ": relative error ", found));
    x[2 * cols + 1] = NAN;
    report.expect(quantise() == 2, name + ": a NaN in row 2 is reported");
}

}  // namespace

void check_packing(Report& report) {
    for (int i = 0; i < moesaic::num_formats(); ++i) {
        const FormatInfo& format = moesaic::format_at(i);
        for (std::int64_t rows : {1, 16, 17, 53}) {
            for (std::int64_t blocks : {1, 3, 8}) check_round_trip(report, format, rows, blocks * format.block);
        }
        check_values(report, format, 1, format.block);
        check_values(report, format, 33, 5 * format.block);
        if (format.recodes >= 0) check_recoding(report, format, 33, 5 * format.block);
    }
}

void check_quantisers(Report& report) {
    for (int type : moesaic::quantize::writable_types()) {
        check_quantiser(report, moesaic::format_info(type), false);
        check_quantiser(report, moesaic::format_info(type), true);
    }
}

}  // namespace check
