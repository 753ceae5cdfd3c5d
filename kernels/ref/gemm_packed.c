// The definition: what every other variant is compared with, bit for bit.
#include "kernels/gemm_packed.h"

void fl_gemm_packed_ref(const fl_packed *w, uint32_t row_begin, uint32_t row_end, const fl_x8 *x,
                        float *y, size_t y_stride) {
    const size_t groups = x->groups, tile_size = fl_packed_tile_size(w->bits);
    for (uint32_t panel = row_begin; panel < row_end; panel += FL_PACKED_ROWS) {
        const uint32_t left = row_end - panel;
        const uint32_t rows = left < FL_PACKED_ROWS ? left : FL_PACKED_ROWS;
        const uint8_t *tile = w->data + panel / FL_PACKED_ROWS * groups * tile_size;
        for (size_t g = 0; g < groups; g++, tile += tile_size) {
            uint8_t codes[FL_PACKED_CODES];
            uint16_t scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
            fl_packed_tile_read(tile, w->bits, codes, scale, minimum);
            for (size_t t = 0; t < x->tokens; t++) {
                const size_t at = t * groups + g;
                float *out = y + t * y_stride + (panel - row_begin);
                for (size_t r = 0; r < rows; r++) {
                    int32_t dot = 0;
                    for (size_t k = 0; k < FL_PACKED_GROUP; k++)
                        dot += codes[r * FL_PACKED_GROUP + k] * x->codes[at * FL_X8_GROUP + k];
                    float sum = g == 0 ? 0.0f : out[r];
                    sum += fl_f16_to_f32(scale[r]) * (x->scales[at] * (float)dot);
                    out[r] = sum + fl_f16_to_f32(minimum[r]) * x->sums[at];
                }
            }
        }
    }
}
