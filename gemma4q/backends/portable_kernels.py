"""What the portable backend compiles with Numba: products of rows with weight panels, and attention over pages.

Each function does share `share` of `shares` of one op: no threads, no Python objects, no errors. Weights are panels:
LANES rows of a matrix side by side, so that a vector register holds the same column of neighbouring rows and sums never
cross its lanes. q [blocks, cols, LANES], int8 or float32; scale and minimum [blocks, cols / group, LANES] (no blocks of
minima where the format has none); weight = scale * q + minimum. All columns are multiples of STEP.
"""

import math

import numpy as np
from numba import njit

LANES = 64  # rows of a matrix in one panel
STEP = 16  # columns that surely share a scale
DEPTH = 256  # columns unpacked at a time: with LANES floats each, 64 KiB
ROWS = 8  # activation rows that `matmul` takes at a time


def kernel(function):
    """Compiled on first use for the types it meets; kept on disk if there is a place for it."""
    # Sums may be reordered and fused, but NaN and infinity keep their meaning.
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor at home can anything be written
        return njit(**options)(function)


@kernel
def matvec(share, shares, x, q, scale, minimum, group, y):
    """y [rows, blocks * LANES] = x [rows, cols] . weight', reading each panel once for all of a few rows."""
    blocks, cols = q.shape[0], q.shape[1]
    total = np.empty(LANES, np.float32)
    for b in range(blocks * share // shares, blocks * (share + 1) // shares):
        for r in range(x.shape[0]):
            total[:] = 0
            for k in range(0, cols, STEP):
                values, panel, scales = x[r, k : k + STEP], q[b, k : k + STEP], scale[b, k // group]
                for j in range(LANES):
                    t = np.float32(0)
                    for i in range(STEP):
                        t += values[i] * panel[i, j]
                    total[j] += scales[j] * t
            for g in range(minimum.shape[1] if minimum.shape[0] else 0):
                t = np.float32(0)
                for k in range(g * group, (g + 1) * group):
                    t += x[r, k]
                for j in range(LANES):
                    total[j] += minimum[b, g, j] * t
            y[r, b * LANES : (b + 1) * LANES] = total


@kernel
def unpack(q, scale, minimum, group, panel):
    """panel [cols, LANES] = scale * q + minimum, of q [cols, LANES]; no rows of minima: none."""
    for k in range(q.shape[0]):
        scales = scale[k // group]
        for j in range(LANES):
            panel[k, j] = scales[j] * q[k, j]
    if minimum.shape[0]:
        for k in range(q.shape[0]):
            minima = minimum[k // group]
            for j in range(LANES):
                panel[k, j] += minima[j]


@kernel
def tile(x, panel, y):
    """y [rows, LANES] += x [rows, cols] . panel [cols, LANES]; rows in eights: sixteen factors stay in registers."""
    for r in range(0, x.shape[0], ROWS):
        x0, x1, x2, x3, x4, x5, x6, x7 = x[r], x[r + 1], x[r + 2], x[r + 3], x[r + 4], x[r + 5], x[r + 6], x[r + 7]
        y0, y1, y2, y3, y4, y5, y6, y7 = y[r], y[r + 1], y[r + 2], y[r + 3], y[r + 4], y[r + 5], y[r + 6], y[r + 7]
        for k in range(0, panel.shape[0], 2):
            a0, a1, a2, a3, a4, a5, a6, a7 = x0[k], x1[k], x2[k], x3[k], x4[k], x5[k], x6[k], x7[k]
            n = k + 1
            b0, b1, b2, b3, b4, b5, b6, b7 = x0[n], x1[n], x2[n], x3[n], x4[n], x5[n], x6[n], x7[n]
            v, w = panel[k], panel[n]
            for j in range(LANES):
                y0[j] += a0 * v[j] + b0 * w[j]
                y1[j] += a1 * v[j] + b1 * w[j]
                y2[j] += a2 * v[j] + b2 * w[j]
                y3[j] += a3 * v[j] + b3 * w[j]
                y4[j] += a4 * v[j] + b4 * w[j]
                y5[j] += a5 * v[j] + b5 * w[j]
                y6[j] += a6 * v[j] + b6 * w[j]
                y7[j] += a7 * v[j] + b7 * w[j]


@kernel
def matmul(share, shares, x, q, scale, minimum, group, y):
    """As `matvec` for many rows, a multiple of ROWS: DEPTH columns of a panel at a time are unpacked into cache."""
    blocks, cols = q.shape[0], q.shape[1]
    panel = np.empty((DEPTH, LANES), np.float32)
    total = np.empty((x.shape[0], LANES), np.float32)
    for b in range(blocks * share // shares, blocks * (share + 1) // shares):
        total[:] = 0
        for k in range(0, cols, DEPTH):
            end = min(k + DEPTH, cols)
            first = k // group
            minima = minimum[b, first:] if minimum.shape[0] else scale[b, :0]
            unpack(q[b, k:end], scale[b, first:], minima, group, panel)
            tile(x[:, k:end], panel[: end - k], total)
        y[:, b * LANES : (b + 1) * LANES] = total


@kernel
def attend(share, shares, q, value_q, keys, values, pages, tables, firsts, ends, out):
    """out [rows, heads, dim] = softmax(q . K + value_q . V) . V over positions firsts[row] ... ends[row] - 1.

    q [rows, heads, key_dim]; value_q [rows, heads, dim], or no rows: none. keys [page, kv_heads, positions, key_dim],
    values [page, kv_heads, positions, dim]. A row's page of a position is pages[tables[row] + position / positions].
    """
    heads, dim = out.shape[1], out.shape[2]
    kv_heads, span = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    scores, sums, tops = np.empty(span, np.float32), np.empty(group, np.float32), np.empty(group, np.float32)
    item, end_item = q.shape[0] * heads * share // shares, q.shape[0] * heads * (share + 1) // shares
    while item < end_item:  # the heads of this share that read the same keys, together
        row, kv = item // heads, item % heads // group
        end_head = min(end_item - row * heads, (kv + 1) * group)
        head0 = item - row * heads
        item = row * heads + end_head
        sums[:], tops[:] = 0, -math.inf
        out[row, head0:end_head] = 0
        for page in range(firsts[row] // span, -(-ends[row] // span)):
            at = pages[tables[row] + page]
            low, high = max(firsts[row] - page * span, 0), min(ends[row] - page * span, span)
            k, v = keys[at, kv], values[at, kv]
            for head in range(head0, end_head):
                top = tops[head - head0]
                for p in range(low, high):
                    score = dot(q[row, head], k[p])
                    if value_q.shape[0]:
                        score += dot(value_q[row, head], v[p])
                    scores[p] = score
                    top = max(top, score)
                absorb(scores, low, high, v, top, tops, sums, head - head0, out[row, head])
        for head in range(head0, end_head):
            for d in range(dim):
                out[row, head, d] /= sums[head - head0]


@kernel
def dot(a, b):
    t = np.float32(0)
    for d in range(a.shape[0]):
        t += a[d] * b[d]
    return t


@kernel
def absorb(scores, low, high, values, top, tops, sums, head, out):
    """One page into a head's running softmax: `out` and `sums` are relative to exp(tops)."""
    keep = np.float32(math.exp(tops[head] - top)) if tops[head] != top else np.float32(1)
    tops[head] = top
    total = np.float32(0)
    for d in range(out.shape[0]):
        out[d] *= keep
    for p in range(low, high):
        share = np.float32(math.exp(scores[p] - top))
        total += share
        value = values[p]
        for d in range(out.shape[0]):
            out[d] += share * value[d]
    sums[head] = sums[head] * keep + total
