/* Prompt rows against all but F32 weights, on tiles: both rounded to bf16, their products summed in float32.
 *
 * Of AMX_ROWS weight rows AMX_COLS columns at a time are unpacked into tiles, [16 rows][32 k] each, for up to MOST_TOKENS
 * tokens; 32 tokens meet 32 rows with four tiles of sums, which rest in memory from one piece of columns to the next.
 * So a (row, token) sum runs in the order of k, 32 at a time as simd/amx.h has it, and its bits depend on neither the
 * share, the piece, the thread, nor on what it runs beside.
 *
 * The tokens' piece, 32 KiB, stays in the first cache (48 KiB) while weights, 256 KiB, and sums come from the second.
 */

enum {
    AMX_COLS = 512, /* whole blocks of every format */
    AMX_BYTES = 1024,
    AMX_PAIR = 2 * LANES,
};

/* All that a thread's scratch holds meanwhile. */
typedef struct {
    uint8_t weights[AMX_ROWS / LANES][AMX_COLS / 32][AMX_BYTES];
    uint8_t tokens[AMX_PAIR][2 * AMX_COLS];
    uint8_t q[AMX_COLS * LANES];
    float scale[AMX_COLS / 16 * LANES], minimum[AMX_COLS / 16 * LANES];
    float sums[][4 * LANES * LANES]; /* of 32 tokens and 32 rows; [2 x 16 tokens][2 x 16 rows] */
} K(prompt_room);
_Static_assert(sizeof(K(prompt_room)) + MOST_TOKENS * AMX_ROWS * sizeof(float) + 2 * MOST_TOKENS * sizeof(void *) <=
                   THREAD_BYTES,
               "scratch of a matmul");

/* -- Sixteen rows become tiles ------------------------------------------------------------------------------------ */

