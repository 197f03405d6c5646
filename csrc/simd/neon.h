/* Sixteen lanes in four registers: NEON with dot products of bytes (Armv8.2), and with I8MM products of their matrices.
 *
 * Both multiply signed bytes: a full byte is made signed as it enters a panel, which takes its bias away.
 */
#include <arm_neon.h>

typedef struct { float32x4_t v[4]; } vf;
typedef struct { int32x4_t v[4]; } vi;

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)

static INLINE vf K(set1)(float x) {
    vf y;
    EACH y.v[i] = vdupq_n_f32(x);
    return y;
}
static INLINE vf K(zero)(void) { return K(set1)(0); }
static INLINE vf K(load)(const float *p) {
    vf x;
    EACH x.v[i] = vld1q_f32(p + 4 * i);
    return x;
}
static INLINE void K(store)(float *p, vf x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
static INLINE vf K(mul)(vf x, vf y) {
    EACH x.v[i] = vmulq_f32(x.v[i], y.v[i]);
    return x;
}
static INLINE vf K(fma)(vf x, vf y, vf z) {
    EACH z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
    return z;
}
static INLINE vf K(to_float)(vi x) {
    vf y;
    EACH y.v[i] = vcvtq_f32_s32(x.v[i]);
    return y;
}
static INLINE vf K(load_f16)(const f16 *p) {
    vf x;
    EACH x.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p + 4 * i)));
    return x;
}
static INLINE vf K(load_bf16)(const bf16 *p) {
    vf x;
    EACH x.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)p + 4 * i), 16));
    return x;
}
static INLINE vf K(widened)(int8x16_t x) {
    const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    return K(to_float)((vi){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                             vmovl_s16(vget_high_s16(high))}});
}
static INLINE vf K(load_i8)(const int8_t *p) { return K(widened)(vld1q_s8(p)); }
/* Signed halves of bytes: of eight all, the lower one first; of sixteen the low ones, or the high ones. */
static INLINE int8x16_t K(half_of)(int8x16_t x, int high) { return vshrq_n_s8(high ? x : vshlq_n_s8(x, 4), 4); }
static INLINE vf K(load_i4)(const uint8_t *p) {
    const int8x16_t x = vcombine_s8(vld1_s8((const int8_t *)p), vdup_n_s8(0));
    return K(widened)(vzip1q_s8(K(half_of)(x, 0), K(half_of)(x, 1)));
}
static INLINE vf K(load_halves)(const uint8_t *p, int high) {
    return K(widened)(K(half_of)(vld1q_s8((const int8_t *)p), high));
}
static INLINE vi K(fill)(int32_t x) {
    vi y;
    EACH y.v[i] = vdupq_n_s32(x);
    return y;
}
static INLINE vi K(none)(void) { return K(fill)(0); }
static INLINE vi K(flip)(vi x) {
    EACH x.v[i] = veorq_s32(x.v[i], vdupq_n_s32((int32_t)0x80808080));
    return x;
}
static INLINE vi K(made_signed)(vi w, int most) { return most <= 127 ? w : K(flip)(w); }
static INLINE int32_t K(bias_left)(int bias, int most, int32_t minus_sum) { return most <= 127 ? bias * minus_sum : 0; }

/* Sixteen rows' sums begin at bias * minus_sum and take in the products of sixteen columns, a line for every four. */
static INLINE vi K(sum_from)(int bias, int most, int32_t minus_sum) {
    return K(fill)(K(bias_left)(bias, most, minus_sum));
}
#define LINE(j)                                                                                                        \
    w = K(made_signed)(line[j], most);                                                                                 \
    EACH sum.v[i] = vdotq_laneq_s32(sum.v[i], vreinterpretq_s8_s32(w.v[i]), four, j);
static INLINE vi K(dot_lines)(vi sum, const vi line[4], const int8_t *x, int most) {
    const int8x16_t four = vld1q_s8(x);
    vi w;
    LINE(0) LINE(1) LINE(2) LINE(3) return sum;
}
#undef LINE

/* -- Panels, and dots of `dwords` x 4 weights of sixteen rows with the activations of each of `n` tokens ------------ */

#ifdef __ARM_FEATURE_MATMUL_INT8

