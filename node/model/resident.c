#include "node/model/resident.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/fault.h"
#include "kernels/ggml.h"
#include "kernels/packed.h"

#ifndef MADV_POPULATE_READ // Linux 5.14; older headers
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_PAGEOUT // Linux 5.4
#define MADV_PAGEOUT 21
#endif

enum {
    PAGE = 4096,       // larger pages only make ranges larger
    AROUND = 64 << 10, // what the system maps around a page that is touched
    PIECE = 1 << 20,   // read at a time, so that the reader can be stopped
    SLICE = 1 << 21,   // of the head
    SLICES_MAX = 512,  // a larger head has larger slices
    PARTS_MAX = NODE_LAYERS_MAX + SLICES_MAX,
    RANGES_MAX = NODE_LAYERS_MAX * (NODE_MODULES + 5) + SLICES_MAX,
    ORDER_MAX = 2 * NODE_LAYERS_MAX + SLICES_MAX,
};

// Bytes [begin, end) of the file, whole pages.
typedef struct range {
    size_t begin, end;
} range;

enum { ABSENT, LOADING, PRESENT };

typedef struct part {
    uint32_t first, count; // its ranges
    size_t size;
    bool fixed, wanted;
    int state;
} part;

// Which bytes each part is: layers, then slices of the head.
typedef struct layout {
    const uint8_t *base;
    range range[RANGES_MAX];
    part part[PARTS_MAX];
    uint32_t ranges, layers, slices; // parts: layers, then slices
    size_t slice_size;
} layout;

typedef struct node_resident {
    layout at;
    node_resident_plan plan;
    bool forget;
    uint32_t order[ORDER_MAX];
    uint32_t count, pos; // of the order; where the caller is
    uint32_t low, high;  // parts that the caller uses now
    node_resident_stats stats;
    bool reading; // there is a reader
    bool stop;
    pthread_t reader;
    pthread_mutex_t lock; // guards everything but the layout's bytes
    pthread_cond_t work, done;
} node_resident;

// ---- layout

