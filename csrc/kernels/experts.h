/* The routed mixture: which experts, rows grouped by expert, and their matmuls. Sums run in ascending expert number. */

static void K(route)(const op *o, const context *c, int32_t row) {
    const float *logits = buffer_row(c, o->in[0], row);
    const float *scale = (const float *)(uintptr_t)c->weights[o->weight[0]].data;
    int32_t *best = buffer_row(c, o->out, row);
    float *share = (float *)(best + o->used), top = -INFINITY, sum = 0;
    uint8_t *taken = c->scratch;
    __builtin_memset(taken, 0, (size_t)o->experts);
    for (int32_t n = 0; n < o->used; n++) {
        int32_t e = -1;
        for (int32_t i = 0; i < o->experts; i++)
            if (!taken[i] && (e < 0 || logits[i] > logits[e])) e = i;
        taken[e] = 1;
        if (logits[e] > top) top = logits[e];
    }
    for (int32_t e = 0, n = 0; e < o->experts; e++)
        if (taken[e]) {
            best[n] = e;
            share[n] = K(exponential)(logits[e] - top);
            sum += share[n++];
        }
    for (int32_t n = 0; n < o->used; n++) share[n] = share[n] / sum * scale[best[n]];
}

/* groups, {expert, first pair} each, the pairs' end, then the pairs: row * used + slot, expert by expert. */
static void K(group)(const op *o, const context *c, int32_t chunk) {
    (void)chunk;
    const int32_t rows = rows_of(o, c), used = o->used;
    int32_t *out = buffer_row(c, o->out, 0), *pairs = out + 2 * o->experts + 2, *count = (int32_t *)c->scratch;
    __builtin_memset(count, 0, (size_t)o->experts * sizeof(int32_t));
    for (int32_t r = 0; r < rows; r++)
        for (int32_t s = 0; s < used; s++) count[((int32_t *)buffer_row(c, o->in[0], r))[s]]++;
    int32_t groups = 0, at = 0;
    for (int32_t e = 0; e < o->experts; e++)
        if (count[e]) {
            out[1 + 2 * groups] = e;
            out[2 + 2 * groups++] = at;
            const int32_t n = count[e];
            count[e] = at;
            at += n;
        }
    out[0] = groups;
    out[2 * o->experts + 1] = at;
    for (int32_t r = 0; r < rows; r++)
        for (int32_t s = 0; s < used; s++) pairs[count[((int32_t *)buffer_row(c, o->in[0], r))[s]]++] = r * used + s;
}

typedef struct {
    int32_t expert, count;
    const int32_t *pairs;
} K(expert_group);
static inline K(expert_group) K(group_at)(const op *o, const context *c, int32_t g) {
    const int32_t *groups = buffer_row(c, o->in[2], 0);
    const int32_t first = groups[2 + 2 * g], end = g + 1 < groups[0] ? groups[4 + 2 * g] : groups[2 * o->experts + 1];
    return (K(expert_group)){groups[1 + 2 * g], end - first, groups + 2 * o->experts + 2 + first};
}
/* Pairs of prompt rows, which come first in every group. */
static inline int32_t K(prompt_pairs)(const op *o, const context *c, const int32_t *pairs, int32_t count) {
    const int32_t end = prompt_rows(o, c) * o->used;
    int32_t n = 0;
    while (n < count && pairs[n] < end) n++;
    return n;
}
static inline weight K(expert)(const weight *all, int32_t e) {
    weight w = *all;
    w.data += (uint64_t)e * (uint64_t)matrix_bytes(all);
    return w;
}