static INLINE void K(tiles_of_groups)(const int group, const int bias, const int minima, const K(prompt_room) *room,
                                      int64_t cols, uint8_t *to) {
    for (int64_t k0 = 0; k0 < cols; k0 += group) {
        const vf scale = K(load)(room->scale + k0 / group * LANES);
        const vf minimum = minima ? K(load)(room->minimum + k0 / group * LANES) : K(zero)();
#pragma GCC unroll 8
        for (int64_t k = k0; k < k0 + group; k += 4) {
            const vi four = K(load_line)(room->q + k * LANES);
            vf column[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const vf q = K(byte_of_each)(four, i, bias);
                column[i] = minima ? K(fma)(q, scale, minimum) : K(mul)(q, scale);
            }
            K(store_line)(to + k * 32, K(pair_columns)(column[0], column[1]));
            K(store_line)(to + k * 32 + 64, K(pair_columns)(column[2], column[3]));
        }
    }
}
#define QUANT(name, NAME, values, group, bias, most, minima)                                                           \
    static void K(tiles_of_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, K(prompt_room) *room,     \
                                   uint8_t *to, const uint8_t *next) {                                                 \
        K(unpack_##name)(w, stride, rows, cols, (panel){room->q, room->scale, room->minimum}, next);                   \
        K(tiles_of_groups)(group, bias, minima, room, cols, to);                                                       \
    }
#include "../quants.def"
#undef QUANT
#define FLOATS(name)                                                                                                   \
    static void K(tiles_of_##name)(const uint8_t *w, int64_t stride, int rows, int64_t cols, K(prompt_room) *room,     \
                                   uint8_t *to, const uint8_t *next) {                                                 \
        (void)room;                                                                                                    \
        for (int64_t k = 0; k < cols; k += 16) {                                                                       \
            vf column[16];                                                                                             \
            K(columns_of_##name)(w, stride, rows, k, column, next);                                                    \
            _Pragma("GCC unroll 8") for (int j = 0; j < 16; j += 2)                                                    \
                K(store_line)(to + (k + j) * 32, K(pair_columns)(column[j], column[j + 1]));                           \
        }                                                                                                              \
    }
FLOATS(f16)
FLOATS(bf16)
#undef FLOATS

static void (*const K(tiles_of)[TYPE_COUNT])(const uint8_t *, int64_t, int, int64_t, K(prompt_room) *, uint8_t *,
                                             const uint8_t *) = {
    [TYPE_F16] = K(tiles_of_f16),
    [TYPE_BF16] = K(tiles_of_bf16),
#define QUANT(name, NAME, values, group, bias, most, minima) [TYPE_##NAME] = K(tiles_of_##name),
#include "../quants.def"
#undef QUANT
};

/* -- Tokens against tiles ------------------------------------------------------------------------------------------ */

/* Columns of up to 32 tokens, rows of bf16 `apart` bytes: where they are, or copied if they are no full 32, scattered,
 * or floats still. What is missing of sixteen is zeros. */
static const uint8_t *K(tokens_at)(int floats, const void *const *x, int64_t tokens, int64_t k0, int64_t cols,
                                   K(prompt_room) *room, int64_t *apart) {
    const uintptr_t first = (uintptr_t)x[0];
    int64_t n = 0;
    *apart = tokens > 1 ? (int64_t)((uintptr_t)x[1] - first) : 0;
    while (!floats && n < tokens && (uintptr_t)x[n] == first + (uintptr_t)(n * *apart)) n++;
    if (n == AMX_PAIR) return (const uint8_t *)x[0] + 2 * k0;
    for (n = 0; n < tokens; n++)
        if (floats) K(round_blocks)((const float *)x[n] + k0, (bf16 *)room->tokens[n], cols);
        else __builtin_memcpy(room->tokens[n], (const uint8_t *)x[n] + 2 * k0, 2 * (size_t)cols);
    for (; n % LANES; n++) __builtin_memset(room->tokens[n], 0, 2 * (size_t)cols);
    *apart = sizeof room->tokens[0];
    return room->tokens[0];
}

/* Sixteen tokens, or 32 (`high`), against sixteen rows, or 32 (`wide`), over `tiles` x 32 columns; the sums begin at
 * zero or go on. The next sums and four rows of the next tokens (NULL: none) are fetched meanwhile. */
static INLINE void K(meet)(const int high, const int wide, const uint8_t *x, int64_t apart, const uint8_t *w,
                           int64_t tiles, float *sums, int go_on, const uint8_t *ahead) {
    enum { SUMS = LANES * LANES, LINE = 64, ROWS = AMX_COLS / 32 * AMX_BYTES };
    const uint8_t *more = x + LANES * apart;
    if (go_on) {
        amx_load(0, sums, LINE);
        if (wide) amx_load(1, sums + SUMS, LINE);
        if (high) amx_load(2, sums + 2 * SUMS, LINE);
        if (high && wide) amx_load(3, sums + 3 * SUMS, LINE);
    } else {
        amx_zero(0);
        amx_zero(1);
        amx_zero(2);
        amx_zero(3);
    }
    for (int64_t i = 0; i < tiles; i++) {
        for (int64_t j = 0; j < 4; j++) {
            __builtin_prefetch(sums + 4 * SUMS + (4 * i + j) * LANES, 1, 3);
            if (ahead) K(prefetch)(ahead + j * apart + i * LINE);
        }
        amx_stream(6, w + i * AMX_BYTES, LINE);
        amx_load(4, x + i * LINE, apart);
        amx_dot(0, 4, 6);
        if (wide) {
            amx_stream(7, w + ROWS + i * AMX_BYTES, LINE);
            amx_dot(1, 4, 7);
        }
        if (high) {
            amx_load(5, more + i * LINE, apart);
            amx_dot(2, 5, 6);
        }
        if (high && wide) amx_dot(3, 5, 7);
    }
    amx_store(0, sums, LINE);
    if (wide) amx_store(1, sums + SUMS, LINE);
    if (high) amx_store(2, sums + 2 * SUMS, LINE);
    if (high && wide) amx_store(3, sums + 3 * SUMS, LINE);
}

#define MEET(name, high, wide)                                                                                         \
    static void K(name)(const uint8_t *x, int64_t apart, const uint8_t *w, int64_t tiles, float *sums, int go_on,      \
                        const uint8_t *ahead) {                                                                        \
        K(meet)(high, wide, x, apart, w, tiles, sums, go_on, ahead);                                                   \
    }
MEET(meet_16_16, 0, 0)
MEET(meet_16_32, 0, 1)
MEET(meet_32_16, 1, 0)
MEET(meet_32_32, 1, 1)
#undef MEET
static void (*const K(meets)[2][2])(const uint8_t *, int64_t, const uint8_t *, int64_t, float *, int,
                                    const uint8_t *) = {{K(meet_16_16), K(meet_16_32)}, {K(meet_32_16), K(meet_32_32)}};

static void K(give)(const float *sums, float *const *y, int64_t tokens, int64_t first, int64_t rows) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < rows; r += LANES) {
            const float *from = sums + ((t / LANES * 2 + r / LANES) * LANES + t % LANES) * LANES;
            if (rows - r >= LANES) K(store)(y[t] + first + r, K(load)(from));
            else __builtin_memcpy(y[t] + first + r, from, (size_t)(rows - r) * sizeof(float));
        }
}

