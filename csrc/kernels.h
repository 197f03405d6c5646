/* What a kernel is: share `chunk` of one op, with no threads, allocation, globals or errors of its own. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "abi.h"

_Static_assert(sizeof(block_q4_0) == 18 && sizeof(block_q4_1) == 20 && sizeof(block_q5_0) == 22, "GGUF's sizes");
_Static_assert(sizeof(block_q5_1) == 24 && sizeof(block_q8_0) == 34 && sizeof(block_q2_k) == 84, "GGUF's sizes");
_Static_assert(sizeof(block_q3_k) == 110 && sizeof(block_q4_k) == 144 && sizeof(block_q5_k) == 176, "GGUF's sizes");
_Static_assert(sizeof(block_q6_k) == 210 && sizeof(block_iq4_nl) == 18 && sizeof(block_iq4_xs) == 136, "GGUF's sizes");
_Static_assert(sizeof(block_mxfp4) == 17 && sizeof(block_a8) == 48 && sizeof(op) == 128, "sizes others rely on");

enum {
    PAGE = 64,           /* positions in a page of keys and values */
    LANES = 16,          /* weight rows, positions or dimensions worked on side by side */
    STRETCH_ROWS = 64,   /* weight rows unpacked at a time when many tokens share them */
    STRETCH_COLS = 2048, /* of their columns */
    SHARE_ROWS = 1024,
    SHARE_BYTES = 1 << 16,
    MOST_TOKENS = 576, /* that share what was unpacked: half of the largest step */
    AMX_ROWS = 256, /* weight rows unpacked at a time for tiles: they and their sums leave half of the second cache */
    TILE_ELEMENTS = 8192,   /* of a share of an elementwise op */
    LEAD_BYTES = 1 << 14,   /* between what a matmul reads and what it prefetches, at least; whole panels */
    AHEAD_BYTES = 1 << 17,  /* fetched into the second cache while waiting */
    ATTEND_BLOCK = 512,     /* positions in one softmax block; blocks start at multiples of it */
    ATTEND_SPAN = 1024,     /* positions whose blocks are merged before they meet the others; may be a thread's work */
    ATTEND_ROWS = 8,        /* query rows (heads, tokens) that share each key */
    THREAD_BYTES = 1 << 20, /* scratch of one thread */
    MAX_HEAD_DIM = 1024,
};

/* Everything a kernel sees besides its op. */
typedef struct {
    const batch *head;
    const batch_row *rows;
    const batch_sequence *sequences;
    const int32_t *wanted, *pages;
    const float *vectors;
    const logit_bias *biases;
    const uint32_t *masks;
    const buffer *buffers;
    const weight *weights;
    const kv_layer *kv;
    uint8_t *arena;
    uint8_t *scratch;    /* THREAD_BYTES of this thread's own */
    float *split;        /* what came of the spans of a row that several threads share: {top, sum, head_dim values} */
    int64_t split_bytes; /* of them */
    run_result *result;
    int32_t threads;
    int32_t amx; /* prompt rows meet all but F32 weights on tiles (kernels/prompt.h) */
} context;

typedef void (*kernel)(const op *, const context *, int32_t chunk);

typedef struct {
    const char *isa;
    const char *names[OP_COUNT];
    kernel ops[OP_COUNT];
    const char *matmul_names[TYPE_COUNT];
    const char *row_names[TYPE_COUNT];
    uint64_t (*read)(const uint8_t *data, int64_t bytes);
    void (*quantize)(const float *x, block_a8 *y, int64_t cols);
    void (*round)(const float *x, bf16 *y, int64_t cols); /* what prompt rows become on tiles; NULL: quantised too */
    kernel attend_merge;
    void (*dequantize[TYPE_COUNT])(const uint8_t *x, float *y, int64_t cols);
    void (*encode)(int32_t type, const float *x, int64_t rows, int64_t cols, const float *importance, uint8_t *out);
    double (*squared_error)(const float *x, const float *y, const float *importance, int64_t n);
    void (*matmul)(const weight *, int64_t first, int64_t rows, const void *const *x, float *const *y, int64_t tokens,
                   int64_t prompt, uint8_t *scratch);
} kernel_table;

