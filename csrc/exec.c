/* Runs a plan: op after op, each cut into chunks that threads take as they come, barriers only where one is owed. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

struct session {
    pool *threads;
    const kernel_table *kernels;
    op *ops;
    int32_t count, first, end;
    buffer *buffers;
    weight *weights;
    kv_layer *kv;
    int32_t weight_count;
    uint8_t *arena, *scratch;
    _Atomic int32_t *taken; /* [threads][2][ops]: chunks taken of each thread's own run of them, and of an op's merge */
    int32_t *chunks;        /* [ops] of this run; -1: known only when the op starts */
    int32_t *merges;        /* [ops] chunks of the merge that follows all others; 0: none */
    uint8_t *barrier;       /* [ops] before which all threads meet */
    int32_t *matmul;        /* [ops]: the next matmul from here on, -1: none */
    int32_t fetch_chosen;   /* experts are fetched from the disk when the router has chosen them */
    const int32_t *cancel;
    context step;
    _Atomic int32_t stopped;
};

enum { LATER = -1 };

/* Chunks of an op; those of an expert op depend on what the router chose. */
int32_t chunk_count(const op *o, const context *c) {
    const int32_t rows = rows_of(o, c), width = o->out >= 0 ? c->buffers[o->out].width : 0;
    if (!rows) return 0;
    switch (o->code) {
        case OP_RMS_NORM:
        case OP_ROPE: {
            const int32_t each = width < TILE_ELEMENTS ? TILE_ELEMENTS / width : 1;
            return (rows + each - 1) / each;
        }
        case OP_WANTED: return tile_count(c->head->wanted, width);
        case OP_ADD:
        case OP_SCALE:
        case OP_GELU_MUL:
        case OP_SOFTCAP:
        case OP_QUANTIZE: return tile_count(rows, width);
        case OP_ANGLES: return (rows + 15) / 16;
        case OP_MATMUL: {
            const weight *w = &c->weights[o->weight[0]];
            const int32_t share = matmul_share(w, o, c, c->threads);
            return (w->rows + share - 1) / share;
        }
        case OP_ATTEND: {
            const attend_cut cut = attend_share(o, c);
            return (rows + cut.rows - 1) / cut.rows * o->kv_heads * cut.parts * cut.spans;
        }
        case OP_EXPERTS_UP: {
            const weight *w = &c->weights[o->weight[0]];
            const int32_t groups = *(const int32_t *)buffer_row(c, o->in[2], 0);
            const int32_t share = matmul_share(w, o, c, 1);
            return groups * (o->weight[1] < 0 ? 1 : 2) * ((w->rows + share - 1) / share);
        }
        case OP_EXPERTS_GELU: return tile_count(rows * o->used, o->size);
        case OP_EXPERTS_DOWN: {
            const weight *w = &c->weights[o->weight[0]];
            const int32_t share = matmul_share(w, o, c, c->threads);
            return (w->rows + share - 1) / share;
        }
        case OP_TOP_PART: return rows * ((c->buffers[o->in[0]].width + o->size - 1) / o->size);
        case OP_GROUP:
        case OP_TOP: return 1;
        default: return rows; /* embed, embed_rows, route, store_kv */
    }
}

