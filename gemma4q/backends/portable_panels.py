"""Matrices of every tensor type as the panels that `portable_kernels` multiplies: how large, made how, multiplied how.

A panel is LANES rows side by side, column by column; block formats become values of 8 bits, or 4 where those hold them,
with float32 scales and minima, types of floats float32 values. A matrix is read once from the mapped file, a few panels
at a time, by all threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..abi import BLOCKS, TensorType
from ..gguf.quants import FORMATS, Planes, dequantize, planes
from .portable_kernels import LANES, ROWS, STEP, matmul, matvec

NIBBLES = (TensorType.Q4_0, TensorType.Q4_1, TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K)  # 16 values in a row
AT_A_TIME = 8  # panels repacked in one go
WORTH_SHARING = 1 << 21  # multiplications, 0.1 ms of one thread, below which waking a thread costs more than it brings


class Crew:
    """Threads that do shares of one function; the caller does the first."""

    def __init__(self, threads: int):
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def work(self, function: Callable, *arguments, shared: bool = True) -> None:
        """function(share, shares, *arguments) for every share."""
        shares = self.threads if shared else 1
        others = [self.pool.submit(function, i, shares, *arguments) for i in range(1, shares)]
        function(0, shares, *arguments)
        for other in others:
            other.result()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()


@dataclass(frozen=True)
class Panels:
    """`count` matrices of `rows` rows.

    q [count, blocks, cols, LANES] int8 or float32, or [count, blocks, cols / 2, LANES] uint8, two columns in a byte;
    scale [count, blocks, cols / group, LANES]; minimum likewise, or no blocks; weight = scale * q + minimum. Rows are
    padded to LANES and columns to STEP with zeros.
    """

    q: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    group: int
    rows: int

    @staticmethod
    def shapes(shape: tuple[int, ...], tensor_type: TensorType) -> tuple[tuple, tuple, tuple, int]:
        """Shapes of q, scale and minimum, and the group, for a tensor [..., rows, cols]."""
        *counts, rows, cols = shape
        head = (int(np.prod(counts)), -(-rows // LANES))
        if tensor_type not in FORMATS:
            cols = -(-cols // STEP) * STEP
            return (*head, cols, LANES), (*head, 1, LANES), (head[0], 0, 1, LANES), cols
        group = FORMATS[tensor_type].group
        some = planes(np.zeros(BLOCKS[tensor_type][1], np.uint8), tensor_type).minimum is not None
        groups = (cols // group, LANES)
        q = (*head, cols // 2 if tensor_type in NIBBLES else cols, LANES)
        return q, (*head, *groups), (head[0], head[1] * some, *groups), group

    @classmethod
    def bytes(cls, shape: tuple[int, ...], tensor_type: TensorType) -> int:
        q, scale, minimum, _ = cls.shapes(shape, tensor_type)
        return int(np.prod(q)) * kind_of(tensor_type).itemsize + 4 * int(np.prod(scale)) + 4 * int(np.prod(minimum))

    @property
    def cols(self) -> int:
        return self.scale.shape[2] * self.group

    @property
    def matrix_bytes(self) -> int:
        return (self.q.nbytes + self.scale.nbytes + self.minimum.nbytes) // len(self.q)


def kind_of(tensor_type: TensorType) -> np.dtype:
    """Of the values q of its panels."""
    whole = np.uint8 if tensor_type in NIBBLES else np.int8
    return np.dtype(whole if tensor_type in FORMATS else np.float32)


def nibbles(p: Planes) -> Planes:
    """Two columns in each byte of q, the first in the lower half, signed, so that a half in its place counts 16 times.

    Values from 0 up, which are those of formats with minima, become values from -8 up.
    """
    q, minimum = p.q, p.minimum
    if minimum is not None:
        q, minimum = q - np.int8(8), minimum + 8 * p.scale
    bits = q.view(np.uint8)
    return Planes(bits[:, ::2] & 15 | bits[:, 1::2] << 4, p.scale / 16, minimum, p.group)


def repack(data: np.ndarray, shape: tuple[int, ...], tensor_type: TensorType, crew: Crew) -> Panels:
    """uint8 bytes of a tensor [..., rows, cols] as panels."""
    *q_shape, group = Panels.shapes(shape, tensor_type)
    kinds = kind_of(tensor_type), np.float32, np.float32
    q, scale, minimum = (np.zeros(s, t) for s, t in zip(q_shape, kinds, strict=True))
    rows = data.reshape(q.shape[0], shape[-2], -1)
    if tensor_type not in FORMATS:
        scale[:] = 1
    starts = [(m, b) for m in range(q.shape[0]) for b in range(0, q.shape[1], AT_A_TIME)]

    def some(share: int, shares: int) -> None:
        for m, b in starts[share::shares]:
            stretch = rows[m, b * LANES : (b + AT_A_TIME) * LANES]
            if tensor_type in FORMATS:
                p = planes(stretch, tensor_type)
                p = nibbles(p) if tensor_type in NIBBLES else p
                turn(p.q, q[m, b:])
                turn(p.scale, scale[m, b:])
                if p.minimum is not None:
                    turn(p.minimum, minimum[m, b:])
            else:
                turn(dequantize(stretch, tensor_type), q[m, b:])

    crew.work(some)
    return Panels(q, scale, minimum, group, shape[-2])


def turn(rows: np.ndarray, panels: np.ndarray) -> None:
    """[rows, cols] -> the first of panels [blocks, cols, LANES]."""
    for b in range(-(-len(rows) // LANES)):
        stretch = rows[b * LANES : (b + 1) * LANES]
        panels[b, : rows.shape[1], : len(stretch)] = stretch.T


def product(x: np.ndarray, panels: Panels, matrix: int, crew: Crew) -> np.ndarray:
    """float32 [rows, cols] times one of the matrices -> [rows, panels.rows], a view."""
    blocks, cols = panels.scale.shape[1], panels.cols
    few = len(x) < ROWS
    rows = len(x) if few else -(-len(x) // ROWS) * ROWS
    padded = x
    if x.shape != (rows, cols) or not x.flags.c_contiguous:
        padded = np.zeros((rows, cols), np.float32)
        padded[: len(x), : x.shape[1]] = x
    y = np.empty((rows, blocks * LANES), np.float32)
    arrays = padded, panels.q[matrix], panels.scale[matrix], panels.minimum[matrix], panels.group, y
    crew.work(matvec if few else matmul, *arrays, shared=blocks > 1 and y.size * cols > WORTH_SHARING)
    return y[: len(x), : panels.rows]
