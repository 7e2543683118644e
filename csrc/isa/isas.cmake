# The one list of instruction sets, best first. A row: name, processors, compiler flags.
# Each name is a header here (isa/<name>.h) that holds the vocabulary, and a row in cpu.cpp that says when it is usable.
set(MOESAIC_ISAS "")

function(moesaic_isa name processors)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "${processors}")
    set(MOESAIC_ISAS ${MOESAIC_ISAS} ${name} PARENT_SCOPE)
    set(MOESAIC_FLAGS_${name} "${ARGN}" PARENT_SCOPE)
  endif()
endfunction()

set(x86 "^(x86_64|AMD64|amd64)$")
set(avx2 -mavx2 -mfma -mf16c)
set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512)
set(avx512_vbmi ${avx512} -mavx512vbmi -mavx512bitalg -mgfni)
moesaic_isa(amx ${x86} ${avx512_vbmi} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16)
moesaic_isa(avx512_vbmi ${x86} ${avx512_vbmi})
moesaic_isa(avx512 ${x86} ${avx512})
moesaic_isa(avxvnni ${x86} ${avx2} -mavxvnni)
moesaic_isa(avx2 ${x86} ${avx2})
# -O1: at -O3 the compiler needs over six minutes for the unrolled products in emulated vectors, at -O1 half a minute.
moesaic_isa(generic ".*" -O1)
