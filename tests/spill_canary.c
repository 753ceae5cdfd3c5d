// What tools/spills.py must find, and what it must not: sums of products in more registers than
// there are, and in fewer.
#include <stddef.h>

#if defined(__AVX512F__)
typedef float vec __attribute__((vector_size(64)));
#else
typedef float vec __attribute__((vector_size(16)));
#endif

void canary_spills(size_t n, const vec *x, const vec *y, vec *out);
void canary_is_clean(size_t n, const vec *x, const vec *y, vec *out);

#define SUMS(count)                                                                                \
    vec sum[count];                                                                                \
    for (int i = 0; i < (count); i++) sum[i] = out[i];                                             \
    for (size_t k = 0; k < n; k++)                                                                 \
        _Pragma("GCC unroll 40") for (int i = 0; i < (count); i++) sum[i] +=                       \
            x[k] * y[k + (size_t)i];                                                               \
    for (int i = 0; i < (count); i++) out[i] = sum[i]

void canary_spills(size_t n, const vec *x, const vec *y, vec *out) {
    SUMS(40);
}

void canary_is_clean(size_t n, const vec *x, const vec *y, vec *out) {
    SUMS(8);
}
