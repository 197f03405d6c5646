/* Sixteen lanes in two registers: AVX2, FMA, F16C. */
#include "x86.h"

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;

static INLINE vf K(zero)(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static INLINE vf K(set1)(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static INLINE vf K(load)(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static INLINE void K(store)(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static INLINE vf K(mul)(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static INLINE vf K(fma)(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static INLINE vf K(to_float)(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static INLINE vf K(load_f16)(const f16 *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1))};
}
static INLINE vf K(load_bf16)(const bf16 *p) {
    const __m128i *h = (const __m128i *)p;
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1)), 16))};
}
static INLINE vf K(load_i8)(const int8_t *p) {
    return (vf){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))))};
}
/* The same four bytes in every lane. */
static INLINE __m256i K(quad)(const int8_t *x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
/* Signed halves of bytes: of eight all, the lower one first; of sixteen the low ones, or the high ones. */
static INLINE __m256 K(top_four)(__m256i x) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 28)); }
static INLINE vf K(load_i4)(const uint8_t *p) {
    const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    return (vf){K(top_four)(_mm256_sllv_epi32(K(quad)((const int8_t *)p), up)),
                K(top_four)(_mm256_sllv_epi32(K(quad)((const int8_t *)p + 4), up))};
}
static INLINE vf K(load_halves)(const uint8_t *p, int high) {
    const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                  b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)));
    const int up = high ? 24 : 28;
    return (vf){K(top_four)(_mm256_slli_epi32(a, up)), K(top_four)(_mm256_slli_epi32(b, up))};
}

/* u8 times s8, summed in fours. Pairs stay below 2^15 where q <= 127; a full byte is made signed and |q| takes its place. */
static INLINE __m256i K(pairs)(__m256i w, __m256i x, int most) {
    if (most <= 127) return _mm256_maddubs_epi16(w, x);
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
}
static INLINE __m256i K(dot8)(const uint8_t *w, const int8_t *x, int dwords, int most, __m256i sum) {
    /* Sums of pairs that still fit 16 bits: 2 * 127 * most each. */
    const int fit = most <= 15 ? 8 : most <= 31 ? 4 : most <= 63 ? 2 : 1, together = fit < dwords ? fit : dwords;
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int j = 0; j < dwords; j += together) {
        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < together; i++) {
            __m256i line = _mm256_loadu_si256((const __m256i *)(w + 64 * (j + i)));
            /* Or lines made signed are kept for the next token, on the stack. */
            if (most > 127) __asm__ volatile("" : "+x"(line));
            pairs = _mm256_add_epi16(pairs, K(pairs)(line, K(quad)(x + 4 * (j + i)), most));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
}
/* Sixteen rows' sums begin at bias * minus_sum and take in the products of sixteen columns, a line for every four. A full
 * byte is made signed in pairs(): no bias is left. */
static INLINE vi K(sum_from)(int bias, int most, int32_t minus_sum) {
    const __m256i start = _mm256_set1_epi32(most <= 127 ? bias * minus_sum : 0);
    return (vi){start, start};
}
static INLINE vi K(dot_lines)(vi sum, const vi line[4], const int8_t *x, int most) {
    const int together = most <= 31 ? 4 : most <= 63 ? 2 : 1; /* as in dot8 */
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j += together) {
        __m256i a = _mm256_setzero_si256(), b = a;
#pragma GCC unroll 4
        for (int i = j; i < j + together; i++) {
            const __m256i quad = K(quad)(x + 4 * i);
            a = _mm256_add_epi16(a, K(pairs)(line[i].a, quad, most));
            b = _mm256_add_epi16(b, K(pairs)(line[i].b, quad, most));
        }
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(a, ones));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(b, ones));
    }
    return sum;
}
/* Sixteen rows' dot products of `dwords` x 4 unsigned weights with the same signed activations, of each of `n` tokens
 * from bias * minus_sum on. */
static INLINE void K(dots)(const int n, const uint8_t *w, const int8_t *const *x, int dwords, int bias, int most,
                           const int32_t *minus_sum, vi *sum) {
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
        const vi start = K(sum_from)(bias, most, minus_sum[t]);
        sum[t] = (vi){K(dot8)(w, x[t], dwords, most, start.a), K(dot8)(w + 32, x[t], dwords, most, start.b)};
    }
}

static INLINE vi K(none)(void) { return (vi){_mm256_setzero_si256(), _mm256_setzero_si256()}; }

/* -- Squares: sixteen bytes of sixteen rows; register i has a quarter each of rows i, i + 4, i + 8, i + 12 ---------- */

