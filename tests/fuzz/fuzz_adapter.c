// Property: any bytes that decode as an adapter encode back to exactly those bytes; and refused
// bytes leave the model's exits alone. So that damage behind the checksum is reached too, the last
// four bytes are made right first, unless the input's first byte is a zero.
#include "node/tune/adapter.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { LAYERS = 3, HIDDEN = 4, FFN = 6, HEADS = 2, HEAD_SIZE = 2, VOCABULARY = 8 };

static node_model *model_of_zeros(void) {
    static const float zeros[64];
    static node_model m;
    if (m.layers != 0) return &m;
    m.layers = LAYERS, m.hidden = HIDDEN, m.ffn = FFN, m.heads = HEADS, m.kv_heads = 1;
    m.head_size = HEAD_SIZE, m.vocabulary = VOCABULARY, m.final_norm = zeros;
    static const uint32_t rows[NODE_MODULES] = {4, 2, 2, 4, 6, 6, 4};
    static const uint32_t cols[NODE_MODULES] = {4, 4, 4, 4, 4, 4, 6};
    for (int l = 0; l < LAYERS; l++) {
        m.layer[l].attn_norm = m.layer[l].ffn_norm = zeros;
        for (int i = 0; i < NODE_MODULES; i++)
            m.layer[l].linear[i] = (node_matrix){
                .rows = rows[i], .cols = cols[i], .data = (const uint8_t *)zeros, .size = 64};
    }
    m.head = (node_matrix){
        .rows = VOCABULARY, .cols = HIDDEN, .data = (const uint8_t *)zeros, .size = 64};
    node_model_set_exits(&m, 2);
    return &m;
}

static uint32_t crc32_of(const uint8_t *p, size_t size) {
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xedb88320u : 0);
    }
    return ~crc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    node_model *m = model_of_zeros();
    node_adapter *a = NULL;
    uint8_t *bytes = malloc(size + 1);
    if (bytes == NULL) return 0;
    if (size > 0) memcpy(bytes, data, size);
    node_model_set_exits(m, 2);
    if (size >= 4 && data[0] != 0) {
        const uint32_t crc = crc32_of(bytes, size - 4);
        for (int i = 0; i < 4; i++) bytes[size - 4 + (size_t)i] = (uint8_t)(crc >> 8 * i);
    }
    if (node_adapter_decode((fl_bytes){bytes, size}, m, true, &a, NULL) == FL_OK) {
        FL_ASSERT(node_adapter_file_size(a) == size);
        uint8_t *again = malloc(size);
        if (again != NULL) {
            node_adapter_encode(a, again);
            FL_ASSERT(memcmp(again, bytes, size) == 0);
        }
        free(again);
    } else {
        FL_ASSERT(a == NULL && m->exits == 2);
    }
    node_adapter_close(a);
    free(bytes);
    return 0;
}
