// Sizes and speed of a layer's update in every encoding, and what other codes of the positions
// would take. The layer is SmolLM2-135M's: 41,472 values of B at rank 8.
//
//   bench_update [FILE]   FILE: f32 values of a real change; without it, values of heavy tails
//   --smoke               one short pass
#include "common/checked.h"
#include "common/clock.h"
#include "proto/update.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 576 + 192 + 192 + 576 + 1536 + 1536 + 576, RANK = 8, COUNT = ROWS * RANK };
static int64_t values[COUNT], back[COUNT];
static uint8_t bytes[FL_UPDATE_HEAD + COUNT * 8];

static uint64_t state = 1;
static double draw(void) { // in [-1, 1); repeatable
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)state * 0x1p-63;
}

static bool load(const char *path) {
    FILE *f = path == NULL ? NULL : fopen(path, "rb");
    for (uint32_t i = 0; i < COUNT; i++) {
        uint8_t raw[4];
        double v = 0.01 * draw() * draw() * draw();
        if (path != NULL) {
            if (f == NULL || fread(raw, 1, 4, f) != 4) {
                fprintf(stderr, "%s has no %d values\n", path, COUNT);
                if (f != NULL) fclose(f);
                return false;
            }
            v = (double)fl_get_f32(raw);
        }
        values[i] = llrint(v * 0x1p32);
    }
    if (f != NULL) fclose(f);
    return true;
}

static size_t encode(fl_update_encoding e, uint32_t keep, fl_update *ret) {
    const fl_update_info info = {e, 0, COUNT, 1, 1};
    size_t size = 0;
    fl_err err = {.text = ""};
    fl_status st =
        fl_update_encode_fixed(&info, keep, values, 1, bytes, sizeof(bytes), &size, &err);
    if (st == FL_OK) st = fl_update_open((fl_bytes){bytes, size}, ret, &err);
    if (st != FL_OK) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return size;
}

static void print_positions(double share) {
    fl_update u;
    encode(FL_UPDATE_SPARSE8, (uint32_t)(share * COUNT), &u);
    fl_update_fixed(&u, 0, COUNT, back);
    static const unsigned rice[] = {0, 1, 2, 3, 4, 5, 6, 8};
    double bits[8] = {0}, best = 0;
    size_t varint = 0, kept = 0;
    for (uint32_t i = 0, next = 0; i < COUNT; i++) {
        if (i % FL_UPDATE_PAGE == 0) {
            double least = bits[0];
            for (size_t r = 0; r < FL_COUNT(rice); r++) {
                least = fmin(least, bits[r]);
                bits[r] = 0;
            }
            best += least;
            next = i;
        }
        if (back[i] == 0) continue;
        const uint32_t gap = i - next;
        for (size_t r = 0; r < FL_COUNT(rice); r++) bits[r] += (gap >> rice[r]) + 1 + rice[r];
        varint += gap < 128 ? 1 : 2;
        kept++;
        next = i + 1;
    }
    double least = bits[0];
    for (size_t r = 0; r < FL_COUNT(rice); r++) least = fmin(least, bits[r]);
    const size_t blocks = (COUNT + FL_UPDATE_BLOCK - 1) / FL_UPDATE_BLOCK;
    const double p = (double)kept / COUNT, entropy = -p * log2(p) - (1 - p) * log2(1 - p);
    printf("%8.2f %% %8zu %8.0f %8d %8zu %8zu %10.0f\n", share * 100, kept, (best + least) / 8,
           COUNT / 8, kept + blocks, varint, kept == COUNT ? 0.0 : entropy * COUNT / 8);
}

static void print_size(const char *name, fl_update_encoding e, double share, int runs) {
    fl_update u;
    const uint32_t keep = (uint32_t)(share * COUNT);
    const size_t size = encode(e, keep, &u);
    double error = 0, all = 0;
    fl_update_fixed(&u, 0, COUNT, back);
    for (uint32_t i = 0; i < COUNT; i++) {
        const double d = (double)(values[i] - back[i]), v = (double)values[i];
        error += d * d, all += v * v;
    }
    const double start = fl_clock_s();
    for (int i = 0; i < runs; i++) encode(e, keep, &u);
    const double middle = fl_clock_s();
    for (int i = 0; i < runs; i++) fl_update_fixed(&u, 0, COUNT, back);
    const double end = fl_clock_s();
    printf("%-8s %7.2f %% %8zu %8zu %7.1f %8.1f %% %9.0f %9.0f\n", name, share * 100, size,
           fl_update_size_about(COUNT, e, keep), COUNT * 4.0 / (double)size, 100 * error / all,
           (middle - start) / runs * 1e6, (end - middle) / runs * 1e6);
}

int main(int argc, char **argv) {
    const bool smoke = argc > 1 && strcmp(argv[1], "--smoke") == 0;
    static const double shares[] = {0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0};
    const int runs = smoke ? 1 : 50;
    if (!load(argc > 1 && !smoke ? argv[1] : NULL)) return 1;
    printf("positions, bytes of %d values\n", COUNT);
    printf("      keep    named     Rice   bitmap    bytes   varint    entropy\n");
    for (size_t i = 0; i < FL_COUNT(shares); i++) print_positions(shares[i]);
    printf("\nencoding    keep      size  planned   x f32    left out   write us   read us\n");
    print_size("int16", FL_UPDATE_INT16, 1, runs);
    print_size("int8", FL_UPDATE_INT8, 1, runs);
    print_size("int4", FL_UPDATE_INT4, 1, runs);
    for (size_t i = 0; i < FL_COUNT(shares); i++)
        print_size("sparse8", FL_UPDATE_SPARSE8, shares[i], runs);
    for (size_t i = 0; i < FL_COUNT(shares); i++)
        print_size("sparse4", FL_UPDATE_SPARSE4, shares[i], runs);
    return 0;
}
