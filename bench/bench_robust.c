// The robust rules: how fast they are (15 updates of a layer of 576 wide at rank 8), and with
// --study what each makes of 3 attackers among 15 nodes, from which the default was chosen.
#include "bench/robust_fleet.h"
#include "common/clock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COUNT = 41472 + 576, SEEDS = 2 };

static fl_status read_row(void *ctx, uint32_t v, size_t first, size_t n, int64_t *out,
                          fl_err *err) {
    const int64_t *x = ctx;
    (void)err;
    memcpy(out, x + (size_t)v * COUNT + first, n * sizeof(*out));
    return FL_OK;
}

static int speed(int repeats) {
    int64_t *x = malloc((size_t)FLEET_NODES * COUNT * sizeof(*x));
    double *mean = malloc(COUNT * sizeof(*mean));
    coord_voice voices[FLEET_NODES];
    coord_opinion opinions[FLEET_NODES];
    coord_robust_result r;
    if (x == NULL || mean == NULL) return 1;
    for (size_t i = 0; i < (size_t)FLEET_NODES * COUNT; i++)
        x[i] = (int64_t)(i * 0x9e3779b97f4a7c15u >> 30) - ((int64_t)1 << 33);
    for (int v = 0; v < FLEET_NODES; v++) voices[v].weight = 65536000;
    for (int rule = 0; rule < COORD_RULE_COUNT; rule++) {
        const coord_robust_opts opts = {.rule = (coord_rule)rule,
                                        .byzantine = 0.2,
                                        .clip = 1,
                                        .iterations = 3,
                                        .root = rule == COORD_RULE_FLTRUST ? 0 : COORD_NO_ROOT,
                                        .unit = 0x1p-32};
        const double began = fl_clock_s();
        for (int k = 0; k < repeats; k++) {
            memset(mean, 0, COUNT * sizeof(*mean));
            if (coord_robust_run(&opts, voices, FLEET_NODES, COUNT, read_row, x, mean, opinions, &r,
                                 NULL) != FL_OK)
                return 1;
        }
        const double s = (fl_clock_s() - began) / repeats;
        printf("%-13s %d updates of %d values: %7.2f ms, %6.1f Mvalues/s; check %.9g\n",
               coord_rule_text((coord_rule)rule), FLEET_NODES, COUNT, s * 1e3,
               FLEET_NODES * COUNT / s * 1e-6, mean[0]);
    }
    free(x);
    free(mean);
    return 0;
}

static const char *const attacks[FLEET_ATTACK_COUNT] = {
#define X(name, text) text,
    FLEET_ATTACK_LIST(X)
#undef X
};

// Mean over the seeds; how often good nodes were put away in *ret_wrong.
static double average(fleet_run run, uint32_t ret_put_away[2]) {
    double sum = 0.0;
    ret_put_away[0] = ret_put_away[1] = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        uint32_t q[2];
        run.seed = seed;
        sum += fleet_loss(&run, q);
        ret_put_away[0] += q[0];
        ret_put_away[1] += q[1];
    }
    return sum / SEEDS;
}

static void study(double sparse, double skew, uint32_t rounds) {
    static const struct {
        coord_rule rule;
        double clip;
        bool filter;
    } rows[] = {
        {COORD_RULE_CENTRED, 0, true},  {COORD_RULE_CENTRED, 0, false},
        {COORD_RULE_CLIPPED, 1, false}, {COORD_RULE_CLIPPED, 1, true},
        {COORD_RULE_MEDIAN, 1, false},  {COORD_RULE_TRIMMED, 1, false},
        {COORD_RULE_KRUM, 1, false},    {COORD_RULE_MULTI_KRUM, 1, false},
        {COORD_RULE_FLTRUST, 0, false},
    };
    const fleet_run plain = {.opts = {.rule = COORD_RULE_MEAN, .root = COORD_NO_ROOT},
                             .sparse = sparse,
                             .skew = skew,
                             .rounds = rounds};
    uint32_t away[2];
    const double clean = average(plain, away);
    printf("\n%u rounds, %.0f %% of the values travel, %.0f %% of a node's text is its own kind: "
           "clean %.4f nats\n%-31s",
           rounds, sparse * 100, skew * 100, clean, "loss above the clean run, %");
    for (int a = 0; a < FLEET_ATTACK_COUNT; a++) printf(" %9s", attacks[a]);
    printf("   put away: bad, good\n");
    for (int k = -1; k < (int)FL_COUNT(rows); k++) {
        fleet_run run = plain;
        uint32_t bad = 0, good = 0;
        if (k >= 0) {
            run.opts =
                (coord_robust_opts){.rule = rows[k].rule,
                                    .byzantine = 0.2,
                                    .clip = rows[k].clip,
                                    .filter = rows[k].filter,
                                    .iterations = 3,
                                    .root = rows[k].rule == COORD_RULE_FLTRUST ? 0 : COORD_NO_ROOT};
            run.gated = run.quarantine = true;
        }
        printf("%-13s clip %.1f %-10s ", k < 0 ? "undefended" : coord_rule_text(run.opts.rule),
               run.opts.clip, run.opts.filter ? "filter" : "");
        for (int a = 0; a < FLEET_ATTACK_COUNT; a++) {
            run.attack = (fleet_attack)a;
            printf(" %9.2f", (average(run, away) / clean - 1) * 100);
            bad += away[0];
            good += away[1];
        }
        printf("   %u, %u\n", bad, good);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    const bool smoke = argc > 1 && strcmp(argv[1], "--smoke") == 0;
    if (argc > 1 && strcmp(argv[1], "--study") == 0) {
        study(0.05, 0.3, 40);
        study(1, 0.3, 40);
        study(1, 0.8, 40);
        return 0;
    }
    return speed(smoke ? 1 : 20);
}
