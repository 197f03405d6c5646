/* What the groups of sixteen lanes want becomes what a block can hold: half floats, and where groups share one, whole
 * numbers that it is multiplied by. Codes are found anew for every candidate, and its true error decides. */

enum { CANDIDATES = 32, NEAR = 1 /* whole numbers to either side of the nearest that are tried for a scale */ };

/* scale = d k, minimum = -dmin l; d and dmin are the same for all groups of a block, in its unit. */
typedef struct { lanes d, dmin, k, l, error; } block_lanes;

static INLINE void K(fit_of)(const block_lanes *c, fit_lanes *fit) {
    EACH {
        fit->scale[i] = c->d[i] * c->k[i];
        fit->minimum[i] = -c->dmin[i] * c->l[i];
    }
}
/* d as a half float keeps it, not infinite, nor 0 unless it is 0; or the half float so many further from zero. */
static INLINE float K(stored)(float d, float unit, int further) {
    const float real = d * unit, size = fabsf(real);
    f16 h = K(half_of_float)(size < 65504.0f ? size : 65504.0f);
    const int32_t bits = (h.bits ? h.bits : size > 0.0f) + further;
    h.bits = (uint16_t)(bits < 0 ? 0 : bits < 0x7bff ? bits : 0x7bff);
    const float back = K(half)(h) / unit;
    return real < 0.0f ? -back : back;
}

/* The d whose multiples by whole numbers come nearest to what `groups` groups want: the sum of value * distance^2 is the
 * least among candidates that put the largest one near the end of the range. */
