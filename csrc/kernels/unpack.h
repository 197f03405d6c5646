/* Panels: sixteen rows of a matrix, unpacked from the mapped blocks so that each lane holds a row.
 *
 * unpack(row 0 at column 0, bytes from row to row, rows that exist, columns, panel, the region to prefetch). Rows that
 * do not exist repeat row 0. 256 columns at a time: bytes are gathered row by row, turned by a 16 x 16 transpose of
 * dwords, and split into q where all lanes do the same. The next panel is one contiguous region, prefetched as one
 * stream, a share with each step.
 */

enum {
    PANEL_BYTES = STRETCH_COLS * LANES,         /* q, or floats of a quarter of the columns */
    GROUP_FLOATS = STRETCH_COLS / 16 * LANES,
    STEP = 256,
};

typedef struct {
    uint8_t *q;         /* [cols / 4][LANES][4], or f32 [cols][LANES] */
    float   *scale;     /* [groups][LANES] */
    float   *minimum;   /* [groups][LANES] */
} panel;

/* Columns of one panel: floats take four times the room of q. */
static inline int64_t K(stretch_cols)(int32_t type) {
    return type == TYPE_F32 || type == TYPE_F16 || type == TYPE_BF16 ? STRETCH_COLS / 4 : STRETCH_COLS;
}

static INLINE void K(prefetch_share)(const uint8_t *next, int64_t at, int64_t bytes) {
    for (int64_t n = 0; n < bytes; n += 64) K(prefetch)(next + at + n);
}

/* -- Blocks of 32 with an f16 scale (and minimum) before 16 bytes of nibbles, perhaps a fifth bit in between ---------- */

typedef struct { int bytes, d, m, qh, qs; const uint8_t *table; } K(nibble_layout);      /* offsets, -1: none */

static INLINE void K(unpack_nibbles)(const K(nibble_layout) f, const uint8_t *w, int64_t stride, int rows, int64_t cols,
                                     panel p, const uint8_t *next) {
    for (int64_t k = 0; k < cols; k += STEP) {
        _Alignas(64) uint8_t packed[LANES][STEP / 2], line[LANES][64];
        _Alignas(64) uint16_t d[STEP / 32][LANES], m[STEP / 32][LANES];
        _Alignas(64) uint32_t fifth[STEP / 32][LANES];
        const int blocks = cols - k < STEP ? (int)(cols - k) / 32 : STEP / 32;
        const int64_t at = k / 32 * f.bytes;
        for (int r = 0; r < LANES; r++) {
            const uint8_t *b = w + (r < rows ? r : 0) * stride + at;
            for (int i = 0; i < blocks; i++, b += f.bytes) {
                __builtin_memcpy(packed[r] + 16 * i, b + f.qs, 16);
                if (f.d >= 0) __builtin_memcpy(&d[i][r], b + f.d, 2);
                else d[i][r] = b[0];
                if (f.m >= 0) __builtin_memcpy(&m[i][r], b + f.m, 2);
                if (f.qh >= 0) __builtin_memcpy(&fifth[i][r], b + f.qh, 4);
            }
            K(prefetch_share)(next, at * LANES + (int64_t)r * blocks * f.bytes, (int64_t)blocks * f.bytes);
        }
        for (int i = 0; i < blocks; i++) {
            float *scale = p.scale + (k / 32 + i) * LANES;
            if (f.d >= 0) {
                K(store)(scale, K(load_f16)((const f16 *)d[i]));
            } else {
                uint32_t *bits = (uint32_t *)scale;
                for (int r = 0; r < LANES; r++) bits[r] = K(e8m0)(d[i][r]);
            }
            if (f.m >= 0) K(store)(p.minimum + (k / 32 + i) * LANES, K(load_f16)((const f16 *)m[i]));
        }
        for (int i = 0; i < blocks; i += 4) {
            const int lines = blocks - i < 4 ? 4 * (blocks - i) : 16;
            K(transpose)(packed[0] + 16 * i, STEP / 2, line[0], lines <= 8 ? 8 : 16);
            for (int j = 0; j < lines; j++) {
                uint8_t *low = p.q + (k + 32 * (i + j / 4) + 4 * (j % 4)) * LANES, *high = low + 16 * LANES;
                K(split)(line[j], low, high);
                if (f.qh >= 0) {
                    K(add_bits)(fifth[i + j / 4], 4 * (j % 4), low);
                    K(add_bits)(fifth[i + j / 4], 4 * (j % 4) + 16, high);
                }
                if (f.table) {
                    K(lookup)(f.table, low);
                    K(lookup)(f.table, high);
                }
            }
        }
    }
}
#define NIBBLES(name, d, m, qh, qs, table)                                                                             \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p, const uint8_t *next) { \
        const K(nibble_layout) f = {sizeof(block_##name), d, m, qh, qs, table};                                        \
        K(unpack_nibbles)(f, w, stride, rows, cols, p, next);                                                          \
    }
NIBBLES(q4_0, 0, -1, -1, 2, NULL)
NIBBLES(q4_1, 0, 2, -1, 4, NULL)
NIBBLES(q5_0, 0, -1, 2, 6, NULL)
NIBBLES(q5_1, 0, 2, 4, 8, NULL)
NIBBLES(iq4_nl, 0, -1, -1, 2, K(iq4_table))
NIBBLES(mxfp4, -1, -1, -1, 1, K(fp4_table))
#undef NIBBLES

static void K(unpack_q8_0)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p, const uint8_t *next) {
    for (int64_t k = 0; k < cols; k += STEP) {
        _Alignas(64) uint8_t bytes[LANES][STEP];
        _Alignas(64) uint16_t d[STEP / 32][LANES];
        const int blocks = cols - k < STEP ? (int)(cols - k) / 32 : STEP / 32;
        const int64_t at = k / 32 * (int64_t)sizeof(block_q8_0);
        for (int r = 0; r < LANES; r++) {
            const block_q8_0 *b = (const block_q8_0 *)(w + (r < rows ? r : 0) * stride + at);
            for (int i = 0; i < blocks; i++) {
                __builtin_memcpy(bytes[r] + 32 * i, b[i].qs, 32);
                d[i][r] = b[i].d.bits;
            }
            K(prefetch_share)(next, at * LANES + r * blocks * (int64_t)sizeof *b, blocks * (int64_t)sizeof *b);
        }
        for (int i = 0; i < blocks; i++)
            K(store)(p.scale + (k / 32 + i) * LANES, K(load_f16)((const f16 *)d[i]));
        for (int i = 0; i < blocks; i += 2) {
            uint8_t *out = p.q + (k + 32 * i) * LANES;
            const int lines = blocks - i < 2 ? 8 : 16;
            K(transpose)(bytes[0] + 32 * i, STEP, out, lines);
            for (int j = 0; j < 64 * lines; j++) out[j] ^= 128;
        }
    }
}

