"""A checkpoint's tensors as GGUF stores them: which type each gets, and its values read, checked and rounded in pieces.

Types are those of llama.cpp's converter, and rounding is gguf.quants', so that the bytes are the same. Owns no names
and no shapes; at no time more than a few pieces are in memory, whatever the tensor's size.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import numpy as np

from ..abi import TensorType
from ..errors import Gemma4qError
from ..gguf.pieces import ahead
from ..gguf.quants import quantize
from ..gguf.writer import TensorData
from .names import CLIPS
from .safetensors import Stored

OUTTYPES = {"f32": TensorType.F32, "bf16": TensorType.BF16, "f16": TensorType.F16, "q8_0": TensorType.Q8_0}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type, as llama.cpp numbers recipes
FLOATS = {"F64": None, "F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
I32 = 26  # ggml's number; nothing computes with it
PIECE = 1 << 17  # values read at once: what quantising needs of them stays in a core's cache
AHEAD = 8  # pieces being packed while one is written

Change = Callable[[np.ndarray], np.ndarray]


def stored_type(name: str, shape: tuple[int, ...], outtype: TensorType, forced: TensorType | None = None) -> TensorType:
    """The type of a tensor: vectors, norms, routers and what is no weight stay F32; odd rows cannot be Q8_0."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return TensorType.F32
    if forced is None and (name.endswith("ffn_gate_inp.weight") or not name.endswith(".weight")):
        return TensorType.F32
    type = outtype if forced is None else forced
    return TensorType.F16 if type == TensorType.Q8_0 and shape[-1] % 32 else type


def own_outtype(tensors: list[Stored]) -> str:
    """What `auto` means: the 16-bit type of the first matrix that has one; f16 where none has."""
    names = {"BF16": "bf16", "F16": "f16"}
    return next((names[t.dtype] for t in tensors if len(t.shape) > 1 and t.dtype in names), "f16")


def packed(
    name: str, stored: Stored, shape: tuple[int, ...], type: TensorType, pool: Executor, change: Change | None = None
) -> TensorData:
    """A tensor to write, of which `shape` may be the first rows only.

    `change` makes of the whole tensor (float32, as stored) one of `shape`; for small ones. While its chunks are read,
    raises numeric for a value that is not finite or does not fit, truncated when a file became shorter.
    """
    if stored.dtype not in FLOATS:
        fault = f"{stored.name} holds {stored.dtype}; want {', '.join(FLOATS)}: convert the original checkpoint"
        raise Gemma4qError("bad_dtype", fault)
    size = int(np.prod(shape))

    def changed() -> Iterator[np.ndarray]:
        values = change(_floats(stored, stored.read(0, stored.size)))
        yield _rounded(stored.name, np.ascontiguousarray(values).reshape(shape), type)

    def pieces() -> Iterator[np.ndarray]:
        starts = range(0, size, PIECE)
        return ahead(pool, lambda start: _piece(stored, start, min(PIECE, size - start), type), starts, AHEAD)

    return TensorData(name, type, shape, changed if change else pieces)


def ordering(name: str, stored: Stored, vocab: int) -> TensorData:
    """The permutation of tokens of a clustered head as I32 [vocab]. Raises bad_dtype, shape_mismatch or numeric."""
    if stored.dtype not in ("I64", "I32"):
        raise Gemma4qError("bad_dtype", f"{stored.name} holds {stored.dtype}; want I64")
    if stored.shape != (vocab,):
        raise Gemma4qError("shape_mismatch", f"{stored.name} has shape {list(stored.shape)}; want [{vocab}]")

    def chunks() -> Iterator[np.ndarray]:
        values = stored.read(0, vocab)
        if not np.array_equal(np.sort(values), np.arange(vocab)):
            raise Gemma4qError("numeric", f"{stored.name} does not hold each of 0 to {vocab - 1} once")
        yield values.astype("<i4")

    return TensorData(name, I32, (vocab,), chunks)


def _piece(stored: Stored, start: int, count: int, type: TensorType) -> np.ndarray:
    raw = stored.read(start, count)
    if FLOATS[stored.dtype] == type:  # as it is, once it is known to be finite
        exponent = {TensorType.F32: 0x7F800000, TensorType.F16: 0x7C00, TensorType.BF16: 0x7F80}[type]
        bits = raw.view(f"<u{raw.itemsize}")
        if (bits & exponent == exponent).any():
            _check(stored.name, _floats(stored, raw), start)
        return raw
    return _rounded(stored.name, _floats(stored, raw), type, start)


def _floats(stored: Stored, raw: np.ndarray) -> np.ndarray:
    """float32, in the tensor's shape where `raw` is all of it."""
    if stored.dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    with np.errstate(over="ignore"):
        values = raw.astype("<f4", copy=False)
    return values.reshape(stored.shape) if values.size == stored.size else values


def _rounded(name: str, values: np.ndarray, type: TensorType, start: int = 0) -> np.ndarray:
    """Values in a type's bytes."""
    _check(name, values, start)
    largest = {TensorType.F16: 65520.0, TensorType.Q8_0: 65520.0 * 127}.get(type)
    if largest and (over := np.abs(values) >= np.float32(largest)).any():
        value = values[over].flat[0]
        raise Gemma4qError("numeric", f"{name} holds {value:g}, too large for {type.name}: use --outtype bf16")
    if type == TensorType.Q8_0:
        values = values.reshape(-1, 32)
    return quantize(values, type)


def _check(name: str, values: np.ndarray, start: int) -> None:
    """Raises numeric where a value is not finite; the range of a clipped layer may be infinite."""
    bad = np.isnan(values) if name.endswith(CLIPS) else ~np.isfinite(values)
    if bad.any():
        first = int(np.argmax(bad.reshape(-1)))
        where = f"the first is {values.reshape(-1)[first]} at position {start + first}"
        raise Gemma4qError("numeric", f"{name} holds NaNs or infinities: {where}")
