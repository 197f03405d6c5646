/* What each format means, once: a block as unsigned q, scales and minima in the order of its values.
 * Plain loops of constant length, which the compiler vectorises for each instruction set. */

static inline float K(half)(f16 h) {
    _Float16 x;
    __builtin_memcpy(&x, &h, 2);
    return (float)x;
}
static inline float K(brain)(bf16 h) {
    const uint32_t bits = (uint32_t)h.bits << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

/* The bits of 2^(e - 128) as a float: exponent field e - 1, or a subnormal for e of 0 and 1. */
static inline uint32_t K(e8m0)(uint32_t e) { return e < 2 ? 0x00200000u << e : (e - 1) << 23; }

static const uint8_t K(iq4_table)[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static const uint8_t K(fp4_table)[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

/* Byte j holds value j in its low nibble and value j + n in its high one. */
static INLINE void K(nibbles)(const uint8_t *restrict qs, uint8_t *restrict q, int n) {
    for (int j = 0; j < n; j++) {
        q[j] = qs[j] & 15;
        q[j + n] = qs[j] >> 4;
    }
}
/* Bit e of the 32 becomes 16 in value e. */
static inline void K(fifth_bits)(const uint8_t qh[4], uint8_t *restrict q) {
    for (int e = 0; e < 32; e++) q[e] |= (uint8_t)((qh[e / 8] >> e % 8 & 1) << 4);
}
/* Eight 6-bit scales and eight 6-bit minima in 12 bytes. */
static inline void K(six_bits)(const uint8_t *s, uint8_t *scales, uint8_t *mins) {
    for (int i = 0; i < 4; i++) {
        scales[i] = s[i] & 63;
        mins[i] = s[i + 4] & 63;
        scales[i + 4] = (uint8_t)((s[i + 8] & 15) | (s[i] >> 6) << 4);
        mins[i + 4] = (uint8_t)(s[i + 8] >> 4 | (s[i + 4] >> 6) << 4);
    }
}

static inline void K(decode_q4_0)(const block_q4_0 *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    (void)minimum;
    K(nibbles)(b->qs, q, 16);
    scale[0] = K(half)(b->d);
}
static inline void K(decode_q4_1)(const block_q4_1 *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    K(nibbles)(b->qs, q, 16);
    scale[0] = K(half)(b->d);
    minimum[0] = K(half)(b->m);
}
static inline void K(decode_q5_0)(const block_q5_0 *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    (void)minimum;
    K(nibbles)(b->qs, q, 16);
    K(fifth_bits)(b->qh, q);
    scale[0] = K(half)(b->d);
}
static inline void K(decode_q5_1)(const block_q5_1 *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    K(nibbles)(b->qs, q, 16);
    K(fifth_bits)(b->qh, q);
    scale[0] = K(half)(b->d);
    minimum[0] = K(half)(b->m);
}
static inline void K(decode_q8_0)(const block_q8_0 *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    (void)minimum;
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)b->qs[i] ^ 128;
    scale[0] = K(half)(b->d);
}
static inline void K(scales_q2_k)(const block_q2_k *b, float *restrict scale, float *restrict minimum) {
    const float d = K(half)(b->d), dmin = K(half)(b->dmin);
    for (int s = 0; s < 16; s++) {
        scale[s] = d * (float)(b->scales[s] & 15);
        minimum[s] = -dmin * (float)(b->scales[s] >> 4);
    }
}
static inline void K(decode_q2_k)(const block_q2_k *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    for (int h = 0; h < 2; h++)
        for (int g = 0; g < 4; g++)
            for (int i = 0; i < 32; i++) q[128 * h + 32 * g + i] = b->qs[32 * h + i] >> 2 * g & 3;
    K(scales_q2_k)(b, scale, minimum);
}
static inline void K(scales_q3_k)(const block_q3_k *b, float *restrict scale, float *restrict minimum) {
    (void)minimum;
    const float d = K(half)(b->d);
    for (int s = 0; s < 16; s++) {
        const int low = s < 8 ? b->scales[s] & 15 : b->scales[s - 8] >> 4;
        const int high = b->scales[8 + s % 4] >> 2 * (s / 4) & 3;
        scale[s] = d * (float)((low | high << 4) - 32);
    }
}
static inline void K(decode_q3_k)(const block_q3_k *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    for (int h = 0; h < 2; h++)
        for (int g = 0; g < 4; g++)
            for (int i = 0; i < 32; i++)
                q[128 * h + 32 * g + i] =
                    (uint8_t)((b->qs[32 * h + i] >> 2 * g & 3) | (b->hmask[i] >> (4 * h + g) & 1) << 2);
    K(scales_q3_k)(b, scale, minimum);
}
/* Of Q4_K and Q5_K: eight 6-bit scales and minima. */
static inline void K(scales_of_eight)(f16 d, f16 dmin, const uint8_t six[12], float *restrict scale,
                                      float *restrict minimum) {
    uint8_t s[8], m[8];
    K(six_bits)(six, s, m);
    for (int g = 0; g < 8; g++) {
        scale[g] = K(half)(d) * (float)s[g];
        minimum[g] = -K(half)(dmin) * (float)m[g];
    }
}
static inline void K(decode_q4_k)(const block_q4_k *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    for (int g = 0; g < 4; g++) K(nibbles)(b->qs + 32 * g, q + 64 * g, 32);
    K(scales_of_eight)(b->d, b->dmin, b->scales, scale, minimum);
}
static inline void K(decode_q5_k)(const block_q5_k *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    for (int g = 0; g < 4; g++) K(nibbles)(b->qs + 32 * g, q + 64 * g, 32);
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) q[32 * g + i] |= (uint8_t)((b->qh[i] >> g & 1) << 4);
    K(scales_of_eight)(b->d, b->dmin, b->scales, scale, minimum);
}
static inline void K(scales_q6_k)(const block_q6_k *b, float *restrict scale, float *restrict minimum) {
    (void)minimum;
    const float d = K(half)(b->d);
    for (int s = 0; s < 16; s++) scale[s] = d * (float)b->scales[s];
}
static inline void K(decode_q6_k)(const block_q6_k *b, uint8_t *restrict q, float *restrict scale,
                                  float *restrict minimum) {
    for (int h = 0; h < 2; h++) {
        const uint8_t *ql = b->ql + 64 * h, *qh = b->qh + 32 * h;
        uint8_t *out = q + 128 * h;
        for (int i = 0; i < 32; i++) {
            out[i] = (uint8_t)((ql[i] & 15) | (qh[i] & 3) << 4);
            out[i + 32] = (uint8_t)((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4);
            out[i + 64] = (uint8_t)(ql[i] >> 4 | (qh[i] >> 4 & 3) << 4);
            out[i + 96] = (uint8_t)(ql[i + 32] >> 4 | (qh[i] >> 6) << 4);
        }
    }
    K(scales_q6_k)(b, scale, minimum);
}
static inline void K(decode_iq4_nl)(const block_iq4_nl *b, uint8_t *restrict q, float *restrict scale,
                                    float *restrict minimum) {
    (void)minimum;
    K(nibbles)(b->qs, q, 16);
    for (int i = 0; i < 32; i++) q[i] = K(iq4_table)[q[i]];
    scale[0] = K(half)(b->d);
}
static inline void K(scales_iq4_xs)(const block_iq4_xs *b, float *restrict scale, float *restrict minimum) {
    (void)minimum;
    const float d = K(half)(b->d);
    for (int g = 0; g < 8; g++) {
        const int low = b->scales_l[g / 2] >> 4 * (g % 2) & 15, high = b->scales_h >> 2 * g & 3;
        scale[g] = d * (float)((low | high << 4) - 32);
    }
}
static inline void K(decode_iq4_xs)(const block_iq4_xs *b, uint8_t *restrict q, float *restrict scale,
                                    float *restrict minimum) {
    for (int g = 0; g < 8; g++) K(nibbles)(b->qs + 16 * g, q + 32 * g, 16);
    for (int i = 0; i < 256; i++) q[i] = K(iq4_table)[q[i]];
    K(scales_iq4_xs)(b, scale, minimum);
}
static inline void K(decode_mxfp4)(const block_mxfp4 *b, uint8_t *restrict q, float *restrict scale,
                                   float *restrict minimum) {
    (void)minimum;
    K(nibbles)(b->qs, q, 16);
    for (int i = 0; i < 32; i++) q[i] = K(fp4_table)[q[i]];
    const uint32_t bits = K(e8m0)(b->e);
    __builtin_memcpy(scale, &bits, 4);
}