/* -- Super-blocks of 256: decoded row by row, scales turned like the bytes ------------------------------------------------ */

#define SUPER(name, group, minima)                                                                                     \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p, const uint8_t *next) { \
        enum { GROUPS = STEP / (group) };                                                                              \
        for (int64_t k = 0; k < cols; k += STEP) {                                                                     \
            _Alignas(64) uint8_t q[LANES][STEP];                                                                       \
            _Alignas(64) float scale[LANES][16], minimum[LANES][16];                                                   \
            const int64_t at = k / STEP * (int64_t)sizeof(block_##name);                                               \
            for (int r = 0; r < LANES; r++) {                                                                          \
                K(decode_##name)((const block_##name *)(w + (r < rows ? r : 0) * stride + at), q[r], scale[r], minimum[r]); \
                K(prefetch_share)(next, at * LANES + r * (int64_t)sizeof(block_##name), sizeof(block_##name));         \
            }                                                                                                          \
            K(transpose)((uint8_t *)scale, 64, (uint8_t *)(p.scale + k / (group) * LANES), GROUPS);                    \
            if (minima) K(transpose)((uint8_t *)minimum, 64, (uint8_t *)(p.minimum + k / (group) * LANES), GROUPS);    \
            for (int i = 0; i < STEP; i += 64) K(transpose)(q[0] + i, STEP, p.q + (k + i) * LANES, 16);                \
        }                                                                                                              \
    }
SUPER(q2_k, 16, 1)
SUPER(q3_k, 16, 0)
SUPER(q4_k, 32, 1)
SUPER(q5_k, 32, 1)
SUPER(q6_k, 16, 0)
SUPER(iq4_xs, 32, 0)
#undef SUPER

/* -- Floats ----------------------------------------------------------------------------------------------------------------- */

#define FLOATS(name, value, load)                                                                                      \
    static void K(unpack_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, panel p, const uint8_t *next) { \
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