/* -- Where things are ------------------------------------------------------------------------- */

static inline int32_t rows_of(const op *o, const context *c) {
    return o->rows == ROWS_WANTED ? c->head->wanted : c->head->rows;
}
/* Of an op's rows those of the prompt class, which come first. */
static inline int32_t prompt_rows(const op *o, const context *c) {
    if (o->rows != ROWS_WANTED) return c->head->prompt_rows;
    int32_t n = 0;
    while (n < c->head->wanted && c->wanted[n] < c->head->prompt_rows) n++;
    return n;
}
/* Of `count` rows from `first` on those among the first `prompt`. */
static inline int32_t prompt_among(int32_t prompt, int32_t first, int32_t count) {
    return prompt < first ? 0 : prompt - first < count ? prompt - first : count;
}
static inline void *buffer_row(const context *c, int32_t number, int64_t row) {
    return c->arena + c->buffers[number].offset + row * c->buffers[number].stride;
}
static inline const batch_row *row_info(const op *o, const context *c, int32_t row) {
    return &c->rows[o->rows == ROWS_WANTED ? c->wanted[row] : row];
}

/* An elementwise op is cut into tiles of about TILE_ELEMENTS: some whole rows, or a piece of one row. */
typedef struct {
    int32_t row, rows;
    int32_t col, cols;
} tile;

static inline int32_t tile_count(int32_t rows, int32_t width) {
    if (width >= TILE_ELEMENTS) return rows * ((width + TILE_ELEMENTS - 1) / TILE_ELEMENTS);
    const int32_t each = TILE_ELEMENTS / width;
    return (rows + each - 1) / each;
}
static inline tile tile_at(int32_t rows, int32_t width, int32_t chunk) {
    if (width >= TILE_ELEMENTS) {
        const int32_t pieces = (width + TILE_ELEMENTS - 1) / TILE_ELEMENTS, at = chunk % pieces * TILE_ELEMENTS;
        return (tile){chunk / pieces, 1, at, width - at < TILE_ELEMENTS ? width - at : TILE_ELEMENTS};
    }
    const int32_t each = TILE_ELEMENTS / width, row = chunk * each;
    return (tile){row, rows - row < each ? rows - row : each, 0, width};
}

/* Values and bytes of a block. */
typedef struct { int32_t values, bytes; } block_size;
static inline block_size block_of(int32_t type) {
    static const block_size sizes[TYPE_COUNT] = {
        [TYPE_F32] = {1, 4},
        [TYPE_F16] = {1, 2},
        [TYPE_BF16] = {1, 2},
#define QUANT(name, NAME, values, group, bias, most, minima) [TYPE_##NAME] = {values, sizeof(block_##name)},
#include "quants.def"
#undef QUANT
    };
    return sizes[type];
}
static inline int64_t row_bytes(int32_t type, int64_t cols) {
    const block_size b = block_of(type);
    return cols / b.values * b.bytes;
}

/* Of one matrix; experts are many. */
static inline int64_t matrix_bytes(const weight *w) { return w->rows * row_bytes(w->type, w->cols); }

/* Bytes from row to row of rounded activations: block_a8, or on tiles for prompt rows bf16. Then rows are twice an odd
 * number of lines apart, so that the same columns of 32 tokens spread evenly over the sets of the first cache. */
static inline int64_t rounded_bytes(int32_t amx, int64_t cols) {
    const int64_t lines = cols / 32;
    return amx ? (lines + (6 - lines % 4) % 4) * 64 : lines * (int64_t)sizeof(block_a8);
}

/* Weight rows in one share of a matmul: where many tokens use them a stretch, or on tiles about AMX_ROWS in as many
 * shares for each thread; about 64 KiB where few do. There a thread's shares follow each other, so that what it
 * prefetches is what it comes to. */
