// Weights as they are read from memory; included by matmul.isa.cpp inside its anonymous namespace.

// One core keeps only so many cache misses in flight, and arithmetic between the loads leaves fewer: weights are asked
// for this many bytes before they are used.
constexpr int kPrefetchAhead = 8192;

// Panels from some address to `end`, after which the caller goes on at `next`.
struct WeightStream {
    const uint8_t* end;
    const uint8_t* next;

    // What will be read kPrefetchAhead bytes after p.
    MOESAIC_INLINE const uint8_t* ahead_of(const WeightStream& stream, const uint8_t* p) {
        const int64_t beyond = kPrefetchAhead - (stream.end - p);
        return beyond < 0 ? p + kPrefetchAhead : stream.next + beyond;
    }
};

template <int kBytes>
MOESAIC_INLINE void prefetch_bytes(const uint8_t* p) {
    MOESAIC_UNROLL
    for (int i = 0; i < kBytes; i += 64) prefetch(p + i);
}

// The part of each panel that is expanded after the current one, while the current one is multiplied.
void prefetch_chunk(const uint8_t* p, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += 64) prefetch_far(p + i);
}

// The same in steps of kBytes: one of them. Many prefetches at once hold up what follows, since only so many misses can
// be in flight.
template <int64_t kBytes>
MOESAIC_INLINE void prefetch_step(const uint8_t* p, int64_t step) {
    for (int64_t i = (step * kBytes + 63) / 64 * 64; i < (step + 1) * kBytes; i += 64) prefetch_far(p + i);
}
