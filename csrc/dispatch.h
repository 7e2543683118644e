// Which instruction set runs, and how an op that is written once is found for it.
//
// An op that is compiled once per instruction set has three parts (ops/norm.* is a short example):
//
//   1. foo.h        struct FooKernels { void (*row)(const float* x, float* y, int n); };   // plain function pointers
//                   MOESAIC_DECLARE_KERNELS(FooKernels, foo_kernels)
//   2. foo.isa.cpp  #include MOESAIC_ISA_HEADER   // the vocabulary: vf, vi, load, fma, ... (isa/*.h)
//                   #include "foo.h"
//                   namespace moesaic::MOESAIC_ISA_NAMESPACE {
//                   namespace { void row(const float* x, float* y, int n) { ... } }   // everything internal
//                   const FooKernels& foo_kernels() { static constexpr FooKernels kernels{row}; return kernels; }
//                   }
//   3. foo.cpp      MOESAIC_DEFINE_KERNELS(FooKernels, foo_kernels)   // moesaic::foo_kernels(): the active set's table
//                   void foo(...) { const FooKernels& kernels = foo_kernels(); thread_pool().run(...); }
//
// Rules for *.isa.cpp, checked by a test with nm: no symbol but the table getters is external and none is weak, hence
// no std templates or inline functions with external linkage. CMake picks up csrc/{kernels,ops}/*.isa.cpp by itself.
#pragma once

#include <string>
#include <vector>

#include "isa_list.h"

namespace moesaic {

// Index of the active instruction set in the list of isa/isas.cmake (0 is the best).
int active_isa_index();
const char* active_isa();

// The instruction sets that this processor can run, best first.
std::vector<std::string> usable_isas();

// Those that this processor could run, too, but that the build leaves out (MOESAIC_ONLY_ISAS in CMake), best first.
std::vector<std::string> left_out_isas();

// Make `name` the active one. Throws std::invalid_argument if it is unknown or cannot run here.
void set_isa(const std::string& name);

}  // namespace moesaic

#define MOESAIC_CONCAT_(a, b) a##b
#define MOESAIC_CONCAT(a, b) MOESAIC_CONCAT_(a, b)
#define MOESAIC_ISA_NAMESPACE MOESAIC_CONCAT(isa_, MOESAIC_ISA)

#define MOESAIC_DECLARE_FOR_ISA(isa, Table, getter) \
    namespace isa_##isa {                           \
        const Table& getter();                      \
    }
#define MOESAIC_DECLARE_KERNELS(Table, getter)                   \
    MOESAIC_FOR_EACH_ISA(MOESAIC_DECLARE_FOR_ISA, Table, getter) \
    const Table& getter();

#define MOESAIC_GETTER_FOR_ISA(isa, getter) isa_##isa::getter,
#define MOESAIC_DEFINE_KERNELS(Table, getter)                                                                  \
    const Table& getter() {                                                                                    \
        static constexpr const Table& (*getters[])() = {MOESAIC_FOR_EACH_ISA(MOESAIC_GETTER_FOR_ISA, getter)}; \
        return getters[active_isa_index()]();                                                                  \
    }
