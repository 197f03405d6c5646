/* y = x . W' for every weight type, for one token or a thousand.
 *
 * Sixteen rows of W are unpacked into a panel, lane = row, straight from the mapped blocks: unsigned bytes with scales
 * per group of 16 or 32, or floats. A panel then meets tiles of tokens from cache. Every (row, token) sum runs in the
 * order of k, an exact integer dot and one fused multiply-add a group, so its bits depend on neither the tile, the
 * stretch, the thread, nor the instruction set.
 */

enum {
    PANELS = STRETCH_ROWS / LANES,
    TILE_BATCH = 60, /* tokens whose result pointers are laid out at a time */
};

/* -- Tiles: a panel against some tokens; the sums so far are in y --------------------------------------- */

static INLINE void K(tile_floats)(const int tokens, panel p, const float *const *x, float *const *y, int64_t k0,
                                  int64_t cols) {
    const float *w = (const float *)p.q;
    vf sum[12];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) sum[t] = k0 ? K(load)(y[t]) : K(zero)();
    for (int64_t k = 0; k < cols; k++) {
        const vf column = K(load)(w + k * LANES);
#pragma GCC unroll 12
        for (int t = 0; t < tokens; t++) sum[t] = K(fma)(column, K(set1)(x[t][k0 + k]), sum[t]);
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) K(store)(y[t], sum[t]);
}

