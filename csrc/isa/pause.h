// What a waiting loop does between two looks, so that the other thread of the core gets on.
#pragma once

namespace moesaic {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace moesaic
