"""A model in the portable backend: the reference's session with its slow ops replaced.

Replaced are the products with matrices, attention and its pages (compiled, shared among threads), GELU and the choice
of the best; all other ops are the reference's own numpy. Buffers are dropped after their last use.
"""

import os
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from ..abi import BLOCKS, PAGE, OpCode, RowFlag, Status, TensorType, row_bytes
from ..gguf.quants import dequantize
from ..plan.batch import Batch, Limits
from ..plan.builder import TOP
from ..plan.pack import place
from ..plan.plan import KV, Buffer, Op, Plan, Weight
from . import StepResult, TensorData, portable_kernels
from .portable_kernels import ROWS, STEP
from .portable_panels import WORTH_SHARING, Crew, Panels, product, repack
from .reference import ReferenceSession, rounded

NUMBA = (OpCode.MATMUL, OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN, OpCode.ATTEND)
NUMPY = (
    OpCode.EMBED, OpCode.EMBED_ROWS, OpCode.WANTED, OpCode.RMS_NORM, OpCode.ADD, OpCode.SCALE, OpCode.GELU_MUL,
    OpCode.ANGLES, OpCode.ROPE, OpCode.STORE_KV, OpCode.ROUTE, OpCode.GROUP, OpCode.EXPERTS_GELU, OpCode.SOFTCAP,
    OpCode.TOP_PART, OpCode.TOP, OpCode.QUANTIZE,
)  # fmt: skip
MATRICES = (OpCode.MATMUL, OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN)


def gelu(x: np.ndarray) -> np.ndarray:
    """The reference's, without its slow power; silent about infinity, which tanh brings back, in any thread."""
    with np.errstate(over="ignore", invalid="ignore"):
        inner = np.float32(0.7978845608028654) * (x + np.float32(0.044715) * (x * x * x))
        return np.float32(0.5) * x * (1 + np.tanh(inner))


def memory(plan: Plan, tensors: Mapping[str, TensorData], limits: Limits) -> dict[str, int]:
    """Bytes by purpose; scratch counts every live buffer twice, since numpy makes a new one of an old one."""
    vectors = {w.tensor for op in plan.ops if op.code not in MATRICES for w in op.weights} - tables(plan)
    weights = sum(Panels.bytes(shape_of(w, tensors), tensors[w.tensor].type) for w in matrices(plan))
    return {
        "weights": weights + sum(4 * int(np.prod(tensors[name].shape)) for name in vectors),
        "kv": sum(4 * int(np.prod(shape)) for kv in plan.kv for shape in page_shapes(kv, limits)),
        "scratch": 2 * place(plan, limits)[2],
    }


def matrices(plan: Plan) -> list[Weight]:
    return list(dict.fromkeys(w for op in plan.ops if op.code in MATRICES for w in op.weights))


def tables(plan: Plan) -> set[str]:
    return {op.weights[0].tensor for op in plan.ops if op.code in (OpCode.EMBED, OpCode.EMBED_ROWS)}


def shape_of(w: Weight, tensors: Mapping[str, TensorData]) -> tuple[int, ...]:
    shape = tensors[w.tensor].shape
    return (w.rows, *shape[1:]) if w.rows else shape


