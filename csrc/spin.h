// How a thread waits for another one that is about to be ready, without giving up its core for long.
#pragma once

#include <sched.h>

#include "isa/pause.h"

namespace moesaic {

// Pauses before a waiting thread offers its core to others. With a core for each thread it hardly ever comes to that,
// and a system call is the last thing to be in when the other one is ready; with fewer cores the thread that is waited
// for may need this one.
constexpr int kPausesWithOwnCore = 2000;
constexpr int kPausesWithSharedCore = 50;

// Spins until ready(), offering the core after every `patience` pauses.
template <class Ready>
void spin_until(int patience, Ready&& ready) {
    for (int pauses = 0; !ready();) {
        pause();
        if (++pauses >= patience) {
            sched_yield();
            pauses = 0;
        }
    }
}

}  // namespace moesaic
