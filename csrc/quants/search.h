/* The scale and, where a format has one, the minimum that sixteen groups of values want, each group in a lane of its own:
 * value = scale * q + minimum, with q a code or what a code stands for. The sum of w * (value - x)^2 is as small as some
 * dozens of starts make it: each has its codes rounded, and is solved for the best scale and minimum of those codes.
 *
 * Every sum runs down a lane in the order of the values, so that all instruction sets find the same bits. Loops of
 * sixteen must not be unrolled before they are made vectors. */

#define EACH _Pragma("GCC unroll 1") for (int i = 0; i < 16; i++)

enum { SETTLING = 3 }; /* rounds of new codes and new scales, from the best start on */

typedef float lanes[16];

/* What a search must know of a format. Variables to the compiler: if it knew low < high it would make branches of a
 * maximum and a minimum. */
typedef struct {
    int32_t values, groups; /* of a group; under one d */
    int32_t minima;         /* 0: none; MULTIPLES of -dmin, which are never positive; ANY_SIGN: a half float */
    float low, high;        /* codes */
    float least, most;      /* what d is multiplied by for a group; dmin by 0 .. most */
    int32_t steps;          /* 0, or codes stand for numbers: low and a `gap` more for each of `above` that x passes */
    const float *above, *gap;
    struct {
        int32_t tries;
        float from, step;
    } starts[2]; /* codes that an end of the values lies beyond the last one; without importance, and with it */
} search_form;
enum { MULTIPLES = 1, ANY_SIGN = 2 };

/* x in units of a power of two, which keeps squares in range; `weight` is the sum of w. */
typedef struct { lanes x[32], w[32], weight, unit; } group_lanes;
typedef struct { lanes scale, minimum, error; } fit_lanes;
/* Sums of w times r, r q, q and q^2, where r is what the nearest code leaves of x. */
typedef struct { lanes r, rq, q, qq; } sum_lanes;

/* The nearest integer of up to 22 bits, the even one of two; a multiple of one half is exact long before. */
static INLINE float K(nearest)(float x) { return (x + 12582912.0f) - 12582912.0f; }
static INLINE float K(between)(float low, float x, float high) {
    const float up = x > low ? x : low;
    return up < high ? up : high;
}
static INLINE void K(inverses)(const lanes x, lanes y) { EACH y[i] = x[i] != 0.0f ? 1.0f / x[i] : 0.0f; }

static INLINE void K(keep_better)(const fit_lanes *found, fit_lanes *best) {
    EACH {
        const int32_t better = found->error[i] < best->error[i];
        best->scale[i] = better ? found->scale[i] : best->scale[i];
        best->minimum[i] = better ? found->minimum[i] : best->minimum[i];
        best->error[i] = better ? found->error[i] : best->error[i];
    }
}

/* What the codes nearest to t stand for. */
static INLINE void K(nearest_codes)(const search_form *f, int steps, const lanes t, lanes q) {
    const float low = f->low, high = f->high;
    if (!steps) EACH q[i] = K(between)(low, K(nearest)(t[i]), high);
    else EACH q[i] = low;
#pragma GCC unroll 1
    for (int k = 0; k < steps; k++) {
        const float above = f->above[k], gap = f->gap[k];
        EACH q[i] += t[i] > above ? gap : 0.0f;
    }
}
/* The error of a scale and a minimum, and where `sums` is not NULL what `refit` needs to better them. */
static INLINE void K(measure_as)(const group_lanes *b, const search_form *f, int minima, int steps,
                                 fit_lanes *restrict fit, sum_lanes *restrict sums) {
    lanes inverse, error = {0}, sum_r = {0}, sum_rq = {0}, sum_q = {0}, sum_qq = {0};
    K(inverses)(fit->scale, inverse);
    for (int j = 0; j < f->values; j++) {
        lanes t, q, u;
        EACH {
            u[i] = minima ? b->x[j][i] - fit->minimum[i] : b->x[j][i];
            t[i] = u[i] * inverse[i];
        }
        K(nearest_codes)(f, steps, t, q);
        EACH {
            const float r = u[i] - fit->scale[i] * q[i], wr = b->w[j][i] * r, wq = b->w[j][i] * q[i];
            error[i] += wr * r;
            if (sums) {
                sum_rq[i] += wr * q[i];
                sum_qq[i] += wq * q[i];
            }
            if (sums && minima) {
                sum_r[i] += wr;
                sum_q[i] += wq;
            }
        }
    }
    EACH fit->error[i] = error[i];
    if (!sums) return;
    EACH {
        sums->r[i] = sum_r[i];
        sums->rq[i] = sum_rq[i];
        sums->q[i] = sum_q[i];
        sums->qq[i] = sum_qq[i];
    }
}
#define APART static __attribute__((noinline)) void
#define MEASURE(name, minima, steps)                                                                                   \
    APART K(measure_##name)(const group_lanes *b, const search_form *f, fit_lanes *fit, sum_lanes *sums) {             \
        K(measure_as)(b, f, minima, steps, fit, sums);                                                                 \
    }                                                                                                                  \
    APART K(weigh_##name)(const group_lanes *b, const search_form *f, fit_lanes *fit) {                                \
        K(measure_as)(b, f, minima, steps, fit, NULL);                                                                 \
    }
MEASURE(minima, 1, 0)
MEASURE(scales, 0, 0)
MEASURE(stepped, 0, f->steps)
#undef MEASURE
#undef APART
static void K(measure)(const group_lanes *b, const search_form *f, fit_lanes *fit, sum_lanes *sums) {
    (f->minima ? K(measure_minima) : f->steps ? K(measure_stepped) : K(measure_scales))(b, f, fit, sums);
}
/* The error alone. */
static void K(weigh)(const group_lanes *b, const search_form *f, fit_lanes *fit) {
    (f->minima ? K(weigh_minima) : f->steps ? K(weigh_stepped) : K(weigh_scales))(b, f, fit);
}

/* The best scale and minimum for the codes that a fit was measured with, and the error left then. */
static INLINE void K(refit)(const group_lanes *b, const search_form *f, const fit_lanes *fit, const sum_lanes *s,
                            fit_lanes *next) {
    if (!f->minima) {
        EACH {
            const float more = s->qq[i] > 0.0f ? s->rq[i] / s->qq[i] : 0.0f;
            next->scale[i] = fit->scale[i] + more;
            next->minimum[i] = 0.0f;
            next->error[i] = fit->error[i] - more * s->rq[i];
        }
        return;
    }
    const float most = f->minima == MULTIPLES ? 0.0f : INFINITY;
    EACH {
        const float w = b->weight[i], r = s->r[i], rq = s->rq[i], q = s->q[i], qq = s->qq[i];
        const float all = w * qq, det = all - q * q, free = qq * r - q * rq, minimum = fit->minimum[i];
        const int32_t held = free > (most - minimum) * det; /* at the most a minimum may be, the scale follows */
        const float over = held ? qq : det, inverse = over > (held ? 0.0f : 1e-6f * all) ? 1.0f / over : 0.0f;
        const float up = held ? most - minimum : free * inverse;
        const float more = (held ? rq - up * q : w * rq - q * r) * inverse;
        next->scale[i] = fit->scale[i] + more;
        next->minimum[i] = minimum + up;
        next->error[i] =
            fit->error[i] - 2.0f * (more * rq + up * r) + more * (more * qq + 2.0f * (up * q)) + up * up * w;
    }
}

/* The lowest and the highest value of each group; with MULTIPLES for minima zero is among them. */
static void K(ends_of_groups)(const group_lanes *b, const search_form *f, lanes low, lanes high) {
    lanes least, most; /* of this function alone, so that they stay in registers */
    EACH {
        least[i] = f->minima == MULTIPLES ? 0.0f : b->x[0][i];
        most[i] = b->x[0][i];
    }
    for (int j = 0; j < f->values; j++) EACH {
            least[i] = b->x[j][i] < least[i] ? b->x[j][i] : least[i];
            most[i] = b->x[j][i] > most[i] ? b->x[j][i] : most[i];
        }
    EACH {
        low[i] = least[i];
        high[i] = most[i];
    }
}
/* The lowest value lies `under` codes below the first one, the highest `over` above the last. Without minima it is the
 * value furthest from zero that lies so far beyond the first code or, on the other `side`, the last. */
static INLINE void K(start_at)(const search_form *f, const lanes low, const lanes high, float under, float over,
                               int side, fit_lanes *fit) {
    const float most = f->minima == MULTIPLES ? 0.0f : INFINITY, end = side ? f->high + over : f->low - over;
    EACH {
        const float code = (high[i] - low[i]) / f->high, top = high[i] - over * code;
        const float from = low[i] + under * code, bottom = from < most ? from : most;
        const float furthest = high[i] > -low[i] ? high[i] : low[i];
        fit->minimum[i] = f->minima ? bottom : 0.0f;
        fit->scale[i] = !f->minima ? furthest / end : top > bottom ? (top - bottom) / f->high : 0.0f;
    }
}
static void K(find)(const group_lanes *b, const search_form *f, int weighted, fit_lanes *best, sum_lanes *sums) {
    const float from = f->starts[weighted].from, step = f->starts[weighted].step;
    const int tries = f->starts[weighted].tries, others = f->minima ? tries : 2;
    fit_lanes start, next;
    lanes low, high;
    K(ends_of_groups)(b, f, low, high);
    EACH best->error[i] = INFINITY;
    for (int n = 0; n < tries; n++)
        for (int m = 0; m < others; m++) {
            K(start_at)(f, low, high, from + step * (float)m, from + step * (float)n, m, &start);
            K(measure)(b, f, &start, sums);
            K(refit)(b, f, &start, sums, &next);
            K(keep_better)(&next, best);
        }
    for (int n = 1; n < SETTLING; n++) {
        K(measure)(b, f, best, sums);
        K(refit)(b, f, best, sums, &next);
        *best = next;
    }
    K(measure)(b, f, best, sums);
}
/* What rounding without a search would take: the ends of the values are the ends of the codes. */
static void K(plain_fit)(const group_lanes *b, const search_form *f, fit_lanes *fit, sum_lanes *sums) {
    lanes low, high;
    K(ends_of_groups)(b, f, low, high);
    K(start_at)(f, low, high, 0.0f, 0.0f, 0, fit);
    K(measure)(b, f, fit, sums);
}
