"""The C executor: hands a packed plan, the mapped weights and the memory it needs to csrc/exec.c.

Weights stay where the file maps them; look-up tables that are no matrix (per-layer embeddings) are read by pread, row
by row. All memory is allocated and touched here, at load, and is what `memory()` said it would be.
"""

import mmap
import threading
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from ..abi import (
    PAGE,
    BufferType,
    Layout,
    OpCode,
    Space,
    Status,
    TensorType,
    address,
    dtype,
    ffi,
    lib,
    missing,
    row_bytes,
)
from ..errors import Gemma4qError
from ..gguf.quants import dequantize
from ..plan.batch import Batch, Limits
from ..plan.builder import TOP
from ..plan.fuse import MATRICES as PRODUCTS
from ..plan.fuse import a8_bytes, quantize_inputs
from ..plan.pack import Packed, pack
from ..plan.plan import KV, Plan
from . import StepResult, TensorData

WEIGHT, KV_LAYER, RESULT = dtype("weight"), dtype("kv_layer"), dtype("run_result")
MATRICES = (OpCode.MATMUL, OpCode.EMBED, OpCode.EMBED_ROWS, OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN)
KV_TYPES = (TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0)
KV_BITS = {TensorType.Q8_0: 8, TensorType.Q4_0: 4}  # of a value, where 32 share a scale
POPULATE_WRITE = 23  # madvise(2): since Linux 5.14
SPAN = 1024  # positions: ATTEND_SPAN of csrc/kernels.h
FETCH_BYTES = 64 << 20  # that closing waits for
SPARE_ROWS = 256  # rows of a table kept beyond those of one step


def _compiled() -> list[str]:
    """Instruction sets by their numbers, here or not."""
    return [ffi.string(lib.isa_name(i)).decode() for i in range(lib.isa_count())]


def isas() -> tuple[str, ...]:
    """Instruction sets this library has and this CPU can run, best first."""
    return tuple(name for i, name in enumerate(_compiled()) if lib.isa_available(i))


def level_of(isa: str | None) -> int:
    """The number of an instruction set, or of the best; `unavailable` when it is not here."""
    names, wanted = _compiled(), isa or isas()[0]
    level = names.index(wanted) if wanted in names else -1
    if not lib.isa_available(level):
        raise Gemma4qError("unavailable", f"instruction set {isa} is not here: choose {', '.join(isas())}")
    return level


