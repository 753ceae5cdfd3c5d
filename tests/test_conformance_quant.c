// Goal: a row of every ggml type becomes exactly the floats that it stands for.
// Method: blocks and values made by an independent program (data/quant), compared bit for bit, for
// every variant, in runs of blocks and block by block, with buffers that end at a guard page. Types
// without such data (Q2_K, Q3_K, F16, BF16) are compared with their definition, spelt out weight by
// weight. The data's folder is given by FLEETUNE_DATA; without it the program ends with 77.
#include "kernels/dispatch.h"
#include "kernels/packed.h"
#include "tests/check.h"

static bool no_data;

static const char *data_dir(void) {
    const char *dir = getenv("FLEETUNE_DATA");
    return dir != NULL ? dir : FL_DATA;
}

// The file's bytes, to the end of a guarded buffer; NULL when there is none.
static uint8_t *load(const char *name, size_t *ret_size) {
    char path[512];
    snprintf(path, sizeof(path), "%s/quant/%s", data_dir(), name);
    FILE *f = fopen(path, "rb");
    if (f == NULL) return NULL;
    static uint8_t buffer[1 << 16];
    const size_t size = fread(buffer, 1, sizeof(buffer), f);
    fclose(f);
    uint8_t *p = t_guarded(size);
    memcpy(p, buffer, size);
    *ret_size = size;
    return p;
}

static bool same_bits(size_t n, const float *got, const float *want) {
    return memcmp(got, want, n * sizeof(*got)) == 0;
}

static void check_golden(const char *name, uint32_t id) {
    char file[64];
    size_t block_size = 0, value_size = 0;
    snprintf(file, sizeof(file), "%s.blk", name);
    uint8_t *blocks = load(file, &block_size);
    snprintf(file, sizeof(file), "%s.deq.f32", name);
    float *want = (float *)(void *)load(file, &value_size);
    T_NEED(blocks != NULL && want != NULL, "%s: data is there but this file is not", name);
    const size_t n = value_size / sizeof(float);
    size_t size = 0;
    T_CHECK(fl_ggml_row_size(id, n, &size) && size == block_size, "%s: %zu bytes", name, size);
    const fl_ggml_type *type = fl_ggml_type_find(id);
    float *got = t_guarded(value_size);
    const uint32_t cpu = fl_cpu_detect();
    for (const fl_ggml_variant *v = fl_ggml_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) {
            T_SKIP_PART("ggml %s: not on this CPU", v->tag);
            continue;
        }
        memset(got, 0xee, value_size);
        v->row_to_f32(id, blocks, n, got);
        T_CHECK(same_bits(n, got, want), "%s %s as one row", name, v->tag);
        memset(got, 0xee, value_size);
        const size_t step = type->block_elements;
        for (size_t i = 0; i < n / step; i++)
            v->row_to_f32(id, blocks + i * type->block_bytes, step, got + i * step);
        T_CHECK(same_bits(n, got, want), "%s %s block by block", name, v->tag);
    }
    t_guarded_free(got, value_size);
    t_guarded_free(want, value_size);
    t_guarded_free(blocks, block_size);
}

static void test_golden_blocks(void) {
    static const struct {
        const char *name;
        uint32_t id;
    } types[] = {{"q4_0", FL_GGML_Q4_0}, {"q4_1", FL_GGML_Q4_1}, {"q5_0", FL_GGML_Q5_0},
                 {"q5_1", FL_GGML_Q5_1}, {"q8_0", FL_GGML_Q8_0}, {"q4_K", FL_GGML_Q4_K},
                 {"q5_K", FL_GGML_Q5_K}, {"q6_K", FL_GGML_Q6_K}};
    size_t size;
    uint8_t *input = load("input.f32", &size);
    no_data = input == NULL;
    if (no_data) T_SKIP("no data in %s", data_dir());
    t_guarded_free(input, size);
    for (size_t i = 0; i < FL_COUNT(types); i++) check_golden(types[i].name, types[i].id);
}

