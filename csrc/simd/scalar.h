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
/* Signed halves of bytes: of eight all, the lower one first; of sixteen the low ones, or the high ones. */
static INLINE vf K(load_i4)(const uint8_t *p) {
    vf r;
    EACH r.v[i] = (float)((int8_t)(p[i / 2] << (i % 2 ? 0 : 4)) >> 4);
    return r;
}
static INLINE vf K(load_halves)(const uint8_t *p, int high) {
    vf r;
    EACH r.v[i] = (float)((int8_t)(p[i] << (high ? 0 : 4)) >> 4);
    return r;
}
static INLINE vi K(sum_from)(int bias, int most, int32_t minus_sum) {
    (void)most;
    vi sum;
    EACH sum.v[i] = bias * minus_sum;
    return sum;
}
static INLINE vi K(dot_lines)(vi sum, const vi line[4], const int8_t *x, int most) {
    (void)most;
    for (int j = 0; j < 4; j++)
        EACH for (int k = 0; k < 4; k++) sum.v[i] +=
            (int32_t)((uint32_t)line[j].v[i] >> 8 * k & 255) * (int32_t)x[4 * j + k];
    return sum;
}
static INLINE void K(dots)(const int n, const uint8_t *w, const int8_t *const *x, int dwords, int bias, int most,
                           const int32_t *minus_sum, vi *sum) {
    for (int t = 0; t < n; t++) {
        sum[t] = K(sum_from)(bias, most, minus_sum[t]);
        for (int j = 0; j < dwords; j++)
            EACH for (int k = 0; k < 4; k++) sum[t].v[i] += (int32_t)w[64 * j + 4 * i + k] * (int32_t)x[t][4 * j + k];
    }
}
static INLINE vi K(none)(void) { return (vi){{0}}; }

/* -- Squares: sixteen bytes of sixteen rows; register i has a quarter each of rows i, i + 4, i + 8, i + 12 ---------- */

static INLINE vi K(load_four)(const uint8_t *const rows[4], int64_t at) {
    vi x;
    for (int q = 0; q < 4; q++) __builtin_memcpy(&x.v[4 * q], rows[q] + at, 16);
    return x;
}
/* Register i then has dword i of every row. */
static INLINE void K(turn)(vi r[4]) {
    vi t[4];
    for (int j = 0; j < 4; j++) EACH t[j].v[i] = r[i % 4].v[i / 4 * 4 + j];
    for (int j = 0; j < 4; j++) r[j] = t[j];
}
/* Sums of products of sixteen bytes, four and four; and what they come to for each row. */
static INLINE vi K(dot_square)(vi sum, vi w, const int8_t *x, int most) {
    (void)most;
    EACH for (int k = 0; k < 4; k++) sum.v[i] +=
        (int32_t)((uint32_t)w.v[i] >> 8 * k & 255) * (int32_t)x[4 * (i % 4) + k];
    return sum;
}
static INLINE vi K(fold)(const vi r[4], int most, int32_t start) {
    (void)most;
    vi sum;
    EACH sum.v[i] = start;
    EACH for (int j = 0; j < 4; j++) sum.v[i] += r[i % 4].v[i / 4 * 4 + j];
    return sum;
}
/* The bits of each dword from `down` on that `mask` keeps, moved `up`. */
static INLINE vi K(bits)(vi x, int down, uint32_t mask, int up) {
    EACH x.v[i] = (int32_t)((uint32_t)x.v[i] >> down << up & mask << up);
    return x;
}
static INLINE vi K(or)(vi x, vi y) {
    EACH x.v[i] |= y.v[i];
    return x;
}
static INLINE vi K(flip)(vi x) {
    EACH x.v[i] = (int32_t)((uint32_t)x.v[i] ^ 0x80808080);
    return x;
}
/* Each byte below 16 becomes the table's. */
static INLINE vi K(lookup)(const uint8_t *table, vi x) {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &x, 64);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i]];
    __builtin_memcpy(&x, bytes, 64);
    return x;
}
/* Bit n of the `half` of each quarter's first dword becomes 16 in byte n. */
static INLINE vi K(spread)(vi x, int half) {
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(((uint32_t)x.v[i / 16 * 4] >> (16 * half + i % 16) & 1) << 4);
    __builtin_memcpy(&x, bytes, 64);
    return x;
}
/* Of a panel [cols / 4][LANES][4]. */
static INLINE void K(store_square)(uint8_t *p, const vi line[4], int most) {
    (void)most;
    __builtin_memcpy(p, line, 256);
}
static INLINE vf K(as_float)(vi x) {
    vf r;
    __builtin_memcpy(&r, &x, 64);
    return r;
}
/* The low half of each dword as an f16. */
static INLINE vf K(halves)(vi x) {
    f16 low[16];
    EACH low[i].bits = (uint16_t)x.v[i];
    return K(load_f16)(low);
}
/* An f16 of each row. */
static INLINE vf K(f16_of_each)(const uint8_t *const rows[4], int64_t stride, int64_t at) {
    f16 h[16];
    EACH __builtin_memcpy(&h[i], rows[i / 4] + i % 4 * stride + at, 2);
    return K(load_f16)(h);
}
static INLINE void K(prefetch)(const void *p) { __builtin_prefetch(p, 0, 2); }
#undef EACH