static INLINE float K(propose)(const float *wanted, const float *value, int groups, float least, float most,
                               float unit) {
    float top = 0.0f, d[CANDIDATES], loss[CANDIDATES];
    for (int g = 0; g < groups; g++) top = fabsf(wanted[g]) > fabsf(top) ? wanted[g] : top;
    for (int c = 0; c < CANDIDATES; c++) {
        const float end = least < 0.0f && c % 2 ? least : most, longer = 1.0f + 0.0075f * (float)(c / 2 - 1);
        d[c] = K(stored)(top / end * (c % 2 && least == 0.0f ? longer + 0.00375f : longer), unit, 0);
    }
    for (int c = 0; c < CANDIDATES; c += 16) {
        lanes inverse, sum = {0};
        K(inverses)(d + c, inverse);
        for (int g = 0; g < groups; g++) EACH {
                const float k = K(between)(least, K(nearest)(wanted[g] * inverse[i]), most);
                const float off = d[c + i] * k - wanted[g];
                sum[i] += value[g] * (off * off);
            }
        EACH loss[c + i] = sum[i];
    }
    int best = 0;
    for (int c = 1; c < CANDIDATES; c++) best = loss[c] < loss[best] ? c : best;
    return d[best];
}
/* The minimum that goes best with a scale other than the fit's, its codes kept. */
static INLINE void K(minimum_for)(const group_lanes *b, const fit_lanes *fit, const sum_lanes *s, const lanes scale,
                                  lanes minimum) {
    EACH minimum[i] = fit->minimum[i] - s->q[i] / b->weight[i] * (scale[i] - fit->scale[i]);
}
/* k and l of every group: those about a fit that leave the least error under d and dmin. */
static void K(choose_whole)(const group_lanes *b, const search_form *f, const fit_lanes *fit, const sum_lanes *s,
                            block_lanes *c) {
    lanes inverse, inverse_min, wanted = {0};
    K(inverses)(c->d, inverse);
    K(inverses)(c->dmin, inverse_min);
    EACH c->error[i] = INFINITY;
    for (int n = -NEAR; n <= NEAR; n++)
        for (int second = 0; second <= !!f->minima; second++) { /* the nearest l, and the one beyond what is wanted */
            block_lanes here = *c;
            fit_lanes tried;
            EACH {
                here.k[i] = K(between)(f->least, K(nearest)(fit->scale[i] * inverse[i]) + (float)n, f->most);
                tried.scale[i] = c->d[i] * here.k[i];
            }
            if (f->minima) K(minimum_for)(b, fit, s, tried.scale, wanted);
            EACH {
                const float exact = -wanted[i] * inverse_min[i], l = K(nearest)(exact);
                here.l[i] = K(between)(0.0f, second ? exact > l ? l + 1.0f : l - 1.0f : l, f->most);
            }
            K(fit_of)(&here, &tried);
            K(weigh)(b, f, &tried);
            EACH {
                const int32_t better = tried.error[i] < c->error[i];
                c->error[i] = better ? tried.error[i] : c->error[i];
                c->k[i] = better ? here.k[i] : c->k[i];
                c->l[i] = better ? here.l[i] : c->l[i];
            }
        }
}
/* d and dmin that are best for all codes, k and l of a block as they are: least squares over its groups. */
static INLINE void K(refit_block)(const group_lanes *b, const search_form *f, const sum_lanes *s, int first,
                                  block_lanes *c) {
    float kk = 0, kl = 0, ll = 0, rk = 0, rl = 0;
    for (int i = first; i < first + f->groups; i++) {
        kk += c->k[i] * c->k[i] * s->qq[i];
        rk += c->k[i] * s->rq[i];
        if (f->minima) {
            kl -= c->k[i] * c->l[i] * s->q[i];
            ll += c->l[i] * c->l[i] * b->weight[i];
            rl -= c->l[i] * s->r[i];
        }
    }
    const float det = kk * ll - kl * kl;
    const int both = det > 1e-6f * (kk * ll);
    const float more = both ? (ll * rk - kl * rl) / det : kk > 0.0f ? rk / kk : 0.0f;
    const float more_min = both ? (kk * rl - kl * rk) / det : 0.0f, unit = b->unit[first];
    const float d = K(stored)(c->d[first] + more, unit, 0), dmin = K(stored)(c->dmin[first] + more_min, unit, 0);
    for (int i = first; i < first + f->groups; i++) {
        c->d[i] = d;
        c->dmin[i] = dmin;
    }
}
static INLINE float K(sum_of)(const float *v, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += v[i];
    return sum;
}
static INLINE void K(keep_better_blocks)(const search_form *f, const block_lanes *found, block_lanes *best) {
    for (int t = 0; t < 16; t += f->groups) {
        if (K(sum_of)(found->error + t, f->groups) >= K(sum_of)(best->error + t, f->groups)) continue;
        for (int i = t; i < t + f->groups; i++) {
            best->d[i] = found->d[i];
            best->dmin[i] = found->dmin[i];
            best->k[i] = found->k[i];
            best->l[i] = found->l[i];
            best->error[i] = found->error[i];
        }
    }
}
/* What a block can hold that comes near to a fit: d first, then dmin for the minima that go with its multiples. */
static void K(share)(const group_lanes *b, const search_form *f, const fit_lanes *fit, const sum_lanes *s,
                     block_lanes *best) {
    block_lanes c = {0};
    lanes value, scale, wanted, inverse;
    EACH value[i] = s->qq[i] - s->q[i] * s->q[i] / b->weight[i]; /* as the minimum follows the scale */
    for (int t = 0; t < 16; t += f->groups) {
        const float d = K(propose)(fit->scale + t, value + t, f->groups, f->least, f->most, b->unit[t]);
        for (int g = 0; g < f->groups; g++) c.d[t + g] = d;
    }
    if (f->minima) {
        K(inverses)(c.d, inverse);
        EACH scale[i] = c.d[i] * K(between)(f->least, K(nearest)(fit->scale[i] * inverse[i]), f->most);
        K(minimum_for)(b, fit, s, scale, wanted);
        EACH wanted[i] = -wanted[i];
        for (int t = 0; t < 16; t += f->groups) {
            const float d = K(propose)(wanted + t, b->weight + t, f->groups, 0.0f, f->most, b->unit[t]);
            for (int g = 0; g < f->groups; g++) c.dmin[t + g] = d;
        }
    }
    K(choose_whole)(b, f, fit, s, &c);
    K(keep_better_blocks)(f, &c, best);
}
static void K(choose_shared)(const group_lanes *b, const search_form *f, int weighted, block_lanes *best) {
    fit_lanes fit;
    sum_lanes s;
    EACH best->error[i] = INFINITY;
    K(plain_fit)(b, f, &fit, &s);
    K(share)(b, f, &fit, &s, best);
    K(find)(b, f, weighted, &fit, &s);
    K(share)(b, f, &fit, &s, best);
    block_lanes c = *best;
    K(fit_of)(&c, &fit);
    K(measure)(b, f, &fit, &s);
    for (int t = 0; t < 16; t += f->groups) K(refit_block)(b, f, &s, t, &c);
    K(choose_whole)(b, f, &fit, &s, &c);
    K(keep_better_blocks)(f, &c, best);
}

