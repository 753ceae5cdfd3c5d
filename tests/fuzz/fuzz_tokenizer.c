// Input: a control byte, then a vocabulary and a text. Token lines end with '\n'; an empty line
// ends the vocabulary; what follows is the text. A line whose first byte is below 8 has that type;
// a line that begins with '+' is a merge. The control byte chooses family, pre-tokenizer and flags.
// Property: no crash; ids exist and are not more than promised; with a byte-complete vocabulary
// (control bit 7) BPE decodes to exactly the text, valid UTF-8 or not.
#include "node/model/tokenizer.h"
#include "node/model/unicode.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 1024, TEXT_MAX = 1 << 16 };

typedef struct input {
    fl_bytes token[TOKENS_MAX], merge[TOKENS_MAX];
    float score[TOKENS_MAX];
    int32_t type[TOKENS_MAX];
    uint32_t count, merges;
    uint8_t alphabet[256][2];
} input;

static void add(input *in, fl_bytes text, int32_t type) {
    if (in->count == TOKENS_MAX) return;
    in->score[in->count] = -(float)(text.size % 7);
    in->type[in->count] = type;
    in->token[in->count++] = text;
}

static void add_bytes(input *in) {
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
        const bool prints = (b > 32 && b < 127) || (b > 160 && b != 173);
        const size_t size = node_utf8_put(prints ? b : next++, in->alphabet[b]);
        add(in, (fl_bytes){in->alphabet[b], size}, NODE_TOKEN_NORMAL);
    }
}

// Returns where the text begins.
static size_t read_lines(input *in, const uint8_t *data, size_t size, size_t at) {
    while (at < size) {
        const uint8_t *end = memchr(data + at, '\n', size - at);
        const size_t stop = end == NULL ? size : (size_t)(end - data);
        fl_bytes line = {data + at, stop - at};
        at = stop + (end != NULL);
        if (line.size == 0) break;
        const uint8_t first = line.data[0];
        if (first < 8 || first == '+') line = (fl_bytes){line.data + 1, line.size - 1};
        if (first == '+' && in->merges < TOKENS_MAX)
            in->merge[in->merges++] = line;
        else
            add(in, line, first < 8 ? first : NODE_TOKEN_NORMAL);
    }
    return at;
}

static void check_text(const node_tokenizer *t, fl_bytes text, unsigned flags, bool round_trip) {
    static int32_t ids[2 * TEXT_MAX + 3];
    static uint8_t out[TEXT_MAX];
    size_t count = 0, size = 0;
    const size_t ids_max = node_tokenizer_ids_max(text.size);
    FL_ASSERT(node_tokenizer_encode(t, text, flags, ids, ids_max, &count, NULL) == FL_OK);
    for (size_t i = 0; i < count; i++)
        FL_ASSERT(ids[i] >= 0 && (uint32_t)ids[i] < node_tokenizer_count(t));
    if (!round_trip) return;
    FL_ASSERT(node_tokenizer_decode(t, ids, count, true, out, sizeof(out), &size, NULL) == FL_OK);
    FL_ASSERT(size == text.size && memcmp(out, text.data, size) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const pre[] = {"gpt-2", "smollm", "llama-bpe", "qwen2"};
    if (size == 0) return 0;
    input *in = calloc(1, sizeof(*in));
    if (in == NULL) return 0;
    const uint8_t control = data[0];
    if (control & 0x80) add_bytes(in);
    const size_t at = read_lines(in, data, size, 1);
    const bool sentencepiece = control & 4;
    const node_vocabulary v = {.model = sentencepiece ? "llama" : "gpt2",
                               .pre = pre[control & 3],
                               .count = in->count,
                               .token = in->token,
                               .score = in->score,
                               .type = in->type,
                               .merge_count = in->merges,
                               .merge = in->merge,
                               .bos = (control & 8) != 0 ? 0 : -1,
                               .eos = -1,
                               .unknown = (control & 16) != 0 ? 0 : -1,
                               .add_bos = true,
                               .add_space_prefix = (control & 32) != 0};
    node_tokenizer *t = NULL;
    fl_bytes text = {data + at, size - at < TEXT_MAX ? size - at : TEXT_MAX};
    if (node_tokenizer_open(&v, &t, NULL) == FL_OK) {
        const unsigned flags = control & 64 ? NODE_ENCODE_SPECIAL : NODE_ENCODE_ENDS;
        const bool complete = (control & 0x80) && !sentencepiece && !(control & 8);
        check_text(t, text, flags, complete);
        node_tokenizer_close(t);
    }
    free(in);
    return 0;
}
