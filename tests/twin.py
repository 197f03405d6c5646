"""The C kernels' arithmetic in numpy, bit for bit: the reference's plan, each sum in the order csrc/kernels writes it.

Prompt rows on tiles have an arithmetic of their own, so that there is a twin of `amx` and one of all others.
One thing is left to the reference: logsumexp ends in libm's logf, which numpy does not offer. All else is float32
operations that round once, of which only fma and the double functions behind the angles need help here.
"""

import math
from collections.abc import Callable

import numpy as np
from cases import ISAS

from gemma4q.abi import RowFlag, TensorType, dtype
from gemma4q.backends.reference import Reference, ReferenceSession, rounded
from gemma4q.gguf.quants import FORMATS, Planes, dequantize, planes, to_bf16
from gemma4q.plan.fuse import quantize_inputs

A8 = dtype("block_a8")
BOTH = np.dtype([*((name, A8[name]) for name in A8.names), ("bf16", "f4", 32)])  # a block in either class
F = np.float32
LANES, ATTEND_BLOCK, ATTEND_SPAN = 16, 512, 1024
TINY = np.finfo(F).tiny
SCALED = (TensorType.Q8_0, TensorType.Q4_0)  # of the types of keys and values those of which 32 share a scale


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once: the product is exact in float64, and its sum is rounded to odd there."""
    product = np.asarray(a, "f8") * b
    total = np.asarray(product + c)
    back = total - product
    lost = (product - (total - back)) + (c - back)
    even = (lost != 0) & np.isfinite(total) & (total.view("i8") & 1 == 0)
    if even.any():
        total = np.where(even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return total.astype(F)


def tree(x: np.ndarray) -> np.ndarray:
    """[..., 16] -> [...]: sum16."""
    x = x[..., :8] + x[..., 8:]
    x = x[..., :4] + x[..., 4:]
    return (x[..., 0] + x[..., 2]) + (x[..., 1] + x[..., 3])


def lane_sums(x: np.ndarray) -> np.ndarray:
    """[..., n] -> [...]: sixteen running sums, then the tree."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
    lanes = np.zeros((*x.shape[:-1], LANES), F)
    for at in range(0, x.shape[-1], LANES):
        lanes = lanes + x[..., at : at + LANES]
    return tree(lanes)


