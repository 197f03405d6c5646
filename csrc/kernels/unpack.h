/* Panels: sixteen rows of a matrix, unpacked from the mapped blocks so that each lane holds a row.
 *
 * unpack(row 0 at column 0, bytes from row to row, rows that exist, columns, panel, the region to prefetch). Rows that
 * do not exist repeat row 0. 256 columns at a time: bytes are gathered from each row, turned
 * dword by dword, and split into q where all lanes do the same. The next panel is one contiguous region, prefetched as one
 * stream, a share with each step.
 */

enum {
    PANEL_BYTES = STRETCH_COLS * LANES, /* q, or floats of a quarter of the columns */
    GROUP_FLOATS = STRETCH_COLS / 16 * LANES,
    STEP = 256,
    SPARE = 320, /* room for a step of one row */
};

typedef struct {
    uint8_t *q;     /* [cols / 4][LANES][4], or f32 [cols][LANES] */
    float *scale;   /* [groups][LANES] */
    float *minimum; /* [groups][LANES] */
} panel;

/* Columns of one panel: floats take four times the room of q. For few tokens a panel is used at once and no more than
 * a step of it is unpacked, which leaves the first cache to what is prefetched. */
static inline int64_t K(stretch_cols)(int32_t type, int64_t tokens) {
    if (tokens <= LANES) return STEP;
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16 ? STRETCH_COLS / 4 : STRETCH_COLS;
}

/* The share of the next panel that goes with `bytes` of each of this panel's rows: a few lines at a time, since a core
 * waits when more are asked for than it can keep in flight. */
static INLINE void K(prefetch_share)(const uint8_t *next, int64_t bytes) {
    for (int64_t n = 0; n < bytes * LANES; n += 64) K(prefetch)(next + n);
}

/* -- Lines: sixteen rows' dwords of packed bits, split alike in every lane -------------------------------------- */

/* Sixteen rows, `stride` apart, of 4 `count` bytes become `count` lines of 64: line j holds dword j of every row. */
static INLINE void K(transpose)(const uint8_t *rows, int64_t stride, uint8_t *lines, int count) {
    for (int j = 0; j < count; j += 4) K(transpose_quad)(rows + 4 * j, stride, lines + 64 * j);
}

static INLINE floats K(number)(dwords x) { return __builtin_convertvector((signed_dwords)x, floats); }
/* The low half of each dword as an f16. */
static INLINE floats K(halves)(dwords x) {
    const words low = __builtin_convertvector(x, words);
    floats y;
    K(store)((float *)&y, K(load_f16)((const f16 *)&low));
    return y;
}

/* The bits of x from `down` on that `mask` keeps, moved `up` in each byte. */
static INLINE dwords K(bits)(const uint8_t *x, int down, uint32_t mask, int up) {
    const dwords all = *(const dwords *)x;
    return (up > down ? all << (up - down) : all >> (down - up)) & mask << up;
}
/* Four bits of each lane from bit `at` on become 16 in its four bytes. */
static INLINE dwords K(fifth)(const uint32_t *bits, int at) {
    const dwords four = *(const dwords *)bits >> at & 15;
    return ((four | four << 7 | four << 14 | four << 21) & 0x01010101) << 4;
}
/* Where lines go: into a panel; or, where one token is all there is, straight into its sums, one a group. */
typedef struct {
    panel p;           /* of this step: columns count from its first */
    const block_a8 *x; /* NULL: the panel */
    vi *sum;
    int group, most;
} K(sink);
static INLINE void K(emit)(const K(sink) *s, int column, dwords line) {
    if (!s->x) *(dwords *)(s->p.q + column * LANES) = line;
    else
        s->sum[column / s->group] =
            K(dot_line)(s->sum[column / s->group], line, s->x[column / 32].qs + column % 32, s->most);
}

enum { NIBBLES = 0x0f0f0f0f, PAIRS = 0x03030303, ONES = 0x01010101 };

/* The rows there are, or for the last rows of a matrix a copy in which row 0 fills up the sixteen. */
static INLINE const uint8_t *K(sixteen)(const uint8_t *w, int64_t *stride, int rows, int64_t bytes, uint8_t *spare) {
    if (rows == LANES) return w;
    for (int r = 0; r < LANES; r++)
        __builtin_memcpy(spare + r * SPARE, w + (r < rows ? r : 0) * *stride, (size_t)bytes);
    *stride = SPARE;
    return spare;
}

