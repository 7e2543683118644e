// Attention against one softmax over all keys in double precision.
#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "oracle.h"
#include "parts.h"
#include "quantize/quantize.h"
#include "samples.h"

namespace check {

using moesaic::CacheType;

namespace {

struct Shape {
    std::int64_t kv_heads, group, num_queries, num_keys, key_dim, value_dim;
    CacheType type = CacheType::kF32;
    std::int64_t window = 0;
    bool with_sinks = false;
    std::int64_t second_dim = 0;  // of a second term of the score, as in MLA
};

// Random values as a cache of some type holds them.
struct Cache {
    std::vector<std::uint8_t> bytes;
    std::vector<float> values;

    Cache(CacheType type, std::int64_t count, Random& random) : values(normals(random, count)) {
        const int ggml_type = type == CacheType::kF32 ? 0 : (type == CacheType::kBF16 ? 30 : 1);
        const moesaic::FormatInfo& format = moesaic::format_info(ggml_type);
        bytes.resize(static_cast<std::size_t>(format.row_bytes(count)));
        moesaic::quantize::quantize_rows(ggml_type, 1, count, format.row_bytes(count), values.data(), nullptr,
                                         bytes.data());
        format.dequantize_row(bytes.data(), count, values.data());
    }
};

// Queries [queries, heads, dim], keys and values [kv_heads, keys, dim].
struct Inputs {
    Shape s;
    std::vector<float> q, q_second, sinks;
    Cache k, k_second, v;

    Inputs(const Shape& shape, Random& random)
        : s(shape),
          q(normals(random, s.num_queries * heads() * s.key_dim)),
          q_second(normals(random, s.num_queries * heads() * s.second_dim)),
          sinks(normals(random, heads())),
          k(s.type, s.kv_heads * s.num_keys * s.key_dim, random),
          k_second(s.type, s.kv_heads * s.num_keys * std::max<std::int64_t>(1, s.second_dim), random),
          v(s.type, s.kv_heads * s.num_keys * s.value_dim, random) {}
    std::int64_t heads() const { return s.kv_heads * s.group; }