static int32_t merge_count(const op *o, const context *c) {
    return o->code == OP_ATTEND && rows_of(o, c) && attend_share(o, c).spans > 1 ? rows_of(o, c) * o->heads : 0;
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Adds what has passed since `before`; gives the time now. */
static int64_t count_time(int64_t *time, int64_t before) {
    const int64_t after = now();
    *time += after - before;
    return after;
}

static int of_experts(const op *o) { return o->code == OP_EXPERTS_UP || o->code == OP_EXPERTS_DOWN; }

/* Bytes of weights an op reads: each matrix once, an expert once however many rows chose it. */
static int64_t bytes_read(const op *o, const context *c) {
    int64_t bytes = 0;
    if (o->code != OP_MATMUL && !of_experts(o)) return 0;
    for (int32_t j = 0; j < 4 && o->weight[j] >= 0; j++) bytes += matrix_bytes(&c->weights[o->weight[j]]);
    return bytes * (of_experts(o) ? *(const int32_t *)buffer_row(c, o->in[2], 0) : 1);
}

/* A thread takes its own run of chunks in order, one stream through memory, then helps out with what others have left. */
static void take_chunks(session *s, int32_t number, int merge, int32_t chunks, kernel run, const context *c,
                        int32_t thread) {
    for (int32_t i = 0; i < c->threads; i++) {
        const int32_t owner = (thread + i) % c->threads;
        const int32_t first = (int32_t)((int64_t)chunks * owner / c->threads);
        const int32_t count = (int32_t)((int64_t)chunks * (owner + 1) / c->threads) - first;
        _Atomic int32_t *taken = &s->taken[(int64_t)(2 * owner + merge) * s->count + number];
        for (int32_t n; (n = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed)) < count;)
            run(&s->ops[number], c, first + n);
    }
}

/* Where this thread's part of a matmul's weights begins, and how much of it is worth fetching ahead. */
static int64_t coming(const session *s, const context *c, int32_t number, int32_t thread, const uint8_t **ahead) {
    if (number < 0 || number >= s->end) return 0;
    const weight *w = &c->weights[s->ops[number].weight[0]];
    const int64_t share = matmul_share(w, &s->ops[number], c, c->threads), chunks = (w->rows + share - 1) / share;
    const int64_t first = chunks * thread / c->threads * share, end = chunks * (thread + 1) / c->threads * share;
    const int64_t each = row_bytes(w->type, w->cols), bytes = ((end < w->rows ? end : w->rows) - first) * each;
    *ahead = (const uint8_t *)(uintptr_t)w->data + first * each;
    return bytes < AHEAD_BYTES ? bytes : AHEAD_BYTES;
}

static void run_op(session *s, int32_t number, int32_t chunks, const context *c, int32_t thread) {
    const kernel run = s->kernels->ops[s->ops[number].code];
    if (chunks != 1 || s->chunks[number] == LATER) take_chunks(s, number, 0, chunks, run, c, thread);
    else if (thread == 0) run(&s->ops[number], c, 0);
}

/* Has the system read the experts that the router chose, from this op's matrices on to those that lead back. */
static void fetch_experts(const session *s, int32_t number, const context *c) {
    const int32_t *groups = buffer_row(c, s->ops[number].in[2], 0);
    for (const op *o = &s->ops[number];; o++) {
        for (int32_t j = 0; of_experts(o) && j < 4 && o->weight[j] >= 0; j++) {
            const weight *w = &c->weights[o->weight[j]];
            const int64_t bytes = matrix_bytes(w);
            for (int32_t g = 0; g < groups[0]; g++)
                mapping_fetch(w->data + (uint64_t)(groups[1 + 2 * g] * bytes), bytes);
        }
        if (o->code == OP_EXPERTS_DOWN) return;
    }
}

#ifdef LENGTHEN
/* For tests of the bench: on every thread, the kernel of this name takes so many percent longer. */
static void run_longer(session *s, int32_t number, int32_t chunks, const context *c, int32_t thread) {
    const op *o = &s->ops[number];
    const char *name = s->kernels->names[o->code];
    if (o->code == OP_MATMUL) name = s->kernels->matmul_names[s->weights[o->weight[0]].type];
    const size_t length = strlen(LENGTHEN);
    const int64_t start = now();
    run_op(s, number, chunks, c, thread);
    if (strncmp(name, LENGTHEN, length) || name[length] != '_' || strcmp(name + length + 1, s->kernels->isa)) return;
    const double factor = 1 + LENGTHEN_PERCENT / 100.0;
    for (const int64_t end = start + (int64_t)((double)(now() - start) * factor); now() < end;) {
    }
}
#define run_op run_longer
#endif

/* Thread 0 alone runs ops of one chunk, so a row of them needs no barrier in between. An op's time ends when all
 * threads are done with it: waiting for them is the doing of the op before a barrier. */