/* -- Blocks of 32: an f16 scale (and minimum), then bytes, or nibbles and perhaps a fifth bit ------------------------- */

typedef struct {
    int bytes, m, qh, qs;
    const uint8_t *table;
} K(block_layout); /* offsets, -1: none */

/* A step of 18-byte blocks, scale and nibbles, is 36 whole dwords: all of it is turned, scales too. In every other block
 * the nibbles begin in the middle of a dword. */
static INLINE void K(step_of_nine)(const uint8_t *b, int64_t stride, const K(sink) *s, const uint8_t *table,
                                   const uint8_t *next) {
    _Alignas(64) uint8_t lines[36][64];
    const dwords *line = (const dwords *)lines[0];
    for (int i = 0; i < 9; i++) {
        K(prefetch_share)(next + i * 16 * LANES, 16);
        K(transpose_quad)(b + 16 * i, stride, lines[4 * i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < STEP / 32; i++) {
        const int odd = i % 2, at = 9 * (i / 2) + (odd ? 4 : 0);
        *(floats *)(s->p.scale + i * LANES) = K(halves)(line[at] >> 16 * odd);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            dwords packed = line[at + 1 + j];
            if (!odd) packed = line[at + j] >> 16 | packed << 16;
            const dwords low = packed & NIBBLES, high = packed >> 4 & NIBBLES;
            K(emit)(s, 32 * i + 4 * j, table ? K(lookup)(table, low) : low);
            K(emit)(s, 32 * i + 4 * j + 16, table ? K(lookup)(table, high) : high);
        }
    }
}

static INLINE void K(step_of_blocks)(const K(block_layout) f, const int blocks, const uint8_t *base, int64_t stride,
                                     const K(sink) *s, const uint8_t *next) {
    _Alignas(64) uint8_t lines[4][64];
    _Alignas(64) uint16_t d[STEP / 32][LANES], m[STEP / 32][LANES];
    _Alignas(64) uint32_t fifth[STEP / 32][LANES];
    for (int r = 0; r < LANES; r++) {
        const uint8_t *b = base + r * stride;
#pragma GCC unroll 8
        for (int i = 0; i < blocks; i++) {
            __builtin_memcpy(&d[i][r], b + i * f.bytes, 2);
            if (f.m >= 0) __builtin_memcpy(&m[i][r], b + i * f.bytes + f.m, 2);
            if (f.qh >= 0) __builtin_memcpy(&fifth[i][r], b + i * f.bytes + f.qh, 4);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < blocks; i++) {
        float *scale = s->p.scale + i * LANES;
        if (f.qs > 1) {
            K(store)(scale, K(load_f16)((const f16 *)d[i]));
        } else {
            uint32_t *exponents = (uint32_t *)scale;
            for (int r = 0; r < LANES; r++) exponents[r] = K(e8m0)(d[i][r] & 255u);
        }
        if (f.m >= 0) K(store)(s->p.minimum + i * LANES, K(load_f16)((const f16 *)m[i]));
        K(prefetch_share)(next + i * f.bytes * LANES, f.bytes);
        if (f.bytes == sizeof(block_q8_0)) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                K(transpose_quad)(base + i * f.bytes + f.qs + 16 * h, stride, lines[0]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) K(emit)(s, 32 * i + 16 * h + 4 * j, *(dwords *)lines[j] ^ 0x80808080);
            }
            continue;
        }
        K(transpose_quad)(base + i * f.bytes + f.qs, stride, lines[0]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            dwords low = K(bits)(lines[j], 0, NIBBLES, 0), high = K(bits)(lines[j], 4, NIBBLES, 0);
            if (f.qh >= 0) {
                low |= K(fifth)(fifth[i], 4 * j);
                high |= K(fifth)(fifth[i], 4 * j + 16);
            }
            K(emit)(s, 32 * i + 4 * j, f.table ? K(lookup)(f.table, low) : low);
            K(emit)(s, 32 * i + 4 * j + 16, f.table ? K(lookup)(f.table, high) : high);
        }
    }
}
/* One step: up to eight blocks of each row from b on. */
static INLINE void K(blocks_step)(const K(block_layout) f, const uint8_t *b, int64_t stride, int rows, int64_t cols,
                                  const K(sink) *s, const uint8_t *next) {
    _Alignas(64) uint8_t spare[LANES * SPARE];
    const int blocks = cols < STEP ? (int)cols / 32 : STEP / 32;
    b = K(sixteen)(b, &stride, rows, blocks * f.bytes, spare);
    if (blocks < STEP / 32) K(step_of_blocks)(f, blocks, b, stride, s, next);
    else if (f.bytes == sizeof(block_q4_0)) K(step_of_nine)(b, stride, s, f.table, next);
    else K(step_of_blocks)(f, STEP / 32, b, stride, s, next);
}
#define BLOCKS(name, m, qh, qs, table)                                                                                 \
    static INLINE void K(step_##name)(const uint8_t *b, int64_t stride, int rows, int64_t cols, const K(sink) *s,      \
                                      const uint8_t *next) {                                                           \
        const K(block_layout) f = {sizeof(block_##name), m, qh, qs, table};                                            \
        K(blocks_step)(f, b, stride, rows, cols, s, next);                                                             \
    }
BLOCKS(q4_0, -1, -1, 2, NULL)
BLOCKS(q4_1, 2, -1, 4, NULL)
BLOCKS(q5_0, -1, 2, 6, NULL)
BLOCKS(q5_1, 2, 4, 8, NULL)
BLOCKS(q8_0, -1, -1, 2, NULL)
BLOCKS(iq4_nl, -1, -1, 2, K(iq4_table))
BLOCKS(mxfp4, -1, -1, 1, K(fp4_table))
#undef BLOCKS

/* -- Super-blocks of 256 ------------------------------------------------------------------------------------------------- */

static INLINE void K(q_q4_k)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        K(transpose)(b + offsetof(block_q4_k, qs) + 64 * h, stride, lines[0], 16);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const int column = 128 * h + 64 * (j / 8) + 4 * (j % 8);
            K(emit)(s, column, K(bits)(lines[j], 0, NIBBLES, 0));
            K(emit)(s, column + 32, K(bits)(lines[j], 4, NIBBLES, 0));
        }
    }
}
static INLINE void K(q_q5_k)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64], high[8][64];
    K(transpose)(b + offsetof(block_q5_k, qh), stride, high[0], 8);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        K(transpose)(b + offsetof(block_q5_k, qs) + 64 * h, stride, lines[0], 16);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const int piece = 2 * (2 * h + j / 8);
            const int column = 32 * piece + 4 * (j % 8);
            K(emit)(s, column, K(bits)(lines[j], 0, NIBBLES, 0) | K(bits)(high[j % 8], piece, ONES, 4));
            K(emit)(s, column + 32, K(bits)(lines[j], 4, NIBBLES, 0) | K(bits)(high[j % 8], piece + 1, ONES, 4));
        }
    }
}
static INLINE void K(q_q6_k)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64], high[16][64];
    K(transpose)(b + offsetof(block_q6_k, qh), stride, high[0], 16);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        K(transpose)(b + offsetof(block_q6_k, ql) + 64 * h, stride, lines[0], 16);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const int column = 128 * h + 4 * j;
            const uint8_t *two = high[8 * h + j % 8];
            K(emit)(s, column, K(bits)(lines[j], 0, NIBBLES, 0) | K(bits)(two, 2 * (j / 8), PAIRS, 4));
            K(emit)(s, column + 64, K(bits)(lines[j], 4, NIBBLES, 0) | K(bits)(two, 4 + 2 * (j / 8), PAIRS, 4));
        }
    }
}
static INLINE void K(q_iq4_xs)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        K(transpose)(b + offsetof(block_iq4_xs, qs) + 64 * h, stride, lines[0], 16);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const int column = 128 * h + 32 * (j / 4) + 4 * (j % 4);
            K(emit)(s, column, K(lookup)(K(iq4_table), K(bits)(lines[j], 0, NIBBLES, 0)));
            K(emit)(s, column + 16, K(lookup)(K(iq4_table), K(bits)(lines[j], 4, NIBBLES, 0)));
        }
    }
}
static INLINE void K(q_q2_k)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64];
    K(transpose)(b + offsetof(block_q2_k, qs), stride, lines[0], 16);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
            K(emit)(s, 128 * (j / 8) + 32 * g + 4 * (j % 8), K(bits)(lines[j], 2 * g, PAIRS, 0));
}
static INLINE void K(q_q3_k)(const uint8_t *b, int64_t stride, const K(sink) *s) {
    _Alignas(64) uint8_t lines[16][64], high[8][64];
    K(transpose)(b + offsetof(block_q3_k, hmask), stride, high[0], 8);
    K(transpose)(b + offsetof(block_q3_k, qs), stride, lines[0], 16);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
            K(emit)(s, 128 * (j / 8) + 32 * g + 4 * (j % 8),
                    K(bits)(lines[j], 2 * g, PAIRS, 0) | K(bits)(high[j % 8], 4 * (j / 8) + g, ONES, 2));
}

