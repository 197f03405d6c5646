/* From logits to candidates: in stretches of columns, then merged. A stretch's record is
 * {maximum, sum of exponentials above it, finite?, count, ids [used], values [used]}. */

/* Keeps the best `most`, best first, the lower id first among equals. */
static inline void K(keep)(int32_t *ids, float *values, int32_t *count, int32_t most, int32_t id, float value) {
    int32_t at = *count;
    if (at == most) {
        if (!(value > values[most - 1])) return;
        at--;
    } else {
        ++*count;
    }
    for (; at > 0 && (value > values[at - 1] || (value == values[at - 1] && id < ids[at - 1])); at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
}

/* The largest of n values; `finite` becomes NaN if one of them is not. (A loop that is unrolled first is not made a vector.) */
static inline float K(largest)(const float *x, int32_t n, float *finite) {
    float tops[16], zeros[16] = {0};
    for (int j = 0; j < 16; j++) tops[j] = -INFINITY;
    for (int32_t i = 0; i < n / 16 * 16; i += 16)
#pragma GCC unroll 1
        for (int j = 0; j < 16; j++) {
            tops[j] = x[i + j] > tops[j] ? x[i + j] : tops[j];
            zeros[j] += x[i + j] * 0.0f;
        }
    for (int32_t i = n / 16 * 16; i < n; i++) {
        tops[i % 16] = x[i] > tops[i % 16] ? x[i] : tops[i % 16];
        zeros[i % 16] += x[i] * 0.0f;
    }
    for (int j = 1; j < 16; j++) tops[0] = tops[j] > tops[0] ? tops[j] : tops[0];
    *finite = K(sum16)(zeros);
    return tops[0];
}
static inline int K(any_above)(const float x[16], float least) {
    int32_t above = 0;
#pragma GCC unroll 1
    for (int j = 0; j < 16; j++) above |= x[j] > least;
    return above;
}

static void K(top_part)(const op *o, const context *c, int32_t chunk) {
    const int32_t vocab = c->buffers[o->in[0]].width, pieces = (vocab + o->size - 1) / o->size;
    const int32_t row = chunk / pieces, piece = chunk % pieces, first = piece * o->size;
    const int32_t n = vocab - first < o->size ? vocab - first : o->size, record = 4 + 2 * o->used;
    const float *logits = (const float *)buffer_row(c, o->in[0], row) + first;
    float *out = (float *)buffer_row(c, o->out, row) + (int64_t)piece * record, *x = (float *)c->scratch;
    int32_t *ids = (int32_t *)(out + 4), count = 0;
    float *values = out + 4 + o->used, lanes[16] = {0}, finite = 0;
    const float top = K(largest)(logits, n, &finite);
    for (int32_t i = 0; i < n / 16 * 16; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += K(exponential)(logits[i + j] - top);
    for (int32_t i = n / 16 * 16; i < n; i++) lanes[i % 16] += K(exponential)(logits[i] - top);
    out[0] = top;
    out[1] = K(sum16)(lanes);
    out[2] = finite == 0.0f;
    const batch_row *info = row_info(o, c, row);
    if (out[2] != 0.0f && info->flags & ROW_WANT_TOP) {
        const batch_sequence *s = &c->sequences[info->sequence];
        __builtin_memcpy(x, logits, (size_t)n * sizeof(float));
        for (uint32_t i = 0; i < s->biases; i++) {
            const logit_bias *b = &c->biases[s->bias + i];
            if (b->token < first || b->token >= first + n) continue;
            float *l = &x[b->token - first];
            *l = (*l <= 0.0f ? *l * b->scale : *l / b->scale) + b->add;
        }
        if (s->mask >= 0) {
            const uint32_t *mask = c->masks + (int64_t)s->mask * ((vocab + 31) / 32);
            for (int32_t i = 0; i < n; i++)
                if (!(mask[(first + i) / 32] >> (first + i) % 32 & 1)) x[i] = -INFINITY;
        }
        for (int32_t i = 0; i < n; i += 16) {
            const float least = count < o->used ? -INFINITY : values[o->used - 1];
            const int32_t stop = n - i < 16 ? n : i + 16;
            if (stop == i + 16 && !K(any_above)(x + i, least)) continue;
            for (int32_t j = i; j < stop; j++)
                if (x[j] > -INFINITY && (count < o->used || x[j] > values[o->used - 1]))
                    K(keep)(ids, values, &count, o->used, first + j, x[j]);
        }
    }
    out[3] = (float)count;
}

static void K(top)(const op *o, const context *c, int32_t chunk) {
    (void)chunk;
    run_result *result = c->result;
    const int32_t pieces = c->buffers[o->in[0]].width / (4 + 2 * o->used), most = result->top;
    for (int32_t row = 0; row < c->head->wanted; row++) {
        const float *parts = buffer_row(c, o->in[0], row);
        int32_t *ids = (int32_t *)(uintptr_t)result->top_ids + (int64_t)row * most, count = 0;
        float *values = (float *)(uintptr_t)result->top_values + (int64_t)row * most, top = -INFINITY, sum = 0;
        for (int32_t p = 0; p < pieces; p++) {
            const float *part = parts + (int64_t)p * (4 + 2 * o->used);
            top = part[0] > top ? part[0] : top;
            if (part[2] == 0.0f && result->status == STATUS_OK) {
                result->status = STATUS_NON_FINITE;
                result->bad_row = c->wanted[row];
            }
        }
        for (int32_t p = 0; p < pieces; p++) {
            const float *part = parts + (int64_t)p * (4 + 2 * o->used);
            sum += part[1] * K(exponential)(part[0] - top);
            for (int32_t i = 0; i < (int32_t)part[3]; i++)
                K(keep)(ids, values, &count, most, ((const int32_t *)(part + 4))[i], part[4 + o->used + i]);
        }
        ((float *)(uintptr_t)result->logsumexp)[row] = top + logf(sum);
        for (int32_t i = count; i < most; i++) {
            ids[i] = -1;
            values[i] = -INFINITY;
        }
    }
}
