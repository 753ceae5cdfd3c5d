// Built without any -m flag: this code must run on the oldest machine we support.
#include "kernels/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

uint32_t fl_cpu_detect(void) {
    uint32_t cpu = FL_CPU_NONE;
#if defined(__x86_64__)
    // The compiler's helper asks the OS (XGETBV) as well as the CPU (CPUID).
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) cpu |= FL_CPU_AVX2;
    if (__builtin_cpu_supports("fma")) cpu |= FL_CPU_FMA;
    // Older helpers do not know F16C by name. It uses the AVX registers, for which the OS was
    // asked.
    unsigned a, b, c, d;
    if (__builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C))
        cpu |= FL_CPU_F16C;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        cpu |= FL_CPU_AVX512_VNNI;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"))
        cpu |= FL_CPU_AVX512_BF16;
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned long caps = getauxval(AT_HWCAP);
    if (caps & HWCAP_ASIMD) cpu |= FL_CPU_NEON;
    const unsigned long more = getauxval(AT_HWCAP2);
    if (caps & HWCAP_ASIMDDP) cpu |= FL_CPU_DOTPROD;
    if (more & HWCAP2_I8MM) cpu |= FL_CPU_I8MM;
    if (more & HWCAP2_BF16) cpu |= FL_CPU_BF16;
#endif
    return cpu;
}

const char *fl_cpu_feature(uint32_t cpu, unsigned i) {
    static const char *const names[] = {"AVX2",    "FMA",          "F16C", "AVX-512 VNNI", "NEON",
                                        "DOTPROD", "AVX-512 BF16", "I8MM", "BF16"};
    for (unsigned bit = 0; bit < FL_COUNT(names); bit++) {
        if ((cpu >> bit & 1u) == 0) continue;
        if (i == 0) return names[bit];
        i--;
    }
    return NULL;
}
