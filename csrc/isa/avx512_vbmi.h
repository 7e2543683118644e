// AVX-512 with VBMI and BITALG (Ice Lake, Zen 4 and later): the vocabulary of avx512.h, whose codebooks are then tables
// of bytes in registers; the compiler flags tell it.
#pragma once

#include "isa/avx512.h"