    double score(std::int64_t query, std::int64_t head, std::int64_t key) const {
        const std::int64_t row = query * heads() + head, column = head / s.group * s.num_keys + key;
        double sum = 0.0;
        for (std::int64_t i = 0; i < s.key_dim; ++i) {
            sum += static_cast<double>(q[row * s.key_dim + i]) * k.values[column * s.key_dim + i];
        }
        for (std::int64_t i = 0; i < s.second_dim; ++i) {
            sum += static_cast<double>(q_second[row * s.second_dim + i]) * k_second.values[column * s.second_dim + i];
        }
        return sum;
    }
};

// Adds what one query head sees of the values to out.
void attend(const Inputs& in, std::int64_t query, std::int64_t head, double scale, double softcap, double* out) {
    const Shape& s = in.s;
    const std::int64_t last = s.num_keys - s.num_queries + query;
    const std::int64_t first = s.window > 0 ? std::max<std::int64_t>(0, last + 1 - s.window) : 0;
    std::vector<double> scores;
    for (std::int64_t key = first; key <= last; ++key) {
        const double score = in.score(query, head, key) * scale;
        scores.push_back(softcap > 0.0 ? softcap * std::tanh(score / softcap) : score);
    }
    double largest = *std::max_element(scores.begin(), scores.end());
    if (s.with_sinks) largest = std::max<double>(largest, in.sinks[head]);
    double sum = s.with_sinks ? std::exp(in.sinks[head] - largest) : 0.0;
    for (double& score : scores) sum += score = std::exp(score - largest);
    for (std::int64_t key = first; key <= last; ++key) {
        const float* value = &in.v.values[(head / s.group * s.num_keys + key) * s.value_dim];
        for (std::int64_t i = 0; i < s.value_dim; ++i) out[i] += scores[key - first] / sum * value[i];
    }
}

void check_shape(Report& report, const Shape& s) {
    Random random(51);
    const Inputs in(s, random);
    const std::int64_t heads = in.heads(), offset = s.num_keys - s.num_queries;
    const double softcap = s.with_sinks ? 15.0 : 0.0, scale = 0.25;
    std::vector<float> out(s.num_queries * heads * s.value_dim);
    std::vector<double> expected(out.size());
    for (std::int64_t row = 0; row < s.num_queries * heads; ++row) {
        attend(in, row / heads, row % heads, scale, softcap, &expected[row * s.value_dim]);
    }
    moesaic::AttentionArgs a{};
    auto part = [&](const std::vector<float>& q, const Cache& k, std::int64_t dim) {
        return moesaic::ScorePart{q.data(), {0, dim, heads * dim}, k.bytes.data(), {0, s.num_keys * dim, dim}, dim};
    };
    a.parts[0] = part(in.q, in.k, s.key_dim);
    if (s.second_dim > 0) a.parts[1] = part(in.q_second, in.k_second, s.second_dim);
    a.num_parts = s.second_dim > 0 ? 2 : 1;
    a.cache_type = s.type;
    a.v = in.v.bytes.data(), a.v_stride = {0, s.num_keys * s.value_dim, s.value_dim}, a.value_dim = s.value_dim;
    a.out = out.data(), a.out_stride = {0, s.value_dim, heads * s.value_dim};
    a.batch = 1, a.num_kv_heads = s.kv_heads, a.group = s.group;
    a.num_queries = s.num_queries, a.num_keys = s.num_keys;
    a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
    a.causal_offset = &offset, a.sliding_window = s.window;
    a.sinks = s.with_sinks ? in.sinks.data() : nullptr;
    moesaic::attention(a);
    report.expect_close(out, expected, kFloat32Sums,
                        text("attention, ", s.num_queries, " queries of ", heads, " heads, ", s.num_keys, " keys of ",
                             s.key_dim, " + ", s.second_dim, ", values of ", s.value_dim, ", cache type ",
                             static_cast<int>(s.type), ", window ", s.window, s.with_sinks ? ", sinks" : ""));
}

constexpr std::int64_t kBlock = 64;  // positions

// Caches [kv_heads, keys, dim] of several sequences as blocks [block, position, kv_head, dim] of a pool, those of
// different sequences in turn. The last block ends with its last key: a sanitizer sees what is read beyond it.
struct Pool {
    std::vector<std::uint8_t> bytes;
    std::int64_t kv_heads, dim;

