/* Keys and values in pages, and attention over them.
 *
 * A page holds 64 positions. Of each KV head: keys as [4][key_dim][16 positions], so that a score needs no horizontal
 * sum, then values as [64][head_dim]. A quantised page adds the scales of 32 keys' or values' dimensions after each:
 * [4][key_dim / 32][16] and [64][head_dim / 32]. In Q4_0 a byte holds two dimensions of one position, each less 8, the
 * lower one in its low half: keys are [4][key_dim / 2][16], values [64][head_dim / 2].
 * Softmax runs in blocks that start at multiples of 512 positions, each on its own; the blocks of a span of 1,024 are
 * merged in order, and then the spans. So a row's bits do not depend on which other rows, heads or threads share the work.
 */

typedef struct { uint8_t *keys, *key_scales, *values, *value_scales; } K(kv_page);

static INLINE int K(has_scales)(int32_t type) { return type == TYPE_Q8_0 || type == TYPE_Q4_0; }
/* Bytes of `count` dimensions of stored keys or values, scales apart. */
static INLINE int64_t K(value_bytes)(int32_t type, int64_t count) {
    return type == TYPE_Q4_0 ? count / 2 : type == TYPE_Q8_0 ? count : type == TYPE_F32 ? 4 * count : 2 * count;
}
static inline int64_t K(scale_count)(int32_t type, int32_t dim) { return K(has_scales)(type) ? (dim + 31) / 32 : 0; }

static inline K(kv_page)
    K(page_of)(const context *c, const op *o, const batch_sequence *s, int32_t position, int32_t head) {
    const kv_layer *l = &c->kv[o->kv_layer];
    const int32_t page = c->pages[(l->local ? s->local_pages : s->global_pages) + (uint32_t)(position / PAGE)];
    const int64_t keys = K(value_bytes)(l->type, PAGE * l->key_dim),
                  key_scales = PAGE * 2 * K(scale_count)(l->type, l->key_dim),
                  values = K(value_bytes)(l->type, PAGE * l->head_dim);
    uint8_t *at = (uint8_t *)(uintptr_t)l->pages + page * l->page_bytes + head * (l->page_bytes / l->kv_heads);
    return (K(kv_page)){at, at + keys, at + keys + key_scales, at + keys + key_scales + values};
}

/* -- Store --------------------------------------------------------------------------------------- */

static inline void K(put)(uint8_t *at, int64_t index, float x, int32_t type) {
    if (type == TYPE_F32) {
        __builtin_memcpy(at + 4 * index, &x, 4);
    } else if (type == TYPE_F16) {
        const _Float16 h = (_Float16)x;
        __builtin_memcpy(at + 2 * index, &h, 2);
    } else {
        uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        const uint16_t high = (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 64)
                                                               : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        __builtin_memcpy(at + 2 * index, &high, 2);
    }
}
/* Of `n` values the first that is farthest from zero, or NaN. */
static inline float K(farthest)(const float *x, int32_t n) {
    float far = 0;
    for (int32_t i = 0; i < n; i++) far = fabsf(x[i]) > fabsf(far) || x[i] != x[i] ? x[i] : far;
    return far;
}
/* At most 32 values and their scale. */
static inline _Float16 K(put_q8_0)(const float *x, int32_t n, int8_t *at, int64_t step) {
    const _Float16 d = (_Float16)(fabsf(K(farthest)(x, n)) / 127.0f);
    const float inverse = (float)d > 0.0f ? 1.0f / (float)d : 0.0f;
    for (int32_t i = 0; i < n; i++) {
        const float q = x[i] * inverse;
        at[i * step] = (int8_t)(q > 127.0f ? 127 : q < -127.0f ? -127 : q == q ? lrintf(q) : 0);
    }
    return d;
}
/* The rule of ggml's Q4_0, less 8. */
static inline uint8_t K(nibble)(float x, float inverse) {
    const float q = x * inverse + 8.5f;
    return (uint8_t)((q >= 15.0f ? 15 : q >= 0.0f ? (int)q : 0) - 8) & 15;
}
static inline _Float16 K(put_q4_0)(const float *x, int32_t n, uint8_t *at, int64_t step) {
    const float d = K(farthest)(x, n) / -8.0f;
    const float inverse = fabsf(d) >= FLT_MIN ? 1.0f / d : 0.0f;
    for (int32_t i = 0; i < n; i += 2)
        at[i / 2 * step] = (uint8_t)(K(nibble)(x[i], inverse) | K(nibble)(x[i + 1], inverse) << 4);
    return (_Float16)d;
}
/* `dim` values as number `lane` of `step`; quantised ones in groups of 32 with a scale each. */
static inline void K(put_vector)(const float *x, int32_t dim, int32_t type, uint8_t *at, uint8_t *scales, int64_t step,
                                 int64_t lane) {
    if (!K(has_scales)(type)) {
        for (int32_t i = 0; i < dim; i++) K(put)(at, i * step + lane, x[i], type);
        return;
    }
    for (int32_t g = 0; g < dim; g += 32) {
        const int32_t n = dim - g < 32 ? dim - g : 32;
        uint8_t *first = at + K(value_bytes)(type, g * step) + lane;
        const _Float16 d =
            type == TYPE_Q8_0 ? K(put_q8_0)(x + g, n, (int8_t *)first, step) : K(put_q4_0)(x + g, n, first, step);
        __builtin_memcpy(scales + 2 * (g / 32 * step + lane), &d, 2);
    }
}