/* Eight 6-bit scales and minima and their f16 factors, the first 16 bytes of a block. */
static INLINE void K(scales_by_lane_k)(const uint8_t *b, int64_t stride, panel p) {
    _Alignas(64) uint8_t lines[4][64];
    K(transpose_quad)(b, stride, lines[0]);
    const dwords first = *(dwords *)lines[1], second = *(dwords *)lines[2], third = *(dwords *)lines[3];
    const dwords scales[2] = {first & 0x3f3f3f3f, (third & NIBBLES) | (first >> 2 & 0x30303030)};
    const dwords minima[2] = {second & 0x3f3f3f3f, (third >> 4 & NIBBLES) | (second >> 2 & 0x30303030)};
    const floats d = K(halves)(*(dwords *)lines[0]), dmin = -K(halves)(*(dwords *)lines[0] >> 16);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        const int at = g % 4 * 8;
        *(floats *)(p.scale + g * LANES) = d * K(number)(scales[g / 4] >> at & 255);
        *(floats *)(p.minimum + g * LANES) = dmin * K(number)(minima[g / 4] >> at & 255);
    }
}
#define BY_LANE_q4_k K(scales_by_lane_k)
#define BY_LANE_q5_k K(scales_by_lane_k)

/* Sixteen signed bytes and one f16 factor. */
static INLINE void K(scales_by_lane_q6_k)(const uint8_t *b, int64_t stride, panel p) {
    _Alignas(64) uint8_t lines[4][64];
    _Alignas(64) uint32_t factors[LANES];
    K(transpose_quad)(b + offsetof(block_q6_k, scales), stride, lines[0]);
    for (int r = 0; r < LANES; r++) {
        uint16_t d;
        __builtin_memcpy(&d, b + r * stride + offsetof(block_q6_k, d), 2);
        factors[r] = d;
    }
    const floats d = K(halves)(*(dwords *)factors);
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) {
        const signed_dwords x = (signed_dwords)(*(dwords *)lines[g / 4] << (24 - g % 4 * 8)) >> 24;
        *(floats *)(p.scale + g * LANES) = d * __builtin_convertvector(x, floats);
    }
}
#define BY_LANE_q6_k K(scales_by_lane_q6_k)

