// AVX2 with AVX-VNNI (client processors without AVX-512): the vocabulary of avx2.h, whose dot products are then one
// instruction; the compiler flag tells it.
#pragma once

#include "isa/avx2.h"
