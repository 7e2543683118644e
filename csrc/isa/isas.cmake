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
moesaic_isa(avx512 ${x86} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c
            -mprefer-vector-width=512)
moesaic_isa(avx2 ${x86} -mavx2 -mfma -mf16c)
# -O1: at -O3 the compiler needs over six minutes for the unrolled products in emulated vectors, at -O1 half a minute.
moesaic_isa(generic ".*" -O1)
