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

static INLINE float K(top_size)(const float x[32]) {
    float lanes[16];
    for (int i = 0; i < 16; i++) {
        const float a = fabsf(x[i]), b = fabsf(x[i + 16]);
        lanes[i] = a > b ? a : b;
    }
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}
/* The value furthest from zero, the first of two; +0 where all are zeros. */
static INLINE float K(furthest)(const float x[32]) {
    const float top = K(top_size)(x);
    int32_t above = 0, below = 0;
    for (int i = 0; i < 32; i++) {
        above |= x[i] == top;
        below |= x[i] == -top;
    }
    if (above && below && top > 0.0f)
        for (int i = 0; i < 32; i++)
            if (fabsf(x[i]) == top) return x[i];
    return above ? top : -top;
}
/* The first of the smallest values, since zeros have signs, and how far from it the largest is. */
static INLINE float K(lowest)(const float x[32], float *range) {
    float low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = x[i] < x[i + 16] ? x[i] : x[i + 16];
        high[i] = x[i] > x[i + 16] ? x[i] : x[i + 16];
    }
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) {
            low[i] = low[i] < low[i + n] ? low[i] : low[i + n];
            high[i] = high[i] > high[i + n] ? high[i] : high[i + n];
        }
    *range = high[0] - low[0];
    if (low[0] == 0.0f)
        for (int i = 0; i < 32; i++)
            if (x[i] == 0.0f) return x[i];
    return low[0];
}

/* d; the furthest value's code is 0, which stands for -levels / 2. */
static INLINE float K(codes_around_zero)(const float x[32], int levels, uint8_t q[32]) {
    const float d = K(furthest)(x) / (float)(-levels / 2), inverse = K(inverse)(d), middle = (float)levels / 2 + 0.5f;
    for (int i = 0; i < 32; i++) {
        const int32_t code = K(whole)(x[i] * inverse + middle);
        q[i] = (uint8_t)(code < levels ? code : levels - 1);
    }
    return d;
}
static INLINE float K(codes_above_lowest)(const float x[32], int levels, uint8_t q[32], float *minimum) {
    float range;
    const float low = *minimum = K(lowest)(x, &range), d = range / (float)(levels - 1), inverse = K(inverse)(d);
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)K(whole)((x[i] - low) * inverse + 0.5f);
    return d;
}
static INLINE void K(pack_nibbles)(const uint8_t q[32], uint8_t qs[16]) {
    for (int i = 0; i < 16; i++) qs[i] = (uint8_t)((q[i] & 15) | q[i + 16] << 4);
}
static INLINE void K(pack_fifths)(const uint8_t q[32], uint8_t qh[4]) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= (uint32_t)(q[i] >> 4) << i;
    for (int i = 0; i < 4; i++) qh[i] = (uint8_t)(bits >> 8 * i);
}

static INLINE void K(plain_q4_0)(const float x[32], block_q4_0 *b) {
    uint8_t q[32];
    b->d = K(half_of_float)(K(codes_around_zero)(x, 16, q));
    K(pack_nibbles)(q, b->qs);
}
static INLINE void K(plain_q4_1)(const float x[32], block_q4_1 *b) {
    uint8_t q[32];
    float low;
    b->d = K(half_of_float)(K(codes_above_lowest)(x, 16, q, &low));
    b->m = K(half_of_float)(low);
    K(pack_nibbles)(q, b->qs);
}
static INLINE void K(plain_q5_0)(const float x[32], block_q5_0 *b) {
    uint8_t q[32];
    b->d = K(half_of_float)(K(codes_around_zero)(x, 32, q));
    K(pack_nibbles)(q, b->qs);
    K(pack_fifths)(q, b->qh);
}
static INLINE void K(plain_q5_1)(const float x[32], block_q5_1 *b) {
    uint8_t q[32];
    float low;
    b->d = K(half_of_float)(K(codes_above_lowest)(x, 32, q, &low));
    b->m = K(half_of_float)(low);
    K(pack_nibbles)(q, b->qs);
    K(pack_fifths)(q, b->qh);
}
/* Halves are rounded away from zero. */
static INLINE void K(plain_q8_0)(const float x[32], block_q8_0 *b) {
    const float d = K(top_size)(x) / 127.0f, inverse = K(inverse)(d);
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
static INLINE void K(codes_fp4)(const float x[32], float d, uint8_t q[32]) {
    static const float sizes[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    int32_t code[32] = {0};
    float least[32];
    for (int i = 0; i < 32; i++) least[i] = fabsf(x[i]);
#pragma GCC unroll 1
    for (int k = 1; k < 8; k++) {
        const float value = sizes[k] * d;
        for (int i = 0; i < 32; i++) {
            const float distance = fabsf(value - fabsf(x[i]));
            code[i] = distance < least[i] ? k : code[i];
            least[i] = distance < least[i] ? distance : least[i];
        }
    }
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)(code[i] + (x[i] < 0.0f && code[i] ? 8 : 0));
}
static INLINE void K(plain_mxfp4)(const float x[32], block_mxfp4 *b) {
    const float top = K(top_size)(x);
    b->e = top > 0.0f ? (uint8_t)((int32_t)floorf(log2f(top)) + 125) : 0; /* modulo 256, as in ggml, below 2^-125 */
    const uint32_t bits = K(e8m0)(b->e);
    float d;
    uint8_t q[32];
    __builtin_memcpy(&d, &bits, 4);
    K(codes_fp4)(x, d, q);
    K(pack_nibbles)(q, b->qs);
}

#define PLAIN(name)                                                                                                    \
    static void K(encode_##name)(const float *x, int64_t rows, int64_t cols, const float *importance, uint8_t *out) {  \
        (void)importance;                                                                                              \
        block_##name *b = (block_##name *)out;                                                                         \
        for (int64_t n = rows * cols / 32; n--; x += 32, b++) K(plain_##name)(x, b);                                   \
    }
PLAIN(q4_0)
PLAIN(q4_1)
PLAIN(q5_0)
PLAIN(q5_1)
PLAIN(q8_0)
PLAIN(mxfp4)
#undef PLAIN

/* The sum of importance * (x - y)^2, all ones without; n is a multiple of 32. */
static double K(squared_error)(const float *x, const float *y, const float *importance, int64_t n) {
    double sums[16] = {0}, sum = 0;
    for (int64_t at = 0; at < n; at += 16)
        for (int i = 0; i < 16; i++) {
            const double off = (double)x[at + i] - (double)y[at + i];
            sums[i] += (importance ? (double)importance[at + i] : 1.0) * (off * off);
        }
    for (int i = 0; i < 16; i++) sum += sums[i];
    return sum;
}
