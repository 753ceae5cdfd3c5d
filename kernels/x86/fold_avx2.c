// There is no product of 64-bit integers here, but as long as it is below 2^51 a double holds it.
#include "kernels/fold_loop.h"

#include <immintrin.h>

enum { SMALL = 1 << 13 }; // times 2^38 it is 2^51

FL_FOLD_MOST(avx2) {
    return fl_fold_most(n, x);
}

FL_FOLD_F32(avx2) {
    const __m256d zero = _mm256_set1_pd(FL_FOLD_ROUND), unit = _mm256_set1_pd(0x1p32);
    size_t i = 0;
    if (m <= SMALL) {
        const __m256d factor = _mm256_set1_pd((double)m);
        for (; i + 4 <= n; i += 4) {
            const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(x + i));
            const __m256d fixed = _mm256_sub_pd(_mm256_fmadd_pd(v, unit, zero), zero);
            const __m256i bits = _mm256_castpd_si256(_mm256_fmadd_pd(fixed, factor, zero));
            const __m256i more = _mm256_sub_epi64(bits, _mm256_castpd_si256(zero));
            __m256i *to = (__m256i *)(void *)(lane + i);
            _mm256_storeu_si256(to, _mm256_add_epi64(_mm256_loadu_si256(to), more));
        }
    }
    fl_fold_f32(n - i, x + i, m, lane + i);
}

FL_FOLD_I64(avx2) {
    fl_fold_i64(n, x, m, lane);
}
