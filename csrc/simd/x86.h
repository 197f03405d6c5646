/* What AVX2 and AVX-512 do the same way. */
#include <immintrin.h>

static INLINE int K(f16_at)(const uint8_t *p) {
    uint16_t x;
    __builtin_memcpy(&x, p, 2);
    return x;
}
/* An f16 of each of eight rows: four from `a` on, four from `b` on. */
static INLINE __m128i K(f16_of_eight)(const uint8_t *a, const uint8_t *b, int64_t stride) {
    __m128i x = _mm_cvtsi32_si128(K(f16_at)(a));
    x = _mm_insert_epi16(x, K(f16_at)(a + stride), 1);
    x = _mm_insert_epi16(x, K(f16_at)(a + 2 * stride), 2);
    x = _mm_insert_epi16(x, K(f16_at)(a + 3 * stride), 3);
    x = _mm_insert_epi16(x, K(f16_at)(b), 4);
    x = _mm_insert_epi16(x, K(f16_at)(b + stride), 5);
    x = _mm_insert_epi16(x, K(f16_at)(b + 2 * stride), 6);
    return _mm_insert_epi16(x, K(f16_at)(b + 3 * stride), 7);
}
static INLINE void K(prefetch)(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }
