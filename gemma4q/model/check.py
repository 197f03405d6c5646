"""Looks for every fault of a model file: all that loading would refuse, and numbers that no model should hold.

Loading stops at the first fault and looks at no weight; this reads every byte, in bounded memory, and goes on as long
as what it found so far makes sense.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..abi import BLOCKS, TensorType, dtype
from ..errors import Gemma4qError
from ..gguf.finite import broken, fields
from ..gguf.reader import GGUF, Tensor, open_gguf
from ..gguf.strings import StringArray
from ..gguf.types import type_name
from . import config as geometry
from . import weights
from .vocabulary import PREFIX, duplicate_tokens, vocabulary_faults

CHUNK = 4 << 20  # bytes read at once
MOST_OF_A_SORT = 20  # findings shown of one source


@dataclass(frozen=True)
class Finding:
    """One line of a report. `level` is error (the model cannot run rightly), warning or note."""

    level: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.kind}: {self.message}"


def check(path: str | os.PathLike, progress: Callable[[int, int], None] | None = None) -> Iterator[Finding]:
    """Yields what is wrong with a model file, then what is odd about it; nothing for a sound one.

    `progress` is called with the bytes scanned and the bytes there are to scan.
    """
    try:
        gguf = open_gguf(path)
    except Gemma4qError as error:
        yield _error(error)
        return
    config, faults = geometry.examine(gguf)
    yield from _errors(faults)
    if not any(fault.kind == "bad_arch" for fault in faults):
        yield from _errors(vocabulary_faults(gguf))
        if isinstance(tokens := gguf.metadata.get(PREFIX + "tokens"), StringArray):
            yield from _errors(duplicate_tokens(tokens))
    if config is not None:
        bound, faults = weights.examine(gguf, config)
        yield from _errors(faults)
        for what, names in (("keys and values of a layer that borrows them", bound.dead), ("unknown", bound.ignored)):
            if names:
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                yield Finding("note", "unused_tensor", f"{len(names)} tensors are not used ({what}): {shown}")
    yield from _numbers(gguf, progress or (lambda done, total: None))
    if gguf.changed():
        yield Finding("error", "model_changed", f"{gguf.path} was written to while it was read")


def _error(error: Gemma4qError) -> Finding:
    return Finding("error", error.kind, error.message)


def _errors(faults: Iterable[Gemma4qError]) -> Iterator[Finding]:
    faults = iter(faults)
    yield from map(_error, islice(faults, MOST_OF_A_SORT))
    if more := sum(1 for _ in faults):
        yield Finding("note", "more", f"{more} more faults of this sort")


def _numbers(gguf: GGUF, progress: Callable[[int, int], None]) -> Iterator[Finding]:
    """Tensors with a NaN or an infinity, and matrices of nothing but zeros."""
    total, done = sum(tensor.nbytes for tensor in gguf.tensors.values()), 0
    progress(0, total)
    for tensor in gguf.tensors.values():
        bad, zero = 0, True
        if not tensor.readable:
            unread = f"{tensor.name} is {type_name(tensor.type)}: its values are not looked at"
            yield Finding("note", "unread_tensor", unread)
        for chunk in _chunks(gguf, tensor):
            if chunk is None:
                yield Finding("error", "model_changed", f"{tensor.name}: the file became shorter while it was read")
                return
            if tensor.readable:
                bad += sum(int(of_scale.sum()) for of_scale in broken(chunk, tensor.type))
                zero = zero and _all_zero(chunk, tensor.type)
            done += len(chunk)
            progress(done, total)
        if bad:
            yield Finding("error", "numeric", f"{tensor.name} holds {bad:,} NaNs or infinities")
        elif tensor.readable and zero and len(tensor.shape) > 1:
            yield Finding("warning", "all_zero", f"{tensor.name} holds nothing but zeros")


def _chunks(gguf: GGUF, tensor: Tensor) -> Iterator[np.ndarray | None]:
    """The tensor's bytes in whole blocks, read, since mapped pages would fill memory; None where they end early."""
    block = BLOCKS[tensor.type][1] if tensor.readable else 1
    buffer, file = np.empty(CHUNK // block * block, np.uint8), gguf.files[tensor.file].fileno
    for start in range(0, tensor.nbytes, len(buffer)):
        chunk = buffer[: min(len(buffer), tensor.nbytes - start)]
        yield chunk if os.preadv(file, [chunk], tensor.offset + start) == len(chunk) else None


def _all_zero(chunk: np.ndarray, tensor_type: TensorType) -> bool:
    if tensor_type == TensorType.MXFP4:
        return not (chunk.view(dtype("block_mxfp4"))["qs"] & 0x77).any()
    sign = {4: 0x7FFFFFFF, 2: 0x7FFF}
    return not any((field & sign[field.itemsize]).any() for field, _ in fields(chunk, tensor_type))
