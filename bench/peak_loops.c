#include "bench/peak_loops.h"

// Sixteen registers hold sums where there are 32, twelve where there are 16: more than any core's
// latency times its throughput.
#if defined(__x86_64__)

#define LOOP(count, body)                                                                          \
    __asm__ volatile("1:\n" body "dec %0\n jnz 1b\n vzeroupper"                                    \
                     : "+r"(count)                                                                 \
                     :                                                                             \
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",       \
                       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
#define TWELVE(line) ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n" line "\n.endr\n"

static void fma_ymm(size_t count) {
    LOOP(count, TWELVE("vfmadd231ps %%ymm14, %%ymm15, %%ymm\\r"));
}

// Six products and six sums in 16 bits: what a kernel for bytes cannot do without.
static void maddubs_ymm(size_t count) {
    LOOP(count, ".irp r,0,1,2,3,4,5\n vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n"
                " vpaddw %%ymm13, %%ymm\\r, %%ymm\\r\n.endr\n");
}

static void fma_zmm(size_t count) {
    LOOP(count, TWELVE("vfmadd231ps %%zmm14, %%zmm15, %%zmm\\r"));
}

static void vpdpbusd_zmm(size_t count) {
    LOOP(count, TWELVE("vpdpbusd %%zmm14, %%zmm15, %%zmm\\r"));
}

static void vdpbf16ps_zmm(size_t count) {
    LOOP(count, TWELVE("vdpbf16ps %%zmm14, %%zmm15, %%zmm\\r"));
}

const double bench_loop_ops[] = {
    [BENCH_fma_ymm] = 12 * 16,       [BENCH_maddubs_ymm] = 6 * 64,    [BENCH_fma_zmm] = 12 * 32,
    [BENCH_vpdpbusd_zmm] = 12 * 128, [BENCH_vdpbf16ps_zmm] = 12 * 64,
};

void bench_loop_read(const void *data, size_t size) {
    const char *at = data;
    size_t left = size / 512;
    if (left == 0) return;
    __asm__ volatile("1:\n.irp o,0,32,64,96,128,160,192,224\n vmovdqu \\o(%0), %%ymm0\n"
                     " vmovdqu 256+\\o(%0), %%ymm1\n.endr\n"
                     " add $512, %0\n dec %1\n jnz 1b\n vzeroupper"
                     : "+r"(at), "+r"(left)
                     :
                     : "cc", "memory", "xmm0", "xmm1");
}

#elif defined(__aarch64__)

#define LOOP(count, body)                                                                          \
    __asm__ volatile(".arch armv8.2-a+dotprod\n1:\n" body "subs %0, %0, #1\n b.ne 1b"              \
                     : "+r"(count)                                                                 \
                     :                                                                             \
                     : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18",  \
                       "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v30", "v31")
#define SIXTEEN(line) ".irp r,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23\n" line "\n.endr\n"

static void fmla(size_t count) {
    LOOP(count, SIXTEEN("fmla v\\r\\().4s, v30.4s, v31.4s"));
}

// Sixteen bytes by sixteen: two products in 16 bits, one sum of pairs into 32.
static void smull(size_t count) {
    LOOP(count, ".irp r,0,1,2,3,4,5,6,7\n smull v24.8h, v30.8b, v31.8b\n"
                " smlal2 v24.8h, v30.16b, v31.16b\n sadalp v\\r\\().4s, v24.8h\n.endr\n");
}

static void sdot(size_t count) {
    LOOP(count, SIXTEEN("sdot v\\r\\().4s, v30.16b, v31.16b"));
}

const double bench_loop_ops[] = {
    [BENCH_fmla] = 16 * 8, [BENCH_smull] = 8 * 32, [BENCH_sdot] = 16 * 32};

void bench_loop_read(const void *data, size_t size) {
    const char *at = data;
    for (size_t left = size / 512; left > 0; left--, at += 512)
        __asm__ volatile(".irp o,0,64,128,192,256,320,384,448\n ldp q0, q1, [%0, #\\o]\n"
                         " ldp q2, q3, [%0, #\\o+32]\n.endr"
                         :
                         : "r"(at)
                         : "memory", "v0", "v1", "v2", "v3");
}

#endif

void bench_loop(bench_rate rate, size_t count) {
    static void (*const loops[])(size_t) = {
#define X(name, need) name,
        BENCH_RATE_LIST(X)
#undef X
    };
    if (count > 0) loops[rate](count);
}