/* One share: some rows of one expert, gate and up in one tensor or in two. */
static void K(experts_up)(const op *o, const context *c, int32_t chunk) {
    const weight *gate = &c->weights[o->weight[0]];
    const int32_t height = gate->rows, share = matmul_share(gate, o, c, 1), shares = (height + share - 1) / share;
    const int32_t tensors = o->weight[1] < 0 ? 1 : 2, which = chunk / shares % tensors;
    const K(expert_group) group = K(group_at)(o, c, chunk / shares / tensors);
    const weight w = K(expert)(&c->weights[o->weight[which]], group.expert);
    const int64_t first = (int64_t)(chunk % shares) * share, rows = height - first < share ? height - first : share;
    const void **x = (const void **)c->scratch;
    float **y = (float **)(x + MOST_TOKENS);
    for (int32_t at = 0; at < group.count; at += MOST_TOKENS) {
        const int32_t n = group.count - at < MOST_TOKENS ? group.count - at : MOST_TOKENS;
        for (int32_t i = 0; i < n; i++) {
            const int32_t row = group.pairs[at + i] / o->used, slot = group.pairs[at + i] % o->used;
            x[i] = buffer_row(c, o->in[0], row);
            y[i] = (float *)buffer_row(c, o->out, row) + ((int64_t)slot * tensors + which) * height + first;
        }
        const int32_t prompt = K(prompt_pairs)(o, c, group.pairs + at, n);
        K(matmul_rows)(&w, first, rows, x, y, n, prompt, (uint8_t *)(y + MOST_TOKENS));
    }
}

static void K(experts_gelu)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(rows_of(o, c) * o->used, o->size, chunk);
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *gate =
            (const float *)buffer_row(c, o->in[0], r / o->used) + (int64_t)(r % o->used) * 2 * o->size + t.col;
        float *y = (float *)buffer_row(c, o->out, r / o->used) + (int64_t)(r % o->used) * o->size + t.col;
        for (int32_t i = 0; i < t.cols; i++) y[i] = K(gelu)(gate[i]) * gate[o->size + i];
    }
}

/* What one expert gets of a row: floats, or rounded as the row's class has it. */
static inline int64_t K(slot_bytes)(const op *o, const context *c, int prompt) {
    if (c->buffers[o->in[0]].type == BUFFER_F32) return o->size * (int64_t)sizeof(float);
    return c->amx && prompt ? o->size * (int64_t)sizeof(bf16) : o->size / 32 * (int64_t)sizeof(block_a8);
}

/* One share: some of the result's columns for every row, expert after expert. */
static void K(experts_down)(const op *o, const context *c, int32_t chunk) {
    enum { TOGETHER = 256 }; /* rows of a share of up to AMX_ROWS, or sixteen of a long one */
    const weight *all = &c->weights[o->weight[0]];
    const int32_t rows = rows_of(o, c), groups = *(const int32_t *)buffer_row(c, o->in[2], 0);
    const int32_t share_width = matmul_share(all, o, c, c->threads);
    const int64_t first = (int64_t)chunk * share_width;
    const int64_t width = all->rows - first < share_width ? all->rows - first : share_width;
    const void **x = (const void **)c->scratch;
    float **y = (float **)(x + TOGETHER), *part = (float *)(y + TOGETHER);
    uint8_t *scratch = (uint8_t *)(part + TOGETHER * AMX_ROWS);
    for (int32_t r = 0; r < rows; r++)
        __builtin_memset((float *)buffer_row(c, o->out, r) + first, 0, (size_t)width * sizeof(float));
    for (int32_t g = 0; g < groups; g++) {
        const K(expert_group) group = K(group_at)(o, c, g);
        const weight w = K(expert)(all, group.expert);
        for (int32_t at = 0; at < group.count; at += TOGETHER) {
            const int32_t n = group.count - at < TOGETHER ? group.count - at : TOGETHER;
            const int32_t prompt = K(prompt_pairs)(o, c, group.pairs + at, n);
            for (int32_t i = 0; i < n; i++) {
                const int32_t row = group.pairs[at + i] / o->used, slot = group.pairs[at + i] % o->used;
                x[i] = (const uint8_t *)buffer_row(c, o->in[0], row) + slot * K(slot_bytes)(o, c, i < prompt);
                y[i] = part + i * width;
            }
            K(matmul_rows)(&w, first, width, x, y, n, prompt, scratch);
            for (int32_t i = 0; i < n; i++) {
                const int32_t row = group.pairs[at + i] / o->used, slot = group.pairs[at + i] % o->used;
                const float share = ((const float *)buffer_row(c, o->in[1], row))[o->used + slot];
                float *out = (float *)buffer_row(c, o->out, row) + first;
                for (int64_t k = 0; k < width; k++) out[k] += share * y[i][k];
            }
        }
    }
}
