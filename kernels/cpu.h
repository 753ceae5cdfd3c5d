// cpu.h: which instruction sets this machine AND its operating system let us use.
#ifndef FL_KERNELS_CPU_H
#define FL_KERNELS_CPU_H

#include "common/base.h"

enum {
    FL_CPU_NONE = 0,
    FL_CPU_AVX2 = 1u << 0,
    FL_CPU_FMA = 1u << 1,
    FL_CPU_F16C = 1u << 2,
    FL_CPU_AVX512_VNNI = 1u << 3, // with AVX-512 F, BW, DQ and VL
    FL_CPU_NEON = 1u << 4,
    FL_CPU_DOTPROD = 1u << 5, // SDOT/UDOT of ARMv8.2
    FL_CPU_AVX512_BF16 = 1u << 6,
    FL_CPU_I8MM = 1u << 7, // SMMLA, USMMLA, USDOT
    FL_CPU_BF16 = 1u << 8, // BFMMLA, BFDOT
};

#if defined(__x86_64__)
#define FL_ON_X86(...) __VA_ARGS__
#else
#define FL_ON_X86(...)
#endif
#if defined(__aarch64__)
#define FL_ON_ARM64(...) __VA_ARGS__
#else
#define FL_ON_ARM64(...)
#endif

uint32_t fl_cpu_detect(void);

// Names of the features in `cpu`, for people: the i-th (0-based) set bit's name, NULL after the
// last.
const char *fl_cpu_feature(uint32_t cpu, unsigned i);

#endif