/* The rarer formats decode their scales row by row. */
#define BY_ROW(name, group, minima)                                                                                    \
    static INLINE void K(scales_by_row_##name)(const uint8_t *b, int64_t stride, panel p) {                            \
        _Alignas(64) float scale[LANES][16], minimum[LANES][16];                                                       \
        for (int r = 0; r < LANES; r++)                                                                                \
            K(scales_##name)((const block_##name *)(b + r * stride), scale[r], minimum[r]);                            \
        K(transpose)((uint8_t *)scale, 64, (uint8_t *)p.scale, STEP / (group));                                        \
        if (minima) K(transpose)((uint8_t *)minimum, 64, (uint8_t *)p.minimum, STEP / (group));                        \
    }
BY_ROW(q2_k, 16, 1)
BY_ROW(q3_k, 16, 0)
BY_ROW(iq4_xs, 32, 0)
#undef BY_ROW
#define BY_LANE_q2_k K(scales_by_row_q2_k)
#define BY_LANE_q3_k K(scales_by_row_q3_k)
#define BY_LANE_iq4_xs K(scales_by_row_iq4_xs)

#define SUPER(name)                                                                                                    \
    static INLINE void K(step_##name)(const uint8_t *b, int64_t stride, int rows, int64_t cols, const K(sink) *s,      \
                                      const uint8_t *next) {                                                           \
        enum { BYTES = sizeof(block_##name) };                                                                         \
        _Alignas(64) uint8_t spare[LANES * SPARE];                                                                     \
        (void)cols;                                                                                                    \
        b = K(sixteen)(b, &stride, rows, BYTES, spare);                                                                \
        K(prefetch_share)(next, BYTES / 2);                                                                            \
        BY_LANE_##name(b, stride, s->p);                                                                               \
        K(prefetch_share)(next + BYTES * LANES / 2, BYTES / 2);                                                        \
        K(q_##name)(b, stride, s);                                                                                     \
    }
SUPER(q2_k)
SUPER(q3_k)
SUPER(q4_k)
SUPER(q5_k)
SUPER(q6_k)
SUPER(iq4_xs)
#undef SUPER

/* -- Steps put together: a panel of many columns, or the results of one token ------------------------------------------- */

#define QUANT(name, NAME, values, group, bias, most, minima)                                                           \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p,                    \
                                 const uint8_t *next) {                                                                \
        for (int64_t k = 0; k < cols; k += STEP) {                                                                     \
            const int64_t at = k / (values) * (int64_t)sizeof(block_##name), g = k / (group) * LANES;                  \
            const K(sink) s = {{p.q + k * LANES, p.scale + g, p.minimum + g}, NULL, NULL, group, most};                \
            K(step_##name)(w + at, stride, rows, cols - k, &s, next + at * LANES);                                     \
        }                                                                                                              \
    }                                                                                                                  \
    static void K(one_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, const block_a8 *x, float *y,   \
                              const uint8_t *next) {                                                                   \
        _Alignas(64) float scale[STEP / (group)][LANES], minimum[STEP / (group)][LANES];                               \
        vf total = K(zero)();                                                                                          \
        for (int64_t k = 0; k < cols; k += STEP, x += STEP / 32) {                                                     \
            const int64_t at = k / (values) * (int64_t)sizeof(block_##name);                                           \
            const int groups = (int)((values) < STEP && cols - k < STEP ? cols - k : STEP) / (group);                  \
            vi sum[STEP / (group)];                                                                                    \
            _Pragma("GCC unroll 16") for (int g = 0; g < STEP / (group); g++) {                                        \
                const block_a8 *a = x + (g < groups ? g * (group) / 32 : 0);                                           \
                const int32_t half = g % 2 ? a->minus_sum - a->minus_half : a->minus_half;                             \
                sum[g] = K(start)(bias, most, (group) == 32 ? a->minus_sum : half);                                    \
            }                                                                                                          \
            const K(sink) s = {{NULL, scale[0], minimum[0]}, x, sum, group, most};                                     \
            K(step_##name)(w + at, stride, rows, cols - k, &s, next + at * LANES);                                     \
            _Pragma("GCC unroll 16") for (int g = 0; g < STEP / (group); g++) {                                        \
                if (g >= groups) break;                                                                                \
                const block_a8 *a = x + g * (group) / 32;                                                              \
                total = K(fma)(K(to_float)(sum[g]), K(mul)(K(load)(scale[g]), K(set1)(a->d)), total);                  \
                if (!(minima)) continue;                                                                               \
                const int32_t half = g % 2 ? a->minus_sum - a->minus_half : a->minus_half;                             \
                total = K(fma)(K(load)(minimum[g]), K(set1)((group) == 32 ? a->dsum : a->d * (float)-half), total);    \
            }                                                                                                          \
        }                                                                                                              \
        K(store)(y, total);                                                                                            \
    }
#include "../quants.def"
#undef QUANT

/* -- Floats ----------------------------------------------------------------------------------------------------------------- */

#define FLOATS(name, value, load)                                                                                      \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p,                    \
                                 const uint8_t *next) {                                                                \
        float *out = (float *)p.q;                                                                                     \
        for (int64_t k = 0; k < cols; k += 16) {                                                                       \
            _Alignas(64) float lines[LANES][LANES];                                                                    \
            for (int r = 0; r < LANES; r++) {                                                                          \
                const value *row = (const value *)(w + (r < rows ? r : 0) * stride) + k;                               \
                K(store)(lines[r], load(row));                                                                         \
                K(prefetch)(next + (k * LANES + 16 * r) * (int64_t)sizeof(value));                                     \
            }                                                                                                          \
            K(transpose)((const uint8_t *)lines, 64, (uint8_t *)(out + k * LANES), 16);                                \
        }                                                                                                              \
    }
FLOATS(f32, float, K(load))
FLOATS(f16, f16, K(load_f16))
FLOATS(bf16, bf16, K(load_bf16))
#undef FLOATS
