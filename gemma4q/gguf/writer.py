"""Writes GGUF files, tensor by tensor, so that a model of many gigabytes needs little memory.

The inverse of the reader: `write_gguf(path, g.metadata, tensors, g.types)` copies a file's metadata unchanged. Tensors
are laid out in the given order without holes. The file appears under its name only when it is complete.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import Gemma4qError
from .reader import Tensor, Value
from .strings import StringArray
from .types import SCALARS, TENSOR_TYPES, ValueType, type_name

Types = tuple[ValueType, ...]


@dataclass(frozen=True)
class TensorData:
    """A tensor to write. `shape` has the slowest dimension first; `chunks` yields its bytes, in GGUF's block format."""

    name: str
    type: int
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview | np.ndarray]]

    @classmethod
    def of(cls, name: str, type: int, shape: Sequence[int], data: np.ndarray) -> "TensorData":
        """From an array whose bytes are the tensor's."""
        return cls(name, type, tuple(shape), lambda: (data,))

    @classmethod
    def copy(cls, tensor: Tensor) -> "TensorData":
        """From a tensor that was read."""
        return cls.of(tensor.name, tensor.type, tensor.shape, tensor.data)

    @property
    def nbytes(self) -> int:
        _, values, block_bytes = TENSOR_TYPES[self.type]
        if self.shape[-1] % values:
            fault = f"{self.name}: rows of {self.shape[-1]} values are not whole blocks of {type_name(self.type)}"
            raise Gemma4qError("bad_block_size", fault)
        return math.prod(self.shape) // values * block_bytes


def write_gguf(
    path: str | os.PathLike,
    metadata: Mapping[str, Value | Sequence[str | bytes]],
    tensors: Sequence[TensorData],
    types: Mapping[str, Types] | None = None,
) -> None:
    """Writes metadata and tensors. `types` overrides what `natural_type` makes of a value.

    The alignment is metadata's `general.alignment`, or 32. Raises bad_tensor_data when a tensor's chunks are not as
    long as its shape and type say; then, as after any error, no file is left.
    """
    path, alignment = Path(path), metadata.get("general.alignment", 32)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(header(metadata, tensors, types or {}, alignment))
            write_tensors(file, tensors, alignment)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def header(
    metadata: Mapping[str, Value | Sequence[str | bytes]],
    tensors: Sequence[TensorData],
    types: Mapping[str, Types],
    alignment: int,
) -> bytes:
    """All that stands before the tensors' data, padding included."""
    out = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out.append(_string(key) + _value(value, types.get(key) or natural_type(value)))
    offset = 0
    for tensor in tensors:
        out.append(_info(tensor, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    whole = b"".join(out)
    return whole + bytes(-len(whole) % alignment)


def write_tensors(file: BinaryIO, tensors: Iterable[TensorData], alignment: int) -> None:
    """Writes tensors' data at the file's position, which is aligned and stays so. Raises bad_tensor_data."""
    for tensor in tensors:
        start = file.tell()
        for chunk in tensor.chunks():
            file.write(np.ascontiguousarray(chunk).data if isinstance(chunk, np.ndarray) else chunk)
        if (written := file.tell() - start) != tensor.nbytes:
            raise Gemma4qError("bad_tensor_data", f"{tensor.name}: {written} bytes given, {tensor.nbytes} needed")
        file.write(bytes(-file.tell() % alignment))


def natural_type(value: Value | Sequence[str | bytes]) -> Types:
    """The type a value is written as unless told otherwise: an int as U32, a float as F32, an array as its dtype."""
    if isinstance(value, np.ndarray):
        return ValueType.ARRAY, next(t for t, dtype in SCALARS.items() if dtype == value.dtype)
    for kind, value_type in ((bool, ValueType.BOOL), (int, ValueType.U32), (float, ValueType.F32)):
        if isinstance(value, kind):
            return (value_type,)
    return (ValueType.STRING,) if isinstance(value, str) else (ValueType.ARRAY, ValueType.STRING)


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value | Sequence[str | bytes], types: Types) -> bytes:
    head = struct.pack("<I", types[0])
    if types[0] == ValueType.STRING:
        return head + _string(value)
    if types[0] != ValueType.ARRAY:
        return head + np.array(value, SCALARS[types[0]]).tobytes()
    head += struct.pack("<IQ", types[1], len(value))
    if types[1] != ValueType.STRING:
        return head + np.asarray(value, SCALARS[types[1]]).tobytes()
    return head + (value.data.tobytes() if isinstance(value, StringArray) else b"".join(map(_string, value)))


def _info(tensor: TensorData, offset: int) -> bytes:
    dims = len(tensor.shape)
    return _string(tensor.name) + struct.pack(f"<I{dims}QIQ", dims, *tensor.shape[::-1], tensor.type, offset)
