/* Norms, sums, activations, rope, quantised rows: plain loops, each sum in sixteen lanes and one fixed order. */

static inline float K(sum16)(const float v[16]) {
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; i++) a[i] += a[i + 4];
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* e^x to 2 ulp, 0 below -87.3, infinity above 88.7; NaN stays NaN. Cephes' polynomial; 12582912 rounds to an integer. */
static INLINE float K(exponential)(float x) {
    const float limited = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    const float n = (limited * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (limited - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float halved = n * 0.5f;
    const int32_t low = (int32_t)(n == n ? halved : 0.0f), high = (int32_t)(n == n ? n : 0.0f) - low;
    const uint32_t a = (uint32_t)(low + 127) << 23, b = (uint32_t)(high + 127) << 23;
    float fa, fb;
    __builtin_memcpy(&fa, &a, 4);
    __builtin_memcpy(&fb, &b, 4);
    const float y = p * fa * fb;
    return x < -87.3f ? 0.0f : x > 88.7f ? INFINITY : y;
}
/* x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u). */
static INLINE float K(gelu)(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * (x * x * x));
    return x / (1.0f + K(exponential)(-2.0f * u));
}

static void K(wanted)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(c->head->wanted, c->buffers[o->out].width, chunk);
    for (int32_t r = t.row; r < t.row + t.rows; r++)
        __builtin_memcpy((float *)buffer_row(c, o->out, r) + t.col,
                         (const float *)buffer_row(c, o->in[0], c->wanted[r]) + t.col, (size_t)t.cols * sizeof(float));
}

static void K(rms_norm)(const op *o, const context *c, int32_t chunk) {
    const int32_t width = c->buffers[o->out].width, size = o->size, rows = rows_of(o, c);
    const int32_t each = width < TILE_ELEMENTS ? TILE_ELEMENTS / width : 1;
    const float *w = o->weight[0] < 0 ? NULL : (const float *)(uintptr_t)c->weights[o->weight[0]].data;
    for (int32_t r = chunk * each; r < rows && r < (chunk + 1) * each; r++)
        for (int32_t at = 0; at < width; at += size) {
            const float *x = (const float *)buffer_row(c, o->in[0], r) + at;
            float *y = (float *)buffer_row(c, o->out, r) + at, squares[16] = {0};
            for (int32_t i = 0; i < size; i += 16)
                for (int j = 0; j < 16; j++) squares[j] += x[i + j] * x[i + j];
            const float s = o->scale / sqrtf(K(sum16)(squares) / (float)size + o->eps);
            if (w)
                for (int32_t i = 0; i < size; i++) y[i] = x[i] * s * w[i];
            else
                for (int32_t i = 0; i < size; i++) y[i] = x[i] * s;
        }
}

static void K(add)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(rows_of(o, c), c->buffers[o->out].width, chunk);
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *a = (const float *)buffer_row(c, o->in[0], r) + t.col;
        const float *b = (const float *)buffer_row(c, o->in[1], r) + t.col;
        float *y = (float *)buffer_row(c, o->out, r) + t.col;
        for (int32_t i = 0; i < t.cols; i++) y[i] = (a[i] + b[i]) * o->scale;
    }
}

static void K(scale)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(rows_of(o, c), c->buffers[o->out].width, chunk);
    const float s = *(const float *)(uintptr_t)c->weights[o->weight[0]].data;
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *x = (const float *)buffer_row(c, o->in[0], r) + t.col;
        float *y = (float *)buffer_row(c, o->out, r) + t.col;
        for (int32_t i = 0; i < t.cols; i++) y[i] = x[i] * s;
    }
}

static void K(gelu_mul)(const op *o, const context *c, int32_t chunk) {
    const int32_t width = c->buffers[o->out].width;
    const tile t = tile_at(rows_of(o, c), width, chunk);
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *gate = (const float *)buffer_row(c, o->in[0], r) + t.col;
        const float *up = (const float *)buffer_row(c, o->in[1], r) + (int64_t)o->part * width + t.col;
        float *y = (float *)buffer_row(c, o->out, r) + t.col;
        for (int32_t i = 0; i < t.cols; i++) y[i] = K(gelu)(gate[i]) * up[i];
    }
}

static void K(softcap)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(rows_of(o, c), c->buffers[o->out].width, chunk);
    const float cap = o->scale, doubled = 2.0f / cap;
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *x = (const float *)buffer_row(c, o->in[0], r) + t.col;
        float *y = (float *)buffer_row(c, o->out, r) + t.col;
        for (int32_t i = 0; i < t.cols; i++) y[i] = cap - 2.0f * cap / (1.0f + K(exponential)(x[i] * doubled));
    }
}

