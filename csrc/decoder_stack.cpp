#include "decoder_stack.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "team_step.h"

namespace moesaic {

namespace {

[[noreturn]] void refuse(const char* what, std::int64_t index, std::int64_t found) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(index) + " of the step is " +
                                std::to_string(found) + ", which does not go with the rest");
}

void check_tables(const KeyPages& pages, std::int64_t sequence, std::int64_t num_blocks) {
    const std::int64_t used = (pages.num_keys[sequence] + pages.block_size - 1) / pages.block_size;
    for (std::int64_t i = 0; i < used; ++i) {
        const std::int64_t block = pages.tables[sequence * pages.table_stride + i];
        if (block < 0 || block >= num_blocks) refuse("a block of sequence", sequence, block);
    }
}

}  // namespace

void DecoderStack::run_attention(std::size_t layer, const AttentionBlockCall& call) const {
    if (layers[layer].attention != nullptr) {
        attention_block(*layers[layer].attention, call);
    } else {
        latent_attention_block(*layers[layer].latent_attention, call);
    }
}

void DecoderStack::run(AttentionBlockCall call, const std::vector<KeyValueCache>& caches, float* (&outputs)[2]) const {
    for (std::size_t i = 0; i < layers.size(); ++i) {
        call.out = outputs[i % 2];
        call.cache = caches[i];
        run_attention(i, call);
        feed_forward_block(*layers[i].feed_forward, call.out, call.batch * call.num_tokens);
        call.x = call.out;
    }
}

void PagedStack::run(AttentionBlockCall call, std::int64_t first, std::int64_t count) const {
    const bool one = call.batch * call.num_tokens == 1;
    std::vector<LayerHalf> together;
    auto run_together = [&] {
        if (!together.empty()) run_in_team(together, call);
        together.clear();
    };
    for (std::int64_t i = first; i < first + count; ++i) {
        const DecoderStack::Layer& layer = stack->layers[static_cast<std::size_t>(i)];
        call.cache = caches[static_cast<std::size_t>(i)];
        if (one && layer.attention != nullptr && runs_in_team(*layer.attention, call)) {
            together.push_back({layer.attention, call.cache, nullptr});
        } else {
            run_together();
            stack->run_attention(static_cast<std::size_t>(i), call);
        }
        if (one && runs_in_team(*layer.feed_forward)) {
            together.push_back({nullptr, {}, layer.feed_forward});
        } else {
            run_together();
            feed_forward_block(*layer.feed_forward, call.out, call.batch * call.num_tokens);
        }
    }
    run_together();
}

namespace {

// The last tokens of the sequences of a call, as a call of one token each whose keys are in the cache already.
class LastTokens {
  public:
    LastTokens(const AttentionBlockCall& c, std::int64_t hidden) : call_(c), step_(*c.paged) {
        const std::int64_t count = step_.num_sequences, pairs = c.angle_stride.head;
        angles_.resize(static_cast<std::size_t>(2 * count * pairs));
        starts_.push_back(0);
        for (std::int64_t s = 0; s < count; ++s) {
            const std::int64_t last = c.paged->pages.starts[s + 1] - 1;
            std::copy_n(c.x + last * hidden, hidden, c.out + s * hidden);
            std::copy_n(c.cos + last * pairs, pairs, angles_.data() + s * pairs);
            std::copy_n(c.sin + last * pairs, pairs, angles_.data() + (count + s) * pairs);
            starts_.push_back(static_cast<std::int32_t>(s + 1));
        }
        slots_.assign(static_cast<std::size_t>(count), -1);
        step_.pages.starts = starts_.data();
        step_.slots = slots_.data();
        call_.x = c.out;
        call_.num_tokens = count;
        call_.cos = angles_.data();
        call_.sin = angles_.data() + count * pairs;
        call_.paged = &step_;
    }
    LastTokens(const LastTokens&) = delete;
    LastTokens& operator=(const LastTokens&) = delete;
    const AttentionBlockCall& call() const { return call_; }

  private:
    AttentionBlockCall call_;
    PagedStep step_;
    std::vector<std::int32_t> starts_;
    std::vector<std::int64_t> slots_;
    std::vector<float> angles_;
};

}  // namespace

void PagedStack::finish(const AttentionBlockCall& call) const {
    const DecoderStack::Layer& layer = stack->layers.back();
    AttentionBlockCall keys = call;
    keys.cache = caches.back();
    if (layer.attention != nullptr) {
        append_keys(*layer.attention, keys);
    } else {
        append_latents(*layer.latent_attention, keys);
    }
    const LastTokens last(call, layer.feed_forward->experts->hidden);
    run(last.call(), static_cast<std::int64_t>(caches.size()) - 1, 1);
}

void check_paged_step(const PagedStep& step, std::int64_t num_tokens, std::int64_t table_width,
                      std::int64_t num_blocks) {
    const KeyPages& pages = step.pages;
    if (pages.starts[0] != 0) refuse("start", 0, pages.starts[0]);
    for (std::int64_t s = 0; s < step.num_sequences; ++s) {
        const std::int64_t start = pages.starts[s], end = pages.starts[s + 1];
        if (end < start || end > num_tokens) refuse("start", s + 1, end);
        const std::int64_t length = pages.num_keys[s];
        if (length < 0 || length > table_width * pages.block_size || (length > 0 && length < end - start)) {
            refuse("length", s, length);
        }
        check_tables(pages, s, num_blocks);
    }
    if (pages.starts[step.num_sequences] != num_tokens) {
        refuse("start", step.num_sequences, pages.starts[step.num_sequences]);
    }
    for (std::int64_t i = 0; i < num_tokens && step.slots != nullptr; ++i) {
        if (step.slots[i] >= num_blocks * pages.block_size) refuse("slot", i, step.slots[i]);
    }
}

}  // namespace moesaic