/* [cols / 8][LANES][8], for products of two rows and two tokens. */
static INLINE void K(store_square)(uint8_t *p, const vi line[4], int most) {
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
        const vi a = K(made_signed)(line[j], most), b = K(made_signed)(line[j + 1], most);
        EACH vst1q_u8(p + 64 * j + 32 * i, vreinterpretq_u8_s32(vzip1q_s32(a.v[i], b.v[i])));
        EACH vst1q_u8(p + 64 * j + 32 * i + 16, vreinterpretq_u8_s32(vzip2q_s32(a.v[i], b.v[i])));
    }
}
/* One token, which is then its own partner, or two. */
static INLINE void K(dots)(const int n, const uint8_t *w, const int8_t *const *x, int dwords, int bias, int most,
                           const int32_t *minus_sum, vi *sum) {
    const int partner = n - 1;
    const int32x4_t start = vzip1q_s32(vdupq_n_s32(K(bias_left)(bias, most, minus_sum[0])),
                                       vdupq_n_s32(K(bias_left)(bias, most, minus_sum[partner])));
    int32x4_t two[8]; /* {row, token}, {row, partner}, {next row, token}, {next row, partner} */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) two[i] = start;
#pragma GCC unroll 2
    for (int j = 0; j < dwords; j += 4) {
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x[0] + 4 * j)),
                        b = vreinterpretq_s64_s8(vld1q_s8(x[partner] + 4 * j));
        const int8x16_t eight[2] = {vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))};
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            two[i % 8] = vmmlaq_s32(two[i % 8], vld1q_s8((const int8_t *)w + 64 * j + 16 * i), eight[i / 8]);
    }
    EACH sum[0].v[i] = vuzp1q_s32(two[2 * i], two[2 * i + 1]);
    if (partner) EACH sum[1].v[i] = vuzp2q_s32(two[2 * i], two[2 * i + 1]);
}

#else

/* [cols / 4][LANES][4]. */
static INLINE void K(store_square)(uint8_t *p, const vi line[4], int most) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const vi a = K(made_signed)(line[j], most);
        EACH vst1q_u8(p + 64 * j + 16 * i, vreinterpretq_u8_s32(a.v[i]));
    }
}
/* One dword of each token: which is part of an instruction. */
#define LINE(dword)                                                                                                    \
    EACH {                                                                                                             \
        const int8x16_t rows = vld1q_s8((const int8_t *)w + 64 * (j + dword) + 16 * i);                                \
        _Pragma("GCC unroll 4") for (int t = 0; t < n; t++) sum[t].v[i] =                                              \
            vdotq_laneq_s32(sum[t].v[i], rows, four[t], dword);                                                        \
    }
static INLINE void K(dots)(const int n, const uint8_t *w, const int8_t *const *x, int dwords, int bias, int most,
                           const int32_t *minus_sum, vi *sum) {
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) sum[t] = K(fill)(K(bias_left)(bias, most, minus_sum[t]));
#pragma GCC unroll 2
    for (int j = 0; j < dwords; j += 4) {
        int8x16_t four[4];
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) four[t] = vld1q_s8(x[t] + 4 * j);
        LINE(0) LINE(1) LINE(2) LINE(3)
    }
}
#undef LINE

#endif

/* -- Squares: sixteen bytes of sixteen rows; register i has a quarter each of rows i, i + 4, i + 8, i + 12 ---------- */

