/* Sixteen rows of a matrix, straight from the mapped blocks: into a panel, each lane a row, or against a few tokens.
 *
 * A format says, a piece of its columns at a time, how the bytes of a square, sixteen of each row, are split into q.
 * That is the same whether the square was turned first, so that each lane has a row's dword (a panel, or tokens that meet
 * its lines in registers), or not (one token: dots of four rows a register, which are exact, and folded to a lane a row).
 * Rows that do not exist repeat row 0. Of `next`, a later sixteen rows and so one contiguous region, a share is
 * prefetched with each square.
 */

enum {
    PANEL_BYTES = STRETCH_COLS * LANES, /* q, or floats of a quarter of the columns */
    GROUP_FLOATS = STRETCH_COLS / 16 * LANES,
    STEP = 256,      /* columns whose scales are at hand */
    HALF = STEP / 2, /* those of a piece of a super-block; a smaller block is a piece */
    SPARE = 320,     /* room for a step of one row */
};

typedef struct {
    uint8_t *q;     /* as the instruction set's store_square and dots have it, or f32 [cols][LANES] */
    float *scale;   /* [groups][LANES] */
    float *minimum; /* [groups][LANES] */
} panel;

/* Columns of one panel: floats take four times the room of q. For few tokens a panel is used at once and no more than
 * a step of it is unpacked, which leaves the first cache to what is prefetched. */
static inline int64_t K(stretch_cols)(int32_t type, int64_t tokens) {
    if (tokens <= LANES) return STEP;
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16 ? STRETCH_COLS / 4 : STRETCH_COLS;
}

/* -- Squares ------------------------------------------------------------------------------------------------------ */

enum { NIBBLES = 0x0f0f0f0f, PAIRS = 0x03030303, ONES = 0x01010101 };

/* Sixteen rows, `stride` apart, by the first of each four. */
typedef struct {
    const uint8_t *four[4];
    int64_t stride;
} K(rows);
typedef struct { vi i[4]; } K(square);

#define FOUR _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
/* The compiler must not know that squares lie side by side: it would keep a pointer for every row, run out of registers,
 * and load all squares, and prefetch, at once. */
static INLINE K(square) K(load_square)(K(rows) *r, int64_t at) {
    K(square) s;
    __asm__ volatile("" : "+r"(r->four[0]), "+r"(r->four[1]), "+r"(r->four[2]), "+r"(r->four[3]));
    FOUR s.i[i] = K(load_four)(r->four, i * r->stride + at);
    return s;
}
static INLINE K(square) K(turned)(K(rows) *r, int64_t at) {
    K(square) s = K(load_square)(r, at);
    K(turn)(s.i);
    return s;
}
static INLINE K(square) K(cut)(K(square) s, int down, uint32_t mask, int up) {
    FOUR s.i[i] = K(bits)(s.i[i], down, mask, up);
    return s;
}
static INLINE K(square) K(join)(K(square) a, K(square) b) {
    FOUR a.i[i] = K(or)(a.i[i], b.i[i]);
    return a;
}
static INLINE K(square) K(through)(const uint8_t *table, K(square) s) {
    FOUR s.i[i] = K(lookup)(table, s.i[i]);
    return s;
}

/* Where a piece's squares go, columns counted from its first; and what is prefetched meanwhile. */
typedef struct {
    uint8_t *q;               /* a panel's, */
    const block_a8 *const *x; /* or `tokens` tokens', */
    vi *sum;                  /* [groups][tokens] exact dots; NULL: a panel */
    vi *part;                 /* [4] dots of four bytes, of one token's group of which not all came */
    int tokens;
    float *scale, *minimum; /* of the step's groups */
    int group, bias, most;
    const uint8_t *next;
    int values, bytes; /* of the format's blocks */
} K(sink);