/* SIDE_TOKENS share each line of the panel while it is in a register. */
static INLINE void K(tile_groups)(const int tokens, const int group, const int bias, const int most, const int minima,
                                  panel p, const block_a8 *const *x, float *const *y, int64_t k0, int64_t cols) {
    enum { SIDE = SIDE_TOKENS };
    const int side = tokens % SIDE ? 1 : SIDE, halves = 32 / group;
    vf sum[12];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) sum[t] = k0 ? K(load)(y[t]) : K(zero)();
    for (int64_t b = 0; b < cols / 32; b++) {
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
            const int64_t g = b * halves + h;
            const uint8_t *w = p.q + g * group * LANES;
            const float *scale = p.scale + g * LANES, *minimum = p.minimum + g * LANES;
#pragma GCC unroll 12
            for (int t0 = 0; t0 < tokens; t0 += side) {
                const block_a8 *a[SIDE];
                const int8_t *q[SIDE];
                int32_t minus[SIDE];
                vi dot[SIDE];
#pragma GCC unroll 4
                for (int t = 0; t < side; t++) {
                    a[t] = x[t0 + t] + k0 / 32 + b;
                    q[t] = a[t]->qs + group * h;
                    minus[t] = K(minus)(a[t], group, h);
                }
                K(dots)(side, w, q, group / 4, bias, most, minus, dot);
#pragma GCC unroll 4
                for (int t = 0; t < side; t++) {
                    vf *total = &sum[t0 + t];
                    *total = K(fma)(K(to_float)(dot[t]), K(mul)(K(load)(scale), K(set1)(a[t]->d)), *total);
                    if (!minima) continue;
                    const float dsum = group == 32 ? a[t]->dsum : a[t]->d * (float)-minus[t];
                    *total = K(fma)(K(load)(minimum), K(set1)(dsum), *total);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; t++) K(store)(y[t], sum[t]);
}

#define TILES(name, call)                                                                                              \
    static void K(tiles_##name)(panel p, const void *const *xs, float *const *y, int64_t tokens, int64_t k0,           \
                                int64_t cols) {                                                                        \
        int64_t t = 0;                                                                                                 \
        for (; t + TILE_TOKENS <= tokens; t += TILE_TOKENS) call(TILE_TOKENS);                                         \
        for (; t + 4 <= tokens; t += 4) call(4);                                                                       \
        for (; t < tokens; t++) call(1);                                                                               \
    }
#define FLOAT_TILE(n) K(tile_floats)(n, p, (const float *const *)xs + t, y + t, k0, cols)
TILES(floats, FLOAT_TILE)
#define QUANT(name, NAME, values, group, bias, most, minima)                                                           \
    static void K(tiles_##name)(panel p, const void *const *xs, float *const *y, int64_t tokens, int64_t k0,           \
                                int64_t cols) {                                                                        \
        const block_a8 *const *x = (const block_a8 *const *)xs;                                                        \
        int64_t t = 0;                                                                                                 \
        for (; t + TILE_TOKENS <= tokens; t += TILE_TOKENS)                                                            \
            K(tile_groups)(TILE_TOKENS, group, bias, most, minima, p, x + t, y + t, k0, cols);                         \
        for (; t + 4 <= tokens; t += 4) K(tile_groups)(4, group, bias, most, minima, p, x + t, y + t, k0, cols);       \
        for (; t < tokens; t++) K(tile_groups)(1, group, bias, most, minima, p, x + t, y + t, k0, cols);               \
    }
#include "../quants.def"
#undef QUANT
#undef FLOAT_TILE
#undef TILES

/* -- All types by number ----------------------------------------------------------------------------------- */

typedef struct {
    void (*unpack)(const uint8_t *, int64_t, int, int64_t, panel, const uint8_t *);
    void (*tiles)(panel, const void *const *, float *const *, int64_t, int64_t, int64_t);
    void (*few[4])(const uint8_t *, int64_t, int, int64_t, const void *const *, float *const *, const uint8_t *);
} K(matmul_kernel);

#define FEW_OF(name) {K(few1_##name), K(few2_##name), K(few4_##name), K(few8_##name)}
static const K(matmul_kernel) K(matmul_kernels)[TYPE_COUNT] = {
    [TYPE_F32] = {K(unpack_f32), K(tiles_floats), FEW_OF(f32)},
    [TYPE_F16] = {K(unpack_f16), K(tiles_floats), FEW_OF(f16)},
    [TYPE_BF16] = {K(unpack_bf16), K(tiles_floats), FEW_OF(bf16)},
#define QUANT(name, NAME, values, group, bias, most, minima)                                                           \
    [TYPE_##NAME] = {K(unpack_##name), K(tiles_##name), FEW_OF(name)},
#include "../quants.def"
#undef QUANT
};
#undef FEW_OF

/* From a panel's rows to those prefetched meanwhile. */
static INLINE int64_t K(ahead)(int64_t stride) {
    return (LEAD_BYTES + LANES * stride - 1) / (LANES * stride) * (LANES * stride);
}

/* Weight rows first ... first + rows against at most FEW_TOKENS tokens, whose sums stay in registers; the last repeats up
 * to a power of two. */
static void K(matmul_few)(const weight *w, int64_t first, int64_t rows, const void *const *x, float *const *y,
                          int tokens) {
    const K(matmul_kernel) kernel = K(matmul_kernels)[w->type];
    const int64_t stride = row_bytes(w->type, w->cols), ahead = K(ahead)(stride);
    const uint8_t *base = (const uint8_t *)(uintptr_t)w->data + first * stride;
    const void *token[FEW_TOKENS];
    float spare[FEW_TOKENS][LANES], *to[FEW_TOKENS];
    int power = 0;
    while (1 << power < tokens) power++;
    const int count = 1 << power;
    for (int t = 0; t < count; t++) token[t] = x[t < tokens ? t : tokens - 1];
    for (int64_t r = 0; r < rows; r += LANES) {
        const int valid = rows - r < LANES ? (int)(rows - r) : LANES;
        for (int t = 0; t < count; t++) to[t] = valid == LANES && t < tokens ? y[t] + r : spare[t];
        const uint8_t *at = base + r * stride;
        kernel.few[power](at, stride, valid, w->cols, token, to, at + ahead);
        for (int t = 0; valid < LANES && t < tokens; t++)
            __builtin_memcpy(y[t] + r, spare[t], (size_t)valid * sizeof(float));
    }
}

/* Weight rows first ... first + rows (at most STRETCH_ROWS) against `tokens` rows x; y[t] points at the first result. */
static void K(matmul_stretch)(const weight *w, int64_t first, int64_t rows, const void *const *x, float *const *y,
                              int64_t tokens, uint8_t *scratch) {
    const K(matmul_kernel) kernel = K(matmul_kernels)[w->type];
    const int64_t stride = row_bytes(w->type, w->cols), most = K(stretch_cols)(w->type, tokens);
    const uint8_t *base = (const uint8_t *)(uintptr_t)w->data + first * stride;
    const int64_t ahead = K(ahead)(stride);
    if (tokens <= FEW_TOKENS) {
        K(matmul_few)(w, first, rows, x, y, (int)tokens);
        return;
    }
    const int together = tokens > LANES ? STRETCH_ROWS / LANES : 1;
    float *groups = (float *)(scratch + PANELS * PANEL_BYTES);
    float *spare = groups + 2 * PANELS * GROUP_FLOATS;
    float *at[TILE_BATCH];
    for (int64_t r0 = 0; r0 < rows; r0 += together * LANES) {
        for (int64_t k0 = 0; k0 < w->cols; k0 += most) {
            const int64_t cols = w->cols - k0 < most ? w->cols - k0 : most;
            const int left = (int)((rows - r0 + LANES - 1) / LANES), panels = left < together ? left : together;
            panel p[PANELS];
            for (int i = 0; i < panels; i++) {
                const int64_t r = r0 + i * LANES;
                p[i] = (panel){scratch + i * PANEL_BYTES, groups + 2 * i * GROUP_FLOATS,
                               groups + (2 * i + 1) * GROUP_FLOATS};
                const int64_t before = row_bytes(w->type, k0);
                const int valid = rows - r < LANES ? (int)(rows - r) : LANES;
                const uint8_t *next = base + r * stride + ahead + LANES * before;
                kernel.unpack(base + r * stride + before, stride, valid, cols, p[i], next);
            }
            for (int64_t t0 = 0; t0 < tokens; t0 += TILE_BATCH) {
                const int64_t n = tokens - t0 < TILE_BATCH ? tokens - t0 : TILE_BATCH;
                for (int i = 0; i < panels; i++) {
                    const int64_t r = r0 + i * LANES;
                    if (rows - r >= LANES) {
                        for (int64_t t = 0; t < n; t++) at[t] = y[t0 + t] + r;
                        kernel.tiles(p[i], x + t0, at, n, k0, cols);
                        continue;
                    }
                    /* The last rows of a matrix whose height is no multiple of 16 end in a spare row. */
                    const size_t bytes = (size_t)(rows - r) * sizeof(float);
                    for (int64_t t = 0; t < n; t++) {
                        at[t] = spare + t * LANES;
                        if (k0) __builtin_memcpy(at[t], y[t0 + t] + r, bytes);
                    }
                    kernel.tiles(p[i], x + t0, at, n, k0, cols);
                    for (int64_t t = 0; t < n; t++) __builtin_memcpy(y[t0 + t] + r, at[t], bytes);
                }
            }
        }
    }
}

/* As matmul_stretch, where the first `prompt` of up to MOST_TOKENS tokens are prompt rows. */
static void K(matmul_rows)(const weight *w, int64_t first, int64_t rows, const void *const *x, float *const *y,
                           int64_t tokens, int64_t prompt, uint8_t *scratch) {
#ifdef AMX
    if (prompt && w->type != TYPE_F32) {
        K(matmul_prompt)(w, first, rows, x, y, prompt, scratch);
        x += prompt;
        y += prompt;
        tokens -= prompt;
    }
#endif
    (void)prompt;
    if (tokens) K(matmul_stretch)(w, first, rows, x, y, tokens, scratch);
}

static void K(matmul)(const op *o, const context *c, int32_t chunk) {
    const weight *w = &c->weights[o->weight[0]];
    const int32_t tokens = rows_of(o, c), share = matmul_share(w, o, c, c->threads), prompt = prompt_rows(o, c);
    const int64_t first = (int64_t)chunk * share, rows = w->rows - first < share ? w->rows - first : share;
    const void **x = (const void **)c->scratch;
    float **y = (float **)(x + MOST_TOKENS);
    for (int32_t t0 = 0; t0 < tokens; t0 += MOST_TOKENS) {
        const int32_t n = tokens - t0 < MOST_TOKENS ? tokens - t0 : MOST_TOKENS;
        for (int32_t t = 0; t < n; t++) {
            x[t] = buffer_row(c, o->in[0], t0 + t);
            y[t] = (float *)buffer_row(c, o->out, t0 + t) + first;
        }
        K(matmul_rows)(w, first, rows, x, y, n, prompt_among(prompt, t0, n), (uint8_t *)(y + MOST_TOKENS));
    }
}
