/* Blocks of 32 under one scale, without importance: the bytes of ggml's reference quantisers, whatever the values.
 * Where a block is so small that 1 / d is infinite, its codes are what x86 makes of an infinite or undefined number
 * as an integer: 0. */

static INLINE f16 K(half_of_float)(float x) {
    const _Float16 h = (_Float16)x;
    f16 bits;
    __builtin_memcpy(&bits, &h, 2);
    return bits;
}
static INLINE float K(inverse)(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }
static INLINE int32_t K(whole)(float x) { return x >= 0.0f && x < 256.0f ? (int32_t)x : 0; }

/* As integers floats keep their order, -0 below +0: only maxima of integers are found in any order. */
static INLINE int32_t K(ordered)(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits ^ (bits >> 31 & INT32_MAX);
}
static INLINE float K(unordered)(int32_t bits) {
    bits ^= bits >> 31 & INT32_MAX;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
typedef struct { float low, high; } K(ends);
static INLINE K(ends) K(ends_of)(const float x[32]) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int i = 0; i < 32; i++) {
        const int32_t v = K(ordered)(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    return (K(ends)){K(unordered)(low), K(unordered)(high)};
}
/* The value furthest from zero, the first of two; +0 where all are zeros. */
static INLINE float K(furthest)(const float x[32]) {
    const K(ends) e = K(ends_of)(x);
    if (e.high == -e.low) {
        if (e.high == 0.0f) return 0.0f;
        for (int i = 0;; i++)
            if (fabsf(x[i]) == e.high) return x[i];
    }
    return e.high > -e.low ? e.high : e.low;
}
/* d; the furthest value's code is 0, which stands for -levels / 2. */
static INLINE float K(codes_around_zero)(const float x[32], int levels, int32_t q[32]) {
    const float d = K(furthest)(x) / (float)(-levels / 2), inverse = K(inverse)(d), middle = (float)levels / 2 + 0.5f;
    for (int i = 0; i < 32; i++) {
        const int32_t code = K(whole)(x[i] * inverse + middle);
        q[i] = code < levels ? code : levels - 1;
    }
    return d;
}
/* d and the lowest value, of zeros the first, since they have signs. */
static INLINE float K(codes_above_lowest)(const float x[32], int levels, int32_t q[32], float *lowest) {
    K(ends) e = K(ends_of)(x);
    if (e.low == 0.0f) {
        int i = 0;
        while (x[i] != 0.0f) i++;
        e.low = x[i];
    }
    const float d = (e.high - e.low) / (float)(levels - 1), inverse = K(inverse)(d);
    for (int i = 0; i < 32; i++) q[i] = K(whole)((x[i] - e.low) * inverse + 0.5f);
    *lowest = e.low;
    return d;
}
/* Codes of four bits, or of five where there is room for the fifth. */
static INLINE void K(pack)(const int32_t q[32], uint8_t qs[16], uint8_t *qh) {
    for (int i = 0; i < 16; i++) qs[i] = (uint8_t)((q[i] & 15) | q[i + 16] << 4);
    if (!qh) return;
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (uint32_t)(q[i] >> 4) << i;
    for (int i = 0; i < 4; i++) qh[i] = (uint8_t)(bits >> 8 * i);
}

static INLINE void K(plain_around_zero)(const float x[32], f16 *d, uint8_t qs[16], uint8_t *qh) {
    int32_t q[32];
    *d = K(half_of_float)(K(codes_around_zero)(x, qh ? 32 : 16, q));
    K(pack)(q, qs, qh);
}
static INLINE void K(plain_above_lowest)(const float x[32], f16 *d, f16 *m, uint8_t qs[16], uint8_t *qh) {
    int32_t q[32];
    float lowest;
    *d = K(half_of_float)(K(codes_above_lowest)(x, qh ? 32 : 16, q, &lowest));
    *m = K(half_of_float)(lowest);
    K(pack)(q, qs, qh);
}
static INLINE void K(plain_block_q4_0)(const float x[32], block_q4_0 *b) {
    K(plain_around_zero)(x, &b->d, b->qs, NULL);
}
static INLINE void K(plain_block_q5_0)(const float x[32], block_q5_0 *b) {
    K(plain_around_zero)(x, &b->d, b->qs, b->qh);
}
static INLINE void K(plain_block_q4_1)(const float x[32], block_q4_1 *b) {
    K(plain_above_lowest)(x, &b->d, &b->m, b->qs, NULL);
}
static INLINE void K(plain_block_q5_1)(const float x[32], block_q5_1 *b) {
    K(plain_above_lowest)(x, &b->d, &b->m, b->qs, b->qh);
}
static INLINE float K(top_size)(const float *x, int n) {
    int32_t top = 0;
    for (int i = 0; i < n; i++) {
        const int32_t size = K(ordered)(fabsf(x[i]));
        top = size > top ? size : top;
    }
    return K(unordered)(top);
}
/* Halves are rounded away from zero. */
static INLINE void K(plain_block_q8_0)(const float x[32], block_q8_0 *b) {
    const float d = K(top_size)(x, 32) / 127.0f, inverse = K(inverse)(d);
    int32_t q[32];
    for (int i = 0; i < 32; i++) {
        const float size = fabsf(x[i]) * inverse;
        const int32_t whole = K(whole)(size), up = whole + (size - (float)whole >= 0.5f && size < 128.0f);
        q[i] = x[i] < 0.0f ? -up : up;
    }
    b->d = K(half_of_float)(d);
    for (int i = 0; i < 32; i++) b->qs[i] = (int8_t)q[i];
}
/* The code of the nearest, the lower of two; distances are rounded as ggml rounds them. */
static INLINE void K(codes_fp4)(const float x[32], float d, int32_t q[32]) {
    static const float sizes[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    float least[32];
    for (int i = 0; i < 32; i++) {
        least[i] = fabsf(x[i]);
        q[i] = 0;
    }
#pragma GCC unroll 1
    for (int k = 1; k < 8; k++) {
        const float value = sizes[k] * d;
        for (int i = 0; i < 32; i++) {
            const float distance = fabsf(value - fabsf(x[i]));
            q[i] = distance < least[i] ? k : q[i];
            least[i] = distance < least[i] ? distance : least[i];
        }
    }
    for (int i = 0; i < 32; i++) q[i] += x[i] < 0.0f && q[i] ? 8 : 0;
}
static INLINE void K(plain_block_mxfp4)(const float x[32], block_mxfp4 *b) {
    const float top = K(top_size)(x, 32);
    b->e = top > 0.0f ? (uint8_t)((int32_t)floorf(log2f(top)) + 125) : 0; /* modulo 256, as in ggml, below 2^-125 */
    const uint32_t bits = K(e8m0)(b->e);
    float d;
    int32_t q[32];
    __builtin_memcpy(&d, &bits, 4);
    K(codes_fp4)(x, d, q);
    K(pack)(q, b->qs, NULL);
}

#define PLAIN(name)                                                                                                    \
    static void K(plain_##name)(const float *x, int64_t blocks, block_##name *b) {                                     \
        for (; blocks--; x += 32, b++) K(plain_block_##name)(x, b);                                                    \
    }
PLAIN(q4_0)
PLAIN(q4_1)
PLAIN(q5_0)
PLAIN(q5_1)
PLAIN(q8_0)
PLAIN(mxfp4)
#undef PLAIN
