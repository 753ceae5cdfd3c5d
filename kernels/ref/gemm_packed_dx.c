// The definition: what every other variant is compared with.
#include "kernels/gemm_packed_dx.h"

// The tile's floats, panel[16][64], as fl_packed_row gives them.
static void dequantise(const uint8_t *tile, uint32_t bits, float *panel) {
    uint8_t codes[FL_PACKED_CODES];
    uint16_t scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    fl_packed_tile_read(tile, bits, codes, scale, minimum);
    for (size_t i = 0; i < FL_PACKED_CODES; i++) {
        const size_t r = i / FL_PACKED_GROUP;
        panel[i] = fl_f16_to_f32(scale[r]) * (float)codes[i];
        panel[i] += fl_f16_to_f32(minimum[r]);
    }
}

void fl_gemm_packed_dx_ref(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                           const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                           bool accumulate, void *scratch) {
    const size_t groups = (w->cols + (size_t)FL_PACKED_GROUP - 1) / FL_PACKED_GROUP;
    float *panel = scratch;
    for (size_t t = 0; t < tokens && !accumulate; t++) {
        for (size_t k = 0; k < range->col_end - range->col_begin; k++) dx[t * dx_stride + k] = 0.0f;
    }
    for (uint32_t row = range->row_begin; row < range->row_end; row += FL_PACKED_ROWS) {
        for (uint32_t col = range->col_begin; col < range->col_end; col += FL_PACKED_GROUP) {
            const size_t index = row / FL_PACKED_ROWS * groups + col / FL_PACKED_GROUP;
            dequantise(w->data + index * fl_packed_tile_size(w->bits), w->bits, panel);
            for (size_t t = 0; t < tokens; t++) {
                for (uint32_t r = row; r < range->row_end && r < row + FL_PACKED_ROWS; r++) {
                    const float d = dy[t * dy_stride + (r - range->row_begin)];
                    const float *wr = panel + (r - row) * FL_PACKED_GROUP;
                    float *out = dx + t * dx_stride + (col - range->col_begin);
                    for (uint32_t k = 0; k < FL_PACKED_GROUP && col + k < range->col_end; k++)
                        out[k] += d * wr[k];
                }
            }
        }
    }
}
