#include "coordinator/robust_tile.h"

#include <stdlib.h>
#include <string.h>

enum { LANES = 8, RUN = 16 };

static double lanes_sum(const double s[LANES]) {
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

double coord_tile_dot(const double *x, const double *y, size_t n) {
    double s[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t k = 0; k < LANES; k++) s[k] += x[i + k] * y[i + k];
    for (size_t k = 0; i < n; i++, k++) s[k] += x[i] * y[i];
    return lanes_sum(s);
}

double coord_tile_distance2(const double *x, const double *y, size_t n) {
    double s[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (size_t k = 0; k < LANES; k++) {
            const double d = x[i + k] - y[i + k];
            s[k] += d * d;
        }
    }
    for (size_t k = 0; i < n; i++, k++) s[k] += (x[i] - y[i]) * (x[i] - y[i]);
    return lanes_sum(s);
}

static void insertion_sort(coord_pair *p, uint32_t n) {
    for (uint32_t i = 1; i < n; i++) {
        const coord_pair moved = p[i];
        uint32_t k = i;
        for (; k > 0 && p[k - 1].value > moved.value; k--) p[k] = p[k - 1];
        p[k] = moved;
    }
}

// Runs sorted by insertion, then merged bottom-up: stable, and no worse than m log m on input that
// an attacker ordered.
void coord_pairs_sort(coord_pair *pairs, coord_pair *scratch, uint32_t m) {
    for (uint32_t i = 0; i < m; i += RUN) insertion_sort(pairs + i, m - i < RUN ? m - i : RUN);
    for (uint32_t width = RUN; width < m; width *= 2) {
        for (uint32_t from = 0; from < m; from += 2 * width) {
            const uint32_t middle = from + width < m ? from + width : m;
            const uint32_t end = from + 2 * width < m ? from + 2 * width : m;
            uint32_t a = from, b = middle, out = from;
            while (a < middle && b < end)
                scratch[out++] = pairs[b].value < pairs[a].value ? pairs[b++] : pairs[a++];
            while (a < middle) scratch[out++] = pairs[a++];
            while (b < end) scratch[out++] = pairs[b++];
        }
        memcpy(pairs, scratch, m * sizeof(*pairs));
    }
}

static void column(const double *x, const double *factor, uint32_t m, size_t i, coord_pair *p) {
    for (uint32_t k = 0; k < m; k++)
        p[k] = (coord_pair){.value = factor[k] * x[(size_t)k * COORD_TILE + i], .voice = k};
    coord_pairs_sort(p, p + m, m);
}

void coord_tile_median(const double *x, const double *factor, uint32_t m, size_t n,
                       coord_pair *pairs, double *kept, double *out) {
    const uint32_t low = (m - 1) / 2, high = m / 2;
    const uint32_t inner = m / 4; // the middle half counts as kept
    for (size_t i = 0; i < n; i++) {
        column(x, factor, m, i, pairs);
        out[i] = low == high ? pairs[low].value : (pairs[low].value + pairs[high].value) / 2.0;
        for (uint32_t k = inner; k < m - inner; k++) kept[pairs[k].voice] += 1.0;
    }
}

void coord_tile_trimmed(const double *x, const double *factor, const coord_voice *voices,
                        uint32_t m, uint32_t cut, size_t n, coord_pair *pairs, double *kept,
                        double *out) {
    for (size_t i = 0; i < n; i++) {
        double sum = 0.0, weights = 0.0;
        column(x, factor, m, i, pairs);
        for (uint32_t k = cut; k < m - cut; k++) {
            const double weight = (double)voices[pairs[k].voice].weight;
            sum += weight * pairs[k].value;
            weights += weight;
            kept[pairs[k].voice] += 1.0;
        }
        out[i] = sum / weights;
    }
}

void coord_tile_combine(const double *x, const double *factor, uint32_t m, size_t n, double *out) {
    for (size_t i = 0; i < n; i++) out[i] = 0.0;
    for (uint32_t k = 0; k < m; k++) {
        const double *row = x + (size_t)k * COORD_TILE;
        if (factor[k] == 0.0) continue;
        for (size_t i = 0; i < n; i++) out[i] += factor[k] * row[i];
    }
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double coord_lower_median(double *values, uint32_t n) {
    FL_ASSERT(n > 0);
    qsort(values, n, sizeof(*values), by_value);
    return values[(n - 1) / 2];
}