static void K(store_kv)(const op *o, const context *c, int32_t row) {
    const batch_row *info = row_info(o, c, row);
    const kv_layer *l = &c->kv[o->kv_layer];
    if (info->flags & ROW_NO_STORE) return;
    const int32_t in_page = info->position % PAGE, sub = in_page / LANES, lane = in_page % LANES;
    for (int32_t h = 0; h < o->kv_heads; h++) {
        const K(kv_page) p = K(page_of)(c, o, &c->sequences[info->sequence], info->position, h);
        const float *k = (const float *)buffer_row(c, o->in[0], row) + h * o->head_dim;
        const float *v = (const float *)buffer_row(c, o->in[1], row) + h * o->head_dim;
        float turned[MAX_HEAD_DIM];
        if (o->from_values) {
            __builtin_memcpy(turned, k, (size_t)o->pairs * sizeof(float));
            __builtin_memcpy(turned + o->pairs, k + o->head_dim / 2, (size_t)o->pairs * sizeof(float));
            k = turned;
        }
        const int64_t key_scales = K(scale_count)(l->type, l->key_dim),
                      value_scales = K(scale_count)(l->type, l->head_dim);
        K(put_vector)(k, l->key_dim, l->type, p.keys + K(value_bytes)(l->type, sub * l->key_dim * LANES),
                      p.key_scales + 2 * sub * key_scales * LANES, LANES, lane);
        K(put_vector)(v, l->head_dim, l->type, p.values + K(value_bytes)(l->type, in_page * l->head_dim),
                      p.value_scales + 2 * in_page * value_scales, 1, 0);
    }
}

enum { AHEAD_OF_KEYS = 4096 }; /* bytes */

/* -- Attend --------------------------------------------------------------------------------------- */

/* Query rows that share keys: some heads of one KV head, some neighbouring rows of one sequence. */
typedef struct {
    const op *o;
    const kv_layer *l;
    const batch_sequence *sequence;
    int32_t rows; /* query rows, at most ATTEND_ROWS */
    int32_t kv_head;
    int32_t first[ATTEND_ROWS], last[ATTEND_ROWS]; /* positions each may see */
    const float *key_query;                        /* [rows][key_dim] */
    const float *value_query; /* [rows][head_dim]: what meets the values, when keys come from them */
    float *scores;            /* [rows][ATTEND_BLOCK] */
    float *part;              /* [rows][head_dim] of this block */
    float *out;               /* [rows][head_dim] so far */
    float top[ATTEND_ROWS], sum[ATTEND_ROWS];
} K(attention);

static INLINE vf K(load_kv)(const uint8_t *at, int64_t index, int type) {
    return type == TYPE_F32    ? K(load)((const float *)at + index)
           : type == TYPE_F16  ? K(load_f16)((const f16 *)at + index)
           : type == TYPE_BF16 ? K(load_bf16)((const bf16 *)at + index)
           : type == TYPE_Q8_0 ? K(load_i8)((const int8_t *)at + index)
                               : K(load_i4)(at + index / 2);
}
/* Dimension `i` of sixteen positions; `odd` says whether it is. */
static INLINE vf K(load_key)(const uint8_t *keys, int64_t i, int odd, int type) {
    return type == TYPE_Q4_0 ? K(load_halves)(keys + K(value_bytes)(type, (i - odd) * LANES), odd)
                             : K(load_kv)(keys, i * LANES, type);
}
static INLINE float K(scale_at)(const uint8_t *scales, int64_t index) {
    f16 h;
    __builtin_memcpy(&h, scales + 2 * index, 2);
    return K(half)(h);
}

