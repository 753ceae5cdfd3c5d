#include "kernels/softmax_xent.h"

#include <math.h>

void fl_lse_init(size_t tokens, fl_lse *state) {
    for (size_t t = 0; t < tokens; t++) state[t] = (fl_lse){-INFINITY, 0.0};
}

float fl_lse_value(const fl_lse *state) {
    if (state->sum == 0.0) return -INFINITY;
    return (float)(state->max + log(state->sum));
}

void fl_xent_pick(size_t tokens, size_t n, size_t first, const float *logits, size_t ld,
                  const int32_t *target, float *picked) {
    for (size_t t = 0; t < tokens; t++) {
        if (target[t] < 0) continue;
        const size_t id = (size_t)target[t];
        if (id >= first && id - first < n) picked[t] = logits[t * ld + (id - first)];
    }
}

FL_XENT_UPDATE(ref) {
    for (size_t t = 0; t < tokens; t++, logits += ld) {
        float max = -INFINITY;
        for (size_t j = 0; j < n; j++) max = fmaxf(max, scale * logits[j]);
        double sum = 0.0;
        for (size_t j = 0; j < n; j++) {
            const float l = scale * logits[j];
            if (l != -INFINITY) sum += (double)expf(l - max);
        }
        if (sum == 0.0) continue; // every logit of this chunk is -INFINITY
        fl_lse *s = &state[t];
        if ((double)max > s->max) {
            s->sum = s->sum * exp(s->max - (double)max) + sum;
            s->max = (double)max;
        } else {
            s->sum += sum * exp((double)max - s->max);
        }
    }
}

FL_XENT_GRAD(ref) {
    for (size_t t = 0; t < tokens; t++, logits += ld, dlogits += ldd) {
        const size_t hit = target[t] < 0 ? SIZE_MAX : (size_t)target[t] - first; // may wrap: no hit
        for (size_t j = 0; j < n; j++) {
            float p = expf(logits[j] - lse[t]);
            if (p < least && j != hit)
                p = fl_xent_chance(draw[t], first + j) * least < p ? least : 0.0f;
            dlogits[j] = weight[t] == 0.0f ? 0.0f : (p - (j == hit ? 1.0f : 0.0f)) * weight[t];
        }
    }
}
