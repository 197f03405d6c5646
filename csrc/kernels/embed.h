/* Rows of tables: every type as floats, and the two look-ups. */

#define QUANT(name, NAME, values, group, bias, most, minima)                                                           \
    static void K(row_##name)(const uint8_t *x, float *y, int64_t cols) {                                              \
        const block_##name *b = (const block_##name *)x;                                                               \
        for (int64_t k = 0; k < cols; k += (values), b++) {                                                            \
            uint8_t q[values];                                                                                         \
            float scale[(values) / (group)], minimum[(values) / (group)] = {0};                                        \
            K(decode_##name)(b, q, scale, minimum);                                                                    \
            for (int g = 0; g < (values) / (group); g++)                                                               \
                for (int i = 0; i < (group); i++) {                                                                    \
                    const float v = scale[g] * (float)((int32_t)q[g * (group) + i] - (bias));                          \
                    y[k + g * (group) + i] = (minima) ? v + minimum[g] : v;                                            \
                }                                                                                                      \
        }                                                                                                              \
    }
#include "../quants.def"
#undef QUANT
static void K(row_f32)(const uint8_t *x, float *y, int64_t cols) {
    __builtin_memcpy(y, x, (size_t)cols * sizeof(float));
}
static void K(row_f16)(const uint8_t *x, float *y, int64_t cols) {
    for (int64_t i = 0; i < cols; i++) y[i] = K(half)(((const f16 *)x)[i]);
}
static void K(row_bf16)(const uint8_t *x, float *y, int64_t cols) {
    for (int64_t i = 0; i < cols; i++) y[i] = K(brain)(((const bf16 *)x)[i]);
}

extern const kernel_table K(kernels);

static void K(embed)(const op *o, const context *c, int32_t row) {
    const weight *w = &c->weights[o->weight[0]];
    const batch_row *info = row_info(o, c, row);
    float *y = buffer_row(c, o->out, row);
    if (info->vector >= 0) {
        __builtin_memcpy(y, c->vectors + (int64_t)info->vector * w->cols, (size_t)w->cols * sizeof(float));
        return;
    }
    K(kernels).dequantize[w->type]((const uint8_t *)(uintptr_t)w->data + info->token * row_bytes(w->type, w->cols), y,
                                   w->cols);
    for (int32_t i = 0; i < w->cols; i++) y[i] *= o->scale;
}

/* A soft token has the row of token 0. The columns wanted may begin and end inside a block. */
static void K(embed_rows)(const op *o, const context *c, int32_t row) {
    enum { PIECE = 1 << 14 };
    const weight *w = &c->weights[o->weight[0]];
    const batch_row *info = row_info(o, c, row);
    const uint8_t *x = row_cache_row((const row_cache *)(uintptr_t)w->data, info->vector >= 0 ? 0 : info->token);
    const int32_t begin = o->part, end = begin + c->buffers[o->out].width;
    float *y = buffer_row(c, o->out, row), *piece = (float *)c->scratch;
    for (int32_t at = begin / PIECE * PIECE; at < end; at += PIECE) {
        const int32_t cols = w->cols - at < PIECE ? w->cols - at : PIECE;
        K(kernels).dequantize[w->type](x + row_bytes(w->type, at), piece, cols);
        for (int32_t i = begin > at ? begin : at; i < at + cols && i < end; i++)
            y[i - begin] = piece[i - at] * o->scale;
    }
}
