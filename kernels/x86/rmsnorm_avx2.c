// Sums are made in double, as in the definition: a row's bits differ from it rarely, and little.
#include "kernels/rmsnorm.h"

#include "kernels/x86/exp_avx2.h"

FL_INLINE __m256d low_pd(__m256 v) {
    return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
}

FL_INLINE __m256d high_pd(__m256 v) {
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}

// 1 / sqrt(mean(x^2) + epsilon)
static double inverse_rms(size_t n, float epsilon, const float *x) {
    __m256d a = _mm256_setzero_pd(), b = a;
    for (size_t i = 0; i < n; i += 8) {
        const __m256 v = fl_load8(x + i, n - i < 8, fl_mask8(n - i < 8 ? n - i : 8));
        a = _mm256_fmadd_pd(low_pd(v), low_pd(v), a);
        b = _mm256_fmadd_pd(high_pd(v), high_pd(v), b);
    }
    const double mean = fl_sum_pd(_mm256_add_pd(a, b)) / (double)n + (double)epsilon;
    const __m128d root = _mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(mean));
    return 1.0 / _mm_cvtsd_f64(root);
}

FL_RMSNORM_FORWARD(avx2) {
    for (size_t t = 0; t < rows; t++, x += n, y += n) {
        const float r = (float)inverse_rms(n, epsilon, x);
        const __m256 rv = _mm256_set1_ps(r);
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), rv);
            _mm256_storeu_ps(y + i, _mm256_mul_ps(v, _mm256_loadu_ps(gain + i)));
        }
        for (; i < n; i++) y[i] = x[i] * r * gain[i];
    }
}

// sum_i dy[i] * gain[i] * x[i]
static double dot3(size_t n, const float *dy, const float *gain, const float *x) {
    __m256d a = _mm256_setzero_pd(), b = a;
    for (size_t i = 0; i < n; i += 8) {
        const bool tail = n - i < 8;
        const __m256i mask = fl_mask8(tail ? n - i : 8);
        const __m256 d = fl_load8(dy + i, tail, mask), g = fl_load8(gain + i, tail, mask);
        const __m256 v = fl_load8(x + i, tail, mask);
        a = _mm256_fmadd_pd(_mm256_mul_pd(low_pd(d), low_pd(g)), low_pd(v), a);
        b = _mm256_fmadd_pd(_mm256_mul_pd(high_pd(d), high_pd(g)), high_pd(v), b);
    }
    return fl_sum_pd(_mm256_add_pd(a, b));
}

FL_RMSNORM_BACKWARD(avx2) {
    for (size_t t = 0; t < rows; t++, x += n, dy += n, dx += n) {
        const float r = (float)inverse_rms(n, epsilon, x);
        const double rd = (double)r;
        const float c = (float)(dot3(n, dy, gain, x) * rd * rd * rd / (double)n);
        const __m256 rv = _mm256_set1_ps(r), cv = _mm256_set1_ps(c);
        size_t i = 0;
        for (; i + 8 <= n; i += 8) {
            const __m256 g = _mm256_loadu_ps(dy + i), v = _mm256_loadu_ps(x + i);
            if (dgain != NULL) {
                const __m256 part = _mm256_mul_ps(_mm256_mul_ps(g, v), rv);
                _mm256_storeu_ps(dgain + i, _mm256_add_ps(_mm256_loadu_ps(dgain + i), part));
            }
            const __m256 along = _mm256_mul_ps(_mm256_mul_ps(rv, _mm256_loadu_ps(gain + i)), g);
            const __m256 all = _mm256_sub_ps(along, _mm256_mul_ps(cv, v));
            _mm256_storeu_ps(dx + i, _mm256_add_ps(_mm256_loadu_ps(dx + i), all));
        }
        for (; i < n; i++) {
            if (dgain != NULL) dgain[i] += dy[i] * x[i] * r;
            dx[i] += r * gain[i] * dy[i] - c * x[i];
        }
    }
}
