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

/* 64 nibble pairs as low and high bytes; four bits of each lane from bit `at` on become 16 in its four bytes; a table of 16. */
static INLINE void K(split)(const uint8_t *line, uint8_t *low, uint8_t *high) {
    const vi x = _mm512_load_si512(line), nibble = _mm512_set1_epi8(15);
    _mm512_store_si512(low, _mm512_and_si512(x, nibble));
    _mm512_store_si512(high, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble));
}
static INLINE void K(add_bits)(const uint32_t *bits, int at, uint8_t *line) {
    const vi four = _mm512_and_si512(_mm512_srlv_epi32(_mm512_load_si512(bits), _mm512_set1_epi32(at)), _mm512_set1_epi32(15));
    const vi spread = _mm512_or_si512(_mm512_or_si512(four, _mm512_slli_epi32(four, 7)),
                                      _mm512_or_si512(_mm512_slli_epi32(four, 14), _mm512_slli_epi32(four, 21)));
    const vi sixteens = _mm512_slli_epi32(_mm512_and_si512(spread, _mm512_set1_epi32(0x01010101)), 4);
    _mm512_store_si512(line, _mm512_or_si512(_mm512_load_si512(line), sixteens));
}
static INLINE void K(lookup)(const uint8_t *table, uint8_t *line) {
    const vi all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    _mm512_store_si512(line, _mm512_shuffle_epi8(all, _mm512_load_si512(line)));
}

/* Rows of 64 bytes, `stride` apart, become 16 lines of 16 dwords: line j holds dword j of every row. */
static INLINE void K(transpose_zmm)(vi r[16]) {
    vi t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
static INLINE void K(transpose)(const uint8_t *rows, int64_t stride, uint8_t *lines, int count) {
    vi r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows + i * stride);
    K(transpose_zmm)(r);
    if (count == 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(lines + 64 * i, r[i]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) _mm512_store_si512(lines + 64 * i, r[i]);
    }
}
static INLINE void K(prefetch)(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
