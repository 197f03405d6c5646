/* Rows of floats become rows of blocks, whole rows to a thread: which thread, and how many there are, leaves no trace. */
#include <stdatomic.h>
#include <string.h>

#include "kernels.h"

enum { SHARE_VALUES = 1 << 15, DECODED = 2048 /* values at a time, to see what became of them; whole blocks */ };

typedef struct {
    const kernel_table *kernels;
    const float *x, *importance;
    uint8_t *out;
    double *error;
    int64_t rows, cols;
    int32_t type;
    _Atomic int64_t next;
    _Atomic int32_t status;
} encoding;

static int32_t all_finite(const float *x, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bad |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !bad;
}
static double row_error(const encoding *e, const float *x, const uint8_t *row) {
    float decoded[DECODED];
    double sum = 0;
    for (int64_t at = 0; at < e->cols; at += DECODED) {
        const int64_t n = e->cols - at < DECODED ? e->cols - at : DECODED;
        e->kernels->dequantize[e->type](row + row_bytes(e->type, at), decoded, n);
        sum += e->kernels->squared_error(x + at, decoded, e->importance ? e->importance + at : NULL, n);
    }
    return sum;
}
static void encode_share(void *arg, int32_t thread, int32_t threads) {
    (void)thread;
    (void)threads;
    encoding *e = arg;
    const int64_t bytes = row_bytes(e->type, e->cols), each = e->cols < SHARE_VALUES ? SHARE_VALUES / e->cols : 1;
    for (int64_t first; (first = atomic_fetch_add(&e->next, each)) < e->rows;) {
        const int64_t rows = e->rows - first < each ? e->rows - first : each;
        const float *x = e->x + first * e->cols;
        uint8_t *out = e->out + first * bytes;
        if (!all_finite(x, rows * e->cols)) {
            atomic_store(&e->status, STATUS_NON_FINITE);
            return;
        }
        e->kernels->encode(e->type, x, rows, e->cols, e->importance, out);
        for (int64_t r = 0; e->error && r < rows; r++)
            e->error[first + r] = row_error(e, x + r * e->cols, out + r * bytes);
    }
}
int32_t encode_rows(pool *threads, int32_t isa, int32_t type, const float *x, int64_t rows, int64_t cols,
                    const float *importance, uint8_t *out, double *error) {
    const kernel_table *kernels = kernels_of(isa);
    if (!kernels || type < 0 || type >= TYPE_COUNT || block_of(type).values < 32 || cols < 1 ||
        cols % block_of(type).values)
        return -1;
    encoding e = {kernels, x, importance, out, error, rows, cols, type, 0, STATUS_OK};
    pool_run(threads, encode_share, &e);
    return e.status;
}