static INLINE vi K(load_four)(const uint8_t *const rows[4], int64_t at) {
    vi x;
    EACH x.v[i] = vreinterpretq_s32_u8(vld1q_u8(rows[i] + at));
    return x;
}
/* Register i then has dword i of every row. */
static INLINE void K(turn)(vi r[4]) {
    EACH {
        const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0].v[i], r[1].v[i])),
                        b = vreinterpretq_s64_s32(vtrn2q_s32(r[0].v[i], r[1].v[i])),
                        c = vreinterpretq_s64_s32(vtrn1q_s32(r[2].v[i], r[3].v[i])),
                        d = vreinterpretq_s64_s32(vtrn2q_s32(r[2].v[i], r[3].v[i]));
        r[0].v[i] = vreinterpretq_s32_s64(vtrn1q_s64(a, c));
        r[1].v[i] = vreinterpretq_s32_s64(vtrn1q_s64(b, d));
        r[2].v[i] = vreinterpretq_s32_s64(vtrn2q_s64(a, c));
        r[3].v[i] = vreinterpretq_s32_s64(vtrn2q_s64(b, d));
    }
}
/* Sums of products of sixteen bytes, four and four; and what they come to for each row. */
static INLINE vi K(dot_square)(vi sum, vi w, const int8_t *x, int most) {
    const int8x16_t all = vld1q_s8(x);
    w = K(made_signed)(w, most);
    EACH sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_s32(w.v[i]), all);
    return sum;
}
static INLINE vi K(fold)(const vi r[4], int most, int32_t start) {
    vi sum;
    EACH sum.v[i] = vpaddq_s32(vpaddq_s32(r[0].v[i], r[1].v[i]), vpaddq_s32(r[2].v[i], r[3].v[i]));
    if (most <= 127) EACH sum.v[i] = vaddq_s32(sum.v[i], vdupq_n_s32(start));
    return sum;
}
/* The bits of each dword from `down` on that `mask` keeps, moved `up`. */
static INLINE vi K(bits)(vi x, int down, uint32_t mask, int up) {
    /* A byte's last bits, shifted as bytes, need no mask. */
    const int last = !up && mask == 0x01010101u * (0xffu >> down % 8) && down < 8;
    EACH {
        const uint32x4_t dwords = vreinterpretq_u32_s32(x.v[i]);
        const uint8x16_t bytes = vreinterpretq_u8_s32(x.v[i]) >> vdupq_n_u8((uint8_t)(down % 8));
        const uint32x4_t moved = up > down ? dwords << vdupq_n_u32((uint32_t)(up - down) & 31)
                                           : dwords >> vdupq_n_u32((uint32_t)(down - up) & 31);
        x.v[i] = last ? vreinterpretq_s32_u8(bytes) : vreinterpretq_s32_u32(moved & vdupq_n_u32(mask << up));
    }
    return x;
}
static INLINE vi K(or)(vi x, vi y) {
    EACH x.v[i] = vorrq_s32(x.v[i], y.v[i]);
    return x;
}
/* Each byte below 16 becomes the table's. */
static INLINE vi K(lookup)(const uint8_t *table, vi x) {
    const uint8x16_t all = vld1q_u8(table);
    EACH x.v[i] = vreinterpretq_s32_u8(vqtbl1q_u8(all, vreinterpretq_u8_s32(x.v[i])));
    return x;
}
/* Bit n of the `half` of each quarter's first dword becomes 16 in byte n. */
static INLINE vi K(spread)(vi x, int half) {
    const uint8x16_t byte = vcombine_u8(vdup_n_u8((uint8_t)(2 * half)), vdup_n_u8((uint8_t)(2 * half + 1)));
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    EACH {
        const uint8x16_t set = vtstq_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x.v[i]), byte), bit);
        x.v[i] = vreinterpretq_s32_u8(vandq_u8(set, vdupq_n_u8(16)));
    }
    return x;
}
static INLINE vf K(as_float)(vi x) {
    vf y;
    EACH y.v[i] = vreinterpretq_f32_s32(x.v[i]);
    return y;
}
/* The low half of each dword as an f16. */
static INLINE vf K(halves)(vi x) {
    vf y;
    EACH y.v[i] = vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(x.v[i])));
    return y;
}
/* An f16 of each row. */
static INLINE vf K(f16_of_each)(const uint8_t *const rows[4], int64_t stride, int64_t at) {
    vf y;
    EACH {
        const uint8_t *p = rows[i] + at;
        uint16x4_t h = vld1_dup_u16((const uint16_t *)p);
        h = vld1_lane_u16((const uint16_t *)(p + stride), h, 1);
        h = vld1_lane_u16((const uint16_t *)(p + 2 * stride), h, 2);
        h = vld1_lane_u16((const uint16_t *)(p + 3 * stride), h, 3);
        y.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(h));
    }
    return y;
}
static INLINE void K(prefetch)(const void *p) { __builtin_prefetch(p, 0, 2); }
#undef EACH