/* Angles in double: at position 200,000 a float product is wrong by 1e-2. */
static void K(angles)(const op *o, const context *c, int32_t chunk) {
    const float *factors = o->weight[0] < 0 ? NULL : (const float *)(uintptr_t)c->weights[o->weight[0]].data;
    for (int32_t r = chunk * 16; r < rows_of(o, c) && r < (chunk + 1) * 16; r++) {
        float *y = buffer_row(c, o->out, r);
        const double position = row_info(o, c, r)->position;
        for (int32_t i = 0; i < o->pairs; i++) {
            const double frequency = pow((double)o->base, -2.0 * i / o->size) / (factors ? (double)factors[i] : 1.0);
            y[i] = (float)cos(position * frequency);
            y[o->pairs + i] = (float)sin(position * frequency);
        }
    }
}

static void K(rope)(const op *o, const context *c, int32_t chunk) {
    const int32_t width = c->buffers[o->out].width, rows = rows_of(o, c);
    const int32_t each = width < TILE_ELEMENTS ? TILE_ELEMENTS / width : 1, half = o->size / 2, pairs = o->pairs;
    for (int32_t r = chunk * each; r < rows && r < (chunk + 1) * each; r++) {
        const float *cosine = buffer_row(c, o->in[1], r), *sine = cosine + pairs;
        const float *x = buffer_row(c, o->in[0], r);
        float *y = buffer_row(c, o->out, r);
        for (int32_t h = 0; h < width; h += o->head_dim) {
            if (x != y) __builtin_memcpy(y + h, x + h, (size_t)o->head_dim * sizeof(float));
            float *restrict low = y + h, *restrict high = y + h + half;
            for (int32_t i = 0; i < pairs; i++) {
                const float a = low[i], b = high[i];
                low[i] = a * cosine[i] - b * sine[i];
                high[i] = b * cosine[i] + a * sine[i];
            }
        }
    }
}

/* d = max |x| / 127 and q = x / d to the nearest. The maximum is taken of the bits, so that a NaN wins and d shows it. */
static void K(quantize_blocks)(const float *x, block_a8 *y, int64_t cols) {
    for (int64_t b = 0; b < cols / 32; b++, x += 32, y++) {
        uint32_t lanes[16] = {0};
        for (int h = 0; h < 32; h += 16)
            for (int i = 0; i < 16; i++) {
                uint32_t bits;
                __builtin_memcpy(&bits, x + h + i, 4);
                bits &= 0x7fffffff;
                lanes[i] = bits > lanes[i] ? bits : lanes[i];
            }
        uint32_t largest = 0;
        for (int i = 0; i < 16; i++) largest = lanes[i] > largest ? lanes[i] : largest;
        float top;
        __builtin_memcpy(&top, &largest, 4);
        const float d = top / 127.0f, inverse = d > 1e-37f && top < INFINITY ? 1.0f / d : 0.0f;
        /* A local array, since bytes stored might alias x; and loops that are unrolled first are not made vectors. */
        int32_t q[32] = {0};
        if (inverse > 0.0f)
            for (int i = 0; i < 32; i++) q[i] = (int32_t)((x[i] * inverse + 12582912.0f) - 12582912.0f);
        int32_t first = 0, all = 0;
#pragma GCC unroll 1
        for (int i = 0; i < 16; i++) first += q[i];
#pragma GCC unroll 1
        for (int i = 0; i < 32; i++) all += q[i];
        for (int i = 0; i < 32; i++) y->qs[i] = (int8_t)q[i];
        y->d = d;
        y->dsum = d * (float)all;
        y->minus_sum = -all;
        y->minus_half = -first;
    }
}

static void K(quantize)(const op *o, const context *c, int32_t chunk) {
    const tile t = tile_at(rows_of(o, c), c->buffers[o->out].width, chunk);
#ifdef AMX
    const int32_t prompt = prompt_rows(o, c);
#endif
    for (int32_t r = t.row; r < t.row + t.rows; r++) {
        const float *x = (const float *)buffer_row(c, o->in[0], r) + t.col;
#ifdef AMX
        if (r < prompt) {
            K(round_blocks)(x, (bf16 *)buffer_row(c, o->out, r) + t.col, t.cols);
            continue;
        }
#endif
        K(quantize_blocks)(x, (block_a8 *)buffer_row(c, o->out, r) + t.col / 32, t.cols);
    }
}