    Pool(const std::vector<Inputs>& sequences, const std::vector<std::int32_t>& tables, std::int64_t width,
         Cache Inputs::* cache, std::int64_t dims)
        : kv_heads(sequences.front().s.kv_heads), dim(dims) {
        for (std::size_t q = 0; q < sequences.size(); ++q) {
            const Shape& s = sequences[q].s;
            const std::vector<std::uint8_t>& from = (sequences[q].*cache).bytes;
            const std::size_t size = dim * (s.type == CacheType::kF32 ? 4 : 2);
            for (std::int64_t i = 0; i < s.num_keys * kv_heads; ++i) {
                const std::int64_t key = i / kv_heads, head = i % kv_heads;
                const std::int64_t position = tables[q * width + key / kBlock] * kBlock + key % kBlock;
                const std::size_t to = (position * kv_heads + head) * size;
                bytes.resize(std::max(bytes.size(), to + size));
                std::copy_n(&from[(head * s.num_keys + key) * size], size, &bytes[to]);
            }
        }
    }
    moesaic::Strides3 strides() const { return {kBlock * kv_heads * dim, dim, kv_heads * dim}; }
};

// Sequences of one shape but for their numbers of queries and keys, {queries, keys} each, in one call.
void check_pages(Report& report, Shape shape, const std::vector<std::pair<std::int64_t, std::int64_t>>& lengths) {
    Random random(52);
    std::vector<Inputs> sequences;
    std::int64_t width = 0;
    std::vector<std::int32_t> starts{0}, num_keys;
    std::vector<float> q, q_second;
    for (const auto& [queries, keys] : lengths) {
        shape.num_queries = queries, shape.num_keys = keys;
        const Inputs& in = sequences.emplace_back(shape, random);
        width = std::max(width, (keys + kBlock - 1) / kBlock);
        starts.push_back(starts.back() + static_cast<std::int32_t>(queries));
        num_keys.push_back(static_cast<std::int32_t>(keys));
        q.insert(q.end(), in.q.begin(), in.q.end());
        q_second.insert(q_second.end(), in.q_second.begin(), in.q_second.end());
    }
    for (Inputs& in : sequences) in.sinks = sequences.front().sinks;
    const auto num_sequences = static_cast<std::int64_t>(sequences.size());
    std::vector<std::int32_t> tables(num_sequences * width, 1 << 30);
    std::int32_t next = 0;
    for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t s = 0; s < num_sequences; ++s) {
            if (i * kBlock < num_keys[s]) tables[s * width + i] = next++;
        }
    }
    const std::int64_t heads = sequences.front().heads(), tokens = starts.back();
    const double softcap = shape.with_sinks ? 15.0 : 0.0, scale = 0.25;
    std::vector<float> out(tokens * heads * shape.value_dim);
    std::vector<double> expected(out.size());
    for (std::int64_t s = 0; s < num_sequences; ++s) {
        for (std::int64_t row = 0; row < sequences[s].s.num_queries * heads; ++row) {
            attend(sequences[s], row / heads, row % heads, scale, softcap,
                   &expected[(starts[s] * heads + row) * shape.value_dim]);
        }
    }
    const Pool k(sequences, tables, width, &Inputs::k, shape.key_dim);
    const Pool k_second(sequences, tables, width, &Inputs::k_second, std::max<std::int64_t>(1, shape.second_dim));
    const Pool v(sequences, tables, width, &Inputs::v, shape.value_dim);
    const moesaic::KeyPages pages{tables.data(), width, kBlock, num_keys.data(), starts.data()};
    moesaic::AttentionArgs a{};
    a.parts[0] = {q.data(), {0, shape.key_dim, heads * shape.key_dim}, k.bytes.data(), k.strides(), shape.key_dim};
    a.num_parts = 1;
    if (shape.second_dim > 0) {
        a.parts[a.num_parts++] = {q_second.data(),
                                  {0, shape.second_dim, heads * shape.second_dim},
                                  k_second.bytes.data(),
                                  k_second.strides(),
                                  shape.second_dim};
    }
    a.cache_type = shape.type;
    a.v = v.bytes.data(), a.v_stride = v.strides(), a.value_dim = shape.value_dim;
    a.out = out.data(), a.out_stride = {0, shape.value_dim, heads * shape.value_dim};
    a.batch = num_sequences, a.num_kv_heads = shape.kv_heads, a.group = shape.group;
    a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
    a.sliding_window = shape.window;
    a.sinks = shape.with_sinks ? sequences.front().sinks.data() : nullptr;
    a.pages = &pages;
    moesaic::attention(a);
    report.expect_close(out, expected, kFloat32Sums,
                        text("attention over pages, ", num_sequences, " sequences of ", heads, " heads, keys of ",
                             shape.key_dim, " + ", shape.second_dim, ", cache type ", static_cast<int>(shape.type),
                             ", window ", shape.window, shape.with_sinks ? ", sinks" : ""));
}

}  // namespace

void check_attention(Report& report) {
    for (auto type : {CacheType::kF32, CacheType::kBF16, CacheType::kF16}) {
        check_shape(report, {2, 2, 3, 65, 80, 72, type});
        check_shape(report, {1, 3, 2, 17, 5, 3, type});
        check_shape(report, {1, 4, 5, 130, 64, 64, type, 40, true});
        check_shape(report, {1, 8, 2, 70, 64, 64, type, 0, false, 16});
    }
    check_shape(report, {2, 1, 1, 1, 64, 64});
    check_shape(report, {1, 2, 1, 1100, 32, 32});  // split over threads

    for (auto type : {CacheType::kF32, CacheType::kBF16, CacheType::kF16}) {
        check_pages(report, {2, 2, 0, 0, 80, 72, type}, {{3, 65}, {1, 1}, {1, 200}, {7, 7}});
        check_pages(report, {1, 4, 0, 0, 64, 64, type, 40, true}, {{1, 130}, {20, 64}});
        check_pages(report, {1, 8, 0, 0, 64, 64, type, 0, false, 16}, {{2, 70}, {1, 5}});
    }
    check_pages(report, {1, 2, 0, 0, 32, 32}, {{1, 4500}, {1, 3}});  // cut into segments of two sizes
}

}  // namespace check