static void share(void *arg, int32_t thread, int32_t threads) {
    session *s = arg;
    context c = s->step;
    c.scratch = s->scratch + (int64_t)thread * THREAD_BYTES;
    c.threads = threads;
    int64_t *times = (int64_t *)(uintptr_t)c.result->op_nanoseconds, before = times && !thread ? now() : 0;
    for (int32_t i = s->first; i < s->end; i++) {
        const op *o = &s->ops[i];
        if (s->barrier[i]) {
            if (thread == 0 && s->cancel && *(volatile const int32_t *)s->cancel) atomic_store(&s->stopped, 1);
            const uint8_t *ahead = NULL;
            const int64_t bytes = coming(s, &c, s->matmul[i], thread, &ahead);
            pool_barrier(s->threads, ahead, bytes);
            if (before && i > s->first) before = count_time(&times[i - 1], before);
            if (atomic_load_explicit(&s->stopped, memory_order_relaxed)) return;
        }
        const int32_t chunks = s->chunks[i] == LATER ? chunk_count(o, &c) : s->chunks[i];
        if (thread == 0 && chunks) c.result->weight_bytes += bytes_read(o, &c);
        if (thread == 0 && s->fetch_chosen && o->code == OP_EXPERTS_UP) fetch_experts(s, i, &c);
        run_op(s, i, chunks, &c, thread);
        if (s->merges[i]) {
            pool_barrier(s->threads, NULL, 0);
            take_chunks(s, i, 1, s->merges[i], s->kernels->attend_merge, &c, thread);
        }
        if (before) before = count_time(&times[i], before);
    }
}

/* Barriers stand where the plan says wait, unless thread 0 alone has been at work since the last one. */
static void lay_barriers(session *s) {
    int alone = 1, owed = 0;
    for (int32_t i = s->first; i < s->end; i++) {
        s->chunks[i] = s->ops[i].code == OP_EXPERTS_UP ? LATER : chunk_count(&s->ops[i], &s->step);
        s->merges[i] = merge_count(&s->ops[i], &s->step);
        s->step.result->barriers += s->merges[i] > 0;
        for (int32_t t = 0; t < 2 * s->step.threads; t++)
            atomic_store_explicit(&s->taken[(int64_t)t * s->count + i], 0, memory_order_relaxed);
        const int single = s->chunks[i] == 1 || s->chunks[i] == 0;
        s->barrier[i] = 0;
        if (s->ops[i].wait || owed) {
            if (single && alone) {
                owed = 1;
            } else {
                s->barrier[i] = 1;
                owed = 0;
                alone = 1;
                s->step.result->barriers++;
            }
        }
        if (!single) alone = 0;
    }
}

/* Every token in range, every row of a table at hand. */
static int32_t prepare(session *s, const uint8_t *memory) {
    const batch *b = (const batch *)memory;
    s->step.head = b;
    s->step.rows = (const batch_row *)(memory + b->row_at);
    s->step.sequences = (const batch_sequence *)(memory + b->sequence_at);
    s->step.wanted = (const int32_t *)(memory + b->wanted_at);
    s->step.pages = (const int32_t *)(memory + b->page_at);
    s->step.vectors = (const float *)(memory + b->vector_at);
    s->step.biases = (const logit_bias *)(memory + b->bias_at);
    s->step.masks = (const uint32_t *)(memory + b->mask_at);
    for (int32_t i = 0; i < s->weight_count; i++)
        if (s->weights[i].layout == LAYOUT_ROWS)
            for (int32_t r = 0; r < b->rows; r++) {
                const batch_row *row = &s->step.rows[r];
                if (!row_cache_fetch((row_cache *)(uintptr_t)s->weights[i].data, row->vector >= 0 ? 0 : row->token))
                    return STATUS_MODEL_CHANGED;
            }
    return STATUS_OK;
}