static int compare(const void *a, const void *b) {
    const range *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

static void add_bytes(layout *l, const void *data, size_t size) {
    if (data == NULL || size == 0) return;
    const size_t begin = (uintptr_t)data - (uintptr_t)l->base;
    l->range[l->ranges++] = (range){begin / PAGE * PAGE, (begin + size + PAGE - 1) / PAGE * PAGE};
}

// The ranges from `first` on become one part; neighbours are joined.
static void add_part(layout *l, part *p, uint32_t first) {
    uint32_t last = first;
    qsort(l->range + first, l->ranges - first, sizeof(range), compare);
    for (uint32_t i = first + 1; i < l->ranges; i++) {
        if (l->range[i].begin > l->range[last].end + AROUND)
            l->range[++last] = l->range[i];
        else if (l->range[i].end > l->range[last].end)
            l->range[last].end = l->range[i].end;
    }
    l->ranges = last + 1;
    *p = (part){.first = first, .count = l->ranges - first};
    for (uint32_t i = first; i < l->ranges; i++) p->size += l->range[i].end - l->range[i].begin;
}

static void add_layer(layout *l, const node_model *m, uint32_t layer) {
    const node_layer *y = &m->layer[layer];
    const uint32_t first = l->ranges;
    for (int i = 0; i < NODE_MODULES; i++) add_bytes(l, y->linear[i].data, y->linear[i].size);
    for (int i = 0; i < 3; i++) add_bytes(l, y->bias[i], y->linear[i].rows * sizeof(float));
    add_bytes(l, y->attn_norm, m->hidden * sizeof(float));
    add_bytes(l, y->ffn_norm, m->hidden * sizeof(float));
    add_part(l, &l->part[layer], first);
}

static void make_layout(layout *l, const node_model *m, uint32_t layers) {
    l->base = m->file != NULL ? node_gguf_bytes(m->file).data : NULL;
    l->ranges = 0;
    l->layers = layers;
    for (uint32_t i = 0; i < layers; i++) add_layer(l, m, i);
    const size_t even = (m->head.size / SLICES_MAX / PAGE + 1) * PAGE;
    l->slice_size = even > SLICE ? even : SLICE;
    l->slices = (uint32_t)((m->head.size + l->slice_size - 1) / l->slice_size);
    for (uint32_t i = 0; i < l->slices; i++) {
        const size_t at = i * l->slice_size, left = m->head.size - at;
        const uint32_t first = l->ranges;
        add_bytes(l, m->head.data + at, left < l->slice_size ? left : l->slice_size);
        add_part(l, &l->part[layers + i], first);
    }
}

// Slices that hold rows of the head.
static void slices_of(const layout *l, const node_matrix *head, uint32_t row_begin,
                      uint32_t row_end, uint32_t *low, uint32_t *high) {
    // Packed rows lie in panels of 16, ggml's each for itself: the same share of the bytes.
    const size_t panels = ((size_t)head->rows + 15) / 16;
    const size_t panel =
        head->type == NODE_TYPE_PACKED ? head->size / panels : head->size / head->rows * 16;
    const size_t begin = row_begin / 16 * panel, end = ((size_t)row_end + 15) / 16 * panel;
    *low = l->layers + (uint32_t)(begin / l->slice_size);
    *high = l->layers + (uint32_t)(((end < head->size ? end : head->size) - 1) / l->slice_size);
}

// ---- plan

// Most bytes of a chunk's slices.
static size_t chunk_bytes(const layout *l, const node_model *m, uint32_t rows) {
    size_t most = 0;
    for (uint32_t row = 0; row < m->head.rows; row += rows) {
        uint32_t low, high;
        size_t size = 0;
        slices_of(l, &m->head, row, m->head.rows - row < rows ? m->head.rows : row + rows, &low,
                  &high);
        for (uint32_t i = low; i <= high; i++) size += l->part[i].size;
        if (size > most) most = size;
    }
    return most;
}

// Parts that stay, the most used first, until `room` is spent: layers of the window, the head,
// other layers. Returns what they take.
static size_t fix_parts(layout *l, const node_resident_use *use, size_t room) {
    const uint32_t window = use->layers - use->window, parts = l->layers + l->slices;
    const uint32_t order[3][2] = {{window, l->layers}, {l->layers, parts}, {0, window}};
    size_t taken = 0;
    for (int n = 0; n < 3; n++) {
        for (uint32_t i = order[n][0]; i < order[n][1]; i++) {
            l->part[i].fixed = l->part[i].size <= room - taken;
            if (l->part[i].fixed) taken += l->part[i].size;
        }
    }
    return taken;
}

static void stream_plan(layout *l, size_t largest, node_resident_plan *ret) {
    // Twice the largest part: one computes while the next is read.
    ret->ring = 2 * largest > ret->limit ? ret->limit : 2 * largest;
    ret->fixed = fix_parts(l, &ret->use, ret->limit - ret->ring);
    ret->bytes = ret->fixed + ret->ring;
    for (uint32_t i = 0; i < l->layers + l->slices; i++) {
        const bool twice = i >= ret->use.layers - ret->use.window && i < ret->use.layers;
        if (l->part[i].fixed) continue;
        ret->streamed += l->part[i].size * (twice ? 2 : 1);
        ret->layers_streamed += i < l->layers;
        ret->head_streamed = ret->head_streamed || i >= l->layers;
    }
}

// Fills `l` too, with the parts that stay.
static bool plan_with(layout *l, const node_model *m, const node_resident_use *use, uint64_t limit,
                      node_resident_plan *ret) {
    FL_ASSERT(use->layers <= m->layers && use->window <= use->layers && use->head_rows > 0);
    make_layout(l, m, use->layers);
    *ret = (node_resident_plan){.use = *use, .limit = limit};
    size_t whole = 0, largest = chunk_bytes(l, m, use->head_rows);
    for (uint32_t i = 0; i < l->layers + l->slices; i++) {
        whole += l->part[i].size;
        if (l->part[i].size > largest) largest = l->part[i].size;
    }
    ret->least = largest < whole ? largest : whole;
    if (limit == 0 || whole <= limit) {
        for (uint32_t i = 0; i < l->layers + l->slices; i++) l->part[i].fixed = true;
        ret->fixed = ret->bytes = whole;
        return true;
    }
    if (limit < ret->least) return false;
    stream_plan(l, largest, ret);
    return true;
}

bool node_resident_make_plan(const node_model *model, const node_resident_use *use, uint64_t limit,
                             node_resident_plan *ret) {
    layout *l = malloc(sizeof(*l));
    if (l == NULL) return false;
    const bool fits = plan_with(l, model, use, limit, ret);
    free(l);
    return fits;
}

// ---- pages

static void advise(const layout *l, range r, int advice) {
    // Advice that this system does not know changes nothing but the speed.
    (void)madvise((void *)(uintptr_t)(l->base + r.begin), r.end - r.begin, advice);
}

static void let_go(const layout *l, const part *p, bool forget) {
    for (uint32_t i = p->first; i < p->first + p->count; i++) {
        if (forget) advise(l, l->range[i], MADV_PAGEOUT);
        advise(l, l->range[i], MADV_DONTNEED);
    }
}

static void touch(const uint8_t *begin, const uint8_t *end) {
    for (const volatile uint8_t *p = begin; p < end; p += PAGE) (void)*p;
}

// Without the lock. `stop` is looked at between pieces.
static void load(const layout *l, const part *p, const bool *stop) {
    for (uint32_t i = p->first; i < p->first + p->count; i++) {
        const range r = l->range[i];
        advise(l, r, MADV_WILLNEED);
        for (size_t at = r.begin; at < r.end; at += PIECE) {
            const size_t size = r.end - at < PIECE ? r.end - at : PIECE;
            void *piece = (void *)(uintptr_t)(l->base + at);
            if (__atomic_load_n(stop, __ATOMIC_RELAXED)) return;
            if (madvise(piece, size, MADV_POPULATE_READ) != 0)
                touch(l->base + at, l->base + at + size);
        }
    }
}

void node_resident_drop(const node_model *model) {
    if (model->file == NULL || node_gguf_fd(model->file) < 0) return;
    const fl_bytes all = node_gguf_bytes(model->file);
    (void)madvise((void *)(uintptr_t)all.data, all.size, MADV_DONTNEED);
}

// A row that lies in no part that stays, through the file. False when it cannot be read so.
static bool read_row(const node_model *m, const node_matrix *w, uint32_t row, float *out) {
    enum { BUFFER = 16384 };
    _Alignas(64) uint8_t buffer[BUFFER];
    const bool packed = w->type == NODE_TYPE_PACKED;
    // Packed rows lie 16 together, in tiles of 64 columns; ggml's in blocks of their own.
    const fl_ggml_type *type = packed ? NULL : fl_ggml_type_find(w->type);
    const size_t unit = packed ? fl_packed_tile_size(w->bits) : type->block_bytes;
    const uint32_t unit_cols = packed ? FL_PACKED_GROUP : type->block_elements;
    const uint32_t cols_max = (uint32_t)(BUFFER / unit) * unit_cols;
    const size_t line = ((size_t)w->cols + unit_cols - 1) / unit_cols * unit;
    const uint8_t *from = w->data + (packed ? row / FL_PACKED_ROWS : row) * line;
    off_t at = (off_t)(from - node_gguf_bytes(m->file).data);
    for (uint32_t c = 0; c < w->cols; c += cols_max) {
        const uint32_t cols = w->cols - c < cols_max ? w->cols - c : cols_max;
        const size_t size = (cols + unit_cols - 1) / unit_cols * unit;
        if (pread(node_gguf_fd(m->file), buffer, size, at) != (ssize_t)size) return false;
        at += (off_t)size;
        const fl_packed tile = {buffer, FL_PACKED_ROWS, cols, w->bits};
        if (packed)
            fl_packed_row(&tile, row % FL_PACKED_ROWS, out + c);
        else
            fl_ggml_row_to_f32(w->type, buffer, cols, out + c);
    }
    return true;
}

// ---- the reader

// Marks what is wanted from here on: what is used now, then what comes, as far as the ring holds.
static void want(node_resident *r) {
    layout *l = &r->at;
    uint64_t taken = 0;
    for (uint32_t i = 0; i < l->layers + l->slices; i++) l->part[i].wanted = l->part[i].fixed;
    for (uint32_t i = r->low; i <= r->high; i++) {
        l->part[i].wanted = true;
        if (!l->part[i].fixed) taken += l->part[i].size;
    }
    for (uint32_t n = 0; n < r->count; n++) {
        part *p = &l->part[r->order[(r->pos + n) % r->count]];
        if (p->wanted) continue;
        if (taken + p->size > r->plan.ring) return;
        taken += p->size;
        p->wanted = true;
    }
}

static void release_unwanted(node_resident *r) {
    for (uint32_t i = 0; i < r->at.layers + r->at.slices; i++) {
        part *p = &r->at.part[i];
        if (p->wanted || p->state != PRESENT) continue;
        let_go(&r->at, p, r->forget);
        p->state = ABSENT;
    }
}

// The next part in the order that is wanted and absent; NULL when there is none.
static part *next_absent(node_resident *r) {
    for (uint32_t i = r->low; i <= r->high; i++)
        if (r->at.part[i].state == ABSENT) return &r->at.part[i];
    for (uint32_t n = 0; n < r->count; n++) {
        part *p = &r->at.part[r->order[(r->pos + n) % r->count]];
        if (p->wanted && p->state == ABSENT) return p;
    }
    return NULL;
}

static void *read_ahead(void *arg) {
    node_resident *r = arg;
    pthread_mutex_lock(&r->lock);
    while (!r->stop) {
        part *p = next_absent(r);
        if (p == NULL) {
            pthread_cond_wait(&r->work, &r->lock);
            continue;
        }
        p->state = LOADING;
        pthread_mutex_unlock(&r->lock);
        const double start = fl_clock_s();
        load(&r->at, p, &r->stop);
        const double end = fl_clock_s();
        pthread_mutex_lock(&r->lock);
        p->state = PRESENT;
        r->stats.streamed_bytes += p->size;
        r->stats.read_seconds += end - start;
        release_unwanted(r); // this one may be unwanted by now
        pthread_cond_broadcast(&r->done);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

static bool present(const node_resident *r) {
    for (uint32_t i = r->low; i <= r->high; i++)
        if (r->at.part[i].state != PRESENT) return false;
    return true;
}

// The caller goes on to parts low .. high.
static void enter(node_resident *r, uint32_t low, uint32_t high) {
    pthread_mutex_lock(&r->lock);
    for (uint32_t n = 0; n < r->count; n++) {
        if (r->order[(r->pos + n) % r->count] != low) continue;
        r->pos = (r->pos + n) % r->count;
        break;
    }
    r->low = low;
    r->high = high;
    want(r);
    release_unwanted(r);
    pthread_cond_signal(&r->work);
    if (!present(r)) {
        const double start = fl_clock_s();
        while (!present(r)) pthread_cond_wait(&r->done, &r->lock);
        r->stats.wait_seconds += fl_clock_s() - start;
    }
    pthread_mutex_unlock(&r->lock);
}

// ---- where weights are used

void node_resident_begin(const node_model *model, const node_resident_pass *pass) {
    node_resident *r = model->resident;
    if (r == NULL || !r->reading) return;
    pthread_mutex_lock(&r->lock);
    r->count = r->pos = 0;
    for (uint32_t l = pass->first; l <= pass->last && l < r->at.layers; l++)
        r->order[r->count++] = l;
    for (uint32_t h = 0; h < pass->heads; h++)
        for (uint32_t i = 0; i < r->at.slices && r->count < ORDER_MAX - NODE_LAYERS_MAX; i++)
            r->order[r->count++] = r->at.layers + i;
    for (uint32_t l = pass->last + 1; pass->back && l-- > pass->low;) r->order[r->count++] = l;
    r->low = 1; // nothing is used until the first layer
    r->high = 0;
    want(r);
    release_unwanted(r);
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->lock);
}

void node_resident_layer(const node_model *model, uint32_t layer) {
    node_resident *r = model->resident;
    if (r == NULL || !r->reading || layer >= r->at.layers) return;
    enter(r, layer, layer);
}

void node_resident_head(const node_model *model, uint32_t row_begin, uint32_t row_end) {
    node_resident *r = model->resident;
    if (r == NULL || !r->reading || row_begin >= row_end) return;
    uint32_t low, high;
    slices_of(&r->at, &model->head, row_begin, row_end, &low, &high);
    enter(r, low, high);
}

// Does the row stay with the head's fixed slices? Then the mapping will do.
static bool stays(const node_model *m, const node_matrix *w, uint32_t row) {
    const node_resident *r = m->resident;
    uint32_t low, high;
    if (r == NULL) return true;
    if (w->data != m->head.data) return false;
    slices_of(&r->at, &m->head, row, row + 1, &low, &high);
    return r->at.part[low].fixed && r->at.part[high].fixed;
}

void node_resident_row(const node_model *model, const node_matrix *w, uint32_t row, float *out) {
    FL_ASSERT(row < w->rows);
    if (stays(model, w, row) || !read_row(model, w, row, out)) node_matrix_row(w, row, out);
}

bool node_resident_head_passes(const node_model *model) {
    return model->resident != NULL && model->resident->plan.head_streamed;
}

void node_resident_read_stats(const node_model *model, node_resident_stats *ret) {
    node_resident *r = model->resident;
    *ret = (node_resident_stats){0};
    if (r == NULL) return;
    pthread_mutex_lock(&r->lock);
    *ret = r->stats;
    pthread_mutex_unlock(&r->lock);
}

// ---- open and close

fl_status node_resident_open(node_model *model, const node_resident_plan *plan, bool forget,
                             fl_err *err) {
    FL_ASSERT(node_gguf_fd(model->file) >= 0 && model->resident == NULL);
    node_resident *r = fl_fault() ? NULL : calloc(1, sizeof(*r));
    if (r == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to keep account of the weights");
    node_resident_plan again;
    FL_ASSERT(plan_with(&r->at, model, &plan->use, plan->limit, &again));
    r->plan = *plan;
    r->forget = forget;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->done, NULL);
    model->resident = r;
    if (plan->ring == 0) return FL_OK;
    // By the small page from here on, for a huge one comes and goes whole, with its neighbours; and
    // those that the system's cache holds are mapped whole whatever is advised.
    const fl_bytes all = node_gguf_bytes(model->file);
    (void)madvise((void *)(uintptr_t)all.data, all.size, MADV_NOHUGEPAGE);
    node_resident_drop(model);
    (void)posix_fadvise(node_gguf_fd(model->file), 0, 0, POSIX_FADV_DONTNEED);
    r->low = 1; // nothing is used yet: high is 0
    r->reading = !fl_fault() && pthread_create(&r->reader, NULL, read_ahead, r) == 0;
    if (r->reading) return FL_OK;
    node_resident_close(model);
    return FL_FAIL(err, FL_EIO, "the system refused to start the thread that reads ahead");
}

void node_resident_close(node_model *model) {
    node_resident *r = model->resident;
    if (r == NULL) return;
    if (r->reading) {
        pthread_mutex_lock(&r->lock);
        __atomic_store_n(&r->stop, true, __ATOMIC_RELAXED);
        pthread_cond_signal(&r->work);
        pthread_mutex_unlock(&r->lock);
        pthread_join(r->reader, NULL);
    }
    pthread_cond_destroy(&r->done);
    pthread_cond_destroy(&r->work);
    pthread_mutex_destroy(&r->lock);
    free(r);
    model->resident = NULL;
}