static inline int32_t share_rows(int32_t height, int64_t bytes, int32_t tokens, int32_t on_tiles, int32_t threads) {
    if (on_tiles > LANES) {
        const int32_t shares = (height + AMX_ROWS * threads - 1) / (AMX_ROWS * threads) * threads;
        return ((height + shares - 1) / shares + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    }
    if (tokens > LANES) return STRETCH_ROWS;
    const int64_t even = height / (4 * threads),
                  most = SHARE_BYTES / bytes < SHARE_ROWS ? SHARE_BYTES / bytes : SHARE_ROWS;
    const int64_t rows = (even < most ? even : most) / LANES * LANES;
    return rows < LANES ? LANES : (int32_t)rows;
}
static inline int32_t rows_on_tiles(const weight *w, const op *o, const context *c) {
    return c->amx && w->type != TYPE_F32 ? prompt_rows(o, c) : 0;
}
static inline int32_t matmul_share(const weight *w, const op *o, const context *c, int32_t threads) {
    return share_rows(w->rows, row_bytes(w->type, w->cols), rows_of(o, c), rows_on_tiles(w, o, c), threads);
}
/* The first and the last position that a row sees. */
static inline int32_t seen_from(const op *o, const batch_row *r) {
    return o->window && r->position >= o->window ? r->position - o->window + 1 : 0;
}
static inline int32_t seen_to(const op *o, const batch_row *r) {
    return o->window || r->reach < r->position ? r->reach : r->position;
}
/* Spans that what a row sees lies in. */
static inline int32_t spans_of(const op *o, const batch_row *r) {
    return seen_to(o, r) / ATTEND_SPAN - seen_from(o, r) / ATTEND_SPAN + 1;
}
/* How attention is cut: heads of a KV head that go together, the parts that makes of its group, rows that go together,
 * and where there are few rows and much to see, spans that go alone (1: all together). */
typedef struct { int32_t heads, parts, rows, spans; } attend_cut;
static inline attend_cut attend_share(const op *o, const context *c) {
    const int32_t group = o->heads / o->kv_heads, rows = rows_of(o, c);
    attend_cut cut = {group < ATTEND_ROWS ? group : ATTEND_ROWS, 1, 1, 1};
    cut.rows = ATTEND_ROWS / cut.heads;
    while (cut.rows > 1 && rows * o->kv_heads / cut.rows < 2 * c->threads) cut.rows /= 2;
    if (rows < 2 * c->threads && !o->window) {
        for (int32_t r = 0; r < rows; r++) {
            const int32_t spans = spans_of(o, row_info(o, c, r));
            cut.spans = spans > cut.spans ? spans : cut.spans;
        }
        if ((int64_t)rows * o->heads * cut.spans * (o->head_dim + 2) * (int64_t)sizeof(float) > c->split_bytes)
            cut.spans = 1;
        if (cut.spans > 1) cut.rows = 1;
    }
    const int32_t least = cut.spans > 1 ? 2 * c->threads : c->threads; /* spans are of unequal length */
    while (cut.heads > 1 && rows * o->kv_heads * ((group + cut.heads - 1) / cut.heads) * cut.spans < least)
        cut.heads = (cut.heads + 1) / 2;
    cut.parts = (group + cut.heads - 1) / cut.heads;
    return cut;
}
/* Where the result of a span of a row's head is kept. */
static inline float *split_at(const op *o, const context *c, attend_cut cut, int32_t row, int32_t head, int32_t span) {
    return c->split + (((int64_t)row * o->heads + head) * cut.spans + span) * (o->head_dim + 2);
}
int32_t chunk_count(const op *, const context *);

/* -- Rows read by pread ------------------------------------------------------------------------ */

int32_t row_cache_fetch(row_cache *, int32_t row); /* 0: could not be read */
const uint8_t *row_cache_row(const row_cache *, int32_t row);

/* -- Threads -------------------------------------------------------------------------------------- */

typedef void (*job)(void *arg, int32_t thread, int32_t threads);
int32_t pool_threads(const pool *);
void pool_run(pool *, job, void *arg);
void pool_barrier(pool *, const uint8_t *ahead, int64_t bytes);

const kernel_table *kernels_of(int32_t isa);