int32_t session_run(session *s, const uint8_t *memory, run_result *result, const int32_t *cancel, int32_t first,
                    int32_t end) {
    s->step.result = result;
    s->step.threads = pool_threads(s->threads);
    s->cancel = cancel;
    s->first = first;
    s->end = end < 0 || end > s->count ? s->count : end;
    atomic_store(&s->stopped, 0);
    result->barriers = 0;
    result->weight_bytes = 0;
    result->bad_row = -1;
    result->threads = s->step.threads;
    if ((result->status = prepare(s, memory)) != STATUS_OK) return result->status;
    lay_barriers(s);
    pool_run(s->threads, share, s);
    if (atomic_load(&s->stopped)) result->status = STATUS_CANCELLED;
    return result->status;
}

static void *copy(const void *from, size_t count, size_t each) {
    void *to = calloc(count + 1, each);
    if (to && count) memcpy(to, from, count * each);
    return to;
}
session *session_new(pool *threads, int32_t isa, const op *ops, int32_t count, const buffer *buffers,
                     int32_t buffer_count, const weight *weights, int32_t weight_count, const kv_layer *kv,
                     int32_t kv_count, uint8_t *arena, uint8_t *scratch, float *split, int64_t split_bytes) {
    session *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->threads = threads;
    s->kernels = kernels_of(isa);
    s->ops = copy(ops, (size_t)count, sizeof *ops);
    s->buffers = copy(buffers, (size_t)buffer_count, sizeof *buffers);
    s->weights = copy(weights, (size_t)weight_count, sizeof *weights);
    s->kv = copy(kv, (size_t)kv_count, sizeof *kv);
    s->taken = calloc(2 * (size_t)count * (size_t)(threads ? pool_threads(threads) : 1), sizeof *s->taken);
    s->chunks = calloc((size_t)count, sizeof *s->chunks);
    s->merges = calloc((size_t)count, sizeof *s->merges);
    s->barrier = calloc((size_t)count, 1);
    s->matmul = calloc((size_t)count + 1, sizeof *s->matmul);
    s->count = count;
    s->weight_count = weight_count;
    s->arena = arena;
    s->scratch = scratch;
    if (!s->kernels || !s->ops || !s->buffers || !s->weights || !s->kv || !s->taken || !s->chunks || !s->merges ||
        !s->barrier || !s->matmul) {
        session_free(s);
        return NULL;
    }
    s->matmul[count] = -1;
    for (int32_t i = count; i--;) s->matmul[i] = ops[i].code == OP_MATMUL ? i : s->matmul[i + 1];
    s->step = (context){.amx = s->kernels->round != NULL,
                        .buffers = s->buffers,
                        .weights = s->weights,
                        .kv = s->kv,
                        .arena = arena,
                        .split = split,
                        .split_bytes = split_bytes};
    return s;
}
void session_free(session *s) {
    if (!s) return;
    free(s->ops);
    free(s->buffers);
    free(s->weights);
    free(s->kv);
    free(s->taken);
    free(s->chunks);
    free(s->merges);
    free(s->barrier);
    free(s->matmul);
    free(s);
}
void session_fetch_chosen(session *s) {
    s->fetch_chosen = 1;
    for (const weight *w = s->weights; w < s->weights + s->weight_count; w++)
        if (w->count > 1) mapping_scattered(w->data, w->bytes);
}
int64_t activation_bytes(int32_t isa, int32_t cols) { return rounded_bytes(kernels_of(isa)->round != NULL, cols); }
int64_t scratch_bytes(int32_t threads) { return (int64_t)threads * THREAD_BYTES; }

/* -- Without a plan: for tests and the bench ----------------------------------------------------------- */

typedef struct {
    const kernel_table *kernels;
    const weight *weights;
    const uint8_t *x;
    float *y;
    uint8_t *scratch;
    int64_t x_stride;
    int32_t count, rows, prompt;
} once;