static INLINE K(square) K(take)(const K(sink) *s, K(rows) *r, int64_t at) {
    return s->tokens == 1 ? K(load_square)(r, at) : K(turned)(r, at);
}
/* Minus the sum of a group's activations. */
static INLINE int32_t K(minus)(const block_a8 *a, int group, int half) {
    if (group == 32) return a->minus_sum;
    return half ? a->minus_sum - a->minus_half : a->minus_half;
}
/* A group's two squares follow each other. */
static INLINE void K(emit)(K(sink) *s, int column, K(square) v) {
    const int from = column * s->bytes * LANES / s->values, to = (column + 16) * s->bytes * LANES / s->values;
    for (int n = (from + 63) / 64 * 64; n < to; n += 64) K(prefetch)(s->next + n);
    if (!s->sum) {
        K(store_square)(s->q + column * LANES, v.i, s->most);
        return;
    }
    const int half = column / 16 % 2, fresh = s->group == 16 || !half;
    if (s->tokens == 1) {
        const block_a8 *a = s->x[0] + column / 32;
        FOUR s->part[i] = K(dot_square)(fresh ? K(none)() : s->part[i], v.i[i], a->qs + 16 * half, s->most);
        if (s->group == 16 || half)
            s->sum[column / s->group] = K(fold)(s->part, s->most, s->bias * K(minus)(a, s->group, half));
        return;
    }
#pragma GCC unroll 8
    for (int t = 0; t < s->tokens; t++) {
        const block_a8 *a = s->x[t] + column / 32;
        vi *sum = &s->sum[column / s->group * s->tokens + t];
        if (fresh) *sum = K(sum_from)(s->bias, s->most, K(minus)(a, s->group, half));
        *sum = K(dot_lines)(*sum, v.i, a->qs + 16 * half, s->most);
    }
}

/* The rows there are, or for the last rows of a matrix a copy of `bytes` of each in which row 0 fills up the sixteen. */
static INLINE K(rows) K(sixteen)(const uint8_t *w, int64_t stride, int rows, int64_t bytes, uint8_t *spare) {
    if (rows < LANES) {
        for (int r = 0; r < LANES; r++)
            __builtin_memcpy(spare + r * SPARE, w + (r < rows ? r : 0) * stride, (size_t)bytes);
        w = spare;
        stride = SPARE;
    }
    return (K(rows)){{w, w + 4 * stride, w + 8 * stride, w + 12 * stride}, stride};
}

/* -- Blocks of 32: an f16 scale (and minimum), then bytes, or nibbles and perhaps a fifth bit ------------------------- */

typedef struct {
    int bytes, m, qh, qs;
    const uint8_t *table;
} K(block_layout); /* offsets, -1: none */

