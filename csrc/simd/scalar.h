/* Sixteen lanes as an array: what every compiler and CPU has. */
typedef struct { float v[16]; } vf;
typedef struct { int32_t v[16]; } vi;

#define EACH for (int i = 0; i < 16; i++)
static INLINE vf K(zero)(void) { return (vf){{0}}; }
static INLINE vf K(set1)(float x) {
    vf r;
    EACH r.v[i] = x;
    return r;
}
static INLINE vf K(load)(const float *p) {
    vf r;
    __builtin_memcpy(&r, p, 64);
    return r;
}
static INLINE void K(store)(float *p, vf x) { __builtin_memcpy(p, &x, 64); }
static INLINE vf K(mul)(vf x, vf y) {
    EACH x.v[i] *= y.v[i];
    return x;
}
static INLINE vf K(fma)(vf x, vf y, vf z) {
    EACH z.v[i] = fmaf(x.v[i], y.v[i], z.v[i]);
    return z;
}
static INLINE vf K(to_float)(vi x) {
    vf r;
    EACH r.v[i] = (float)x.v[i];
    return r;
}
static INLINE vf K(load_f16)(const f16 *p) {
    vf r;
    EACH {
        _Float16 h;
        __builtin_memcpy(&h, p + i, 2);
        r.v[i] = (float)h;
    }
    return r;
}
static INLINE vf K(load_bf16)(const bf16 *p) {
    vf r;
    EACH {
        const uint32_t bits = (uint32_t)p[i].bits << 16;
        __builtin_memcpy(&r.v[i], &bits, 4);
    }
    return r;
}
static INLINE vf K(load_i8)(const int8_t *p) {
    vf r;
    EACH r.v[i] = (float)p[i];
    return r;
}
static INLINE vi K(dot)(const uint8_t *w, const int8_t *x, int dwords, int bias, int most, int32_t minus_sum) {
    (void)most;
    vi sum;
    EACH sum.v[i] = bias * minus_sum;
    for (int j = 0; j < dwords; j++)
        EACH for (int k = 0; k < 4; k++) sum.v[i] += (int32_t)w[64 * j + 4 * i + k] * (int32_t)x[4 * j + k];
    return sum;
}
/* The same a line at a time: where the sum starts, and one dword of every row. */
static INLINE vi K(start)(int bias, int most, int32_t minus_sum) {
    (void)most;
    vi sum;
    EACH sum.v[i] = bias * minus_sum;
    return sum;
}
static INLINE vi K(dot_line)(vi sum, dwords line, const int8_t *x, int most) {
    (void)most;
    EACH for (int k = 0; k < 4; k++) sum.v[i] += (int32_t)(line[i] >> 8 * k & 255) * (int32_t)x[k];
    return sum;
}
/* Each of 64 bytes below 16 becomes the table's. */
static INLINE dwords K(lookup)(const uint8_t *table, dwords line) {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &line, 64);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i]];
    __builtin_memcpy(&line, bytes, 64);
    return line;
}
/* Sixteen rows of 16 bytes, `stride` apart, become 4 lines: line j holds dword j of every row. */
static INLINE void K(transpose_quad)(const uint8_t *rows, int64_t stride, uint8_t *lines) {
    for (int j = 0; j < 4; j++) EACH __builtin_memcpy(lines + 64 * j + 4 * i, rows + i * stride + 4 * j, 4);
}
static INLINE void K(prefetch)(const void *p) { __builtin_prefetch(p, 0, 2); }
#undef EACH