enum { SIDES = TILE_TOKENS > LANES / 2 ? 2 : 1 }; /* sixteens of positions scored together, where registers allow */

/* Scores of `n` query rows against `sides` times 16 positions' stored keys: sum[side * n + row]. */
static INLINE void K(score_keys)(const K(attention) *a, K(kv_page) p, int sub, const int sides, const int n,
                                 const int type, vf *sum) {
    const int32_t dim = a->l->key_dim;
    const uint8_t *keys = p.keys + K(value_bytes)(type, sub * dim * LANES);
    const int64_t group = K(has_scales)(type) ? 32 : dim, counted = K(scale_count)(type, dim);
    const f16 *scales = (const f16 *)p.key_scales + sub * counted * LANES;
    for (int32_t g = 0; g < dim; g += group) {
        vf part[2 * ATTEND_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < sides * n; r++) part[r] = K(zero)();
        for (int32_t two = g; two < dim && two < g + group; two += 2) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                const int64_t i = two + odd;
                vf key[2];
#pragma GCC unroll 2
                for (int side = 0; side < sides; side++) {
                    key[side] = K(load_key)(keys, (int64_t)side * dim + i, odd, type);
                    if (!odd || type == TYPE_F32) /* of the others two dimensions are a line at most */
                        K(prefetch)(keys + K(value_bytes)(type, (side * dim + i) * LANES) + AHEAD_OF_KEYS);
                }
#pragma GCC unroll 8
                for (int r = 0; r < n; r++) {
                    const vf q = K(set1)(a->key_query[r * dim + i]);
#pragma GCC unroll 2
                    for (int side = 0; side < sides; side++)
                        part[side * n + r] = K(fma)(q, key[side], part[side * n + r]);
                }
            }
        }
#pragma GCC unroll 2
        for (int side = 0; side < sides; side++) {
            const vf scale = K(has_scales)(type) ? K(load_f16)(scales + (side * counted + g / 32) * LANES) : K(zero)();
#pragma GCC unroll 8
            for (int r = side * n; r < (side + 1) * n; r++)
                sum[r] = K(has_scales)(type) ? K(fma)(part[r], scale, sum[r]) : part[r];
        }
    }
}

