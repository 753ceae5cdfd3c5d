# Cross-build for 64-bit ARM (crossbuild-essential-arm64); tests run under qemu-user-static. The
# emulated core is chosen with QEMU_CPU (cortex-a72 has no dot product, cortex-a76 has).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