static INLINE void K(scale_of_block)(const K(block_layout) f, K(rows) *r, int at, float *scale, float *minimum) {
    if (f.qs > 1) {
        K(store)(scale, K(f16_of_each)(r->four, r->stride, at));
    } else {
        _Alignas(64) uint32_t e[LANES];
        K(store)((float *)e, K(as_float)(K(bits)(K(turned)(r, at).i[0], 0, 255, 0)));
        for (int n = 0; n < LANES; n++) e[n] = K(e8m0)(e[n]);
        __builtin_memcpy(scale, e, sizeof e);
    }
    if (f.m >= 0) K(store)(minimum, K(f16_of_each)(r->four, r->stride, at + f.m));
}
static INLINE K(square) K(fifths)(const K(sink) *s, K(square) bits, int half) {
    FOUR bits.i[i] = K(spread)(bits.i[i], half);
    if (s->tokens != 1) K(turn)(bits.i);
    return bits;
}
static INLINE void K(piece_of_blocks)(const K(block_layout) f, K(rows) r, int k, K(sink) *s) {
    const int at = k / 32 * f.bytes;
    K(scale_of_block)(f, &r, at, s->scale + k / 32 * LANES, s->minimum + k / 32 * LANES);
    const K(square) v = K(take)(s, &r, at + f.qs);
    if (f.bytes == sizeof(block_q8_0)) {
        K(square) first = v, second = K(take)(s, &r, at + f.qs + 16);
        FOUR first.i[i] = K(flip)(first.i[i]);
        FOUR second.i[i] = K(flip)(second.i[i]);
        K(emit)(s, 0, first);
        K(emit)(s, 16, second);
        return;
    }
    K(square) low = K(cut)(v, 0, NIBBLES, 0), high = K(cut)(v, 4, NIBBLES, 0);
    if (f.qh >= 0) {
        const K(square) bits = K(load_square)(&r, at + f.qh);
        low = K(join)(low, K(fifths)(s, bits, 0));
        high = K(join)(high, K(fifths)(s, bits, 1));
    }
    K(emit)(s, 0, f.table ? K(through)(f.table, low) : low);
    K(emit)(s, 16, f.table ? K(through)(f.table, high) : high);
}
#define BLOCKS(name, m, qh, qs, table)                                                                                 \
    static INLINE void K(piece_of_##name)(K(rows) r, int k, K(sink) *s) {                                              \
        const K(block_layout) f = {sizeof(block_##name), m, qh, qs, table};                                            \
        K(piece_of_blocks)(f, r, k, s);                                                                                \
    }
BLOCKS(q4_0, -1, -1, 2, NULL)
BLOCKS(q4_1, 2, -1, 4, NULL)
BLOCKS(q5_0, -1, 2, 6, NULL)
BLOCKS(q5_1, 2, 4, 8, NULL)
BLOCKS(q8_0, -1, -1, 2, NULL)
BLOCKS(iq4_nl, -1, -1, 2, K(iq4_table))
BLOCKS(mxfp4, -1, -1, 1, K(fp4_table))
#undef BLOCKS

/* -- Super-blocks of 256 ------------------------------------------------------------------------------------------- */

#define AT(name, field) (int)offsetof(block_##name, field)
#define SCALES_OF(name) static INLINE void K(scales_of_##name)(K(rows) *r, float *scale, float *minimum)

/* Eight 6-bit scales and minima and their f16 factors, the first 16 bytes of a block. */
static INLINE void K(scales_of_q4_k)(K(rows) *r, float *scale, float *minimum) {
    const K(square) v = K(turned)(r, 0);
    const vi scales[2] = {K(bits)(v.i[1], 0, 0x3f3f3f3f, 0),
                          K(or)(K(bits)(v.i[3], 0, NIBBLES, 0), K(bits)(v.i[1], 6, PAIRS, 4))};
    const vi minima[2] = {K(bits)(v.i[2], 0, 0x3f3f3f3f, 0),
                          K(or)(K(bits)(v.i[3], 4, NIBBLES, 0), K(bits)(v.i[2], 6, PAIRS, 4))};
    const vf d = K(halves)(v.i[0]), dmin = K(mul)(K(halves)(K(bits)(v.i[0], 16, 0xffff, 0)), K(set1)(-1));
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        K(store)(scale + g * LANES, K(mul)(d, K(to_float)(K(bits)(scales[g / 4], g % 4 * 8, 255, 0))));
        K(store)(minimum + g * LANES, K(mul)(dmin, K(to_float)(K(bits)(minima[g / 4], g % 4 * 8, 255, 0))));
    }
}
/* Sixteen signed bytes and one f16 factor. */
SCALES_OF(q6_k) {
    (void)minimum;
    const K(square) v = K(turned)(r, AT(q6_k, scales));
    const vf d = K(f16_of_each)(r->four, r->stride, AT(q6_k, d));
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) {
        const vf from_zero = K(to_float)(K(bits)(K(flip)(v.i[g / 4]), g % 4 * 8, 255, 0));
        K(store)(scale + g * LANES, K(mul)(d, K(fma)(from_zero, K(set1)(1), K(set1)(-128))));
    }
}
/* `count` bits of a square, from bit `down` of each row's byte `byte` on, moved `up`. */
static INLINE vi K(field)(const K(square) *v, int byte, int down, int count, int up) {
    return K(bits)(v->i[byte / 4], byte % 4 * 8 + down, (1u << count) - 1, up);
}
/* d (s - 32), s of a low and a high part. */
static INLINE void K(store_scale)(float *scale, vf d, vi low, vi high) {
    K(store)(scale, K(mul)(d, K(fma)(K(to_float)(K(or)(low, high)), K(set1)(1), K(set1)(-32))));
}
/* Sixteen bytes, a 4-bit scale low and a 4-bit minimum high, and their f16 factors, the last of a block. */
SCALES_OF(q2_k) {
    const K(square) v = K(turned)(r, AT(q2_k, scales)), end = K(turned)(r, AT(q2_k, dmin) + 2 - 16);
    const vf d = K(halves)(end.i[3]), dmin = K(mul)(K(halves)(K(bits)(end.i[3], 16, 0xffff, 0)), K(set1)(-1));
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) {
        K(store)(scale + g * LANES, K(mul)(d, K(to_float)(K(field)(&v, g, 0, 4, 0))));
        K(store)(minimum + g * LANES, K(mul)(dmin, K(to_float)(K(field)(&v, g, 4, 4, 0))));
    }
}
/* Twelve bytes of sixteen 6-bit scales and one f16 factor, the last of a block. */
SCALES_OF(q3_k) {
    enum { FIRST = 2 }; /* of the scales, in the last sixteen bytes */
    (void)minimum;
    const K(square) v = K(turned)(r, AT(q3_k, scales) - FIRST);
    const vf d = K(halves)(K(bits)(v.i[3], 16, 0xffff, 0));
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++)
        K(store_scale)(scale + g * LANES, d, K(field)(&v, FIRST + g % 8, g / 8 * 4, 4, 0),
                       K(field)(&v, FIRST + 8 + g % 4, g / 4 * 2, 2, 4));
}
/* One f16 factor, then eight 6-bit scales: two bits each, then four each. */
SCALES_OF(iq4_xs) {
    (void)minimum;
    const K(square) v = K(turned)(r, 0);
    const vf d = K(halves)(v.i[0]);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++)
        K(store_scale)(scale + g * LANES, d, K(field)(&v, AT(iq4_xs, scales_l) + g / 2, g % 2 * 4, 4, 0),
                       K(field)(&v, AT(iq4_xs, scales_h) + g / 4, g % 4 * 2, 2, 4));
}
#undef SCALES_OF

