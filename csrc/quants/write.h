/* Rows become blocks: sixteen groups at a time are laid side by side, searched, and written as GGUF has them. */

static const float K(above_iq4)[15] = {-115.5f, -93.5f, -74,   -57,   -42, -28.5f, -16, -4.5f,
                                       7,       19,     31.5f, 45.5f, 61,  79,     101};
static const float K(gap_iq4)[15] = {23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24};
static const float K(above_fp4)[14] = {-10, -7, -5, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
static const float K(gap_fp4)[14] = {4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 4};

/* Starts were chosen by trial on normal, heavy-tailed and trained values: fine codes gain from many, since the error of
 * each is a fresh draw; low weights at the ends let more of the range be given up. */
static const search_form K(forms)[TYPE_COUNT] = {
    [TYPE_Q4_0] = {32, 1, 0, -8, 7, 1, 1, 0, NULL, NULL, {{0}, {34, -2, 0.35f}}},
    [TYPE_Q5_0] = {32, 1, 0, -16, 15, 1, 1, 0, NULL, NULL, {{0}, {40, -3, 0.375f}}},
    [TYPE_Q8_0] = {32, 1, 0, -127, 127, 1, 1, 0, NULL, NULL, {{0}, {5, -8, 2}}},
    [TYPE_Q4_1] = {32, 1, ANY_SIGN, 0, 15, 1, 1, 0, NULL, NULL, {{0}, {12, -0.75f, 0.45f}}},
    [TYPE_Q5_1] = {32, 1, ANY_SIGN, 0, 31, 1, 1, 0, NULL, NULL, {{0}, {12, -1.8f, 0.6f}}},
    [TYPE_MXFP4] = {32, 1, 0, -12, 12, 1, 1, 14, K(above_fp4), K(gap_fp4), {{0}, {0}}},
    [TYPE_IQ4_NL] = {32, 1, 0, -127, 113, 1, 1, 15, K(above_iq4), K(gap_iq4), {{17, -24, 3}, {30, -24, 4}}},
    [TYPE_IQ4_XS] = {32, 8, 0, -127, 113, -32, 31, 15, K(above_iq4), K(gap_iq4), {{17, -24, 3}, {30, -24, 4}}},
    [TYPE_Q2_K] = {16, 16, MULTIPLES, 0, 3, 0, 15, 0, NULL, NULL, {{5, -0.6f, 0.3f}, {8, -0.6f, 0.3f}}},
    [TYPE_Q3_K] = {16, 16, 0, -4, 3, -32, 31, 0, NULL, NULL, {{5, -1, 0.4f}, {32, -1.2f, 0.3f}}},
    [TYPE_Q4_K] = {32, 8, MULTIPLES, 0, 15, 0, 63, 0, NULL, NULL, {{7, -0.9f, 0.3f}, {12, -0.75f, 0.45f}}},
    [TYPE_Q5_K] = {32, 8, MULTIPLES, 0, 31, 0, 63, 0, NULL, NULL, {{8, -1.8f, 0.4f}, {12, -1.8f, 0.6f}}},
    [TYPE_Q6_K] = {16, 16, 0, -32, 31, -128, 127, 0, NULL, NULL, {{16, -8, 0.6f}, {20, -8, 1}}},
};

/* One block's groups from lane `first` on. Importance is of the block's most, and never nothing, so that what has none is
 * kept where that costs nothing. */
static void K(lay)(const search_form *f, const float *x, const float *importance, int first, group_lanes *b) {
    const int size = f->values * f->groups;
    float unit = K(top_size)(x, size), most = importance ? K(top_size)(importance, size) : 0.0f, w[256];
    uint32_t bits;
    __builtin_memcpy(&bits, &unit, 4);
    bits = bits < 0x00800000 ? 0x00800000 : bits & 0x7f800000; /* its power of two, a normal one */
    __builtin_memcpy(&unit, &bits, 4);
    const float inverse = 1.0f / unit;
    for (int i = 0; i < size; i++) {
        const float share = most > 0.0f ? importance[i] / most : 1.0f;
        w[i] = share > 1e-6f ? share : 1e-6f;
    }
    for (int g = 0; g < f->groups; g++) {
        for (int j = 0; j < f->values; j++) {
            b->x[j][first + g] = x[g * f->values + j] * inverse;
            b->w[j][first + g] = w[g * f->values + j];
        }
        b->unit[first + g] = unit;
    }
}
static void K(sum_weights)(const search_form *f, group_lanes *b) {
    EACH b->weight[i] = 0.0f;
    for (int j = 0; j < f->values; j++) EACH b->weight[i] += b->w[j][i];
}

/* Codes from 0 up, group after group. */
static void K(codes_of)(const group_lanes *b, const search_form *f, const block_lanes *c, uint8_t *q) {
    fit_lanes fit;
    lanes inverse;
    K(fit_of)(c, &fit);
    K(inverses)(fit.scale, inverse);
    for (int j = 0; j < f->values; j++) {
        int32_t code[16] = {0};
        lanes t;
        EACH t[i] = (f->minima ? b->x[j][i] - fit.minimum[i] : b->x[j][i]) * inverse[i];
        for (int k = 0; k < f->steps; k++) EACH code[i] += t[i] > f->above[k];
        if (!f->steps) EACH code[i] = (int32_t)(K(between)(f->low, K(nearest)(t[i]), f->high) - f->low);
        for (int i = 0; i < 16; i++) q[i * f->values + j] = (uint8_t)code[i];
    }
}
/* In each run of bytes the first codes lie lowest, the next ones above them: what decode.h and gguf's readers undo. */
static INLINE void K(gather)(const uint8_t *q, int count, int run, int bits, int down, uint8_t *out) {
    const int mask = (1 << bits) - 1;
    for (int at = 0; at < count; at += run * 8 / bits, out += run)
        for (int j = 0; j < run; j++) {
            int byte = 0;
            for (int n = 0; n < 8 / bits; n++) byte |= (q[at + n * run + j] >> down & mask) << n * bits;
            out[j] = (uint8_t)byte;
        }
}
static INLINE void K(pack_bytes)(const uint8_t q[32], uint8_t qs[16], uint8_t *qh) {
    int32_t code[32];
    for (int i = 0; i < 32; i++) code[i] = q[i];
    K(pack)(code, qs, qh);
}
/* Eight 6-bit scales and eight 6-bit minima in 12 bytes. */
static INLINE void K(pack_sixes)(const uint8_t k[8], const uint8_t l[8], uint8_t out[12]) {
    for (int g = 0; g < 4; g++) {
        out[g] = (uint8_t)(k[g] | k[g + 4] >> 4 << 6);
        out[g + 4] = (uint8_t)(l[g] | l[g + 4] >> 4 << 6);
        out[g + 8] = (uint8_t)((k[g + 4] & 15) | l[g + 4] << 4);
    }
}
static void K(write_block)(int32_t type, const search_form *f, const block_lanes *c, float unit, int first,
                           const uint8_t *q, uint8_t *out) {
#define BLOCK(name) block_##name *b = (block_##name *)out
    const f16 d = K(half_of_float)(c->d[first] * unit), dmin = K(half_of_float)(c->dmin[first] * unit);
    const f16 minimum = K(half_of_float)(-c->dmin[first] * unit);
    uint8_t k[16], l[16];
    for (int g = 0; g < f->groups; g++) {
        k[g] = (uint8_t)(int32_t)(c->k[first + g] - f->least);
        l[g] = (uint8_t)(int32_t)c->l[first + g];
    }
    switch (type) {
        case TYPE_Q4_0:
        case TYPE_IQ4_NL: { /* of one layout */
            BLOCK(q4_0);
            b->d = d;
            K(pack_bytes)(q, b->qs, NULL);
        } break;
        case TYPE_Q4_1: {
            BLOCK(q4_1);
            b->d = d, b->m = minimum;
            K(pack_bytes)(q, b->qs, NULL);
        } break;
        case TYPE_Q5_0: {
            BLOCK(q5_0);
            b->d = d;
            K(pack_bytes)(q, b->qs, b->qh);
        } break;
        case TYPE_Q5_1: {
            BLOCK(q5_1);
            b->d = d, b->m = minimum;
            K(pack_bytes)(q, b->qs, b->qh);
        } break;
        case TYPE_Q8_0: {
            BLOCK(q8_0);
            b->d = d;
            for (int i = 0; i < 32; i++) b->qs[i] = (int8_t)(q[i] - 127);
        } break;
        case TYPE_MXFP4: { /* 0 .. 12 are codes 0 .. 7, and -1 .. -12 are 9 .. 15 */
            BLOCK(mxfp4);
            int32_t code[32];
            for (int i = 0; i < 32; i++) code[i] = q[i] < 7 ? 15 - q[i] : q[i] - 7;
            b->e = (uint8_t)(ilogbf(c->d[first] * unit) + 128);
            K(pack)(code, b->qs, NULL);
        } break;
        case TYPE_IQ4_XS: {
            BLOCK(iq4_xs);
            uint8_t high[2];
            b->d = d;
            K(gather)(k, 8, 1, 4, 0, b->scales_l);
            K(gather)(k, 8, 1, 2, 4, high);
            b->scales_h = (uint16_t)(high[0] | high[1] << 8);
            for (int g = 0; g < 8; g++) K(pack_bytes)(q + 32 * g, b->qs + 16 * g, NULL);
        } break;
        case TYPE_Q2_K: {
            BLOCK(q2_k);
            b->d = d, b->dmin = dmin;
            for (int g = 0; g < 16; g++) b->scales[g] = (uint8_t)(k[g] | l[g] << 4);
            K(gather)(q, 256, 32, 2, 0, b->qs);
        } break;
        case TYPE_Q3_K: {
            BLOCK(q3_k);
            b->d = d;
            K(gather)(k, 16, 8, 4, 0, b->scales);
            K(gather)(k, 16, 4, 2, 4, b->scales + 8);
            K(gather)(q, 256, 32, 2, 0, b->qs);
            K(gather)(q, 256, 32, 1, 2, b->hmask);
        } break;
        case TYPE_Q4_K: {
            BLOCK(q4_k);
            b->d = d, b->dmin = dmin;
            K(pack_sixes)(k, l, b->scales);
            K(gather)(q, 256, 32, 4, 0, b->qs);
        } break;
        case TYPE_Q5_K: {
            BLOCK(q5_k);
            b->d = d, b->dmin = dmin;
            K(pack_sixes)(k, l, b->scales);
            K(gather)(q, 256, 32, 4, 0, b->qs);
            K(gather)(q, 256, 32, 1, 4, b->qh);
        } break;
        case TYPE_Q6_K: {
            BLOCK(q6_k);
            b->d = d;
            for (int g = 0; g < 16; g++) b->scales[g] = (int8_t)(k[g] - 128);
            K(gather)(q, 256, 64, 4, 0, b->ql);
            K(gather)(q, 256, 32, 2, 4, b->qh);
        } break;
        default: break;
    }
#undef BLOCK
}

static void K(search_blocks)(int32_t type, const float *x, int64_t rows, int64_t cols, const float *importance,
                             uint8_t *out) {
    const search_form *f = &K(forms)[type];
    const block_size size = block_of(type);
    const int64_t blocks = rows * cols / size.values;
    const int at_once = 16 / f->groups, weighted = importance != NULL;
    for (int64_t from = 0; from < blocks; from += at_once) {
        group_lanes b;
        block_lanes c;
        uint8_t codes[16 * 32];
        for (int n = 0; n < at_once; n++) { /* the last block fills lanes that are left over */
            const int64_t at = (from + n < blocks ? from + n : blocks - 1) * size.values;
            K(lay)(f, x + at, importance ? importance + at % cols : NULL, n * f->groups, &b);
        }
        K(sum_weights)(f, &b);
        if (f->groups > 1) K(choose_shared)(&b, f, weighted, &c);
        else if (type == TYPE_MXFP4) K(choose_power)(&b, f, &c);
        else if (type == TYPE_Q8_0) K(choose_fine)(&b, f, weighted, &c);
        else K(choose_alone)(&b, f, weighted, &c);
        K(codes_of)(&b, f, &c, codes);
        for (int n = 0; n < at_once && from + n < blocks; n++, out += size.bytes)
            K(write_block)(type, f, &c, b.unit[n * f->groups], n * f->groups, codes + n * size.values, out);
    }
}
static void K(encode)(int32_t type, const float *x, int64_t rows, int64_t cols, const float *importance, uint8_t *out) {
    const int64_t n = rows * cols / 32;
    if (importance) K(search_blocks)(type, x, rows, cols, importance, out);
    else if (type == TYPE_Q4_0) K(plain_q4_0)(x, n, (block_q4_0 *)out);
    else if (type == TYPE_Q4_1) K(plain_q4_1)(x, n, (block_q4_1 *)out);
    else if (type == TYPE_Q5_0) K(plain_q5_0)(x, n, (block_q5_0 *)out);
    else if (type == TYPE_Q5_1) K(plain_q5_1)(x, n, (block_q5_1 *)out);
    else if (type == TYPE_Q8_0) K(plain_q8_0)(x, n, (block_q8_0 *)out);
    else if (type == TYPE_MXFP4) K(plain_mxfp4)(x, n, (block_mxfp4 *)out);
    else K(search_blocks)(type, x, rows, cols, NULL, out);
}

/* The sum of importance * (x - y)^2, all ones without; n is a multiple of 32. */
static double K(squared_error)(const float *x, const float *y, const float *importance, int64_t n) {
    double sums[16] = {0}, sum = 0;
    for (int64_t at = 0; at < n; at += 16)
        for (int i = 0; i < 16; i++) {
            const double off = (double)x[at + i] - (double)y[at + i];
            sums[i] += (importance ? (double)importance[at + i] : 1.0) * (off * off);
        }
    for (int i = 0; i < 16; i++) sum += sums[i];
    return sum;
}
#undef EACH
