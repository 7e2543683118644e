# Cross build for 64-bit ARM with Debian's compiler, for make aarch64-check. Static, so that the emulator needs no libraries
# of the other processor.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(MOESAIC_CROSS_CXX NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-12)
if(NOT MOESAIC_CROSS_CXX)
  message(FATAL_ERROR "needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
endif()
set(CMAKE_CXX_COMPILER ${MOESAIC_CROSS_CXX})
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