/* Up to 32 tokens, of `left`, against columns k0 ... k0 + cols of `rows` unpacked rows from `first` on. */
static void K(meet_all)(const weight *w, int64_t first, int64_t rows, int64_t k0, int64_t cols, const void *const *x,
                        float *const *y, int64_t left, K(prompt_room) *room, float (*sums)[4 * LANES * LANES]) {
    const int64_t tokens = left < AMX_PAIR ? left : AMX_PAIR;
    int64_t apart;
    const uint8_t *at = K(tokens_at)(w->type == TYPE_F16 || w->type == TYPE_BF16, x, tokens, k0, cols, room, &apart);
    const uint8_t *later = at == room->tokens[0] || left < 2 * AMX_PAIR ? NULL : at + AMX_PAIR * apart;
    for (int64_t r = 0; r < rows; r += AMX_PAIR, sums++, later = later ? later + 4 * apart : NULL) {
        const uint8_t *tiles = room->weights[r / LANES][0];
        K(meets)[tokens > LANES][rows - r > LANES](at, apart, tiles, cols / 32, *sums, k0 > 0, later);
        if (k0 + cols == w->cols) K(give)(*sums, y, tokens, first + r, rows - r < AMX_PAIR ? rows - r : AMX_PAIR);
    }
}

/* As matmul_stretch, for any number of rows and up to MOST_TOKENS tokens; x are rows of bf16, or floats for weights that
 * are. Of what follows the rows in memory, the next share, a piece is prefetched with each panel. */
static void K(matmul_prompt)(const weight *w, int64_t first, int64_t rows, const void *const *x, float *const *y,
                             int64_t tokens, uint8_t *scratch) {
    K(prompt_room) *room = (K(prompt_room) *)(void *)scratch;
    const int64_t stride = row_bytes(w->type, w->cols);
    const uint8_t *base = (const uint8_t *)(uintptr_t)w->data + first * stride, *next = base + rows * stride;
    K(amx_on)();
    for (int64_t r0 = 0; r0 < rows; r0 += AMX_ROWS) {
        const int64_t height = rows - r0 < AMX_ROWS ? rows - r0 : AMX_ROWS, pairs = (height + AMX_PAIR - 1) / AMX_PAIR;
        for (int64_t k0 = 0; k0 < w->cols; k0 += AMX_COLS) {
            const int64_t cols = w->cols - k0 < AMX_COLS ? w->cols - k0 : AMX_COLS;
            for (int64_t r = 0; r < height; r += LANES, next += LANES * row_bytes(w->type, cols)) {
                const uint8_t *from = base + (r0 + r) * stride + row_bytes(w->type, k0);
                const int valid = height - r < LANES ? (int)(height - r) : LANES;
                K(tiles_of)[w->type](from, stride, valid, cols, room, room->weights[r / LANES][0], next);
            }
            for (int64_t t = 0; t < tokens; t += AMX_PAIR)
                K(meet_all)(w, r0, height, k0, cols, x + t, y + t, tokens - t, room, room->sums + t / AMX_PAIR * pairs);
        }
    }
    K(amx_off)();
}

/* Whether this machine's tiles give what integers give: sums of products that are exact in any order, begun and gone on
 * with. What a compiler or a hypervisor got wrong must cost speed, not answers. */
int32_t K(amx_sound)(void) {
    enum { COLS = 64, SUMS = LANES * LANES };
    _Alignas(64) uint16_t x[AMX_PAIR][COLS], w[2][AMX_COLS / 32][LANES][LANES][2];
    _Alignas(64) float sums[8 * SUMS]; /* the second half is fetched, no more */
    int32_t wrong = 0;
    for (int i = 0; i < AMX_PAIR; i++)
        for (int k = 0; k < COLS; k++) {
            const float a = (float)((5 * i + 3 * k) % 31 - 15), b = (float)((7 * i + 11 * k) % 29 - 14);
            __builtin_memcpy(&x[i][k], (const uint8_t *)&a + 2, 2);
            __builtin_memcpy(&w[i / LANES][k / 32][k % 32 / 2][i % LANES][k % 2], (const uint8_t *)&b + 2, 2);
        }
    K(amx_on)();
    for (int go_on = 0; go_on < 2; go_on++)
        K(meet_32_32)((const uint8_t *)x, sizeof x[0], (const uint8_t *)w, COLS / 32, sums, go_on, NULL);
    K(amx_off)();
    for (int t = 0; t < AMX_PAIR; t++)
        for (int r = 0; r < AMX_PAIR; r++) {
            int32_t exact = 0;
            for (int k = 0; k < COLS; k++) exact += ((5 * t + 3 * k) % 31 - 15) * ((7 * r + 11 * k) % 29 - 14);
            const float sum = sums[(t / LANES * 2 + r / LANES) * SUMS + t % LANES * LANES + r % LANES];
            wrong |= sum != (float)(2 * exact);
        }
    return !wrong;
}
