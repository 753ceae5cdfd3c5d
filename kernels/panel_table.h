// panel_table.h: how a vector variant of gemm_packed goes over the panels of 16 rows. The file that
// includes this has defined
//     panel(tiles, bits, x, y, y_stride, rows)
//                                    forced inline: one panel, of which `rows` rows are wanted;
//                                    bits is a constant in every call
// and names its entry with FL_PANEL_ENTRY(tag). Everything here is static: no copy of it can be
// linked into code for other machines.
#define PANEL(bits)                                                                                \
    static void panel_##bits(const uint8_t *tiles, const fl_x8 *x, float *y, size_t y_stride,      \
                             size_t rows) {                                                        \
        panel(tiles, bits, x, y, y_stride, rows);                                                  \
    }
PANEL(2)
PANEL(3)
PANEL(4)
PANEL(5)
PANEL(6)
PANEL(7)
PANEL(8)
#undef PANEL

FL_INLINE void all_panels(const fl_packed *w, uint32_t row_begin, uint32_t row_end, const fl_x8 *x,
                          float *y, size_t y_stride) {
    static void (*const panels[FL_PACKED_BITS_MAX + 1])(const uint8_t *, const fl_x8 *, float *,
                                                        size_t, size_t) = {
        [2] = panel_2, [3] = panel_3, [4] = panel_4, [5] = panel_5,
        [6] = panel_6, [7] = panel_7, [8] = panel_8,
    };
    const size_t panel_size = x->groups * (FL_PACKED_HEAD + (size_t)128 * w->bits);
    for (uint32_t row = row_begin; row < row_end; row += FL_PACKED_ROWS) {
        const uint32_t left = row_end - row;
        panels[w->bits](w->data + row / FL_PACKED_ROWS * panel_size, x, y + (row - row_begin),
                        y_stride, left < FL_PACKED_ROWS ? left : FL_PACKED_ROWS);
    }
}

#define FL_PANEL_ENTRY(tag)                                                                        \
    void fl_gemm_packed_##tag(const fl_packed *w, uint32_t row_begin, uint32_t row_end,            \
                              const fl_x8 *x, float *y, size_t y_stride) {                         \
        all_panels(w, row_begin, row_end, x, y, y_stride);                                         \
    }
