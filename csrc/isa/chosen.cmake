# MOESAIC_ONLY_ISAS divides MOESAIC_ISAS: what is built stays in it, the others become MOESAIC_LEFT_OUT_ISAS.
set(MOESAIC_LEFT_OUT_ISAS "")
set(chosen "${MOESAIC_ONLY_ISAS}")

if(chosen STREQUAL native)
  # The program asks the processor with the code that chooses when the extension is loaded (csrc/cpu.cpp).
  if(NOT DEFINED MOESAIC_NATIVE_ISAS)
    string(REPLACE ";" "\", \"" names "${MOESAIC_ISAS}")
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/native_isas.cpp
         "#include <cstdio>\n#include \"cpu.h\"\nint main() {\n"
         "    for (const char* isa : {\"${names}\"}) {\n"
         "        if (moesaic::cpu_supports_isa(isa)) std::printf(\"%s;\", isa);\n    }\n}\n")
    try_run(exit_code has_compiled SOURCES ${CMAKE_CURRENT_BINARY_DIR}/native_isas.cpp ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu.cpp
            CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${CMAKE_CURRENT_SOURCE_DIR}/csrc CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON
            COMPILE_OUTPUT_VARIABLE messages RUN_OUTPUT_VARIABLE native_isas)
    if(NOT has_compiled OR NOT exit_code EQUAL 0)
      message(FATAL_ERROR "MOESAIC_ONLY_ISAS=native: the program that asks this processor for its instruction sets "
                          "did not run (${exit_code}). Give a list of: ${MOESAIC_ISAS}\n${messages}")
    endif()
    string(REGEX REPLACE ";$" "" native_isas "${native_isas}")
    set(MOESAIC_NATIVE_ISAS "${native_isas}" CACHE INTERNAL "the instruction sets of the processor that configured")
  endif()
  set(chosen "${MOESAIC_NATIVE_ISAS}")
  message(STATUS "Instruction sets of this processor: ${chosen}")
endif()

if(chosen)
  foreach(isa IN ITEMS generic LISTS chosen)
    if(NOT isa IN_LIST MOESAIC_ISAS OR NOT isa IN_LIST chosen)
      message(FATAL_ERROR "MOESAIC_ONLY_ISAS is \"${chosen}\": expected generic, and others of \"${MOESAIC_ISAS}\" "
                          "(csrc/isa/isas.cmake) for a ${CMAKE_SYSTEM_PROCESSOR} processor, or native alone")
    endif()
  endforeach()
  set(MOESAIC_LEFT_OUT_ISAS ${MOESAIC_ISAS})
  list(REMOVE_ITEM MOESAIC_LEFT_OUT_ISAS ${chosen})
  if(MOESAIC_LEFT_OUT_ISAS)
    list(REMOVE_ITEM MOESAIC_ISAS ${MOESAIC_LEFT_OUT_ISAS})
  endif()
endif()
