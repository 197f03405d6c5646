"""Tensors on their way from one file to another: read, rounded and checked in pieces, on every core.

Owns the pieces and what can be wrong with their numbers. All tensors are one stream in the order in which they are
written, so that no core waits for the last piece of a tensor; of none more than a few pieces are in memory.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from ..abi import BLOCKS, row_bytes
from ..errors import Gemma4qError
from ..gguf.finite import first_broken
from ..gguf.pieces import ahead
from ..gguf.reader import GGUF, Tensor
from ..gguf.types import type_name
from ..gguf.writer import TensorData
from . import grid
from .encode import Encoder, cpus

PIECE = 1 << 19  # values rounded at once
COPIED = 4 << 20  # bytes of a tensor that stays as it is
RANGES = ("put_min", "put_max")  # of an encoder's layer that clips: may be infinite
AHEAD = 4  # pieces a thread, being made while one is written


class Importance(Protocol):
    """How much each column of a matrix matters: float32 [matrices, cols] by tensor's name, None for all alike."""

    def of(self, name: str, cols: int) -> np.ndarray | None: ...


Job = Callable[[Encoder], np.ndarray]


class Stream:
    """The tensors of a file as other types have them, to be written once and in their order; then close it."""

    def __init__(
        self,
        gguf: GGUF,
        tensors: Sequence[Tensor],
        types: Mapping[str, int],
        importance: Importance | None,
        threads: int | None,
        on_grid: Collection[str] = (),
    ):
        """`threads`: None for one on each CPU we may run on; `on_grid`: names of those whose grid Q4_0 keeps.

        Raises no_native.
        """
        self.on_grid = on_grid
        self.gguf, self.tensors, self.types, self.importance = gguf, tensors, types, importance
        count = threads or cpus()
        self.encoders: SimpleQueue[Encoder] = SimpleQueue()
        for _ in range(count):
            self.encoders.put(Encoder(1))
        self.pool = ThreadPoolExecutor(count)
        self.made = ahead(self.pool, self._work, self._jobs(), AHEAD * count)

    def data(self) -> list[TensorData]:
        """The tensors to write.

        While their chunks are read, raises numeric for a value that is not finite or that its type does not hold,
        naming tensor and index, and model_changed.
        """

        def chunks(count: int) -> Iterator[np.ndarray]:
            yield from islice(self.made, count)
            if self.gguf.changed():
                raise Gemma4qError("model_changed", f"{self.gguf.path} was written to while it was read")

        return [
            TensorData(t.name, self.types[t.name], t.shape, partial(chunks, len(self._pieces(t)))) for t in self.tensors
        ]

    def close(self) -> None:
        self.made.close()
        self.pool.shutdown()

    def _pieces(self, tensor: Tensor) -> list[tuple[int, int]]:
        """Where each piece begins and how long it is: in rows, none of two matrices; in bytes of what stays."""
        if self.types[tensor.name] == tensor.type:
            block = BLOCKS[tensor.type][1] if tensor.readable else 1
            return _cut(tensor.nbytes, COPIED // block * block)
        rows, cols = (1, *tensor.shape)[-2:]
        starts = range(0, math.prod(tensor.shape[:-1]), rows)
        return [(first + at, count) for first in starts for at, count in _cut(rows, max(1, PIECE // cols))]

    def _jobs(self) -> Iterator[Job]:
        for tensor in self.tensors:
            if self.types[tensor.name] == tensor.type:
                yield from (partial(self._copied, tensor, *piece) for piece in self._pieces(tensor))
                continue
            weights = self.importance.of(tensor.name, tensor.shape[-1]) if self.importance else None
            for row, count in self._pieces(tensor):
                own = None if weights is None else weights[row // tensor.shape[-2]]
                yield partial(self._rounded, tensor, row, count, own)

    def _work(self, job: Job) -> np.ndarray:
        encoder = self.encoders.get()
        try:
            return job(encoder)
        finally:
            self.encoders.put(encoder)

    def _read(self, tensor: Tensor, start: int, count: int) -> np.ndarray:
        return self.gguf.files[tensor.file].read(tensor.offset + start, count)

    def _copied(self, tensor: Tensor, start: int, count: int, _: Encoder) -> np.ndarray:
        data = self._read(tensor, start, count)
        checked = tensor.readable and not tensor.name.endswith(RANGES)
        if checked and (at := first_broken(data, tensor.type)) is not None:
            values, size = BLOCKS[tensor.type]
            what = "NaN or infinity" if values == 1 else "a block with NaN or infinity as its scale"
            raise Gemma4qError("numeric", f"{_where(tensor, start // size * values + at)}: {what}")
        return data

    def _rounded(
        self, tensor: Tensor, row: int, count: int, weights: np.ndarray | None, encoder: Encoder
    ) -> np.ndarray:
        cols, size, type = tensor.shape[-1], row_bytes(tensor.type, tensor.shape[-1]), self.types[tensor.name]
        values = encoder.decode(self._read(tensor, row * size, count * size), tensor.type).reshape(count, cols)
        try:
            data = encoder.encode(values, type, weights)
            if tensor.name in self.on_grid:
                grid.laid(data, values, tensor.type)
            sound = first_broken(data.reshape(-1), type) is None
        except Gemma4qError as error:
            sound = False
            if error.kind != "numeric":
                raise
        if not sound:
            raise _fault(tensor, values, row, type)
        return data


def _cut(size: int, most: int) -> list[tuple[int, int]]:
    return [(at, min(most, size - at)) for at in range(0, size, most)]


def _where(tensor: Tensor, position: int) -> str:
    """A value as people find it: `blk.0.attn_q.weight[12, 345]`."""
    return f"{tensor.name}{[int(i) for i in np.unravel_index(position, tensor.shape)]}"


def _fault(tensor: Tensor, values: np.ndarray, row: int, type: int) -> Gemma4qError:
    """What is wrong with values of which none can be stored: float32 [rows, cols] from a tensor's row on."""
    bad = ~np.isfinite(values)
    if bad.any():
        at = int(bad.argmax())
        return Gemma4qError(
            "numeric", f"{_where(tensor, row * values.shape[1] + at)} is {values.flat[at]}: the model is damaged"
        )
    at = int(np.abs(values).argmax())
    where = _where(tensor, row * values.shape[1] + at)
    return Gemma4qError("numeric", f"{where} is {values.flat[at]:g}, too large for {type_name(type)}: BF16 holds it")
