# Toolchain: Debian's cross compiler for 64-bit Arm, programs run under qemu-user.  tests/test-arm uses it.
#
# RS_ARM_ROOT: a folder with what the cross compiler lacks (utf8proc, GoogleTest), unpacked from Debian's arm64 packages.
# RS_ARM_CPU: the CPU that qemu plays; neoverse-n1 has the dot products that the NEON row wants.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)

set(RS_ARM_ROOT "" CACHE PATH "Unpacked arm64 packages")
set(RS_ARM_CPU neoverse-n1 CACHE STRING "The CPU that qemu-aarch64 plays")
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES RS_ARM_ROOT RS_ARM_CPU)

# Programs are of this machine; headers and libraries are not.
set(CMAKE_FIND_ROOT_PATH ${RS_ARM_ROOT} /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

# An emulated program that hangs must not hang the build: it is also run to list its tests.
set(RS_ARM_EMULATOR timeout --kill-after=5 300 qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_CROSSCOMPILING_EMULATOR ${RS_ARM_EMULATOR} -cpu ${RS_ARM_CPU})
