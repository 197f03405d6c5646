/* Tiles: eight registers of sixteen lines of 64 bytes, and what fills them. AMX-TILE, AMX-BF16, AVX512-BF16.
 *
 * amx_dot(c, a, b) adds to sums c [16 tokens][16 rows] the products of tokens a [16][32 k] and weights
 * b [32 k / 2][16 rows][2], all bf16: of each 32 first those with even k one after the other, and likewise those with
 * odd k, fused, then both sums to each other, then that to c. All of it in float32, rounded to nearest even, with
 * denormals as zeros on either side (Intel's Software Developer's Manual, volume 2, TDPBF16PS).
 */

#ifdef AMX_EMULATED
static _Thread_local struct {
    _Alignas(64) uint32_t tile[8][LANES][LANES];
    int32_t on;
} K(amx);
static void K(amx_on)(void) { K(amx).on = 1; }
static void K(amx_off)(void) { K(amx).on = 0; }
/* As the CPU faults where no configuration was loaded. */
static uint32_t (*K(amx_tile)(int t)) [LANES] {
    if (!K(amx).on) __builtin_trap();
    return K(amx).tile[t];
} static void amx_zero(int t) {
    __builtin_memset(K(amx_tile)(t), 0, sizeof K(amx).tile[t]);
}
static void amx_load(int t, const void *from, int64_t stride) {
    for (int i = 0; i < LANES; i++) __builtin_memcpy(K(amx_tile)(t)[i], (const uint8_t *)from + i * stride, 64);
}
static void amx_stream(int t, const void *from, int64_t stride) { amx_load(t, from, stride); }
static void amx_store(int t, void *to, int64_t stride) {
    for (int i = 0; i < LANES; i++) __builtin_memcpy((uint8_t *)to + i * stride, K(amx_tile)(t)[i], 64);
}
static void amx_dot(int c, int a, int b) {
    enum { MASKED = 0x1f80, FLUSH = 0x8000, ZEROS = 0x40 };
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(MASKED | FLUSH | ZEROS);
    __asm__ volatile("" ::: "memory");
    for (int i = 0; i < LANES; i++) {
        __m512 even = _mm512_setzero_ps(), odd = even, sum = _mm512_load_ps(K(amx_tile)(c)[i]);
        for (int k = 0; k < LANES; k++) {
            const __m512i x = _mm512_set1_epi32((int32_t)K(amx_tile)(a)[i][k]);
            const __m512i w = _mm512_load_si512(K(amx_tile)(b)[k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                  _mm512_castsi512_ps(_mm512_and_si512(w, high)), odd);
        }
        _mm512_store_ps(K(amx_tile)(c)[i], _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
    }
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(before);
}
#else
/* Eight tiles of full size. Static, since gcc 12 takes _tile_loadconfig to read eight bytes and drops other stores. */
static const struct {
    uint8_t palette, start, none[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} K(amx_config) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
_Static_assert(sizeof K(amx_config) == 64, "what the CPU loads");
static inline void K(amx_on)(void) { _tile_loadconfig(&K(amx_config)); }
static inline void K(amx_off)(void) { _tile_release(); }
/* A tile's number is a part of the instruction's name. To gcc 12 a load reads no memory: it must see stores first. */
#define AMX_SEEN __asm__ volatile("" ::: "memory")
#define amx_zero(t) _tile_zero(t)
#define amx_load(t, from, stride)                                                                                      \
    do {                                                                                                               \
        AMX_SEEN;                                                                                                      \
        _tile_loadd(t, from, stride);                                                                                  \
    } while (0)
#define amx_stream(t, from, stride)                                                                                    \
    do {                                                                                                               \
        AMX_SEEN;                                                                                                      \
        _tile_stream_loadd(t, from, stride);                                                                           \
    } while (0)
#define amx_store(t, to, stride) _tile_stored(t, to, stride)
#define amx_dot(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

/* -- To bf16, to nearest even, denormals to zero ------------------------------------------------------------------- */

static void K(round_blocks)(const float *x, bf16 *y, int64_t cols) {
    for (int64_t k = 0; k < cols; k += 32)
        _mm512_storeu_si512(y + k, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k)));
}
/* A line of a tile of weights: of each row the one column beside the other. */
static INLINE vi K(pair_columns)(vf even, vf odd) {
    static const _Alignas(64)
        uint16_t order[2 * LANES] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
static INLINE vi K(load_line)(const uint8_t *p) { return _mm512_load_si512(p); }
static INLINE void K(store_line)(uint8_t *p, vi x) { _mm512_store_si512(p, x); }
/* Byte i of each dword, less `bias`, exactly: put behind the bits of 2^23. */
static INLINE vf K(byte_of_each)(vi line, int i, int bias) {
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi32(i, 4 + i, 8 + i, 12 + i));
    const __m512i behind = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4b000000), 0x1111111111111111, line, places);
    return _mm512_sub_ps(_mm512_castsi512_ps(behind), _mm512_set1_ps((float)(0x800000 + bias)));
}
