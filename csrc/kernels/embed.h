/* Rows of tables: every type as floats, and the two look-ups. */

#define QUANT(name, NAME, values, group, bias, most, minima)                                                          \
    static void K(row_##name)(const uint8_t *x, float *y, int64_t cols) {                                             \
        const block_##name *b = (const block_##name *)x;                                                              \
        for (int64_t k = 0; k < cols; k += (values), b++) {                                                           \
            uint8_t q[values];                                                                                        \
            float scale[(values) / (group)], minimum[(values) / (group)] = {0};                                       \
            K(decode_##name)(b, q, scale, minimum);                                                                   \
            for (int g = 0; g < (values) / (group); g++)                                                              \
                for (int i = 0; i < (group); i++) {                                                                   \
                    const float v = scale[g] * (float)((int32_t)q[g * (group) + i] - (bias));                         \
                    y[k + g * (group) + i] = (minima) ? v + minimum[g] : v;                                           \
                }                                                                                                     \
        }                                                                                                             \
    }
#include "../quants.def"
#undef QUANT
static void K(row_f32)(const uint8_t *x, float *y, int64_t cols) { __builtin_memcpy(y, x, (size_t)cols * sizeof(float)); }
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
    K(kernels).dequantize[w->type]((const uint8_t *)(uintptr_t)w->data + info->token * row_bytes(w->type, w->cols), y, w->cols);
    for (int32_t i = 0; i < w->cols; i++) y[i] *= o->scale;
}

/* A soft token has the row of token 0. A width that cuts a block in two is why the whole row is unpacked. */
static void K(embed_rows)(const op *o, const context *c, int32_t row) {
    const weight *w = &c->weights[o->weight[0]];
    const batch_row *info = row_info(o, c, row);
    const int32_t width = c->buffers[o->out].width, values = block_of(w->type).values;
    const int32_t first = o->part / values * values, end = (o->part + width + values - 1) / values * values;
    const uint8_t *x = row_cache_row((const row_cache *)(uintptr_t)w->data, info->vector >= 0 ? 0 : info->token);
    float *y = buffer_row(c, o->out, row), *whole = (float *)c->scratch;
    K(kernels).dequantize[w->type](x + row_bytes(w->type, first), whole, end - first);
    for (int32_t i = 0; i < width; i++) y[i] = whole[o->part - first + i] * o->scale;
}