static INLINE vi K(load_four)(const uint8_t *const rows[4], int64_t at) {
    const __m128i *r[4];
    for (int q = 0; q < 4; q++) r[q] = (const __m128i *)(rows[q] + at);
    return (vi){_mm256_loadu2_m128i(r[1], r[0]), _mm256_loadu2_m128i(r[3], r[2])};
}
static INLINE void K(turn_half)(__m256i r[4]) {
    const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm256_unpacklo_epi64(a, c);
    r[1] = _mm256_unpackhi_epi64(a, c);
    r[2] = _mm256_unpacklo_epi64(b, d);
    r[3] = _mm256_unpackhi_epi64(b, d);
}
/* Register i then has dword i of every row: two rounds of unpacking, since quarter q is of row i + 4 q. */
static INLINE void K(turn)(vi r[4]) {
    __m256i a[4] = {r[0].a, r[1].a, r[2].a, r[3].a}, b[4] = {r[0].b, r[1].b, r[2].b, r[3].b};
    K(turn_half)(a);
    K(turn_half)(b);
    for (int i = 0; i < 4; i++) r[i] = (vi){a[i], b[i]};
}
/* Sums of products of sixteen bytes: in twos where those of a group fit 16 bits, else in fours; and what they come to for each row. */
static INLINE vi K(dot_square)(vi sum, vi w, const int8_t *x, int most) {
    const __m256i ones = _mm256_set1_epi16(1), all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)x));
    const __m256i a = K(pairs)(w.a, all, most), b = K(pairs)(w.b, all, most);
    if (most <= 63) return (vi){_mm256_add_epi16(sum.a, a), _mm256_add_epi16(sum.b, b)};
    return (vi){_mm256_add_epi32(sum.a, _mm256_madd_epi16(a, ones)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(b, ones))};
}
static INLINE __m256i K(fold_half)(__m256i a, __m256i b, __m256i c, __m256i d, int most, int32_t start) {
    if (most <= 63) {
        const __m256i ones = _mm256_set1_epi16(1);
        a = _mm256_madd_epi16(a, ones);
        b = _mm256_madd_epi16(b, ones);
        c = _mm256_madd_epi16(c, ones);
        d = _mm256_madd_epi16(d, ones);
    }
    /* A full byte is made signed in pairs(): no bias is left. */
    const __m256i sum = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return most <= 127 ? _mm256_add_epi32(sum, _mm256_set1_epi32(start)) : sum;
}
static INLINE vi K(fold)(const vi r[4], int most, int32_t start) {
    return (vi){K(fold_half)(r[0].a, r[1].a, r[2].a, r[3].a, most, start),
                K(fold_half)(r[0].b, r[1].b, r[2].b, r[3].b, most, start)};
}
/* The bits of each dword from `down` on that `mask` keeps, moved `up`. */
static INLINE vi K(bits)(vi x, int down, uint32_t mask, int up) {
    const __m256i kept = _mm256_set1_epi32((int)(mask << up));
    x = up > down ? (vi){_mm256_slli_epi32(x.a, up - down), _mm256_slli_epi32(x.b, up - down)}
                  : (vi){_mm256_srli_epi32(x.a, down - up), _mm256_srli_epi32(x.b, down - up)};
    return (vi){_mm256_and_si256(x.a, kept), _mm256_and_si256(x.b, kept)};
}
static INLINE vi K(or)(vi x, vi y) { return (vi){_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
static INLINE vi K(flip)(vi x) {
    const __m256i top = _mm256_set1_epi8(-128);
    return (vi){_mm256_xor_si256(x.a, top), _mm256_xor_si256(x.b, top)};
}
/* Each byte below 16 becomes the table's. */
static INLINE vi K(lookup)(const uint8_t *table, vi x) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vi){_mm256_shuffle_epi8(all, x.a), _mm256_shuffle_epi8(all, x.b)};
}
static INLINE __m256i K(spread_half)(__m256i x, int half) {
    const __m256i bytes = _mm256_set_epi64x(0x0101010101010101, 0, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    x = _mm256_shuffle_epi8(x, _mm256_add_epi8(bytes, _mm256_set1_epi8((char)(2 * half))));
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(x, bit), bit), _mm256_set1_epi8(16));
}
/* Bit n of the `half` of each quarter's first dword becomes 16 in byte n. */
static INLINE vi K(spread)(vi x, int half) { return (vi){K(spread_half)(x.a, half), K(spread_half)(x.b, half)}; }
/* Of a panel [cols / 4][LANES][4]. */
static INLINE void K(store_square)(uint8_t *p, const vi line[4], int most) {
    (void)most;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        _mm256_store_si256((__m256i *)(p + 64 * j), line[j].a);
        _mm256_store_si256((__m256i *)(p + 64 * j + 32), line[j].b);
    }
}
static INLINE vf K(as_float)(vi x) { return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
/* The low half of each dword as an f16. */
static INLINE vf K(halves)(vi x) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    __m256i all = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    all = _mm256_permute4x64_epi64(all, 0xd8);
    return (vf){_mm256_cvtph_ps(_mm256_castsi256_si128(all)), _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1))};
}
/* An f16 of each row. */
static INLINE vf K(f16_of_each)(const uint8_t *const rows[4], int64_t stride, int64_t at) {
    const __m128i low = K(f16_of_eight)(rows[0] + at, rows[1] + at, stride),
                  high = K(f16_of_eight)(rows[2] + at, rows[3] + at, stride);
    return (vf){_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
}