/* A thread has the same rows of every matrix, so that they need not wait for each other. */
static void matmul_share_once(void *arg, int32_t thread, int32_t threads) {
    const once *m = arg;
    uint8_t *scratch = m->scratch + (int64_t)thread * THREAD_BYTES;
    const void *x[MOST_TOKENS];
    float *y[MOST_TOKENS];
    const weight *any = m->weights;
    const int32_t on_tiles = m->kernels->round && any->type != TYPE_F32 ? m->prompt : 0;
    const int32_t share = share_rows(any->rows, row_bytes(any->type, any->cols), m->rows, on_tiles, threads);
    const int32_t chunks = (any->rows + share - 1) / share;
    const int32_t begin = (int32_t)((int64_t)chunks * thread / threads),
                  end = (int32_t)((int64_t)chunks * (thread + 1) / threads);
    for (const weight *w = m->weights; w < m->weights + m->count; w++)
        for (int32_t n = begin; n < end; n++) {
            const int64_t first = (int64_t)n * share, height = w->rows - first < share ? w->rows - first : share;
            for (int32_t r0 = 0; r0 < m->rows; r0 += MOST_TOKENS) {
                const int32_t rows = m->rows - r0 < MOST_TOKENS ? m->rows - r0 : MOST_TOKENS;
                for (int32_t r = 0; r < rows; r++) {
                    x[r] = m->x + (r0 + r) * m->x_stride;
                    y[r] = m->y + (int64_t)(r0 + r) * w->rows + first;
                }
                m->kernels->matmul(w, first, height, x, y, rows, prompt_among(m->prompt, r0, rows), scratch);
            }
        }
}
int32_t matmul_once(pool *threads, int32_t isa, const weight *weights, int32_t count, const float *x, float *y,
                    int32_t rows, int32_t prompt_rows, uint8_t *scratch) {
    const kernel_table *kernels = kernels_of(isa);
    const weight *w = weights;
    const int is_float = w->type == TYPE_F32 || w->type == TYPE_F16 || w->type == TYPE_BF16;
    if (!kernels || !block_of(w->type).bytes || matrix_bytes(w) > w->bytes) return -1;
    once m = {.kernels = kernels,
              .weights = weights,
              .y = y,
              .scratch = scratch,
              .count = count,
              .rows = rows,
              .prompt = prompt_rows};
    uint8_t *rounded = NULL;
    if (is_float) {
        m.x = (const uint8_t *)x;
        m.x_stride = w->cols * (int64_t)sizeof(float);
    } else {
        m.x_stride = rounded_bytes(kernels->round != NULL, w->cols);
        m.x = rounded = aligned_alloc(64, ((size_t)rows * (size_t)m.x_stride + 63) / 64 * 64);
        if (!rounded) return -1;
        for (int32_t r = 0; r < rows; r++) {
            void *to = rounded + r * m.x_stride;
            if (kernels->round && r < prompt_rows) kernels->round(x + (int64_t)r * w->cols, to, w->cols);
            else kernels->quantize(x + (int64_t)r * w->cols, to, w->cols);
        }
    }
    pool_run(threads, matmul_share_once, &m);
    free(rounded);
    return 0;
}
void quantize_row(int32_t isa, const float *x, block_a8 *y, int32_t cols) { kernels_of(isa)->quantize(x, y, cols); }
int32_t dequantize_row(int32_t isa, int32_t type, const uint8_t *x, float *y, int32_t cols) {
    const kernel_table *t = kernels_of(isa);
    if (!t || type < 0 || type >= TYPE_COUNT || !t->dequantize[type]) return -1;
    t->dequantize[type](x, y, cols);
    return 0;
}

typedef struct {
    const kernel_table *kernels;
    const uint8_t *data;
    int64_t bytes;
    _Atomic uint64_t sum;
} reading;
static void read_share(void *arg, int32_t thread, int32_t threads) {
    reading *r = arg;
    const int64_t lines = r->bytes / 64, first = lines * thread / threads, end = lines * (thread + 1) / threads;
    atomic_fetch_add(&r->sum, r->kernels->read(r->data + 64 * first, 64 * (end - first)));
}
double read_bandwidth(pool *threads, const uint8_t *data, int64_t bytes) {
    int32_t best = 0;
    while (!isa_available(best)) best++;
    reading r = {.kernels = kernels_of(best), .data = data, .bytes = bytes};
    const int64_t before = now();
    pool_run(threads, read_share, &r);
    return (double)bytes * 1e9 / (double)(now() - before);
}
