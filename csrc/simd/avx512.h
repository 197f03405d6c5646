/* Sixteen lanes in one register: AVX-512 F, BW, VL, DQ, VNNI, VBMI. */
#include "x86.h"

typedef __m512 vf;
typedef __m512i vi;

static INLINE vf K(zero)(void) { return _mm512_setzero_ps(); }
static INLINE vf K(set1)(float x) { return _mm512_set1_ps(x); }
static INLINE vf K(load)(const float *p) { return _mm512_loadu_ps(p); }
static INLINE void K(store)(float *p, vf x) { _mm512_storeu_ps(p, x); }
static INLINE vf K(mul)(vf a, vf b) { return _mm512_mul_ps(a, b); }
static INLINE vf K(fma)(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE vf K(to_float)(vi x) { return _mm512_cvtepi32_ps(x); }
static INLINE vf K(load_f16)(const f16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static INLINE vf K(load_bf16)(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static INLINE vf K(load_i8)(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* The last four bits of each dword, signed. */
static INLINE vf K(last_four)(vi x) {
    return _mm512_permutexvar_ps(x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
}
/* Signed halves of bytes: of eight all, the lower one first; of sixteen the low ones, or the high ones. */
static INLINE vf K(load_i4)(const uint8_t *p) {
    int64_t eight;
    __builtin_memcpy(&eight, p, 8);
    const vi at =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60); /* first bit of each */
    return K(last_four)(_mm512_multishift_epi64_epi8(at, _mm512_set1_epi64(eight)));
}
static INLINE vf K(load_halves)(const uint8_t *p, int high) {
    const vi x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return K(last_four)(high ? _mm512_srli_epi32(x, 4) : x);
}

/* The same four bytes in every lane. */
static INLINE vi K(quad)(const int8_t *x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}
/* Sixteen rows' sums begin at bias * minus_sum and take in the products of sixteen columns, a line for every four. */
static INLINE vi K(sum_from)(int bias, int most, int32_t minus_sum) {
    (void)most;
    return bias ? _mm512_slli_epi32(_mm512_set1_epi32(minus_sum), __builtin_ctz(bias | 256)) : _mm512_setzero_si512();
}
static INLINE vi K(dot_lines)(vi sum, const vi line[4], const int8_t *x, int most) {
    (void)most;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum = _mm512_dpbusd_epi32(sum, line[i], K(quad)(x + 4 * i));
    return sum;
}
/* Sixteen rows' dot products of `dwords` x 4 unsigned weights with the same signed activations, of each of `n` tokens
 * from bias * minus_sum on. */
static INLINE void K(dots)(const int n, const uint8_t *w, const int8_t *const *x, int dwords, int bias, int most,
                           const int32_t *minus_sum, vi *sum) {
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) sum[t] = K(sum_from)(bias, most, minus_sum[t]);
#pragma GCC unroll 8
    for (int j = 0; j < dwords; j++) {
        const vi line = _mm512_load_si512(w + 64 * j);
#pragma GCC unroll 4
        for (int t = 0; t < n; t++) sum[t] = _mm512_dpbusd_epi32(sum[t], line, K(quad)(x[t] + 4 * j));
    }
}

static INLINE vi K(none)(void) { return _mm512_setzero_si512(); }

/* -- Squares: sixteen bytes of sixteen rows; register i has a quarter each of rows i, i + 4, i + 8, i + 12 ---------- */

static INLINE vi K(load_four)(const uint8_t *const rows[4], int64_t at) {
    const __m128i *r[4];
    for (int q = 0; q < 4; q++) r[q] = (const __m128i *)(rows[q] + at);
    const __m256i low =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(r[0])), _mm_loadu_si128(r[1]), 1);
    const __m256i high =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(r[2])), _mm_loadu_si128(r[3]), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
/* Register i then has dword i of every row: two rounds of unpacking, since quarter q is of row i + 4 q. */
static INLINE void K(turn)(vi r[4]) {
    const vi a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const vi c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm512_unpacklo_epi64(a, c);
    r[1] = _mm512_unpackhi_epi64(a, c);
    r[2] = _mm512_unpacklo_epi64(b, d);
    r[3] = _mm512_unpackhi_epi64(b, d);
}
/* Sums of products of sixteen bytes, four and four; and what they come to for each row. */
static INLINE vi K(dot_square)(vi sum, vi w, const int8_t *x, int most) {
    (void)most;
    return _mm512_dpbusd_epi32(sum, w, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)x)));
}
static INLINE vi K(fold)(const vi r[4], int most, int32_t start) {
    (void)most;
    const vi a = _mm512_add_epi32(_mm512_unpacklo_epi32(r[0], r[1]), _mm512_unpackhi_epi32(r[0], r[1]));
    const vi b = _mm512_add_epi32(_mm512_unpacklo_epi32(r[2], r[3]), _mm512_unpackhi_epi32(r[2], r[3]));
    const vi sum = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    return _mm512_add_epi32(sum, _mm512_set1_epi32(start));
}
/* The bits of each dword from `down` on that `mask` keeps, moved `up`. */
static INLINE vi K(bits)(vi x, int down, uint32_t mask, int up) {
    x = up > down ? _mm512_slli_epi32(x, up - down) : _mm512_srli_epi32(x, down - up);
    return _mm512_and_si512(x, _mm512_set1_epi32((int)(mask << up)));
}
static INLINE vi K(or)(vi x, vi y) { return _mm512_or_si512(x, y); }
static INLINE vi K(flip)(vi x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
/* Each byte below 16 becomes the table's. */
static INLINE vi K(lookup)(const uint8_t *table, vi x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), x);
}
/* Bit n of the `half` of each quarter's first dword becomes 16 in byte n. */
static INLINE vi K(spread)(vi x, int half) {
    const __m128i bytes = _mm_add_epi8(_mm_set_epi64x(0x0101010101010101, 0), _mm_set1_epi8((char)(2 * half)));
    const vi copies = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(bytes));
    return _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(copies, _mm512_set1_epi64((int64_t)0x8040201008040201)), 16);
}
/* Of a panel [cols / 4][LANES][4]. */
static INLINE void K(store_square)(uint8_t *p, const vi line[4], int most) {
    (void)most;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) _mm512_store_si512(p + 64 * j, line[j]);
}
static INLINE vf K(as_float)(vi x) { return _mm512_castsi512_ps(x); }
/* The low half of each dword as an f16. */
static INLINE vf K(halves)(vi x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
/* An f16 of each row. */
static INLINE vf K(f16_of_each)(const uint8_t *const rows[4], int64_t stride, int64_t at) {
    const __m128i low = K(f16_of_eight)(rows[0] + at, rows[1] + at, stride),
                  high = K(f16_of_eight)(rows[2] + at, rows[3] + at, stride);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}