#define PIECE_OF(name) static INLINE void K(piece_of_##name)(K(rows) r, int k0, K(sink) *s)

PIECE_OF(q4_k) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_q4_k)(&r, s->scale, s->minimum);
#pragma GCC unroll 2
    for (int k = 0; k < HALF; k += 64) {
        const K(square) first = K(take)(s, &r, AT(q4_k, qs) + 64 * h + k / 2);
        const K(square) second = K(take)(s, &r, AT(q4_k, qs) + 64 * h + k / 2 + 16);
#pragma GCC unroll 2
        for (int up = 0; up < 2; up++) {
            K(emit)(s, k + 32 * up, K(cut)(first, 4 * up, NIBBLES, 0));
            K(emit)(s, k + 32 * up + 16, K(cut)(second, 4 * up, NIBBLES, 0));
        }
    }
}
PIECE_OF(q5_k) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_q4_k)(&r, s->scale, s->minimum);
    const K(square) fifth[2] = {K(take)(s, &r, AT(q5_k, qh)), K(take)(s, &r, AT(q5_k, qh) + 16)};
#pragma GCC unroll 2
    for (int k = 0; k < HALF; k += 64) {
        const int at = AT(q5_k, qs) + 64 * h + k / 2;
        const K(square) four[2] = {K(take)(s, &r, at), K(take)(s, &r, at + 16)};
#pragma GCC unroll 2
        for (int up = 0; up < 2; up++)
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                const K(square) bit = K(cut)(fifth[c], 4 * h + k / 32 + up, ONES, 4);
                K(emit)(s, k + 32 * up + 16 * c, K(join)(K(cut)(four[c], 4 * up, NIBBLES, 0), bit));
            }
    }
}
PIECE_OF(q6_k) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_q6_k)(&r, s->scale, s->minimum);
#pragma GCC unroll 2
    for (int c = 0; c < 32; c += 16) {
        const K(square) two = K(take)(s, &r, AT(q6_k, qh) + 32 * h + c);
#pragma GCC unroll 2
        for (int up = 0; up < 2; up++) {
            const int k = c + 32 * up;
            const K(square) four = K(take)(s, &r, AT(q6_k, ql) + 64 * h + k);
            K(emit)(s, k, K(join)(K(cut)(four, 0, NIBBLES, 0), K(cut)(two, 2 * up, PAIRS, 4)));
            K(emit)(s, k + 64, K(join)(K(cut)(four, 4, NIBBLES, 0), K(cut)(two, 2 * up + 4, PAIRS, 4)));
        }
    }
}
PIECE_OF(iq4_xs) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_iq4_xs)(&r, s->scale, s->minimum);
#pragma GCC unroll 4
    for (int k = 0; k < HALF; k += 32) {
        const K(square) v = K(take)(s, &r, AT(iq4_xs, qs) + 64 * h + k / 2);
        K(emit)(s, k, K(through)(K(iq4_table), K(cut)(v, 0, NIBBLES, 0)));
        K(emit)(s, k + 16, K(through)(K(iq4_table), K(cut)(v, 4, NIBBLES, 0)));
    }
}
PIECE_OF(q2_k) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_q2_k)(&r, s->scale, s->minimum);
#pragma GCC unroll 2
    for (int c = 0; c < 32; c += 16) {
        const K(square) v = K(take)(s, &r, AT(q2_k, qs) + 32 * h + c);
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) K(emit)(s, 32 * g + c, K(cut)(v, 2 * g, PAIRS, 0));
    }
}
PIECE_OF(q3_k) {
    const int h = k0 / HALF;
    if (h == 0) K(scales_of_q3_k)(&r, s->scale, s->minimum);
#pragma GCC unroll 2
    for (int c = 0; c < 32; c += 16) {
        const K(square) two = K(take)(s, &r, AT(q3_k, qs) + 32 * h + c);
        const K(square) third = K(take)(s, &r, AT(q3_k, hmask) + c);
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
            K(emit)(s, 32 * g + c, K(join)(K(cut)(two, 2 * g, PAIRS, 0), K(cut)(third, 4 * h + g, ONES, 2)));
    }
}
#undef PIECE_OF
#undef AT

