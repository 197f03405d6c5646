"""Small codes in and out of bytes, and back to the values they stand for: what all block formats are written with."""

import numpy as np

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # e2m1, doubled
TINY = np.finfo("f4").tiny


def spread(packed: np.ndarray, run: int, bits: int) -> np.ndarray:
    """uint8 [n, bytes] -> codes uint8 [n, bytes * 8 / bits].

    In each `run` of bytes the lowest `bits` of all its bytes come first, then the next higher ones, and so on.
    """
    shifts = np.arange(0, 8, bits, dtype="u1")[:, None]
    blocks, size = packed.shape
    codes = packed.reshape(blocks, size // run, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(blocks, size * 8 // bits)


def gather(codes: np.ndarray, run: int, bits: int) -> np.ndarray:
    """The inverse of `spread`; codes must be below 2 ** bits."""
    shifts = np.arange(0, 8, bits, dtype="u1")[:, None]
    blocks, size = codes.shape
    parts = codes.reshape(blocks, size // (run * len(shifts)), len(shifts), run) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(blocks, size // len(shifts))


def nearest(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The code of the entry nearest to each x; `table` ascends."""
    middles = (table[1:].astype("f4") + table[:-1].astype("f4")) / 2
    return np.searchsorted(middles, x).astype("u1")


def furthest(x: np.ndarray) -> np.ndarray:
    """[..., 1]: along the last axis the value furthest from zero, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is so small that no half float holds it nor float32 its inverse."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) >= TINY)
