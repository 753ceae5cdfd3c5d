#include "kernels/swiglu.h"

#include "kernels/x86/exp_avx2.h"

FL_INLINE __m256 sigmoid(__m256 g) {
    const __m256 one = _mm256_set1_ps(1.0f);
    const __m256 e = fl_exp8(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));
    return _mm256_div_ps(one, _mm256_add_ps(one, e));
}

FL_INLINE void forward8(const bool tail, __m256i mask, const float *gate, const float *up,
                        float *act) {
    const __m256 g = fl_load8(gate, tail, mask), one = _mm256_set1_ps(1.0f);
    const __m256 e = fl_exp8(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));
    const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, e));
    fl_store8(act, tail, mask, _mm256_mul_ps(silu, fl_load8(up, tail, mask)));
}

FL_SWIGLU_FORWARD(avx2) {
    const __m256i mask = fl_mask8(n % 8);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) forward8(false, mask, gate + i, up + i, act + i);
    if (i < n) forward8(true, mask, gate + i, up + i, act + i);
}

FL_INLINE void backward8(const bool tail, __m256i mask, const float *gate, const float *up,
                         const float *dact, float *dgate, float *dup) {
    const __m256 g = fl_load8(gate, tail, mask), u = fl_load8(up, tail, mask);
    const __m256 d = fl_load8(dact, tail, mask), s = sigmoid(g), one = _mm256_set1_ps(1.0f);
    const __m256 slope =
        _mm256_mul_ps(s, _mm256_fmadd_ps(g, _mm256_sub_ps(one, s), one)); // s (1 + g (1 - s))
    fl_store8(dgate, tail, mask, _mm256_mul_ps(_mm256_mul_ps(d, u), slope));
    fl_store8(dup, tail, mask, _mm256_mul_ps(d, _mm256_mul_ps(g, s)));
}

FL_SWIGLU_BACKWARD(avx2) {
    const __m256i mask = fl_mask8(n % 8);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        backward8(false, mask, gate + i, up + i, dact + i, dgate + i, dup + i);
    if (i < n) backward8(true, mask, gate + i, up + i, dact + i, dgate + i, dup + i);
}