/* -- Steps put together: a panel of many columns, or the results of a few tokens --------------------------------------- */

typedef void (*K(piece))(K(rows) r, int k, K(sink) *s);

static INLINE void K(unpack_steps)(K(piece) piece, K(sink) s, const uint8_t *w, int64_t stride, int rows, int64_t cols,
                                   panel p, const uint8_t *next) {
    const int width = s.values < HALF ? s.values : HALF;
    _Alignas(64) uint8_t spare[LANES * SPARE];
    for (int64_t k = 0; k < cols; k += STEP) {
        const int left = cols - k < STEP ? (int)(cols - k) : STEP;
        const int64_t at = k / s.values * s.bytes, g = k / s.group * LANES;
        const K(rows) r = K(sixteen)(w + at, stride, rows, left / s.values * s.bytes, spare);
        s.scale = p.scale + g;
        s.minimum = p.minimum + g;
        for (int c = 0; c < left; c += width) {
            s.next = next + at * LANES + c * s.bytes * LANES / s.values;
            s.q = p.q + (k + c) * LANES;
            piece(r, c, &s);
        }
    }
}
static INLINE void K(few_steps)(K(piece) piece, K(sink) s, const int minima, const uint8_t *w, int64_t stride, int rows,
                                int64_t cols, float *const *y, const uint8_t *next) {
    const int width = s.values < HALF ? s.values : HALF, tokens = s.tokens;
    _Alignas(64) uint8_t spare[LANES * SPARE];
    _Alignas(64) float scale[STEP / 16][LANES], minimum[STEP / 16][LANES];
    vf total[FEW_TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) total[t] = K(zero)();
    s.scale = scale[0];
    s.minimum = minimum[0];
    const block_a8 *x[FEW_TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) x[t] = s.x[t];
    s.x = x;
    for (int64_t k = 0; k < cols; k += STEP) {
        const int left = cols - k < STEP ? (int)(cols - k) : STEP;
        const int64_t at = k / s.values * s.bytes;
        const K(rows) r = K(sixteen)(w + at, stride, rows, left / s.values * s.bytes, spare);
        for (int c = 0; c < left; c += width) {
            vi sum[HALF / 16 * FEW_TOKENS], part[4];
            s.next = next + at * LANES + c * s.bytes * LANES / s.values;
            s.sum = sum;
            s.part = part;
            piece(r, c, &s);
#pragma GCC unroll 8
            for (int g = 0; g < width / s.group; g++) {
                const int n = c / s.group + g;
#pragma GCC unroll 8
                for (int t = 0; t < tokens; t++) {
                    const block_a8 *a = x[t] + g * s.group / 32;
                    const vf d = K(mul)(K(load)(scale[n]), K(set1)(a->d));
                    total[t] = K(fma)(K(to_float)(sum[g * tokens + t]), d, total[t]);
                    if (!minima) continue;
                    const float dsum = s.group == 32 ? a->dsum : a->d * (float)-K(minus)(a, s.group, g % 2);
                    total[t] = K(fma)(K(load)(minimum[n]), K(set1)(dsum), total[t]);
                }
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) x[t] += width / 32;
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) K(store)(y[t], total[t]);
}

/* Sixteen rows against one, two, four or eight tokens, as far as FEW_TOKENS goes: each a function of its own. */
#define FEW(name, n)                                                                                                   \
    static void K(few##n##_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, const void *const *x,     \
                                   float *const *y, const uint8_t *next) {                                             \
        if ((n) <= FEW_TOKENS) K(few_##name)(n, w, stride, rows, cols, x, y, next);                                    \
    }

#define QUANT(name, NAME, values_, group_, bias_, most_, minima)                                                       \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p,                    \
                                 const uint8_t *next) {                                                                \
        const K(sink) s = {                                                                                            \
            .group = group_, .bias = bias_, .most = most_, .values = values_, .bytes = sizeof(block_##name)};          \
        K(unpack_steps)(K(piece_of_##name), s, w, stride, rows, cols, p, next);                                        \
    }                                                                                                                  \
    static INLINE void K(few_##name)(const int tokens, const uint8_t *w, int64_t stride, int rows, int64_t cols,       \
                                     const void *const *x, float *const *y, const uint8_t *next) {                     \
        const K(sink) s = {.x = (const block_a8 *const *)x,                                                            \
                           .tokens = tokens,                                                                           \
                           .group = group_,                                                                            \
                           .bias = bias_,                                                                              \
                           .most = most_,                                                                              \
                           .values = values_,                                                                          \
                           .bytes = sizeof(block_##name)};                                                             \
        K(few_steps)(K(piece_of_##name), s, minima, w, stride, rows, cols, y, next);                                   \
    }                                                                                                                  \
    FEW(name, 1) FEW(name, 2) FEW(name, 4) FEW(name, 8)
#include "../quants.def"
#undef QUANT

/* -- Floats: sixteen columns at a time -------------------------------------------------------------------------------- */

/* The values in a dword of every row. */
static INLINE void K(values_of_f32)(vi x, vf y[1]) { y[0] = K(as_float)(x); }
static INLINE void K(values_of_f16)(vi x, vf y[2]) {
    y[0] = K(halves)(x);
    y[1] = K(halves)(K(bits)(x, 16, 0xffff, 0));
}
static INLINE void K(values_of_bf16)(vi x, vf y[2]) {
    y[0] = K(as_float)(K(bits)(x, 0, 0xffff, 16));
    y[1] = K(as_float)(K(bits)(x, 16, 0xffff, 16));
}

#define FLOATS(name, value)                                                                                            \
    static INLINE void K(columns_of_##name)(const uint8_t *w, int64_t stride, int rows, int64_t k, vf column[16],      \
                                            const uint8_t *next) {                                                     \
        enum { EACH = 4 / sizeof(value), BYTES = 16 * sizeof(value) };                                                 \
        _Alignas(64) uint8_t spare[LANES * SPARE];                                                                     \
        K(rows) r = K(sixteen)(w + k * (int64_t)sizeof(value), stride, rows, BYTES, spare);                            \
        for (int n = 0; n < BYTES * LANES; n += 64) K(prefetch)(next + k * LANES * (int64_t)sizeof(value) + n);        \
        _Pragma("GCC unroll 4") for (int j = 0; j < 4 / EACH; j++) {                                                   \
            const K(square) s = K(turned)(&r, 16 * j);                                                                 \
            FOUR K(values_of_##name)(s.i[i], column + (4 * j + i) * EACH);                                             \
        }                                                                                                              \
    }                                                                                                                  \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p,                    \
                                 const uint8_t *next) {                                                                \
        for (int64_t k = 0; k < cols; k += 16) {                                                                       \
            vf column[16];                                                                                             \
            K(columns_of_##name)(w, stride, rows, k, column, next);                                                    \
            _Pragma("GCC unroll 16") for (int j = 0; j < 16; j++) K(store)((float *)p.q + (k + j) * LANES, column[j]); \
        }                                                                                                              \
    }                                                                                                                  \
    static INLINE void K(few_##name)(const int tokens, const uint8_t *w, int64_t stride, int rows, int64_t cols,       \
                                     const void *const *xs, float *const *y, const uint8_t *next) {                    \
        const float *const *x = (const float *const *)xs;                                                              \
        vf total[FEW_TOKENS];                                                                                          \
        _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) total[t] = K(zero)();                                 \
        for (int64_t k = 0; k < cols; k += 16) {                                                                       \
            vf column[16];                                                                                             \
            K(columns_of_##name)(w, stride, rows, k, column, next);                                                    \
            _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++)                                                   \
                _Pragma("GCC unroll 16") for (int j = 0; j < 16; j++) total[t] =                                       \
                    K(fma)(column[j], K(set1)(x[t][k + j]), total[t]);                                                 \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int t = 0; t < tokens; t++) K(store)(y[t], total[t]);                             \
    }                                                                                                                  \
    FEW(name, 1) FEW(name, 2) FEW(name, 4) FEW(name, 8)
FLOATS(f32, float)
FLOATS(f16, f16)
FLOATS(bf16, bf16)
#undef FLOATS
#undef FEW
#undef FOUR
