// The definition: sums in order, one at a time.
#include "kernels/gemm_f32.h"

FL_GEMM_F32_NT(ref) {
    for (size_t t = 0; t < tokens; t++) {
        for (size_t j = 0; j < n; j++) {
            float sum = 0.0f;
            for (size_t i = 0; i < k; i++) sum += x[t * ldx + i] * w[j * ldw + i];
            y[t * ldy + j] = sum;
        }
    }
}

FL_GEMM_F32_NN(ref) {
    for (size_t t = 0; t < tokens; t++) {
        float *row = dx + t * lddx;
        if (!accumulate)
            for (size_t i = 0; i < k; i++) row[i] = 0.0f;
        for (size_t j = 0; j < n; j++) {
            const float g = dy[t * lddy + j];
            for (size_t i = 0; i < k; i++) row[i] += g * w[j * ldw + i];
        }
    }
}

FL_GEMM_F32_TN(ref) {
    for (size_t t = 0; t < tokens; t++) {
        for (size_t j = 0; j < n; j++) {
            const float g = dy[t * lddy + j];
            for (size_t r = 0; r < rank; r++) db[j * lddb + r] += g * u[t * ldu + r];
        }
    }
}

FL_GEMM_F32_RANK_UP(ref) {
    for (size_t t = 0; t < tokens; t++) {
        for (size_t j = 0; j < n; j++) {
            float sum = 0.0f;
            for (size_t r = 0; r < rank; r++) sum += u[t * ldu + r] * b[j * ldb + r];
            y[t * ldy + j] += s * sum;
        }
    }
}