def page_shapes(kv: KV, limits: Limits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a layer's keys and values: [page, kv_heads, PAGE, dim]."""
    pages = limits.local_pages if kv.local else limits.global_pages
    return (pages, kv.kv_heads, PAGE, kv.key_dim), (pages, kv.kv_heads, PAGE, kv.head_dim)


def kept(op: Op, heads: np.ndarray, kv: KV) -> np.ndarray:
    """Of [rows, heads, head_dim] what is stored of keys: all, or the pairs that turned."""
    if not op.args["from_values"]:
        return heads
    pairs, half = op.args["pairs"], kv.head_dim // 2
    return np.concatenate([heads[..., :pairs], heads[..., half : half + pairs]], axis=-1)


def best_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the TOP largest of x, best first, lower id first among equals, none of minus infinity."""
    least = np.partition(x, len(x) - TOP)[len(x) - TOP] if len(x) > TOP else -np.inf
    ids = np.flatnonzero(x >= least)
    ids = ids[np.argsort(-x[ids], kind="stable")][:TOP]
    ids = ids[x[ids] > -np.inf]
    return ids, x[ids]


def compile_kernels(kinds: set[TensorType]) -> None:
    """One small call of everything that tensors of these types need."""
    alone = Crew(1)
    for kind in kinds:
        cols = BLOCKS[kind][0] * STEP
        panels = repack(np.zeros(row_bytes(kind, cols), np.uint8), (1, cols), kind, alone)
        for rows in (1, ROWS):
            product(np.zeros((rows, cols), np.float32), panels, 0, alone)
    q, pages = np.zeros((1, 1, STEP), np.float32), np.zeros((1, 1, PAGE, STEP), np.float32)
    zero = np.zeros(1, np.int64)
    portable_kernels.attend(0, 1, q, q, pages, pages, np.zeros(1, np.int32), zero, zero, zero + 1, np.zeros_like(q))


class PortableSession(ReferenceSession):
    def __init__(self, plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, kv: TensorType, threads: int):
        self.plan, self.tensors, self.limits, self.kv_type = plan, tensors, limits, kv
        self.crew = Crew(threads)
        self.kv = {k.layer: k for k in plan.kv}
        self.pages = {k.layer: tuple(np.zeros(shape, np.float32) for shape in page_shapes(k, limits)) for k in plan.kv}
        self.cached: dict[str, np.ndarray] = {}
        self.buffers: dict[Buffer, np.ndarray] = {}
        with ThreadPoolExecutor(1) as compiler:  # most of its time is LLVM's, which leaves Python alone
            compiled = compiler.submit(compile_kernels, {tensors[w.tensor].type for w in matrices(plan)})
            self.panels = {w: self._panels(w) for w in matrices(plan)}
            compiled.result()
        self.files = {name: os.dup(tensors[name].fileno) for name in tables(plan)}
        self.close_files = weakref.finalize(self, lambda files: [os.close(f) for f in files], list(self.files.values()))
        self.last = place(plan, limits)[1]
        self.cancelled = False
        self.touched: dict[tuple[int, int], int] = {}
        self.bytes = memory(plan, tensors, limits)

    def _panels(self, w: Weight) -> Panels:
        t = self.tensors[w.tensor]
        data = t.data.reshape(*t.shape[:-1], -1)
        data = data[w.first : w.first + w.rows] if w.rows else data
        return repack(data, shape_of(w, self.tensors), t.type, self.crew)

    def close(self) -> None:
        self.crew.close()
        self.close_files()
        self.panels.clear()
        self.pages.clear()
        self.buffers.clear()

    def kernels(self) -> dict[str, str]:
        def name(op: Op) -> str:
            kind = f"_{self.tensors[op.weights[0].tensor].type.name.lower()}" if op.code in MATRICES else ""
            return f"{op.code.name.lower()}{kind}_{'numba' if op.code in NUMBA else 'numpy'}"

        return {op.name: name(op) for op in self.plan.ops}

    def clear_pages(self, local: bool, pages: np.ndarray) -> None:
        for store in self._stores(local):
            store[pages] = 0

    def copy_page(self, local: bool, source: int, target: int) -> None:
        for store in self._stores(local):
            store[target] = store[source]

    def _stores(self, local: bool) -> list[np.ndarray]:
        return [store for layer, stores in self.pages.items() if self.kv[layer].local == local for store in stores]

    def run(self, batch: Batch, first_op: int = 0, end_op: int | None = None) -> StepResult:
        self.touched.clear()
        return replace(super().run(batch, first_op, end_op), weight_bytes=sum(self.touched.values()))

    def _run_op(self, number: int, op: Op) -> None:
        super()._run_op(number, op)
        for dead in [b for b in op.inputs if self.last[b] == number and b != op.out]:
            self.buffers.pop(dead, None)

    def weight(self, w: Weight) -> "np.ndarray | Panels":
        return self.panels.get(w) or super().weight(w)

    def _table(self, op: Op, tokens: np.ndarray) -> np.ndarray:
        """Rows of a table read from the file one by one: it is never mapped, let alone held."""
        t = self.tensors[op.weights[0].tensor]
        size, file = row_bytes(t.type, t.shape[-1]), self.files[t.name]
        try:
            data = b"".join(os.pread(file, size, t.offset + int(token) * size) for token in tokens)
        except OSError:
            data = b""
        if len(data) < size * len(tokens):
            self.result["status"], data = Status.MODEL_CHANGED, bytes(size * len(tokens))
        rows = np.frombuffer(data, np.uint8).reshape(len(tokens), size)
        return dequantize(rows, t.type) * np.float32(op.args["scale"])

    def product(self, x: np.ndarray, panels: Panels, matrix: int = 0) -> np.ndarray:
        self.touched[id(panels), matrix] = panels.matrix_bytes
        return product(x, panels, matrix, self.crew)

    def matmul(self, op: Op, x: np.ndarray, w: Panels) -> np.ndarray:
        return self.product(x, w)

    def rms_norm(self, op: Op, x: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
        """The reference's in half as many steps over the row: most of a short row's time is numpy's own."""
        size = op.args["size"]
        runs = x.reshape(len(x), -1, size)
        mean = np.vecdot(runs, runs) / np.float32(size)
        y = runs * (np.float32(op.args["scale"]) / np.sqrt(mean + np.float32(op.args["eps"])))[..., None]
        return (y if w is None else np.multiply(y, w, out=y)).reshape(x.shape)

    def gelu_mul(self, op: Op, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        n = gate.shape[1]
        return self._gated(gate, up[:, op.args["part"] * n : (op.args["part"] + 1) * n])

    def experts_gelu(self, op: Op, x: np.ndarray) -> np.ndarray:
        gate, up = np.moveaxis(x.reshape(len(x), op.args["used"], 2, -1), 2, 0)
        return self._gated(gate, up).reshape(len(x), -1)

    def _gated(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """gelu(gate) * up, a few rows at a time: what lies between stays in cache."""
        out = np.empty(gate.shape, np.float32)

        def some(share: int, shares: int) -> None:
            for r in range(share * ROWS, len(gate), shares * ROWS):
                rows = slice(r, r + ROWS)
                np.multiply(gelu(gate[rows]), up[rows], out=out[rows])

        self.crew.work(some, shared=len(gate) > ROWS)
        return out

    def experts_up(self, op: Op, x, route, _group, *gate_up: Panels) -> np.ndarray:
        chosen = route[:, : op.args["used"]]
        out = np.empty((*chosen.shape, sum(w.rows for w in gate_up)), np.float32)
        for expert in np.unique(chosen):
            row, slot = np.nonzero(chosen == expert)
            out[row, slot] = np.concatenate([self.product(x[row], w, int(expert)) for w in gate_up], axis=1)
        return out.reshape(len(x), -1)

    def experts_down(self, op: Op, x, route, _group, down: Panels) -> np.ndarray:
        used = op.args["used"]
        chosen, shares = route[:, :used], np.ascontiguousarray(route[:, used:]).view(np.float32)
        hidden = x.reshape(len(x), used, -1)
        out = np.zeros((len(x), down.rows), np.float32)
        for expert in np.unique(chosen):
            row, slot = np.nonzero(chosen == expert)
            out[row] += shares[row, slot][:, None] * self.product(hidden[row, slot], down, int(expert))
        return out

    def store_kv(self, op: Op, k: np.ndarray, v: np.ndarray) -> None:
        kv = self.kv[op.args["kv_layer"]]
        keys, values = self.pages[kv.layer]
        k, v = (rounded(x.reshape(len(x), kv.kv_heads, kv.head_dim), self.kv_type) for x in (k, v))
        k = kept(op, k, kv)
        for s in self.batch.sequences[: int(self.batch.header["sequences"])]:
            span = np.arange(s["first_row"], s["first_row"] + s["rows"])
            span = span[self.batch.rows["flags"][span] & RowFlag.NO_STORE == 0]
            page, at = self._slots(op, s, self.batch.rows["position"][span])
            keys[page, :, at], values[page, :, at] = k[span], v[span]

    def attend(self, op: Op, q: np.ndarray, k_norm: np.ndarray | None = None) -> np.ndarray:
        kv, window, rows = self.kv[op.args["kv_layer"]], op.args["window"], self._rows(op)
        q = q.reshape(len(q), -1, kv.head_dim)
        value_q = np.empty((0, *q.shape[1:]), np.float32)
        if k_norm is not None:  # keys are values times k_norm: the norm goes to q, the pairs that turned stay apart
            pairs, half = op.args["pairs"], kv.head_dim // 2
            value_q = q * k_norm
            value_q[..., :pairs], value_q[..., half : half + pairs] = 0, 0
            q = kept(op, q, kv)
        table = self.batch.sequences["local_pages" if kv.local else "global_pages"][rows["sequence"]]
        position, reach = rows["position"].astype(np.int64), rows["reach"].astype(np.int64)
        firsts = np.maximum(position - window + 1, 0) if window else np.zeros_like(position)
        ends = (reach if window else np.minimum(reach, position)) + 1
        out = np.empty((len(q), q.shape[1], kv.head_dim), np.float32)
        worth = 2 * int((ends - firsts).sum()) * q.shape[1] * kv.head_dim > WORTH_SHARING
        visible = self.batch.pages, table.astype(np.int64), firsts, ends
        q = np.ascontiguousarray(q)
        self.crew.work(portable_kernels.attend, q, value_q, *self.pages[kv.layer], *visible, out, shared=worth)
        return out.reshape(len(out), -1)

    def top(self, op: Op, logits: np.ndarray) -> None:
        rows = self._rows(op)
        ids, values = np.full((len(rows), TOP), -1, np.int32), np.full((len(rows), TOP), -np.inf, np.float32)
        for t, row in enumerate(rows):
            if not np.isfinite(logits[t]).all():
                self.result |= {"status": Status.NON_FINITE, "bad_row": int(self.batch.wanted[t])}
                continue
            best, adjusted = best_of(self._adjusted(logits[t], self.batch.sequences[row["sequence"]]))
            ids[t, : len(best)], values[t, : len(best)] = best, adjusted
        top = logits.max(-1, keepdims=True)
        lse = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))[:, 0]
        self.result |= {"ids": ids, "values": values, "lse": lse}
