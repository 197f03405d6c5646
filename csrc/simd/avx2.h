/* Sixteen lanes in two registers: AVX2, FMA, F16C. */
#include <immintrin.h>

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
            int32_t quad;
            __builtin_memcpy(&quad, x + 4 * (j + i), 4);
            const __m256i line = _mm256_loadu_si256((const __m256i *)(w + 64 * (j + i)));
            pairs = _mm256_add_epi16(pairs, K(pairs)(line, _mm256_set1_epi32(quad), most));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
}
static INLINE vi K(dot)(const uint8_t *w, const int8_t *x, int dwords, int bias, int most, int32_t minus_sum) {
    /* A full byte is made signed in pairs(): no bias is left. */
    const __m256i start = _mm256_set1_epi32(most <= 127 ? bias * minus_sum : 0);
    return (vi){K(dot8)(w, x, dwords, most, start), K(dot8)(w + 32, x, dwords, most, start)};
}

/* The same a line at a time: where the sum starts, and one dword of every row. */
static INLINE vi K(start)(int bias, int most, int32_t minus_sum) {
    const __m256i start = _mm256_set1_epi32(most <= 127 ? bias * minus_sum : 0);
    return (vi){start, start};
}
static INLINE vi K(dot_line)(vi sum, dwords line, const int8_t *x, int most) {
    const __m256i ones = _mm256_set1_epi16(1);
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    const __m256i all = _mm256_set1_epi32(quad);
    vi w;
    __builtin_memcpy(&w, &line, sizeof w);
    return (vi){_mm256_add_epi32(sum.a, _mm256_madd_epi16(K(pairs)(w.a, all, most), ones)),
                _mm256_add_epi32(sum.b, _mm256_madd_epi16(K(pairs)(w.b, all, most), ones))};
}

/* Each of 64 bytes below 16 becomes the table's. */
static INLINE dwords K(lookup)(const uint8_t *table, dwords line) {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    vi w;
    __builtin_memcpy(&w, &line, sizeof w);
    w = (vi){_mm256_shuffle_epi8(all, w.a), _mm256_shuffle_epi8(all, w.b)};
    __builtin_memcpy(&line, &w, sizeof w);
    return line;
}

/* Sixteen rows of 16 bytes, `stride` apart, become 4 lines: line j holds dword j of every row. Each half of a register holds row i or i + 4, so two rounds of unpacking do. */
static INLINE void K(transpose_quad)(const uint8_t *rows, int64_t stride, uint8_t *lines) {
    for (int eight = 0; eight < 2; eight++, rows += 8 * stride, lines += 32) {
        __m256i r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            r[i] =
                _mm256_loadu2_m128i((const __m128i *)(rows + (i + 4) * stride), (const __m128i *)(rows + i * stride));
        const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
        const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
        _mm256_storeu_si256((__m256i *)lines, _mm256_unpacklo_epi64(a, c));
        _mm256_storeu_si256((__m256i *)(lines + 64), _mm256_unpackhi_epi64(a, c));
        _mm256_storeu_si256((__m256i *)(lines + 128), _mm256_unpacklo_epi64(b, d));
        _mm256_storeu_si256((__m256i *)(lines + 192), _mm256_unpackhi_epi64(b, d));
    }
}
static INLINE void K(prefetch)(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