/* Half floats about what each group alone wants. */
static void K(round_alone)(const group_lanes *b, const search_form *f, const fit_lanes *fit, const sum_lanes *s,
                           fit_lanes *best) {
    fit_lanes tried = {0};
    for (int n = -1; n <= 1; n++) {
        EACH tried.scale[i] = K(stored)(fit->scale[i], b->unit[i], n);
        if (f->minima) {
            K(minimum_for)(b, fit, s, tried.scale, tried.minimum);
            EACH tried.minimum[i] = K(stored)(tried.minimum[i], b->unit[i], 0);
        }
        K(weigh)(b, f, &tried);
        K(keep_better)(&tried, best);
    }
}
static INLINE void K(take_alone)(const fit_lanes *fit, block_lanes *best) {
    EACH {
        best->d[i] = fit->scale[i];
        best->dmin[i] = -fit->minimum[i];
        best->k[i] = best->l[i] = 1.0f;
    }
}
static void K(choose_alone)(const group_lanes *b, const search_form *f, int weighted, block_lanes *best) {
    fit_lanes fit, again, kept = {0};
    sum_lanes s;
    EACH kept.error[i] = INFINITY;
    K(plain_fit)(b, f, &fit, &s);
    K(round_alone)(b, f, &fit, &s, &kept);
    K(find)(b, f, weighted, &fit, &s);
    K(round_alone)(b, f, &fit, &s, &kept);
    fit = kept;
    K(measure)(b, f, &fit, &s);
    K(refit)(b, f, &fit, &s, &again);
    K(round_alone)(b, f, &again, &s, &kept);
    K(take_alone)(&kept, best);
}
static INLINE void K(try_stored)(const group_lanes *b, const search_form *f, fit_lanes *fit, fit_lanes *best) {
    EACH fit->scale[i] = K(stored)(fit->scale[i], b->unit[i], 0);
    K(weigh)(b, f, fit);
    K(keep_better)(fit, best);
}
/* Codes so fine that which half float they are multiplied by is but a draw of all values' errors: starts are tried as
 * half floats, and the best one alone is solved for its codes. Codes are alike on both sides of zero. */
static void K(choose_fine)(const group_lanes *b, const search_form *f, int weighted, block_lanes *best) {
    const float from = f->starts[weighted].from, step = f->starts[weighted].step;
    const int tries = f->starts[weighted].tries;
    fit_lanes fit, kept = {0};
    sum_lanes s;
    lanes low, high;
    K(ends_of_groups)(b, f, low, high);
    EACH kept.error[i] = INFINITY;
    for (int n = 0; n < tries; n++) {
        K(start_at)(f, low, high, 0.0f, from + step * (float)n, 0, &fit);
        K(try_stored)(b, f, &fit, &kept);
    }
    K(measure)(b, f, &kept, &s);
    K(refit)(b, f, &kept, &s, &fit);
    K(try_stored)(b, f, &fit, &kept);
    K(take_alone)(&kept, best);
}
/* A power of two for each group: 2^-128 at least, as in MXFP4. */
static void K(choose_power)(const group_lanes *b, const search_form *f, block_lanes *best) {
    fit_lanes kept = {0}, tried = {0};
    EACH kept.error[i] = INFINITY;
    for (int n = -4; n < -1; n++) { /* the largest value is 1 to 2 units */
        EACH {
            const float scale = ldexpf(1.0f, n), least = 0x1p-128f / b->unit[i];
            tried.scale[i] = scale > least ? scale : least;
        }
        K(weigh)(b, f, &tried);
        K(keep_better)(&tried, &kept);
    }
    K(take_alone)(&kept, best);
}
