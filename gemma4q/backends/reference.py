"""The plan in numpy, one function an op: slow, obvious, and what every other backend is tested against.

Weights are dequantised to float32, activations stay float32: the numbers are those of the file's weights exactly.
`quantize_activations=True` rounds rows as the integer kernels do, to bound what that costs.
"""

from collections.abc import Mapping

import numpy as np

from ..abi import BLOCKS, PAGE, OpCode, RowFlag, Space, Status, TensorType
from ..gguf.quants import dequantize, quantize
from ..plan.batch import Batch, Limits
from ..plan.builder import TOP
from ..plan.fuse import quantize_inputs
from ..plan.plan import Buffer, Op, Plan, Weight
from . import StepResult


def gelu(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608028654) * (x + np.float32(0.044715) * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rounded(x: np.ndarray, kind: TensorType) -> np.ndarray:
    """float32 [..., dim] as a cache of type `kind` would give it back; NaN, which no block can hold, as it is."""
    dim, (group, _) = x.shape[-1], BLOCKS[kind]
    if kind == TensorType.F32 or (group > 1 and not np.isfinite(x).all()):
        return x
    with np.errstate(over="ignore"):
        whole = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -dim % group)])
        return dequantize(quantize(whole, kind), kind)[..., :dim]


class Reference:
    name = "reference"

    def __init__(self, quantize_activations: bool = False):
        self.quantize_activations = quantize_activations

    def available(self) -> str | None:
        return None

    def memory(self, plan: Plan, tensors, limits: Limits, kv: TensorType, threads: int, isa=None) -> dict[str, int]:
        weights = sum(4 * int(np.prod(tensors[name].shape)) for name in {w.tensor for w in plan.weights()})
        pages = sum(_page_values(k) * (limits.local_pages if k.local else limits.global_pages) for k in plan.kv)
        return {"weights": weights, "kv": 4 * pages}

    def load(self, plan, tensors, limits, kv=TensorType.F32, threads=1, isa=None) -> "ReferenceSession":
        if self.quantize_activations:
            plan = quantize_inputs(plan, {name: t.type for name, t in tensors.items()})
        return ReferenceSession(plan, tensors, limits, kv)


def _page_values(kv) -> int:
    return PAGE * kv.kv_heads * 2 * kv.head_dim


class ReferenceSession:
    def __init__(self, plan: Plan, tensors: Mapping, limits: Limits, kv: TensorType):
        self.plan, self.tensors, self.limits, self.kv_type = plan, tensors, limits, kv
        self.cached: dict[str, np.ndarray] = {}
        self.buffers: dict[Buffer, np.ndarray] = {}
        self.kv = {k.layer: k for k in plan.kv}
        self.pages = {
            k.layer: np.zeros(
                (limits.local_pages if k.local else limits.global_pages, PAGE, 2, k.kv_heads, k.head_dim), np.float32
            )
            for k in plan.kv
        }
        self.bytes = {"kv": sum(p.nbytes for p in self.pages.values())}
        self.cancelled = False

    def close(self) -> None:
        self.cached.clear()

    def cancel(self) -> None:
        self.cancelled = True

    def kernels(self) -> dict[str, str]:
        return {op.name: f"{op.code.name.lower()}_reference" for op in self.plan.ops}

    def clear_pages(self, local: bool, pages: np.ndarray) -> None:
        for layer, store in self.pages.items():
            if self.kv[layer].local == local:
                store[pages] = 0

    def copy_page(self, local: bool, source: int, target: int) -> None:
        for layer, store in self.pages.items():
            if self.kv[layer].local == local:
                store[target] = store[source]

    def read(self, buffer: str) -> np.ndarray:
        return next(v for b, v in self.buffers.items() if b.name == buffer)

    def weight(self, w: Weight) -> np.ndarray:
        if w.tensor not in self.cached:
            t = self.tensors[w.tensor]
            rows = t.data.reshape(*t.shape[:-1], -1)
            self.cached[w.tensor] = dequantize(rows, t.type).reshape(t.shape)
        full = self.cached[w.tensor]
        return full[w.first : w.first + w.rows] if w.rows else full

    def fetch(self, fits: bool) -> None:
        """Its own copy of the weights is read at load."""

    def run(self, batch: Batch, first_op: int = 0, end_op: int | None = None) -> StepResult:
        self.batch = batch
        self.count = {Space.ROW: int(batch.header["rows"]), Space.WANTED: int(batch.header["wanted"]), Space.FIXED: 1}
        self.cancelled = False
        self.result: dict = {"status": Status.OK, "bad_row": -1}
        with np.errstate(over="ignore", invalid="ignore"):
            for number, op in list(enumerate(self.plan.ops))[first_op:end_op]:
                if self.cancelled:
                    self.result["status"] = Status.CANCELLED
                if self.result["status"] != Status.OK:
                    break
                self._run_op(number, op)
        empty = np.zeros((0, 0), np.float32)
        return StepResult(
            self.result["status"], self.result["bad_row"], self.buffers.get(self.plan.logits, empty),
            self.buffers.get(self.plan.hidden, empty), *(self.result.get(k, empty) for k in ("ids", "values", "lse")),
        )  # fmt: skip

    def _run_op(self, number: int, op: Op) -> None:
        out = np.zeros((0, op.out.width if op.out else 0), np.float32)
        if self.count[op.space]:
            inputs = [self.buffers[b] for b in op.inputs]
            out = getattr(self, op.code.name.lower())(op, *inputs, *map(self.weight, self._matrices(op)))
        if op.out is not None:
            self.buffers[op.out] = out

    def _matrices(self, op: Op) -> tuple[Weight, ...]:
        """All weights but look-up tables, of which one row is dequantised at a time."""
        return () if op.code in (OpCode.EMBED, OpCode.EMBED_ROWS) else op.weights

    def _rows(self, op: Op) -> np.ndarray:
        rows = self.batch.rows[: self.count[Space.ROW]]
        return rows[self.batch.wanted[: self.count[Space.WANTED]]] if op.space == Space.WANTED else rows

    def _table(self, op: Op, tokens: np.ndarray) -> np.ndarray:
        t = self.tensors[op.weights[0].tensor]
        return dequantize(t.data.reshape(t.shape[0], -1)[tokens], t.type) * np.float32(op.args["scale"])

    def embed(self, op: Op) -> np.ndarray:
        rows = self._rows(op)
        x = self._table(op, np.where(rows["vector"] >= 0, 0, rows["token"]))
        soft = rows["vector"] >= 0
        x[soft] = self.batch.vectors[rows["vector"][soft]]
        return x

    def embed_rows(self, op: Op) -> np.ndarray:
        rows = self._rows(op)
        x = self._table(op, np.where(rows["vector"] >= 0, 0, rows["token"]))
        return x[:, op.args["part"] : op.args["part"] + op.out.width]

    def wanted(self, op: Op, x):
        return x[self.batch.wanted[: self.count[Space.WANTED]]]

    def quantize(self, op: Op, x):
        """The values that block_a8 stands for: d = max|x| / 127, q = round half to even of x / d."""
        blocks = x.reshape(len(x), -1, 32)
        d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
        return (np.rint(blocks * inverse) * d).reshape(x.shape)

    def matmul(self, op: Op, x, w):
        return x @ w.T

    def rms_norm(self, op: Op, x, w=None):
        runs = x.reshape(len(x), -1, op.args["size"])
        y = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + np.float32(op.args["eps"]))
        return (y * (np.float32(1) if w is None else w) * np.float32(op.args["scale"])).reshape(x.shape)

    def angles(self, op: Op, factors=None):
        frequency = float(np.float32(op.args["base"])) ** (-np.arange(0, 2 * op.args["pairs"], 2) / op.args["size"])
        frequency = frequency / (1 if factors is None else factors[: op.args["pairs"]].astype(np.float64))
        angle = self._rows(op)["position"][:, None] * frequency
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def rope(self, op: Op, x, angles):
        half, pairs = op.args["size"] // 2, op.args["pairs"]
        cos, sin = np.split(angles[:, None], 2, axis=-1)
        y = x.reshape(len(x), -1, op.args["head_dim"]).copy()
        a, b = y[..., :pairs].copy(), y[..., half : half + pairs].copy()
        y[..., :pairs], y[..., half : half + pairs] = a * cos - b * sin, b * cos + a * sin
        return y.reshape(x.shape)

    def _slots(self, op: Op, sequence, positions):
        """Page and place within it of each of a sequence's positions."""
        table = sequence["local_pages" if self.kv[op.args["kv_layer"]].local else "global_pages"]
        return self.batch.pages[int(table) + positions // PAGE], positions % PAGE

    def store_kv(self, op: Op, k, v):
        kv = self.kv[op.args["kv_layer"]]
        store = self.pages[kv.layer]
        for s in self.batch.sequences[: int(self.batch.header["sequences"])]:
            rows = np.arange(s["first_row"], s["first_row"] + s["rows"])
            rows = rows[self.batch.rows[rows]["flags"] & RowFlag.NO_STORE == 0]
            page, at = self._slots(op, s, self.batch.rows[rows]["position"])
            shape = (len(rows), kv.kv_heads, kv.head_dim)
            store[page, at, 0] = rounded(k[rows].reshape(shape), self.kv_type)
            store[page, at, 1] = rounded(v[rows].reshape(shape), self.kv_type)

    def attend(self, op: Op, q, k_norm=None):
        kv, window = self.kv[op.args["kv_layer"]], op.args["window"]
        rows, out = self._rows(op), np.empty_like(q)
        for t, row in enumerate(rows):
            sequence = self.batch.sequences[row["sequence"]]
            end = int(row["reach"]) if window else min(int(row["reach"]), int(row["position"]))
            j = np.arange(max(0, int(row["position"]) - window + 1) if window else 0, end + 1)
            page, at = self._slots(op, sequence, j)
            k, v = np.moveaxis(self.pages[kv.layer][page, at], 1, 0)
            if k_norm is not None:
                pairs, half, stored = op.args["pairs"], kv.head_dim // 2, k
                k = v * k_norm
                k[..., :pairs], k[..., half : half + pairs] = stored[..., :pairs], stored[..., half : half + pairs]
            heads = q[t].reshape(kv.kv_heads, -1, kv.head_dim)
            p = softmax(np.einsum("kgd,jkd->kgj", heads, k))
            out[t] = np.einsum("kgj,jkd->kgd", p, v).reshape(-1)
        return out

    def add(self, op: Op, a, b):
        return (a + b) * np.float32(op.args["scale"])

    def scale(self, op: Op, x, w):
        return x * w.reshape(-1)[0]

    def gelu_mul(self, op: Op, gate, up):
        n = gate.shape[1]
        return gelu(gate) * up[:, op.args["part"] * n : (op.args["part"] + 1) * n]

    def route(self, op: Op, logits, scale):
        """[rows, 2 used]: expert numbers, ascending, then their weights as float32 bits."""
        used = op.args["used"]
        best = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :used], axis=1)
        p = np.take_along_axis(softmax(logits), best, axis=1)
        w = (p / p.sum(1, keepdims=True) * scale[best]).astype(np.float32)
        return np.concatenate([best.astype(np.int32), w.view(np.int32)], axis=1)

    def group(self, op: Op, route):
        return route

    def experts_up(self, op: Op, x, route, _group, gate, up=None):
        both = gate if up is None else np.concatenate([gate, up], axis=1)
        return np.stack(
            [np.concatenate([both[e] @ row for e in r[: op.args["used"]]]) for row, r in zip(x, route, strict=True)]
        )

    def experts_gelu(self, op: Op, x):
        gate, up = np.moveaxis(x.reshape(len(x), op.args["used"], 2, -1), 2, 0)
        return (gelu(gate) * up).reshape(len(x), -1)

    def experts_down(self, op: Op, x, route, _group, down):
        used = op.args["used"]
        hidden = x.reshape(len(x), used, -1)
        weights = np.ascontiguousarray(route[:, used:]).view(np.float32)
        return np.stack(
            [
                sum(w[i] * (down[e] @ h[i]) for i, e in enumerate(r[:used]))
                for h, r, w in zip(hidden, route, weights, strict=True)
            ]
        )

    def softcap(self, op: Op, x):
        cap = np.float32(op.args["scale"])
        return np.tanh(x / cap) * cap

    def top_part(self, op: Op, logits):
        return logits

    def top(self, op: Op, logits):
        rows = self._rows(op)
        ids = np.full((len(rows), TOP), -1, np.int32)
        values = np.full((len(rows), TOP), -np.inf, np.float32)
        for t, row in enumerate(rows):
            if not np.isfinite(logits[t]).all():
                self.result |= {"status": Status.NON_FINITE, "bad_row": int(self.batch.wanted[t])}
                continue
            adjusted = self._adjusted(logits[t], self.batch.sequences[row["sequence"]])
            best = np.argsort(-adjusted, kind="stable")[:TOP]
            best = best[adjusted[best] > -np.inf]
            ids[t, : len(best)], values[t, : len(best)] = best, adjusted[best]
        top = logits.max(-1, keepdims=True)
        lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
        self.result |= {"ids": ids, "values": values, "lse": lse}

    def _adjusted(self, logits: np.ndarray, sequence) -> np.ndarray:
        """Biases, then the mask."""
        x = logits.copy()
        for b in self.batch.biases[int(sequence["bias"]) :][: int(sequence["biases"])]:
            l = x[b["token"]]
            x[b["token"]] = (l * b["scale"] if l <= 0 else l / b["scale"]) + b["add"]
        if sequence["mask"] >= 0:
            bits = np.unpackbits(self.batch.masks[sequence["mask"]].view(np.uint8), bitorder="little")[: len(x)]
            x[bits == 0] = -np.inf
        return x


BACKEND = Reference()
