"""What kernels and forward passes are tested with: shapes, blocks of random bits, memory with fences, runs of a model.

Owns no assertion but that nothing was written or read beyond an end; leaves the arithmetic expected to `twin`.
"""

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma4q import backends
from gemma4q.abi import BLOCKS, RowFlag, TensorType, address, dtype, ffi, lib, row_bytes
from gemma4q.backends import StepResult
from gemma4q.backends.native import WEIGHT, isas
from gemma4q.gguf.quants import quantize
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.model import open_model
from gemma4q.model.forward import build
from gemma4q.plan.batch import Batch, Limits, Step
from gemma4q.plan.plan import Plan

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDENS = ["e2b-like", "e4b-like", "moe-like", "dense-like", "unified-like"]
KINDS = list(BLOCKS)
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
QUANTS = [kind for kind in KINDS if kind not in FLOATS]
NAMES = [ffi.string(lib.isa_name(i)).decode() for i in range(lib.isa_count())]
ISAS = isas()

TOKENS = (1, 2, 4, 5, 12, 13, 16, 17, 61)
ROWS = (1, 15, 16, 17, 63, 64, 65, 100)
# Whole blocks; the last of each is longer than the stretch of columns that a panel holds.
COLS = {1: (32, 64, 96, 256, 704, 2112), 32: (32, 64, 96, 256, 704, 2112), 256: (256, 512, 2304)}

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def fenced(size: int, start: int | None = None) -> np.ndarray:
    """`size` zero bytes between two pages that must not be touched: at the end, or from byte `start` on."""
    page = mmap.PAGESIZE
    room = -(-(size + (start or 0)) // page) * page
    block = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for fence in (block.ctypes.data, block.ctypes.data + page + room):
        if _mprotect(fence, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    first = page + (room - size if start is None else start)
    return block[first : first + size]


def fence(array: np.ndarray, start: int | None = None) -> np.ndarray:
    """A copy of an array in fenced memory."""
    copy = fenced(array.nbytes, start).view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def blocks(kind: TensorType, rows: int, cols: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes]: every code there is, under scales that are small numbers of either sign."""
    shape = rows, row_bytes(kind, cols)
    if kind in FLOATS:
        return quantize(random.standard_normal((rows, cols)).astype("f4"), kind)
    data = random.integers(0, 256, shape, np.uint8)
    form = dtype(f"block_{kind.name.lower()}")
    view = data.reshape(-1).view(form)
    for name in {"d", "m", "dmin"} & set(form.names):
        view[name] = random.normal(0, 0.01, len(view))
    if kind == TensorType.MXFP4:
        view["e"] = random.integers(118, 128, len(view))
    return data


@dataclass(frozen=True)
class Matmul:
    """matmul_once on one instruction set; its scratch and its results stand between fences.

    prompt: of the tokens so many are prompt rows, which is seen only where there are tiles.
    """

    isa: str
    threads: int = 1
    prompt: int = 0

    def __call__(self, kind: TensorType, data: np.ndarray, cols: int, x: np.ndarray) -> np.ndarray:
        """[tokens, rows] of x [tokens, cols] and weights uint8 [rows, bytes]."""
        tokens, rows = len(x), len(data)
        entry = np.zeros(1, WEIGHT)
        entry[0] = (data.ctypes.data, data.nbytes, kind, 0, rows, cols, 1, 0)
        pool = ffi.gc(lib.pool_new(self.threads), lib.pool_free)
        scratch = fenced(lib.scratch_bytes(self.threads))
        before, y = (fenced(4 * tokens * rows + 64, start).view("f4") for start in (None, 0))
        for out, at in ((before, 16), (y, 0)):
            out[:] = 12345.0
            status = lib.matmul_once(
                pool, NAMES.index(self.isa), ffi.cast("weight *", entry.ctypes.data), 1,
                ffi.cast("float *", x.ctypes.data), ffi.cast("float *", out[at:].ctypes.data), tokens,
                self.prompt, address(scratch),
            )  # fmt: skip
            assert status == 0
        assert (before[:16] == 12345.0).all() and (y[tokens * rows :] == 12345.0).all(), "written beyond the result"
        np.testing.assert_array_equal(bits(before[16:]), bits(y[: tokens * rows]))
        return y[: tokens * rows].reshape(tokens, rows).copy()


def bits(x: np.ndarray) -> np.ndarray:
    """float32 as its bits, all NaNs alike."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.ascontiguousarray(x, "f4").view("u4"))


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))


# -- Models -----------------------------------------------------------------------------------------------------------

LIMITS = Limits(rows=128, wanted=128, sequences=5, context=640, global_pages=24, local_pages=24)
LOGITS = int(RowFlag.WANT_LOGITS)


@dataclass(frozen=True)
class Model:
    """A plan and the tensors it is about; width and vocab are those of a batch."""

    plan: Plan
    tensors: Mapping
    width: int
    vocab: int
    keep: object = None  # whatever holds the tensors' file open

    @classmethod
    def open(cls, path: Path) -> "Model":
        gguf, config, weights = open_model(path)
        return cls(build(config, weights.shapes), weights.tensors, config.width, config.vocab, (gguf, config))

    @property
    def config(self):
        return self.keep[1]


def quantized(source: Path, target: Path, kind: TensorType) -> Path:
    """A copy of a model file whose matrices are of another type, where their rows are whole blocks."""
    gguf = open_model(source)[0]
    tensors = []
    for t in gguf.tensors.values():
        if len(t.shape) > 1 and t.shape[-1] % BLOCKS[kind][0] == 0 and t.type == TensorType.F32:
            data = quantize(t.data.view("f4").reshape(t.shape), kind)
            tensors.append(TensorData.of(t.name, kind, t.shape, data.reshape(-1)))
        else:
            tensors.append(TensorData.copy(t))
    write_gguf(target, gguf.metadata, tensors, gguf.types)
    return target


def step(tokens, start=0, pages=range(10), local=None, **more) -> Step:
    """Rows of one sequence, by default at pages 0, 1, ... of either kind, every row's logits wanted."""
    pages = np.array(pages, np.int32)
    more = {"want": np.full(len(tokens), LOGITS | RowFlag.WANT_TOP)} | more
    return Step(np.asarray(tokens), start, pages, pages if local is None else np.array(local, np.int32), **more)


class Runner:
    """A model loaded on one backend with pages of its own, which hold NaN until something is stored."""

    def __init__(self, model: Model, backend="native", isa=None, threads=1, kv=TensorType.F32, limits=LIMITS):
        backend = backends.get(backend) if isinstance(backend, str) else backend
        self.session = backend.load(model.plan, model.tensors, limits, kv, threads, isa)
        self.batch = Batch(limits, model.width, model.vocab)
        if isinstance(pages := getattr(self.session, "pages", None), np.ndarray):
            pages[:] = 0xFF

    def run(self, *steps: Step) -> StepResult:
        """The result in arrays of its own, its rows in the order of `steps`."""
        order = self.batch.fill(steps)
        r = self.session.run(self.batch)
        back = sorted(range(len(order)), key=order.__getitem__)
        fields = ("logits", "hidden", "top_ids", "top_values", "logsumexp")
        picked = {name: getattr(r, name)[back].copy() if len(getattr(r, name)) else getattr(r, name) for name in fields}
        return replace(r, **picked)

    def logits(self, *steps: Step) -> np.ndarray:
        return self.run(*steps).logits