/* What 16 positions' values add to the scores of rows whose keys come from values. */
static INLINE void K(score_values)(const K(attention) *a, K(kv_page) p, int sub, const int n, const int type,
                                   float *scores) {
    const int32_t dim = a->l->head_dim;
    for (int j = 0; j < LANES; j++) {
        const int64_t at = sub * LANES + j;
        vf sum[ATTEND_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) sum[r] = K(zero)();
        for (int32_t i = 0; i < dim; i += LANES) {
            vf value = K(load_kv)(p.values, at * dim + i, type);
            if (K(has_scales)(type))
                value = K(mul)(value, K(set1)(K(scale_at)(p.value_scales, at * K(scale_count)(type, dim) + i / 32)));
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) sum[r] = K(fma)(K(load)(a->value_query + r * dim + i), value, sum[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) {
            float lanes[LANES];
            K(store)(lanes, sum[r]);
            scores[r * ATTEND_BLOCK + j] += K(sum16)(lanes);
        }
    }
}

/* part = sum over positions of score times value. A page at a time, so that memory is read in order, and the one after
 * it is fetched meanwhile. */
static INLINE void K(weigh_values)(const K(attention) *a, const context *c, int32_t begin, int32_t end, const int n,
                                   const int type) {
    enum { WIDE = 2 };
    const int most = SIDES == 2 || n <= 2 ? 2 : 1; /* sixteens of dimensions weighed together, where registers allow */
    const int32_t dim = a->l->head_dim, base = begin / ATTEND_BLOCK * ATTEND_BLOCK;
    const int64_t each = K(value_bytes)(type, dim), each_scale = 2 * K(scale_count)(type, dim);
    K(kv_page) next = K(page_of)(c, a->o, a->sequence, begin, a->kv_head);
    for (int32_t first = begin; first <= end; first = (first / PAGE + 1) * PAGE) {
        const K(kv_page) p = next;
        const int32_t after = (first / PAGE + 1) * PAGE, stop = after <= end ? after : end + 1;
        if (after <= end) next = K(page_of)(c, a->o, a->sequence, after, a->kv_head);
        const int64_t ahead = next.values - p.values;
        for (int32_t i = 0; i < dim; i += most * LANES) {
            const int wide = dim - i >= most * LANES ? most : 1;
            const uint8_t *value = p.values + first % PAGE * each + K(value_bytes)(type, i);
            const uint8_t *scale = p.value_scales + first % PAGE * each_scale + 2 * (i / 32);
            const float *weights = a->scores + first - base;
            vf sum[ATTEND_ROWS][WIDE];
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) {
                const float *part = a->part + r * dim + i;
                sum[r][0] = first == begin ? K(zero)() : K(load)(part);
                sum[r][1] = first == begin || wide == 1 ? K(zero)() : K(load)(part + LANES);
            }
            for (int32_t at = first; at < stop; at++, value += each, scale += each_scale, weights++) {
                vf low = K(load_kv)(value, 0, type), high = wide == 2 ? K(load_kv)(value, LANES, type) : low;
                K(prefetch)(value + ahead);
                if (type == TYPE_F32) K(prefetch)(value + ahead + 64);
                if (K(has_scales)(type)) { /* the same: two sixteens begin at a multiple of 32 */
                    low = K(mul)(low, K(set1)(K(scale_at)(scale, 0)));
                    high = K(mul)(high, K(set1)(K(scale_at)(scale, 0)));
                }
#pragma GCC unroll 8
                for (int r = 0; r < n; r++) {
                    const vf weight = K(set1)(weights[r * ATTEND_BLOCK]);
                    sum[r][0] = K(fma)(weight, low, sum[r][0]);
                    sum[r][1] = K(fma)(weight, high, sum[r][1]);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) {
                K(store)(a->part + r * dim + i, sum[r][0]);
                if (wide == 2) K(store)(a->part + r * dim + i + LANES, sum[r][1]);
            }
        }
    }
}

/* What a row has seen so far, {out, top, sum}, and what it sees behind that; a sum of 0 is nothing. */
static inline void K(merge)(float *out, float *top, float *sum, const float *part, float its_top, float its_sum,
                            int32_t dim) {
    if (its_sum == 0) return;
    const float most = *top > its_top ? *top : its_top;
    const float before = *sum == 0 ? 0 : K(exponential)(*top - most), now = K(exponential)(its_top - most);
    for (int32_t i = 0; i < dim; i++) out[i] = out[i] * before + part[i] * now;
    *sum = *sum * before + its_sum * now;
    *top = most;
}

/* Positions begin ... end, all of one block: scores, softmax, values, merged into what came before. */
static INLINE void K(attend_block)(K(attention) *a, const context *c, int32_t begin, int32_t end, const int n,
                                   const int type) {
    const int32_t base = begin / ATTEND_BLOCK * ATTEND_BLOCK, dim = a->l->head_dim;
    const int32_t low = (begin - base) / LANES * LANES, high = ((end - base) / LANES + 1) * LANES;
    for (int32_t at = low; at < high;) {
        const K(kv_page) p = K(page_of)(c, a->o, a->sequence, base + at, a->kv_head);
        const int sub = (base + at) % PAGE / LANES;
        const int two = SIDES == 2 && at + LANES < high && sub + 1 < PAGE / LANES;
        vf sum[2 * ATTEND_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < 2 * n; r++) sum[r] = K(zero)();
        if (two) K(score_keys)(a, p, sub, 2, n, type, sum);
        else K(score_keys)(a, p, sub, 1, n, type, sum);
        for (int side = 0; side < 1 + two; side++, at += LANES) {
#pragma GCC unroll 8
            for (int r = 0; r < n; r++) K(store)(a->scores + r * ATTEND_BLOCK + at, sum[side * n + r]);
            if (a->o->from_values) K(score_values)(a, p, sub + side, n, type, a->scores + at);
        }
    }
    float top[ATTEND_ROWS], sum[ATTEND_ROWS];
    for (int r = 0; r < n; r++) {
        float *s = a->scores + r * ATTEND_BLOCK, lanes[LANES] = {0};
        for (int32_t at = low; at < high && base + at < a->first[r]; at++) s[at] = -INFINITY;
        for (int32_t at = high; at-- > low && base + at > a->last[r];) s[at] = -INFINITY;
        float tops[LANES];
        for (int j = 0; j < LANES; j++) tops[j] = -INFINITY;
        for (int32_t at = low; at < high; at += LANES)
            for (int j = 0; j < LANES; j++)
                tops[j] = s[at + j] > tops[j] || s[at + j] != s[at + j] ? s[at + j] : tops[j];
        top[r] = -INFINITY;
        for (int j = 0; j < LANES; j++) top[r] = tops[j] > top[r] || tops[j] != tops[j] ? tops[j] : top[r];
        if (top[r] == -INFINITY) { /* nothing of this block is this row's to see */
            for (int32_t at = low; at < high; at++) s[at] = 0;
            sum[r] = 0;
            continue;
        }
        for (int32_t at = low; at < high; at += LANES)
            for (int j = 0; j < LANES; j++) {
                s[at + j] = K(exponential)(s[at + j] - top[r]);
                lanes[j] += s[at + j];
            }
        sum[r] = K(sum16)(lanes);
    }
    K(weigh_values)(a, c, begin, end, n, type);
    for (int r = 0; r < n; r++)
        K(merge)(a->out + r * dim, &a->top[r], &a->sum[r], a->part + r * dim, top[r], sum[r], dim);
}

#define BLOCKS_OF(n, type)                                                                                             \
    for (int32_t at = first; at <= last; at = (at / ATTEND_BLOCK + 1) * ATTEND_BLOCK) {                                \
        const int32_t stop = (at / ATTEND_BLOCK + 1) * ATTEND_BLOCK - 1;                                               \
        K(attend_block)(a, c, at, stop < last ? stop : last, n, type);                                                 \
    }
#define BLOCKS_FOR(type)                                                                                               \
    static void K(blocks_##type)(K(attention) *a, const context *c, int32_t first, int32_t last) {                     \
        switch (a->rows) {                                                                                             \
            case 1: BLOCKS_OF(1, TYPE_##type) break;                                                                   \
            case 2: BLOCKS_OF(2, TYPE_##type) break;                                                                   \
            case 4: BLOCKS_OF(4, TYPE_##type) break;                                                                   \
            default: BLOCKS_OF(8, TYPE_##type) break;                                                                  \
        }                                                                                                              \
    }
BLOCKS_FOR(F32)
BLOCKS_FOR(F16)
BLOCKS_FOR(BF16)
BLOCKS_FOR(Q8_0)
BLOCKS_FOR(Q4_0)
#undef BLOCKS_FOR
#undef BLOCKS_OF

/* Nothing is seen yet. */
static void K(start)(float *out, float *top, float *sum, int32_t rows, int32_t dim) {
    for (int32_t r = 0; r < rows; r++) {
        top[r] = -INFINITY;
        sum[r] = 0;
    }
    __builtin_memset(out, 0, (size_t)rows * (size_t)dim * sizeof(float));
}
static void K(attend_span)(K(attention) *a, const context *c, int32_t first, int32_t last) {
    K(start)(a->out, a->top, a->sum, a->rows, a->l->head_dim);
    if (a->l->type == TYPE_F32) K(blocks_F32)(a, c, first, last);
    else if (a->l->type == TYPE_F16) K(blocks_F16)(a, c, first, last);
    else if (a->l->type == TYPE_BF16) K(blocks_BF16)(a, c, first, last);
    else if (a->l->type == TYPE_Q8_0) K(blocks_Q8_0)(a, c, first, last);
    else K(blocks_Q4_0)(a, c, first, last);
}
static inline void K(divide)(float *y, const float *out, float sum, int32_t dim) {
    for (int32_t i = 0; i < dim; i++) y[i] = out[i] / sum;
}

/* The query rows' heads as the keys, and where those come from values, the values, are to meet them. */
static void K(take_query)(K(attention) *a, float *keys, float *values, int32_t n, const float *q, const float *k_norm) {
    const op *o = a->o;
    const int32_t dim = o->head_dim;
    if (!o->from_values) {
        __builtin_memcpy(keys + n * dim, q, (size_t)dim * sizeof(float));
        return;
    }
    for (int32_t i = 0; i < dim; i++) values[n * dim + i] = i % (dim / 2) < o->pairs ? 0.0f : q[i] * k_norm[i];
    __builtin_memcpy(keys + n * a->l->key_dim, q, (size_t)o->pairs * sizeof(float));
    __builtin_memcpy(keys + n * a->l->key_dim + o->pairs, q + dim / 2, (size_t)o->pairs * sizeof(float));
}

static void K(attend)(const op *o, const context *c, int32_t chunk) {
    const attend_cut cut = attend_share(o, c);
    const kv_layer *l = &c->kv[o->kv_layer];
    const int32_t group = o->heads / o->kv_heads, dim = o->head_dim;
    const int32_t span = chunk % cut.spans, part = chunk / cut.spans % cut.parts,
                  kv_head = chunk / cut.spans / cut.parts % o->kv_heads;
    const int32_t row0 = chunk / cut.spans / cut.parts / o->kv_heads * cut.rows;
    const int32_t head0 = kv_head * group + part * cut.heads;
    const int32_t heads = group - part * cut.heads < cut.heads ? group - part * cut.heads : cut.heads;
    const float *k_norm = o->from_values ? (const float *)(uintptr_t)c->weights[o->weight[0]].data : NULL;
    enum { ALL = ATTEND_ROWS * MAX_HEAD_DIM };
    float *keys = (float *)c->scratch, *values = keys + ALL, *total = values + ALL;
    float tops[ATTEND_ROWS], sums[ATTEND_ROWS];
    K(attention) a = {.o = o,
                      .l = l,
                      .kv_head = kv_head,
                      .key_query = keys,
                      .value_query = values,
                      .part = total + ALL,
                      .out = total + 2 * ALL,
                      .scores = total + 3 * ALL};
    for (int32_t row = row0; row < row0 + cut.rows && row < rows_of(o, c);) {
        const int32_t sequence = row_info(o, c, row)->sequence, begin = row;
        int32_t first = INT32_MAX, last = -1, n = 0;
        for (; row < row0 + cut.rows && row < rows_of(o, c) && row_info(o, c, row)->sequence == sequence; row++) {
            const int32_t from = seen_from(o, row_info(o, c, row)), to = seen_to(o, row_info(o, c, row));
            first = from < first ? from : first;
            last = to > last ? to : last;
            for (int32_t h = 0; h < heads; h++, n++) {
                a.first[n] = from;
                a.last[n] = to;
                K(take_query)(&a, keys, values, n, (const float *)buffer_row(c, o->in[0], row) + (head0 + h) * dim,
                              k_norm);
            }
        }
        a.sequence = &c->sequences[sequence];
        const int32_t real = n;
        for (; n & (n - 1); n++) { /* up to a power of two with rows that see nothing */
            a.first[n] = 0;
            a.last[n] = -1;
            __builtin_memset(keys + n * l->key_dim, 0, (size_t)l->key_dim * sizeof(float));
            if (o->from_values) __builtin_memset(values + n * dim, 0, (size_t)dim * sizeof(float));
        }
        a.rows = n;
        if (cut.spans == 1) K(start)(total, tops, sums, real, dim);
        for (int32_t at = first, number = 0; at <= last; at = (at / ATTEND_SPAN + 1) * ATTEND_SPAN, number++) {
            const int32_t stop = (at / ATTEND_SPAN + 1) * ATTEND_SPAN - 1;
            if (cut.spans > 1 && number != span) continue;
            K(attend_span)(&a, c, at, stop < last ? stop : last);
            for (int32_t r = 0; r < real; r++) {
                if (cut.spans == 1) {
                    K(merge)(total + r * dim, &tops[r], &sums[r], a.out + r * dim, a.top[r], a.sum[r], dim);
                    continue;
                }
                float *kept = split_at(o, c, cut, begin, head0 + r, span);
                kept[0] = a.top[r];
                kept[1] = a.sum[r];
                __builtin_memcpy(kept + 2, a.out + r * dim, (size_t)dim * sizeof(float));
            }
        }
        for (int32_t r = 0; r < real && cut.spans == 1; r++)
            K(divide)((float *)buffer_row(c, o->out, begin + r / heads) + (head0 + r % heads) * dim, total + r * dim,
                      sums[r], dim);
    }
}

/* Merges the spans of one head of one row, in order. */
static void K(attend_merge)(const op *o, const context *c, int32_t chunk) {
    const attend_cut cut = attend_share(o, c);
    const int32_t row = chunk / o->heads, head = chunk % o->heads, dim = o->head_dim;
    float *out = (float *)c->scratch, top, sum;
    K(start)(out, &top, &sum, 1, dim);
    for (int32_t span = 0; span < spans_of(o, row_info(o, c, row)); span++) {
        const float *kept = split_at(o, c, cut, row, head, span);
        K(merge)(out, &top, &sum, kept + 2, kept[0], kept[1], dim);
    }
    K(divide)((float *)buffer_row(c, o->out, row) + head * dim, out, sum, dim);
}