def page_bytes(kv: KV, kind: TensorType) -> int:
    """Bytes of one page of one layer, all KV heads (csrc/kernels/attend.h)."""

    def values(dim: int) -> int:
        return PAGE * (dim * KV_BITS[kind] // 8 + 2 * -(-dim // 32) if kind in KV_BITS else row_bytes(kind, dim))

    return kv.kv_heads * (values(kv.key_dim) + values(kv.head_dim))


def pages_of(kv: KV, limits: Limits) -> int:
    return limits.local_pages if kv.local else limits.global_pages


class Native:
    name = "native"

    def available(self) -> str | None:
        return missing

    def memory(self, plan: Plan, tensors, limits: Limits, kv: TensorType, threads: int, isa=None) -> dict[str, int]:
        """Bytes of anonymous memory by purpose: what `load` will allocate and touch."""
        packed = _pack(plan, tensors, limits, level_of(isa))
        return {
            "kv": sum(page_bytes(k, kv) * pages_of(k, limits) for k in plan.kv),
            "arena": packed.arena_bytes,
            "scratch": lib.scratch_bytes(threads) + _split_bytes(plan, limits, threads),
            "rows": sum(_cache_bytes(tensors[name], limits) for name in _tables(plan)),
            "results": limits.wanted * (8 * TOP + 4),
        }

    def load(self, plan, tensors, limits, kv=TensorType.F16, threads=1, isa=None) -> "NativeSession":
        if kv not in KV_TYPES:
            names = ", ".join(k.name.lower() for k in KV_TYPES)
            raise Gemma4qError("bad_option", f"keys and values cannot be kept as {kv.name.lower()}: choose {names}")
        level, split_bytes = level_of(isa), _split_bytes(plan, limits, threads)
        return NativeSession(_pack(plan, tensors, limits, level), tensors, kv, threads, level, split_bytes)


def _pack(plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, level: int) -> Packed:
    types = {name: t.type for name, t in tensors.items()}
    return pack(quantize_inputs(plan, types, lambda width: lib.activation_bytes(level, width)), limits)


def _split_bytes(plan: Plan, limits: Limits, threads: int) -> int:
    """What threads find that share the attention of a few rows: for each span of positions and head a vector."""
    spans, rows = limits.global_pages * PAGE // SPAN + 1, min(limits.rows, 2 * threads - 1)
    ops = [op.args for op in plan.ops if op.code == OpCode.ATTEND and not op.args["window"]]
    return rows * spans * max((4 * op["heads"] * (op["head_dim"] + 2) for op in ops), default=0)


def _tables(plan: Plan) -> list[str]:
    return list(dict.fromkeys(op.weights[0].tensor for op in plan.ops if op.code == OpCode.EMBED_ROWS))


def _slots(tensor: TensorData, limits: Limits) -> int:
    return min(tensor.shape[0], limits.rows + SPARE_ROWS)


def _cache_bytes(tensor: TensorData, limits: Limits) -> int:
    slots = _slots(tensor, limits)
    return slots * (row_bytes(tensor.type, tensor.shape[1]) + 12) + 4 * tensor.shape[0]


def anonymous(count: int) -> np.ndarray:
    """`count` zero bytes of memory of our own, all of it touched, in huge pages where the system has them."""
    block = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(block, np.uint8)
    try:
        block.madvise(POPULATE_WRITE)
    except (OSError, ValueError):
        array[:: mmap.PAGESIZE] = 0
    return array


class NativeSession:
    """Owns pool, pages, arena and row caches; closing frees them, and the mapped weights stay the caller's."""

    def __init__(
        self,
        packed: Packed,
        tensors: Mapping[str, TensorData],
        kv: TensorType,
        threads: int,
        isa: int,
        split_bytes: int,
    ):
        self.packed, self.plan, self.limits, self.isa = packed, packed.plan, packed.limits, isa
        self.tensors, self.keep, self.caches, self.slots, self.fetching = tensors, [], [], [], None
        # Whether prompt and generated rows meet different arithmetic: on tiles all but F32 weights.
        short = any(
            tensors[op.weights[0].tensor].type != TensorType.F32 for op in packed.plan.ops if op.code in PRODUCTS
        )
        self.classes_differ = short and lib.activation_bytes(isa, 32) > a8_bytes(32)
        self.arena, self.scratch = anonymous(packed.arena_bytes), anonymous(lib.scratch_bytes(threads) + split_bytes)
        split = self.scratch.ctypes.data + lib.scratch_bytes(threads)
        self.pool = ffi.gc(lib.pool_new(threads), lib.pool_free)
        layers = self._kv_layers(kv)
        weights = np.array([self._weight(i) for i in range(len(packed.weights))], WEIGHT)
        self._guard_mappings()
        self.cancel_flag = np.zeros(1, np.int32)
        self.times = np.zeros(len(packed.ops), np.int64)
        self._results()
        self.session = lib.session_new(
            self.pool, isa, ffi.cast("op *", packed.ops.ctypes.data), len(packed.ops),
            ffi.cast("buffer *", packed.buffers.ctypes.data), len(packed.buffers),
            ffi.cast("weight *", weights.ctypes.data), len(weights),
            ffi.cast("kv_layer *", layers.ctypes.data), len(layers), address(self.arena), address(self.scratch),
            ffi.cast("float *", split), split_bytes,
        )  # fmt: skip
        if self.session == ffi.NULL or self.pool == ffi.NULL:
            raise Gemma4qError("out_of_memory", "no memory for the executor")

    def _kv_layers(self, kind: TensorType) -> np.ndarray:
        kv = self.plan.kv
        sizes = [page_bytes(k, kind) * pages_of(k, self.limits) for k in kv]
        self.pages = anonymous(sum(sizes))
        layers, at = np.zeros(max((k.layer for k in kv), default=-1) + 1, KV_LAYER), 0
        self.regions: dict[int, np.ndarray] = {}
        for k, size in zip(kv, sizes, strict=True):
            self.regions[k.layer] = self.pages[at : at + size].reshape(pages_of(k, self.limits), -1)
            layers[k.layer] = (
                self.pages.ctypes.data + at, page_bytes(k, kind), k.local, kind, k.kv_heads, k.key_dim, k.head_dim, 0
            )  # fmt: skip
            at += size
        self.local = {k.layer: k.local for k in kv}
        return layers

    def _weight(self, number: int) -> tuple:
        w = self.packed.weights[number]
        t = self.tensors[w.tensor]
        codes = {OpCode(op.code) for op in self.plan.ops if w in op.weights}
        rows, cols = (t.shape[-2] if len(t.shape) > 1 else 1), t.shape[-1]
        count, kind, data = t.shape[0] if len(t.shape) == 3 else 1, t.type, t.data
        if not codes & set(MATRICES) and kind != TensorType.F32:
            data, kind = dequantize(t.data, t.type).view(np.uint8), TensorType.F32
            self.keep.append(data)
        if OpCode.EMBED_ROWS in codes:
            size = row_bytes(kind, cols)
            cache = lib.row_cache_new(t.fileno, t.offset, size, rows, _slots(t, self.limits))
            if cache == ffi.NULL:
                raise Gemma4qError("out_of_memory", f"no memory for rows of {t.name}")
            self.caches.append(ffi.gc(cache, lib.row_cache_free))
            return (int(ffi.cast("uintptr_t", cache)), 0, kind, Layout.ROWS, rows, cols, 1, 0)
        first = w.first * row_bytes(kind, cols)
        return (data.ctypes.data + first, data.nbytes - first, kind, Layout.NATIVE, w.rows or rows, cols, count, 0)

    def _guard_mappings(self) -> None:
        """A file that shrinks while it is mapped must not kill the process."""
        for base in {id(b): b for b in (_mapping(t.data) for t in self.tensors.values()) if b is not None}.values():
            self.slots.append(lib.mapping_register(base.ctypes.data, base.nbytes))

    def fetch(self, fits: bool) -> None:
        if fits:
            self.fetching = threading.Thread(target=self._fetch_all, daemon=True)
            self.fetching.start()
        else:
            lib.session_fetch_chosen(self.session)

    def _fetch_all(self) -> None:
        names = dict.fromkeys(w.tensor for op in self.plan.ops if op.code in PRODUCTS for w in op.weights)
        for bring in (lib.mapping_fetch, lib.mapping_touch):
            for data in (self.tensors[name].data for name in names):
                for piece in (data[at : at + FETCH_BYTES] for at in range(0, data.nbytes, FETCH_BYTES)):
                    if self.session is None:
                        return
                    bring(piece.ctypes.data, piece.nbytes)

    def _results(self) -> None:
        rows = self.limits.wanted
        self.top_ids, self.top_values = np.zeros((rows, TOP), np.int32), np.zeros((rows, TOP), np.float32)
        self.logsumexp = np.zeros(rows, np.float32)
        self.result = np.zeros(1, RESULT)
        self.result[0]["top"] = TOP
        for name in ("top_ids", "top_values", "logsumexp"):
            self.result[0][name] = getattr(self, name).ctypes.data

    @cached_property
    def bytes(self) -> dict[str, int]:
        rows = sum(_cache_bytes(self.tensors[name], self.limits) for name in _tables(self.plan))
        results = self.limits.wanted * (8 * TOP + 4)
        sizes = {"kv": self.pages.nbytes, "arena": self.arena.nbytes, "scratch": self.scratch.nbytes}
        return sizes | {"rows": rows, "results": results}

    def run(self, batch: Batch, first_op: int = 0, end_op: int | None = None) -> StepResult:
        self.cancel_flag[0] = 0
        self.last = batch
        result = ffi.cast("run_result *", self.result.ctypes.data)
        lib.session_run(
            self.session, address(batch.memory), result, ffi.cast("int32_t *", self.cancel_flag.ctypes.data),
            first_op, -1 if end_op is None else end_op,
        )  # fmt: skip
        status = Status(result.status)
        if any(slot >= 0 and lib.mapping_poisoned(slot) for slot in self.slots):
            status = Status.MODEL_CHANGED
        wanted = int(batch.header["wanted"])
        return StepResult(
            status, result.bad_row, self._view(self.plan.logits, wanted), self._view(self.plan.hidden, wanted),
            self.top_ids[:wanted], self.top_values[:wanted], self.logsumexp[:wanted], result.barriers,
            result.weight_bytes,
        )  # fmt: skip

    def _view(self, buffer, rows: int) -> np.ndarray:
        entry = self.packed.buffers[self.packed.numbers[buffer]]
        kind = {BufferType.F32: np.float32, BufferType.I32: np.int32, BufferType.A8: np.uint8}[buffer.type]
        at, stride = int(entry["offset"]), int(entry["stride"])
        return self.arena[at : at + rows * stride].view(kind).reshape(rows, stride // np.dtype(kind).itemsize)

    def read(self, buffer: str) -> np.ndarray:
        """A copy of a buffer's rows as the last run left them; only true while nothing has taken its place."""
        b = next(b for b in self.packed.numbers if b.name == buffer)
        rows = {0: self.limits.rows, 1: self.limits.wanted, 2: 1}[b.space]
        x = self._view(b, rows)
        return self._rounded(b, x) if b.type == BufferType.A8 else x.copy()

    def _rounded(self, buffer, x: np.ndarray) -> np.ndarray:
        """What the bytes of an A8 buffer stand for."""
        prompt = int(self.last.header["prompt_rows"]) if buffer.row_bytes > a8_bytes(buffer.width) else 0
        if buffer.space == Space.WANTED:
            prompt = int((self.last.wanted[: self.last.header["wanted"]] < prompt).sum())
        blocks = x[prompt:, : a8_bytes(buffer.width)].view(dtype("block_a8"))
        values = (blocks["d"][..., None] * blocks["qs"]).reshape(len(x) - prompt, -1)
        if not prompt:
            return values
        # Where rows have room for it, those of prompts are bf16.
        return np.concatenate([dequantize(x[:prompt, : 2 * buffer.width], TensorType.BF16), values])

    def profile(self, on: bool) -> np.ndarray:
        """Nanoseconds of each op, summed over steps from now on; the array is live."""
        self.times[:] = 0
        self.result[0]["op_nanoseconds"] = self.times.ctypes.data if on else 0
        return self.times

    def kernels(self) -> dict[str, str]:
        names = {}
        for op in self.packed.plan.ops:
            kind = self.tensors[op.weights[0].tensor].type if op.weights and op.code in MATRICES else -1
            names[op.name] = ffi.string(lib.kernel_name(self.isa, op.code, kind)).decode()
        return names

    def cancel(self) -> None:
        self.cancel_flag[0] = 1

    def clear_pages(self, local: bool, pages: np.ndarray) -> None:
        for layer, region in self.regions.items():
            if self.local[layer] == local:
                region[pages] = 0

    def copy_page(self, local: bool, source: int, target: int) -> None:
        for layer, region in self.regions.items():
            if self.local[layer] == local:
                region[target] = region[source]

    def close(self) -> None:
        if self.session is not None:
            session, self.session = self.session, None
            if self.fetching:
                self.fetching.join()
            lib.session_free(session)
            for slot in self.slots:
                lib.mapping_release(slot)
            self.caches.clear()
            ffi.release(self.pool)


def _mapping(data: np.ndarray) -> np.ndarray | None:
    """The array over the whole mapped file that a tensor's bytes are a part of."""
    base = data
    while isinstance(base.base, np.ndarray):
        base = base.base
    return base if isinstance(base.base, mmap.mmap | memoryview) else None


def bandwidth(threads: int, count: int = 1 << 28) -> float:
    """Bytes a second that `threads` threads read from memory: the best of five readings of `count` bytes."""
    pool = ffi.gc(lib.pool_new(threads), lib.pool_free)
    data = anonymous(count)
    return max(lib.read_bandwidth(pool, address(data), count) for _ in range(5))


BACKEND = Native()
