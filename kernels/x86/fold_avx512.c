// Eight floats become eight 64-bit integers in one instruction that rounds to even.
#include "kernels/fold_loop.h"

#include <immintrin.h>

FL_FOLD_MOST(avx512) {
    return fl_fold_most(n, x);
}

FL_FOLD_F32(avx512) {
    const __m512i factor = _mm512_set1_epi64((int64_t)m);
    const __m256 unit = _mm256_set1_ps(0x1p32f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m512i fixed = _mm512_cvtps_epi64(_mm256_mul_ps(_mm256_loadu_ps(x + i), unit));
        const __m512i more = _mm512_mullo_epi64(fixed, factor);
        _mm512_storeu_si512(lane + i, _mm512_add_epi64(_mm512_loadu_si512(lane + i), more));
    }
    fl_fold_f32(n - i, x + i, m, lane + i);
}

FL_FOLD_I64(avx512) {
    fl_fold_i64(n, x, m, lane);
}
