"""Weights that lie on Q4_0's grid already, as those of a checkpoint trained for it do: found, and kept as they are.

Such a block was d * q, d a float16 and q whole from -8 to 7, rounded to the type of its file. Plain rounding to Q4_0
takes the furthest value for -8 times its scale, which moves every value of a block where it was not.
"""

import numpy as np

from ..abi import TensorType
from ..gguf.quants import block_dtype, dequantize, quantize
from ..gguf.reader import GGUF, Tensor
from ..gguf.types import TENSOR_TYPES

VALUES, LOWEST, HIGHEST = 32, -8, 7
SPOTS, SPOT = 32, 16  # where a tensor is looked at, and blocks there
NEARLY_ALL = 31 / 32  # of the blocks that hold anything
LEAST_SCALES, LEAST_CODES = 16, 12  # what has fewer is tied data, which are on many grids
# Binary digits of the stored numbers, and the exponent of the least half step.
DIGITS = {TensorType.F32: (24, -150), TensorType.F16: (11, -25), TensorType.BF16: (8, -134)}
FOUR_BITS = tuple(TensorType[name] for name in ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4"))


def fit(x: np.ndarray, stored: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales float16 [n] and codes int8 [n, 32] that give float32 x [n, 32] once rounded to `stored`; bool [n], where.

    Blocks of zeros have no scale of their own and are none of them.
    """
    scale, codes = np.zeros(len(x), "f2"), np.zeros(x.shape, "i1")
    furthest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    left = np.flatnonzero((furthest != 0) & np.isfinite(furthest))
    for code in range(LOWEST, 0):  # of the value that is furthest from zero
        d, q, fits = _fit(x[left], furthest[left] / np.float32(code), stored)
        scale[left[fits]], codes[left[fits]] = d[fits], q[fits]
        left = left[~fits]
    return scale, codes, scale != 0


def _fit(x: np.ndarray, near: np.ndarray, stored: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `fit`, with scales that lie near those given, float32 [n]."""
    with np.errstate(all="ignore"):  # what comes of scales too small or too large for float16 fits nothing
        q = np.rint(x / near[:, None])
        digits, least = DIGITS[stored]
        size, times = np.abs(x.astype("f8")), np.abs(q)
        part, power = np.frexp(size)
        above = np.ldexp(1.0, np.maximum(power - digits - 1, least))
        below = np.ldexp(1.0, np.maximum(power - digits - 1 - (part == 0.5), least))
        low = np.where(times > 0, (size - below) / times, 0).max(1)
        high = np.where(times > 0, (size + above) / times, np.inf).min(1)
        middle = (size * times).sum(1) / (times * times).sum(1)
        d = (np.clip(middle, low, high) * np.sign(near)).astype("f2")
        fits, best = np.zeros(len(x), bool), d
        for scale in (d, np.nextafter(d, np.float16(np.inf)), np.nextafter(d, np.float16(-np.inf))):
            values = scale.astype("f4")[:, None] * q.astype("f4")
            same = (dequantize(quantize(values, stored), stored) == x).all(1) & ~fits
            best, fits = np.where(same, scale, best), fits | same
    return best, q.astype("i1"), fits & ((q >= LOWEST) & (q <= HIGHEST)).all(1) & (low <= high)


def laid(data: np.ndarray, x: np.ndarray, stored: int) -> None:
    """Puts the blocks of float32 x [rows, cols] that are on the grid in their places among `data`, x as Q4_0."""
    scale, codes, found = fit(x.reshape(-1, VALUES), stored)
    nibbles = (codes[found] - LOWEST).astype("u1")
    blocks = data.reshape(-1).view(block_dtype(TensorType.Q4_0))
    whole = blocks[found]
    whole["d"] = scale[found].view(whole["d"].dtype)
    whole["qs"] = nibbles[:, : VALUES // 2] | nibbles[:, VALUES // 2 :] << 4
    blocks[found] = whole


class Grid:
    """Which tensors of a model have Q4_0's grid: each is looked at once."""

    def __init__(self, gguf: GGUF):
        self.gguf, self.known = gguf, {}

    def has(self, tensor: Tensor) -> bool:
        if tensor.name not in self.known:
            self.known[tensor.name] = is_on_grid(self.gguf, tensor)
        return self.known[tensor.name]


def is_on_grid(gguf: GGUF, tensor: Tensor) -> bool:
    """Whether a tensor of floats has Q4_0's grid, going by blocks from all over it; what is merely tied has not."""
    if tensor.type not in DIGITS or tensor.shape[-1] % VALUES:
        return False
    size = VALUES * TENSOR_TYPES[tensor.type][2]
    count = tensor.nbytes // size
    spots = sorted({int(at) for at in np.linspace(0, max(0, count - SPOT), SPOTS)})
    file, length = gguf.files[tensor.file], min(SPOT, count) * size
    data = np.concatenate([file.read(tensor.offset + at * size, length) for at in spots])
    x = dequantize(data, tensor.type).reshape(-1, VALUES)
    scale, codes, found = fit(x, tensor.type)
    held = int(x.any(1).sum())
    some = len(np.unique(np.abs(scale[found]))) >= LEAST_SCALES and len(np.unique(codes[found])) >= LEAST_CODES
    return some and found.sum() >= NEARLY_ALL * held
