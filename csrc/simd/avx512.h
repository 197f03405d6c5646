/* Sixteen lanes in one register: AVX-512 F, BW, VL, DQ, VNNI, VBMI. */
#include <immintrin.h>

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

/* Sixteen rows' dot products of `dwords` x 4 unsigned weights with the same signed activations, from bias * minus_sum on. */
static INLINE vi K(dot)(const uint8_t *w, const int8_t *x, int dwords, int bias, int most, int32_t minus_sum) {
    (void)most;
    vi sum = bias ? _mm512_slli_epi32(_mm512_set1_epi32(minus_sum), __builtin_ctz(bias | 256)) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < dwords; j++) {
        int32_t quad;
        __builtin_memcpy(&quad, x + 4 * j, 4);
        sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(w + 64 * j), _mm512_set1_epi32(quad));
    }
    return sum;
}

/* The same a line at a time: where the sum starts, and one dword of every row. */
static INLINE vi K(start)(int bias, int most, int32_t minus_sum) {
    (void)most;
    return _mm512_set1_epi32(bias * minus_sum);
}
static INLINE vi K(dot_line)(vi sum, dwords line, const int8_t *x, int most) {
    (void)most;
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_dpbusd_epi32(sum, (vi)line, _mm512_set1_epi32(quad));
}

/* Each of 64 bytes below 16 becomes the table's. */
static INLINE dwords K(lookup)(const uint8_t *table, dwords line) {
    return (dwords)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), (vi)line);
}

/* Sixteen rows of 16 bytes, `stride` apart, become 4 lines: line j holds dword j of every row. Quarter q of a register holds row i + 4 q, so two rounds of unpacking do. */
static INLINE void K(transpose_quad)(const uint8_t *rows, int64_t stride, uint8_t *lines) {
    vi r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const uint8_t *x = rows + i * stride;
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)x));
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x + 4 * stride)), 1);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x + 8 * stride)), 2);
        r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x + 12 * stride)), 3);
    }
    const vi a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const vi c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_store_si512(lines, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(lines + 64, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(lines + 128, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(lines + 192, _mm512_unpackhi_epi64(b, d));
}
static INLINE void K(prefetch)(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
