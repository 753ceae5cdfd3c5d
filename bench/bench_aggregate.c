// Folding updates into a layer's exact sum, and one optimiser step: what a coordinator does for
// each byte that a node sends. The check value is the sum's first coordinate.
#include "coordinator/aggregate.h"

#include "common/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COUNT = 41472 + 576, REPEATS = 400 }; // rank 8 on a layer of 576 wide, and an exit

int main(int argc, char **argv) {
    const int repeats = argc > 1 && strcmp(argv[1], "--smoke") == 0 ? 2 : REPEATS;
    int64_t *values = malloc(COUNT * sizeof(*values));
    double *mean = malloc(COUNT * sizeof(*mean)), *moments = malloc(2 * COUNT * sizeof(*moments));
    float *theta = calloc(COUNT, sizeof(*theta));
    coord_sum sum;
    fl_err err;
    if (values == NULL || mean == NULL || moments == NULL || theta == NULL ||
        coord_sum_init(&sum, COUNT, &err) != FL_OK)
        return 1;
    for (int i = 0; i < COUNT; i++) values[i] = (int64_t)i * 1000003 - ((int64_t)1 << 34);
    double began = fl_clock_s();
    for (int r = 0; r < repeats; r++) {
        if (coord_sum_fold(&sum, values, COUNT, 65536000, COORD_ONE, &err) != FL_OK) return 1;
    }
    const double fold_s = (fl_clock_s() - began) / repeats;
    const coord_opt opt = {COORD_FEDADAM, .01, .9, .99, 1e-3};
    coord_opt_start(&opt, COUNT, moments);
    began = fl_clock_s();
    for (int r = 0; r < repeats; r++) {
        if (coord_sum_mean(&sum, 0x1p-32, 0.0, mean, &err) != FL_OK ||
            coord_opt_step(&opt, COUNT, mean, theta, moments, &err) != FL_OK)
            return 1;
    }
    const double step_s = (fl_clock_s() - began) / repeats;
    printf("fold %d values: %.0f ns, %.2f Gvalues/s, %.2f GB/s; step: %.0f ns; check %.9g\n", COUNT,
           fold_s * 1e9, COUNT / fold_s * 1e-9, COUNT * 24.0 / fold_s * 1e-9, step_s * 1e9,
           (double)theta[0]);
    coord_sum_done(&sum);
    free(values);
    free(mean);
    free(moments);
    free(theta);
    return 0;
}
