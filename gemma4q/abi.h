/* Everything that crosses Python, C and CUDA: quant blocks, plan records, batches, entry points.
 * Read by the C compiler, by cffi (as its cdef) and, through cffi, by numpy and Numba.
 * So: plain declarations only, no preprocessor; whoever includes it brings <stdint.h>. */

/* Half floats are their own types: one cannot add two of them by mistake. */
typedef struct { uint16_t bits; } f16;
typedef struct { uint16_t bits; } bf16;

/* -- Tensor types: GGUF's ids ------------------------------------------------------------------ */

typedef enum {
    TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q4_1 = 3, TYPE_Q5_0 = 6, TYPE_Q5_1 = 7, TYPE_Q8_0 = 8,
    TYPE_Q2_K = 10, TYPE_Q3_K = 11, TYPE_Q4_K = 12, TYPE_Q5_K = 13, TYPE_Q6_K = 14,
    TYPE_IQ4_NL = 20, TYPE_IQ4_XS = 23, TYPE_BF16 = 30, TYPE_MXFP4 = 39, TYPE_COUNT = 40
} tensor_type;

/* -- Quant blocks, as GGUF stores them; "nib16": byte j holds value j low and value j + 16 high --- */

typedef struct { f16 d; uint8_t qs[16]; } block_q4_0;                             /* 32: d (q - 8), nib16 */
typedef struct { f16 d, m; uint8_t qs[16]; } block_q4_1;                          /* 32: d q + m, nib16 */
typedef struct { f16 d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;              /* 32: d (q - 16), bit 4 of value e is bit e of qh */
typedef struct { f16 d, m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;           /* 32: d q + m */
typedef struct { f16 d; int8_t qs[32]; } block_q8_0;                              /* 32: d q */
typedef struct { uint8_t scales[16]; uint8_t qs[64]; f16 d, dmin; } block_q2_k;   /* 256 in groups of 16: d (s & 15) q - dmin (s >> 4) */
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; f16 d; } block_q3_k; /* 256 in groups of 16: d (s - 32) (q - 4) */
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qs[128]; } block_q4_k;  /* 256 in groups of 32: d s q - dmin m */
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_k; /* 256 in groups of 32 */
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; f16 d; } block_q6_k;    /* 256 in groups of 16: d s (q - 32) */
typedef struct { f16 d; uint8_t qs[16]; } block_iq4_nl;                           /* 32: d LUT[q], nib16 */
typedef struct { f16 d; uint16_t scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs; /* 256 in groups of 32: d (s - 32) LUT[q] */
typedef struct { uint8_t e; uint8_t qs[16]; } block_mxfp4;                        /* 32: 2^(e - 128) FP4[q], nib16 */

/* Activations as the integer kernels read them: 32 values, x = d q. */
typedef struct {
    float   d;
    float   dsum;       /* d times the sum of q, rounded once: what a format with minima multiplies them by */
    int32_t minus_sum;  /* of all 32 q; negative, since unsigned weights q + bias start their sum at bias times this */
    int32_t minus_half; /* of the first 16 q */
    int8_t  qs[32];
} block_a8;

/* -- Plan: ops over numbered buffers and weights -------------------------------------------------- */

typedef enum { SPACE_ROW, SPACE_WANTED, SPACE_FIXED } buffer_space;  /* one row a batch row, a wanted row, or one in all */
typedef enum { BUFFER_F32, BUFFER_A8, BUFFER_I32 } buffer_type;
typedef enum { ROWS_ALL, ROWS_WANTED } op_rows;
typedef enum { LAYOUT_NATIVE, LAYOUT_ROWS } weight_layout;   /* mapped blocks; rows fetched by pread into a row cache */

typedef enum {
    OP_EMBED,       /* out = table row of the token, times scale; or the batch's vector where the row has one */
    OP_EMBED_ROWS,  /* out = table row of the token (of token 0 for vectors), times scale, from a row cache */
    OP_WANTED,      /* out = the wanted rows of in */
    OP_RMS_NORM,    /* runs of `size`: out = in / rms(in) * weight * scale; no weight: 1 */
    OP_ADD,         /* out = (a + b) * scale */
    OP_SCALE,       /* out = in * weight[0] */
    OP_GELU_MUL,    /* out = gelu(a) * b[part * width ...] */
    OP_ANGLES,      /* out = cosines, then sines, of position * base^(-2i / size) / weight[i], `pairs` of each */
    OP_ROPE,        /* the first `pairs` half-split pairs of every head turned by the angles of in[1] */
    OP_QUANTIZE,    /* out (A8) = in (F32); prompt rows as bf16 where an instruction set has tiles */
    OP_MATMUL,      /* out = in . weight' */
    OP_STORE_KV,    /* keys and values into the pages of kv_layer */
    OP_ATTEND,      /* out = softmax(q . K) . V over what the row may see */
    OP_ROUTE,       /* out (I32) = the `used` best experts of each row, ascending, then their weights (F32) */
    OP_GROUP,       /* out (FIXED I32) = groups n, n x {expert, first pair}, end; pairs (row * used + slot) by expert */
    OP_EXPERTS_UP,  /* out = in . gate_up' of each chosen expert: [used, 2 ffn] a row */
    OP_EXPERTS_GELU,/* out = gelu(gate) * up: [used, ffn] a row */
    OP_EXPERTS_DOWN,/* out = sum over chosen experts, ascending, of weight * (in . down') */
    OP_SOFTCAP,     /* out = tanh(in / scale) * scale */
    OP_TOP_PART,    /* out = of each stretch of logits: maximum, sum of exponentials, the `used` best after biases and mask */
    OP_TOP,         /* the result's top_ids, top_values and logsumexp from the stretches of in */
    OP_COUNT
} op_code;

typedef struct {                /* 128 bytes */
    int32_t code;               /* op_code */
    int32_t rows;               /* op_rows */
    int32_t in[4];              /* buffers, -1: none */
    int32_t out;
    int32_t weight[4];          /* weights, -1: none */
    int32_t layer;              /* of the model, -1: outside the layers; for profiles and diffs */
    int32_t name;               /* index into the plan's names */
    int32_t wait;               /* needs what other threads wrote since the last wait */
    int32_t size;               /* rms_norm: length of a run */
    int32_t heads, kv_heads, head_dim;
    int32_t kv_layer;           /* store_kv, attend: which keys and values */
    int32_t window;             /* attend: positions a row sees, itself included; 0: all */
    int32_t pairs;              /* rope: pairs that turn; attend, store_kv: the rotated pairs kept apart when keys come from values */
    int32_t from_values;        /* store_kv, attend: keys are values times weight[0], but for the rotated pairs */
    int32_t part;               /* gelu_mul: which slice of b; embed_rows: the first column taken */
    int32_t experts, used;
    float   eps, scale, base;
    int32_t reserved[4];
} op;

typedef struct {
    int32_t space, type;
    int32_t width;              /* values a row; a multiple of 32 for A8 */
    int32_t last_use;           /* the op that reads it last */
    int64_t offset;             /* bytes from the arena's start */
    int64_t stride;             /* bytes from row to row */
} buffer;

typedef struct {
    uint64_t data;              /* address: mapped blocks, or a row_cache */
    int64_t  bytes;
    int32_t  type, layout;
    int32_t  rows, cols;        /* of one matrix, [rows, cols], a row is contiguous */
    int32_t  count;             /* matrices one behind the other (experts); 1 otherwise */
    int32_t  reserved;
} weight;

typedef struct {
    uint64_t pages;             /* address of page 0 */
    int64_t  page_bytes;
    int32_t  local;             /* pages are numbered by local_pages, else by global_pages */
    int32_t  type;              /* tensor_type: F32, F16, BF16, Q8_0 or Q4_0 */
    int32_t  kv_heads;
    int32_t  key_dim;           /* stored of each key: head_dim, or twice the rotated pairs when keys come from values */
    int32_t  head_dim;
    int32_t  reserved;
} kv_layer;

/* -- Batch: one flat block of memory, offsets in bytes from its start, nothing to patch ------------ */

typedef enum {
    ROW_WANT_LOGITS = 1, ROW_WANT_TOP = 2, ROW_WANT_HIDDEN = 4,
    ROW_GENERATED = 8,          /* class of the row: sampled by this engine, not given */
    ROW_NO_STORE = 16           /* keys and values are not kept (a drafter's rows) */
} row_flag;

typedef struct {
    int32_t  token;
    int32_t  vector;            /* of batch.vectors, -1: none; replaces the embedding, unscaled */
    int32_t  position;          /* for rope, and where keys and values are stored */
    int32_t  reach;             /* last position seen: its own, its image block's end, or n - 1 for a drafter */
    int32_t  sequence;
    uint16_t flags;
    int16_t  adapter;           /* -1: none */
} batch_row;

typedef struct { int32_t token; float scale, add; } logit_bias; /* l = (l <= 0 ? l * scale : l / scale) + add */

typedef struct {
    int32_t  first_row, rows, stored;
    uint32_t global_pages, local_pages;     /* first entry in batch.pages: page ids by position / 64 */
    uint32_t bias, biases;                  /* slice of batch.biases */
    int32_t  mask;                          /* of batch.masks, -1: none */
} batch_sequence;

typedef struct {
    int32_t rows, prompt_rows;              /* prompt rows come first */
    int32_t sequences;
    int32_t wanted;                         /* rows with a WANT flag */
    int64_t row_at;                         /* batch_row [rows] */
    int64_t sequence_at;                    /* batch_sequence [sequences] */
    int64_t wanted_at;                      /* i32 [wanted]: row numbers, ascending */
    int64_t page_at;                        /* i32 page ids */
    int64_t vector_at;                      /* f32 [vectors, width] */
    int64_t bias_at;                        /* logit_bias */
    int64_t mask_at;                        /* u32 [masks, ceil(vocab / 32)]: bit set = token allowed */
} batch;

typedef enum { STATUS_OK, STATUS_NON_FINITE, STATUS_MODEL_CHANGED, STATUS_CANCELLED } run_status;

typedef struct {
    int32_t status;                         /* run_status */
    int32_t bad_row;                        /* non_finite: the row */
    int32_t top;                            /* how many of the best to keep a wanted row */
    int32_t threads;
    uint64_t top_ids;                       /* i32 [wanted, top], best first, lower id first among equals; -1: fewer are allowed */
    uint64_t top_values;                    /* f32 [wanted, top], after biases */
    uint64_t logsumexp;                     /* f32 [wanted], of the logits before biases and mask */
    uint64_t op_nanoseconds;                /* i64 [ops], 0: not timed */
    int64_t barriers;
    int64_t weight_bytes;                   /* read in this step, each weight once */
} run_result;

/* -- Entry points ------------------------------------------------------------------------------------ */

typedef struct pool pool;
typedef struct session session;
typedef struct row_cache row_cache;

pool *pool_new(int32_t threads);
void pool_free(pool *);

int32_t isa_count(void);
const char *isa_name(int32_t);              /* best first */
int32_t isa_available(int32_t);             /* by this CPU */
const char *kernel_name(int32_t isa, int32_t code, int32_t type); /* which kernel serves an op, NULL: none */

row_cache *row_cache_new(int32_t fd, int64_t offset, int64_t row_bytes, int32_t rows, int32_t slots);
void row_cache_free(row_cache *);

/* Copies the records; keeps the addresses. Arena, pages and weights stay the caller's. NULL: no memory.
 * split: room for what threads that share a row's attention found; without it a row's heads alone are shared out. */
session *session_new(pool *, int32_t isa, const op *, int32_t ops, const buffer *, int32_t buffers,
                     const weight *, int32_t weights, const kv_layer *, int32_t kv_layers,
                     uint8_t *arena, uint8_t *scratch, float *split, int64_t split_bytes);
void session_free(session *);
/* For experts that memory does not hold: from now on the disk is asked for those that a step chose, and no others. */
void session_fetch_chosen(session *);
int64_t scratch_bytes(int32_t threads);
int64_t activation_bytes(int32_t isa, int32_t cols);    /* from row to row of an A8 buffer */
int32_t session_run(session *, const uint8_t *batch, run_result *, const int32_t *cancel, int32_t first_op, int32_t end_op);

/* A mapped file that shrinks under us reads as zeros from then on, and says so. */
int32_t mapping_register(uint64_t address, int64_t bytes);      /* a slot, -1: none left */
int32_t mapping_poisoned(int32_t slot);
void mapping_release(int32_t slot);
/* Bytes of a mapped file: the disk is asked for them; each page is touched, which waits for it; or the system is told
 * that who reads one will not read its neighbours. */
void mapping_fetch(uint64_t address, int64_t bytes);
void mapping_touch(uint64_t address, int64_t bytes);
void mapping_scattered(uint64_t address, int64_t bytes);

/* Matmuls without a plan, for tests and the bench: y [rows, w->rows] = x [rows, w->cols] . W', both F32, of each of
 * `count` matrices of one shape and type; the last one's result stays. The first `prompt_rows` rows are a
 * prompt's. */
int32_t matmul_once(pool *, int32_t isa, const weight *, int32_t count, const float *x, float *y, int32_t rows,
                    int32_t prompt_rows, uint8_t *scratch);
void quantize_row(int32_t isa, const float *x, block_a8 *y, int32_t cols);
int32_t dequantize_row(int32_t isa, int32_t type, const uint8_t *x, float *y, int32_t cols);
/* Quantises rows of whole blocks; importance: [cols] of each row's squared errors, NULL: all 1. error: NULL, or of each row
 * the sum of importance * (x - decoded)^2. STATUS_NON_FINITE: x holds NaN or infinity; -1: no such encoder. */
int32_t encode_rows(pool *, int32_t isa, int32_t type, const float *x, int64_t rows, int64_t cols,
                    const float *importance, uint8_t *out, double *error);
double read_bandwidth(pool *, const uint8_t *data, int64_t bytes);     /* bytes a second */

/* -- Tokenizer ----------------------------------------------------------------------------------------- */

typedef struct tokenizer tokenizer;

typedef struct {                            /* strings of a file; every one is checked to lie in data */
    const uint8_t *data;
    int64_t        data_bytes;
    const int64_t *starts, *lengths;        /* [count] */
    int64_t        count;
} string_array;

typedef enum {
    VOCABULARY_OK, VOCABULARY_NO_MEMORY, VOCABULARY_TOO_BIG, VOCABULARY_OUT_OF_FILE, VOCABULARY_TOO_LONG,
    VOCABULARY_EMPTY, VOCABULARY_NOT_UTF8, VOCABULARY_DUPLICATE, VOCABULARY_NO_BYTE
} vocabulary_status;

/* Copies what it needs. where: the token at fault, -1 - the merge, or the byte without a token. seed: random. */
int32_t tokenizer_new(const string_array *tokens, const string_array *merges, uint64_t seed, tokenizer **made,
                      int64_t *where);
void tokenizer_free(tokenizer *);

/* How many ids the UTF-8 text has, at most `room` of them written; -1: no memory. Specials are plain text here. */
int64_t tokenizer_encode(const tokenizer *, const uint8_t *text, int64_t bytes, int32_t *ids, int64_t room);
int32_t tokenizer_find(const tokenizer *, const uint8_t *text, int64_t bytes);         /* -1: no such token */
const uint8_t *tokenizer_text(const tokenizer *, int32_t token, int64_t *bytes);       /* as stored; NULL: no such id */