def exponential(x: np.ndarray) -> np.ndarray:
    limited = np.where(x < F(-87.3), F(-87.3), np.where(x > F(88.7), F(88.7), x))
    n = (limited * F(1.44269504) + F(12582912)) - F(12582912)
    r = (limited - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = F(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + F(c)
    p = p * r * r + r + F(1)
    whole = np.where(np.isnan(n), F(0), n)
    low = (whole * F(0.5)).astype("i4")
    a, b = ((part + 127 << 23).astype("u4").view(F) for part in (low, whole.astype("i4") - low))
    return np.where(x < F(-87.3), F(0), np.where(x > F(88.7), F(np.inf), p * a * b))


def merged(one: tuple, other: tuple) -> tuple:
    """What was seen so far and what is seen behind it, each (sum of score times value, top score, their sum)."""
    (out, top, total), (part, peak, more) = one, other
    most = np.maximum(top, peak)
    before, now = np.where(total == 0, F(0), exponential(top - most)), exponential(peak - most)
    live = more != 0
    out = np.where(live[..., None], out * before[..., None] + part * now[..., None], out)
    return out, np.where(live, most, top), np.where(live, total * before + more * now, total)


def gelu(x: np.ndarray) -> np.ndarray:
    u = F(0.7978845608028654) * (x + F(0.044715) * (x * x * x))
    return x / (F(1) + exponential(F(-2) * u))


def quantize_blocks(x: np.ndarray) -> np.ndarray:
    """float32 [rows, cols] -> block_a8 [rows, cols / 32]."""
    groups = np.ascontiguousarray(x, F).reshape(*x.shape[:-1], -1, 32)
    top = (groups.view("u4") & np.uint32(0x7FFFFFFF)).max(-1).view(F)
    d = top / F(127)
    sound = (d > F(1e-37)) & (top < np.inf)
    inverse = np.divide(F(1), d, out=np.zeros_like(d), where=sound)[..., None]
    q = ((np.where(sound[..., None], groups, F(0)) * inverse + F(12582912)) - F(12582912)).astype("i4")
    y = np.zeros(d.shape, A8)
    y["qs"], y["d"] = q, d
    y["minus_sum"], y["minus_half"] = -q.sum(-1), -q[..., :16].sum(-1)
    y["dsum"] = d * (-y["minus_sum"]).astype(F)
    return y


def product(x: np.ndarray, w: np.ndarray | Planes, prompt: np.ndarray | None = None) -> np.ndarray:
    """[tokens, rows]: x float32 [tokens, cols] or blocks [tokens, cols / 32] against a matrix of matmul.h's.

    prompt: which tokens are multiplied on tiles.
    """
    if prompt is not None and prompt.any():
        y = np.zeros((len(x), len(w.q if isinstance(w, Planes) else w)), F)
        y[prompt] = tile_product(x["bf16"][prompt].reshape(prompt.sum(), -1) if x.dtype.names else x[prompt], w)
        if not prompt.all():
            y[~prompt] = product(x[~prompt], w)
        return y
    if not isinstance(w, Planes):
        y = np.zeros((len(x), len(w)), F)
        for k in range(x.shape[1]):
            y = fma(x[:, k, None], w[:, k], y)
        return y
    y = np.zeros((len(x), len(w.q)), F)
    size, parts = w.group, 32 // w.group
    q = x["qs"].astype(F).reshape(len(x), -1, size).swapaxes(0, 1)
    dots = q @ w.q.astype(F).reshape(len(w.q), -1, size).transpose(1, 2, 0)  # exact: integers below 2^24
    halves = -np.stack([x["minus_half"], x["minus_sum"] - x["minus_half"]], -1)
    for g in range(len(dots)):
        block = x[:, g // parts, None]
        y = fma(dots[g], w.scale[:, g] * block["d"], y)
        if w.minimum is not None:
            sums = block["dsum"] if parts == 1 else block["d"] * halves[:, g // 2, g % 2, None].astype(F)
            y = fma(w.minimum[:, g], sums, y)
    return y


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormals as zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(F(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma whose result is flushed as x86 flushes it: when rounded to 24 bits, of any exponent, it is a denormal's size.

    That differs for what lies within half an ulp of the least normal number, which fma's float64 still tells apart.
    """
    total = np.asarray(a, "f8") * b + c
    y = fma(a, b, c)
    return np.where(np.abs(total) < float(TINY) * (1 - 2.0**-25), np.copysign(F(0), y), y)


def to_tiles(x: np.ndarray) -> np.ndarray:
    """float32 as bf16, to nearest even, as AVX512-BF16 has it: denormals are zeros."""
    return (to_bf16(flushed(x)).astype("u4") << 16).view(F)


def exact_weights(w: np.ndarray | Planes) -> np.ndarray:
    """[rows, cols] as the kernels unpack them to tiles: one rounding to float32."""
    if not isinstance(w, Planes):
        return w
    scale = np.repeat(w.scale, w.group, -1)
    return w.q.astype(F) * scale if w.minimum is None else fma(w.q, scale, np.repeat(w.minimum, w.group, -1))


def tile_product(x: np.ndarray, w: np.ndarray | Planes) -> np.ndarray:
    """[tokens, rows] of float32 [tokens, cols] in the arithmetic of prompt rows on tiles: csrc/simd/amx.h."""
    x, w = to_tiles(x), to_tiles(exact_weights(w))
    y = np.zeros((len(x), len(w)), F)
    for block in range(0, x.shape[1], 32):
        sums = [np.zeros_like(y), np.zeros_like(y)]
        for k in range(block, block + 32):
            sums[k % 2] = fused(x[:, k, None], w[:, k], sums[k % 2])
        y = flushed(flushed(y) + flushed(sums[0] + sums[1]))
    return y


def kept(x: np.ndarray, kind: TensorType) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values [..., dim] as a page keeps them: numbers, and scales of 32 each (1 where the type has none)."""
    groups = -(-x.shape[-1] // 32)
    if kind not in SCALED:
        return rounded(x, kind), np.ones((*x.shape[:-1], groups), F)
    parts = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * 32 - x.shape[-1])]).reshape(*x.shape[:-1], groups, 32)
    if kind == TensorType.Q8_0:
        d = (np.abs(parts).max(-1) / F(127)).astype("f2").astype(F)
        inverse = np.divide(F(1), d, out=np.zeros_like(d), where=d > 0)[..., None]
        q = np.rint((parts * inverse).clip(-127, 127))
    else:
        d = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1) / F(-8)
        inverse = np.divide(F(1), d, out=np.zeros_like(d), where=np.abs(d) >= TINY)
        q = np.trunc(parts * inverse + F(8.5)).clip(0, 15) - F(8)
        d = d[..., 0].astype("f2").astype(F)
    return q.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], d


class Twin(Reference):
    """A backend like the reference, but for each bit of an instruction set's, or of the best one's."""

    name = "twin"

    def __init__(self, of: str = ISAS[0]):
        super().__init__()
        self.tiles = of == "amx"

    def load(self, plan, tensors, limits, kv=TensorType.F32, threads=1, isa=None) -> "TwinSession":
        plan = quantize_inputs(plan, {n: t.type for n, t in tensors.items()})
        return TwinSession(self.tiles, plan, tensors, limits, kv)


def on_each_isa(run: Callable[[Twin], object]) -> dict[str, object]:
    """What `run` gives with the twin of each instruction set here; those that are alike run once."""
    found = {tiles: run(Twin("amx" if tiles else "scalar")) for tiles in {isa == "amx" for isa in ISAS}}
    return {isa: found[isa == "amx"] for isa in ISAS}


class TwinSession(ReferenceSession):
    def __init__(self, tiles: bool, *given):
        super().__init__(*given)
        self.tiles = tiles
        self.scales = {n: np.zeros((*p.shape[:-1], -(-p.shape[-1] // 32)), F) for n, p in self.pages.items()}

    def run(self, *given):
        with np.errstate(all="ignore"):
            return super().run(*given)

    def weight(self, w):
        t = self.tensors[w.tensor]
        if t.type not in FORMATS or len(t.shape) == 1:
            return super().weight(w)
        if w.tensor not in self.cached:
            self.cached[w.tensor] = planes(t.data.reshape(*t.shape[:-1], -1), t.type)
        return part(self.cached[w.tensor], slice(w.first, w.first + w.rows) if w.rows else slice(None))

    def quantize(self, op, x):
        blocks = quantize_blocks(x)
        both = np.zeros(blocks.shape, BOTH)
        both[list(A8.names)] = blocks
        both["bf16"] = to_tiles(x).reshape(both["bf16"].shape)
        return both

    def prompt(self, op) -> np.ndarray | None:
        """Which rows of a matrix's op are multiplied on tiles."""
        if not self.tiles or self.tensors[op.weights[0].tensor].type == TensorType.F32:
            return None
        return self._rows(op)["flags"] & RowFlag.GENERATED == 0

    def matmul(self, op, x, w):
        return product(x, w, self.prompt(op))

    def rms_norm(self, op, x, w=None):
        runs = x.reshape(len(x), -1, op.args["size"])
        mean = lane_sums(runs * runs) / F(op.args["size"])
        y = runs * (F(op.args["scale"]) / np.sqrt(mean + F(op.args["eps"])))[..., None]
        return (y if w is None else y * w).reshape(x.shape)

    def angles(self, op, factors=None):
        base, pairs = float(F(op.args["base"])), op.args["pairs"]
        factors = np.ones(pairs) if factors is None else factors
        turn = [math.pow(base, -2.0 * i / op.args["size"]) / float(factors[i]) for i in range(pairs)]
        angle = [[position * t for t in turn] for position in self._rows(op)["position"].tolist()]
        return np.array([[*map(math.cos, row), *map(math.sin, row)] for row in angle], F)

    def gelu_mul(self, op, gate, up):
        n = gate.shape[1]
        return gelu(gate) * up[:, op.args["part"] * n : (op.args["part"] + 1) * n]

    def softcap(self, op, x):
        cap = F(op.args["scale"])
        return cap - F(2) * cap / (F(1) + exponential(x * (F(2) / cap)))

    # -- Keys, values, attention: csrc/kernels/attend.h

    def store_kv(self, op, k, v):
        kv, pairs = self.kv[op.args["kv_layer"]], op.args["pairs"]
        half = kv.head_dim // 2
        k, v = (x.reshape(len(x), kv.kv_heads, kv.head_dim) for x in (k, v))
        if op.args["from_values"]:
            k = np.concatenate([k[..., :pairs], k[..., half : half + pairs]], -1)
        for r, row in enumerate(self.batch.rows[: len(k)]):
            if row["flags"] & RowFlag.NO_STORE:
                continue
            page, at = self._slots(op, self.batch.sequences[row["sequence"]], row["position"])
            for which, x in enumerate((k[r], v[r])):
                numbers, scales = kept(x, self.kv_type)
                self.pages[kv.layer][page, at, which, :, : numbers.shape[-1]] = numbers
                self.scales[kv.layer][page, at, which, :, : scales.shape[-1]] = scales

    def attend(self, op, q, k_norm=None):
        rows, out = self._rows(op), np.empty_like(q)
        for number in np.unique(rows["sequence"]):
            mine = rows["sequence"] == number
            out[mine] = self._attend(op, q[mine], rows[mine], self.batch.sequences[number], k_norm)
        return out

    def _attend(self, op, q, rows, sequence, k_norm):
        kv, window = self.kv[op.args["kv_layer"]], op.args["window"]
        heads = q.reshape(len(q), kv.kv_heads, -1, kv.head_dim)
        last = rows["reach"] if window else np.minimum(rows["reach"], rows["position"])
        first = np.maximum(0, rows["position"] - window + 1) if window else np.zeros_like(last)
        seen = np.zeros_like(heads), np.full(heads.shape[:3], -np.inf, F), np.zeros(heads.shape[:3], F)
        begin, end = int(first.min()), int(last.max()) + 1
        for base in range(begin // ATTEND_SPAN * ATTEND_SPAN, end, ATTEND_SPAN):
            borders = max(base, begin), min(base + ATTEND_SPAN, end)
            seen = merged(seen, self._attend_span(op, heads, first, last, *borders, sequence, k_norm))
        return (seen[0] / seen[2][..., None]).reshape(q.shape)

    def _attend_span(self, op, heads, first, last, begin, end, sequence, k_norm):
        """(sum of score times value, the scores' top, their sum) over positions begin ... end - 1, block by block."""
        kv = self.kv[op.args["kv_layer"]]
        so_far = np.zeros_like(heads), np.full(heads.shape[:3], -np.inf, F), np.zeros(heads.shape[:3], F)
        for base in range(begin // ATTEND_BLOCK * ATTEND_BLOCK, end, ATTEND_BLOCK):
            at = np.arange(max(base, begin // LANES * LANES), min(base + ATTEND_BLOCK, end))
            page, place = self._slots(op, sequence, at)
            stored = self.pages[kv.layer][page, place], self.scales[kv.layer][page, place]
            seen = (at >= first[:, None]) & (at <= last[:, None])
            s = np.where(seen[:, None, None], self._scores(op, heads, *stored, k_norm), F(-np.inf))
            peak = s.max(-1)
            e = np.where(seen[:, None, None], exponential(s - peak[..., None]), F(0))
            values = (stored[0][:, 1] * np.repeat(stored[1][:, 1], 32, -1)[..., : kv.head_dim]).astype(F)
            part = np.zeros_like(heads)
            for j in range(len(at)):
                part = np.where(e[..., j, None] != 0, fma(e[..., j, None], values[j][None, :, None], part), part)
            so_far = merged(so_far, (part, peak, lane_sums(e)))
        return so_far

    def _scores(self, op, heads, stored, scales, k_norm):
        """[rows, kv_heads, group, positions]."""
        dim, pairs = heads.shape[-1], op.args["pairs"]
        half, query = dim // 2, heads
        if op.args["from_values"]:
            query = np.concatenate([heads[..., :pairs], heads[..., half : half + pairs]], -1)
        keys, factor = stored[:, 0].transpose(1, 2, 0), scales[:, 0].transpose(1, 2, 0)
        s = np.zeros((*heads.shape[:3], len(stored)), F)
        for g in range(0, query.shape[-1], 32):
            direct = self.kv_type not in SCALED
            inner = s if direct else np.zeros_like(s)
            for i in range(g, min(g + 32, query.shape[-1])):
                inner = fma(query[..., i, None], keys[:, i][None, :, None], inner)
            s = inner if direct else fma(inner, factor[:, g // 32][None, :, None], s)
        if not op.args["from_values"]:
            return s
        turned = np.arange(dim) % half < pairs
        query = np.where(turned, F(0), heads * k_norm)[..., None, :]
        values = (stored[:, 1] * np.repeat(scales[:, 1], 32, -1)[..., :dim]).astype(F).swapaxes(0, 1)[None, :, None]
        lanes = np.zeros((*s.shape, LANES), F)
        for i in range(0, dim, LANES):
            lanes = fma(query[..., i : i + LANES], values[..., i : i + LANES], lanes)
        return s + tree(lanes)

    # -- Experts: csrc/kernels/experts.h

    def route(self, op, logits, scale):
        used = op.args["used"]
        best = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :used], axis=1)
        chosen = np.take_along_axis(logits, best, axis=1)
        share = exponential(chosen - chosen.max(1, keepdims=True))
        total = np.zeros(len(share), F)
        for n in range(used):
            total = total + share[:, n]
        share = share / total[:, None] * scale[best]
        return np.concatenate([best.astype("i4"), share.view("i4")], axis=1)

    def experts_up(self, op, x, route, _group, *matrices):
        parts = [self._expert_rows(op, x[:, None], route[:, : op.args["used"]], w) for w in matrices]
        return np.concatenate(parts, -1).reshape(len(x), -1)

    def experts_gelu(self, op, x):
        gate, up = np.moveaxis(x.reshape(len(x), op.args["used"], 2, -1), 2, 0)
        return (gelu(gate) * up).reshape(len(x), -1)

    def experts_down(self, op, x, route, _group, down):
        used = op.args["used"]
        y = self._expert_rows(op, x.reshape(len(x), used, -1), route[:, :used], down)
        share = np.ascontiguousarray(route[:, used:]).view(F)
        total = np.zeros((len(x), y.shape[-1]), F)
        for n in range(used):
            total = total + share[:, n, None] * y[:, n]
        return total

    def _expert_rows(self, op, x, chosen, w):
        """[rows, used, out]: x [rows, 1 or used, ...] times the matrix of each chosen expert."""
        x = np.broadcast_to(x, (*chosen.shape, x.shape[-1]))
        out = np.zeros((*chosen.shape, (w.q if isinstance(w, Planes) else w).shape[1]), F)
        prompt = self.prompt(op)
        for e in np.unique(chosen):
            given = None if prompt is None else np.broadcast_to(prompt[:, None], chosen.shape)[chosen == e]
            out[chosen == e] = product(x[chosen == e], part(w, int(e)), given)
        return out


def part(w: np.ndarray | Planes, which) -> np.ndarray | Planes:
    if not isinstance(w, Planes):
        return w[which]
    minimum = None if w.minimum is None else w.minimum[which]
    return Planes(w.q[which], w.scale[which], minimum, w.group)


def weights(kind: TensorType, data: np.ndarray) -> np.ndarray | Planes:
    """Rows of bytes as `product` takes them."""
    return planes(data, kind) if kind in FORMATS else dequantize(data, kind)


BACKEND = Twin()