static float half_bits(const uint8_t *p) {
    return fl_f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

// A block of random bytes whose halves are small finite numbers.
static void random_block(uint8_t *block, size_t size, size_t half_at, size_t halves) {
    for (size_t i = 0; i < size; i++) block[i] = (uint8_t)t_rand();
    for (size_t i = 0; i < halves; i++) {
        const uint16_t h = fl_f16_from_f32(t_randf() * 0.01f);
        block[half_at + 2 * i] = (uint8_t)h;
        block[half_at + 2 * i + 1] = (uint8_t)(h >> 8);
    }
}

// Q2_K walked in the order in which the format was published: halves of 128, four shifts, two runs
// of 16; an order unlike that of the code under test.
static void test_q2_k(void) {
    uint8_t *block = t_guarded(84);
    float want[256], *got = t_guarded(sizeof(want));
    for (int round = 0; round < 50; round++) {
        random_block(block, 84, 80, 2);
        const float d = half_bits(block + 80), dmin = half_bits(block + 82);
        const uint8_t *q = block + 16, *scale = block;
        float *y = want;
        for (int half = 0; half < 2; half++, q += 32) {
            for (int shift = 0; shift < 8; shift += 2) {
                for (int run = 0; run < 2; run++, scale++) {
                    const float dl = d * (float)(*scale & 15), ml = dmin * (float)(*scale >> 4);
                    for (int l = 0; l < 16; l++)
                        *y++ = dl * (float)(q[16 * run + l] >> shift & 3) - ml;
                }
            }
        }
        fl_ggml_row_to_f32(FL_GGML_Q2_K, block, 256, got);
        T_CHECK(same_bits(256, got, want), "round %d", round);
    }
    t_guarded_free(got, sizeof(want));
    t_guarded_free(block, 84);
}

static void test_q3_k(void) {
    uint8_t *block = t_guarded(110);
    float want[256], *got = t_guarded(sizeof(want));
    for (int round = 0; round < 50; round++) {
        random_block(block, 110, 108, 1);
        const float d = half_bits(block + 108);
        int scale[16];
        for (int s = 0; s < 4; s++) { // twelve bytes to sixteen 6-bit numbers, four at a time
            const int a = block[96 + s], b = block[100 + s], c = block[104 + s];
            scale[s] = (a & 15) | (c & 3) << 4;
            scale[s + 4] = (b & 15) | (c >> 2 & 3) << 4;
            scale[s + 8] = a >> 4 | (c >> 4 & 3) << 4;
            scale[s + 12] = b >> 4 | (c >> 6 & 3) << 4;
        }
        const uint8_t *q = block + 32;
        float *y = want;
        int mask = 1, s = 0;
        for (int half = 0; half < 2; half++, q += 32) {
            for (int shift = 0; shift < 8; shift += 2, mask <<= 1) {
                for (int run = 0; run < 2; run++, s++) {
                    const float dl = d * (float)(scale[s] - 32);
                    for (int l = 16 * run; l < 16 * run + 16; l++)
                        *y++ = dl * (float)((q[l] >> shift & 3) - (block[l] & mask ? 0 : 4));
                }
            }
        }
        fl_ggml_row_to_f32(FL_GGML_Q3_K, block, 256, got);
        T_CHECK(same_bits(256, got, want), "round %d", round);
    }
    t_guarded_free(got, sizeof(want));
    t_guarded_free(block, 110);
}

static void test_plain_types(void) {
    const float values[] = {0.0f, -0.0f, 1.0f, -2.5f, 65504.0f, 0x1p-24f, -0x1.ff8p-15f};
    const uint16_t halves[] = {0, 0x8000, 0x3c00, 0xc100, 0x7bff, 1, 0x83ff};
    float got[FL_COUNT(values)];
    fl_ggml_row_to_f32(FL_GGML_F16, (const uint8_t *)halves, FL_COUNT(values), got);
    T_CHECK(same_bits(FL_COUNT(values), got, values), "F16 %g %g %g", (double)got[3],
            (double)got[5], (double)got[6]);
    uint8_t bytes[sizeof(values) + 1];
    memcpy(bytes + 1, values, sizeof(values)); // no alignment is asked for
    fl_ggml_row_to_f32(FL_GGML_F32, bytes + 1, FL_COUNT(values), got);
    T_CHECK(same_bits(FL_COUNT(values), got, values), "F32");
    const uint16_t brain[] = {0x3f80, 0xc020, 0x7f80, 0x0001};
    fl_ggml_row_to_f32(FL_GGML_BF16, (const uint8_t *)brain, 4, got);
    T_CHECK(got[0] == 1.0f && got[1] == -2.5f && isinf(got[2]) && got[3] == 0x1p-133f, "BF16");
}

static void test_sizes_are_refused(void) {
    size_t size = 7;
    T_CHECK(!fl_ggml_row_size(4, 32, &size), "an unknown id");
    T_CHECK(!fl_ggml_row_size(UINT32_MAX, 32, &size), "an unknown id");
    T_CHECK(!fl_ggml_row_size(FL_GGML_Q4_0, 33, &size), "not whole blocks");
    T_CHECK(!fl_ggml_row_size(FL_GGML_Q6_K, 128, &size), "not whole blocks");
    T_CHECK(!fl_ggml_row_size(FL_GGML_F32, SIZE_MAX / 4 + 1, &size), "overflow");
    T_EQ(size, 7);
    T_CHECK(fl_ggml_row_size(FL_GGML_Q4_1, 576, &size) && size == 360, "size %zu", size);
    T_CHECK(fl_ggml_row_size(FL_GGML_Q4_1, 0, &size) && size == 0, "an empty row");
    for (const fl_ggml_type *t = fl_ggml_types; t->name != NULL; t++)
        T_CHECK(fl_ggml_type_find(t->id) == t, "%s", t->name);
}

// Every variant against the definition on many random rows of every type.
static void test_variants_agree(void) {
    const uint32_t cpu = fl_cpu_detect();
    static float want[1024];
    for (const fl_ggml_variant *v = fl_ggml_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        for (const fl_ggml_type *t = fl_ggml_types; t->name != NULL; t++) {
            for (size_t blocks = 0; blocks <= 1024 / t->block_elements && blocks < 40; blocks++) {
                const size_t n = blocks * t->block_elements, size = blocks * t->block_bytes;
                uint8_t *src = t_guarded(size);
                float *got = t_guarded(n * sizeof(float));
                for (size_t i = 0; i < size; i++) src[i] = (uint8_t)(t_rand() & 0xb7); // no NaN
                fl_ggml_row_to_f32_ref(t->id, src, n, want);
                v->row_to_f32(t->id, src, n, got);
                T_CHECK(same_bits(n, got, want), "%s %s, %zu blocks", v->tag, t->name, blocks);
                t_guarded_free(got, n * sizeof(float));
                t_guarded_free(src, size);
            }
        }
    }
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"golden_blocks", test_golden_blocks},
                                   {"q2_k", test_q2_k},
                                   {"q3_k", test_q3_k},
                                   {"plain_types", test_plain_types},
                                   {"sizes_are_refused", test_sizes_are_refused},
                                   {"variants_agree", test_variants_agree}};
    const int status = t_main(argc, argv, cases, FL_COUNT(cases));
    return status == 0 && no_data ? 77 : status; // ctest shows 77 as skipped
}
