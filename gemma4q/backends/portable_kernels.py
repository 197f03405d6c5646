"""What the portable backend compiles with Numba: products of rows with weight panels, and attention over pages.

Each function does share `share` of `shares` of one op: no threads, no Python objects, no errors. Weights are panels:
LANES rows of a matrix side by side, so that a vector register holds the same column of neighbouring rows and sums never
cross its lanes. A column of a panel is one value of type `Lanes`, which LLVM spreads over as many registers as a CPU
needs for it; loops over arrays would leave the sums in memory. q [blocks, cols, LANES], int8 or float32, or
[blocks, cols / 2, LANES] uint8, two columns in a byte, 16 times their value each; scale and minimum
[blocks, cols / group, LANES] (no blocks of minima where the format has none); weight = scale * q + minimum. All columns
are multiples of STEP.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

LANES = 32  # rows of a matrix in one panel
STEP = 16  # columns that surely share a scale
DEPTH = 128  # columns unpacked at a time: with LANES floats each, 16 KiB
ROWS = 3  # activation rows that `matmul` takes at a time: their sums, a column and a factor fit 16 AVX registers


def kernel(function):
    """Compiled on first use for the types it meets; kept on disk if there is a place for it."""
    # Sums may be reordered and fused, but NaN and infinity keep their meaning.
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor at home can anything be written
        return njit(**options)(function)


# -- A column of a panel as one value -------------------------------------------------------------------------------


class Lanes(types.Type):
    """LANES floats."""

    def __init__(self):
        super().__init__("Lanes")


LANES_TYPE, INDEX = Lanes(), ir.IntType(32)
FLOATS, BYTES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(8), LANES)


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, FLOATS)


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return kind([value] * LANES)


def address(context, builder, array_type, array, at, kind: ir.VectorType):
    """Of LANES elements from number `at` of an array without gaps."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


def aligned(instruction, size: int):
    instruction.align = size  # what numpy promises, not what a vector would like
    return instruction


@intrinsic
def zeros(typing):
    return LANES_TYPE(), lambda context, builder, signature, arguments: constant(FLOATS, 0)


@intrinsic
def load(typing, array, at):
    """LANES float32 from element number `at` on."""

    def code(context, builder, signature, arguments):
        return aligned(builder.load(address(context, builder, array, *arguments, FLOATS)), 4)

    return LANES_TYPE(array, types.intp), code


@intrinsic
def store(typing, array, at, value):
    """LANES float32 to element number `at` and those after it."""

    def code(context, builder, signature, arguments):
        at = address(context, builder, array, *arguments[:2], FLOATS)
        aligned(builder.store(arguments[2], at), 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, LANES_TYPE), code


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, rounded once where the CPU can; a may be a scalar."""

    def code(context, builder, signature, arguments):
        a, b, c = arguments
        if not isinstance(signature.args[0], Lanes):
            one = builder.insert_element(FLOATS(ir.Undefined), a, INDEX(0))
            a = builder.shuffle_vector(one, one, constant(ir.VectorType(INDEX, LANES), 0))
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return LANES_TYPE(a if isinstance(a, Lanes) else types.float32, LANES_TYPE, LANES_TYPE), code


@intrinsic
def columns(typing, q, k):
    """Columns k and k + 1 of panels that lie behind each other; k is even."""
    bits = {types.float32: 32, types.int8: 8, types.uint8: 4}[q.dtype]

    def code(context, builder, signature, arguments):
        array, k = arguments
        at = builder.mul(k, k.type(LANES if bits > 4 else LANES // 2))
        if bits == 4:
            both = aligned(builder.load(address(context, builder, q, array, at, BYTES)), 1)
            two = builder.shl(both, constant(BYTES, 4)), builder.and_(both, constant(BYTES, 0xF0))
        else:
            kind = BYTES if bits == 8 else FLOATS
            ends = at, builder.add(at, k.type(LANES))
            two = [aligned(builder.load(address(context, builder, q, array, i, kind)), bits // 8) for i in ends]
        values = two if bits == 32 else [builder.sitofp(v, FLOATS) for v in two]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(LANES_TYPE, 2)(q, types.intp), code


# -- Products -------------------------------------------------------------------------------------------------------


@kernel
def matvec(share, shares, x, q, scale, minimum, group, y):
    """y [rows, blocks * LANES] = x [rows, cols] . weight', reading each panel once for all of a few rows."""
    rows, cols = x.shape
    blocks, groups = scale.shape[0], scale.shape[1]
    sums = np.zeros((rows, groups), np.float32)
    for r in range(rows if minimum.shape[0] else 0):
        for k in range(cols):
            sums[r, k // group] += x[r, k]
    for b in range(blocks * share // shares, blocks * (share + 1) // shares):
        for r in range(rows):
            total = zeros()
            for g in range(groups):
                even, odd = zeros(), zeros()
                for k in range(g * group, (g + 1) * group, 2):
                    v, w = columns(q, b * cols + k)
                    even, odd = fma(x[r, k], v, even), fma(x[r, k + 1], w, odd)
                at = (b * groups + g) * LANES
                total = fma(load(scale, at), fma(np.float32(1), even, odd), total)
                if minimum.shape[0]:
                    total = fma(sums[r, g], load(minimum, at), total)
            store(y, (r * blocks + b) * LANES, total)


@kernel
def unpack(b, first, end, q, cols, scale, minimum, group, panel):
    """panel [end - first, LANES] = columns first ... end - 1 of panel b as weights."""
    groups = scale.shape[1]
    for k in range(first, end, 2):
        v, w = columns(q, b * cols + k)
        at = (b * groups + k // group) * LANES
        scales = load(scale, at)
        low = load(minimum, at) if minimum.shape[0] else zeros()
        store(panel, (k - first) * LANES, fma(v, scales, low))
        store(panel, (k - first + 1) * LANES, fma(w, scales, low))


@kernel
def tile(x, first, end, panel, y):
    """y [rows, LANES] += columns first ... end - 1 of x [rows, cols] . panel [end - first, LANES]."""
    for r in range(0, x.shape[0], ROWS):
        at = r * LANES
        y0, y1, y2 = load(y, at), load(y, at + LANES), load(y, at + 2 * LANES)
        for k in range(first, end):
            w = load(panel, (k - first) * LANES)
            y0, y1, y2 = fma(x[r, k], w, y0), fma(x[r + 1, k], w, y1), fma(x[r + 2, k], w, y2)
        store(y, at, y0)
        store(y, at + LANES, y1)
        store(y, at + 2 * LANES, y2)


@kernel
def matmul(share, shares, x, q, scale, minimum, group, y):
    """As `matvec` for many rows, a multiple of ROWS: DEPTH columns of a panel at a time are unpacked into cache."""
    blocks, cols = scale.shape[0], x.shape[1]
    panel = np.empty((DEPTH, LANES), np.float32)
    total = np.empty((x.shape[0], LANES), np.float32)  # y's own rows lie too far apart for a cache
    for b in range(blocks * share // shares, blocks * (share + 1) // shares):
        total[:] = 0
        for k in range(0, cols, DEPTH):
            end = min(k + DEPTH, cols)
            unpack(b, k, end, q, cols, scale, minimum, group, panel)
            tile(x, k, end, panel, total)
        for r in range(x.shape[0]):
            store(y, (r * blocks + b) * LANES, load(total, r * LANES))


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
