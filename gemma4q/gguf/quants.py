"""What every tensor type means, in numpy: the oracle for all kernels, and the packer of small files.

Owns `dequantize`, `quantize` and `planes` over rows of bytes as GGUF stores them. The layouts of the blocks come from
abi.h; the blocks of one scale stand here, those of 256 values in `kquants`. Leaves files to `reader` and speed to the
backends. `dequantize` gives the bits of ggml's own decoders; `quantize` those of its reference quantisers where it has
one in gguf-py, and plain rounding to nearest for the K and IQ4 formats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import abi
from ..abi import TensorType
from ..errors import Gemma4qError
from . import kquants
from .bits import FP4, IQ4, furthest, gather, inverse, nearest, spread

POWERS = np.ldexp(np.float32(1), np.arange(256) - 128).astype("f4")  # of MXFP4 exponents; half, as FP4 is doubled


@dataclass(frozen=True)
class Planes:
    """Rows taken apart: value = scale * q + minimum, where each `group` neighbours share a scale (and a minimum).

    `q` int8 [..., cols], offsets already taken off; `scale` and `minimum` float32 [..., cols / group], no minimum where
    the format has none. In float32, product and sum rounded one after the other, this is the value exactly.
    """

    q: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None
    group: int

    def values(self) -> np.ndarray:
        """float32 [..., cols]: what the rows stand for."""
        x = self.q.astype("f4").reshape(*self.scale.shape, self.group)
        with np.errstate(invalid="ignore", over="ignore"):
            x *= self.scale[..., None]
            if self.minimum is not None:
                x += self.minimum[..., None]
        return x.reshape(self.q.shape)


def planes(data: np.ndarray, tensor_type: int) -> Planes:
    """uint8 [..., row_bytes] of a block format (not F32, F16, BF16) as int8 values, scales and minima."""
    blocks = view(data, block_dtype(tensor_type))
    form = FORMATS[tensor_type]
    q, scale, minimum = form.unpack(blocks.reshape(-1))
    *rows, count = blocks.shape
    cols = count * abi.BLOCKS[tensor_type][0]
    groups = (*rows, cols // form.group)
    minimum = None if minimum is None else minimum.reshape(groups)
    return Planes(q.reshape(*rows, cols), scale.reshape(groups), minimum, form.group)


def dequantize(data: np.ndarray, tensor_type: int) -> np.ndarray:
    """uint8 [..., row_bytes] -> float32 [..., cols]; may share memory with `data` for F32."""
    if tensor_type == TensorType.F32:
        return view(data, "<f4")
    if tensor_type == TensorType.F16:
        return view(data, "<f2").astype("f4")
    if tensor_type == TensorType.BF16:
        return (view(data, "<u2").astype("u4") << 16).view("f4")
    return planes(data, tensor_type).values()


def quantize(x: np.ndarray, tensor_type: int) -> np.ndarray:
    """float32 [..., cols] -> uint8 [..., row_bytes].

    Raises `bad_block_size` if cols is not whole blocks, `numeric` if a block format is asked to hold NaN or infinity.
    """
    x = np.ascontiguousarray(x, "f4")
    if tensor_type == TensorType.F32:
        return x.view("u1")
    if tensor_type == TensorType.F16:
        with np.errstate(over="ignore"):
            return x.astype("<f2").view("u1")
    if tensor_type == TensorType.BF16:
        return to_bf16(x).view("u1")
    dtype, values = block_dtype(tensor_type), abi.BLOCKS[tensor_type][0]
    if x.shape[-1] % values:
        raise Gemma4qError(
            "bad_block_size", f"{x.shape[-1]} columns are not whole blocks of {values} ({TensorType(tensor_type).name})"
        )
    if not np.isfinite(x).all():
        raise Gemma4qError("numeric", f"NaN or infinity cannot be stored as {TensorType(tensor_type).name}")
    blocks = np.zeros(x.size // values, dtype)
    with np.errstate(over="ignore"):
        FORMATS[tensor_type].pack(x.reshape(len(blocks), values), blocks)
    return blocks.view("u1").reshape(*x.shape[:-1], abi.row_bytes(tensor_type, x.shape[-1]))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves as uint16, rounded to nearest even; NaN stays NaN."""
    bits = x.view("u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint64(0x7FFF)) >> 16).astype("<u2")
    return np.where(np.isnan(x), (bits >> 16 | 64).astype("<u2"), rounded)


def view(data: np.ndarray, dtype) -> np.ndarray:
    """Rows of bytes as rows of `dtype`, without a copy where the bytes of a row are neighbours."""
    dtype = np.dtype(dtype)
    if data.dtype != np.uint8 or data.shape[-1] % dtype.itemsize:
        raise Gemma4qError("bad_block_size", f"rows of {data.shape[-1]} bytes are not whole blocks of {dtype.itemsize}")
    if data.strides[-1] != 1:
        data = np.ascontiguousarray(data)
    return data.view(dtype)


def block_dtype(tensor_type: int) -> np.dtype:
    """The block of a format, as abi.h declares it."""
    if tensor_type not in FORMATS:
        known = ", ".join(t.name for t in FORMATS)
        raise Gemma4qError("bad_quant_type", f"tensor type {int(tensor_type)} is no block format: formats are {known}")
    return abi.dtype(f"block_{TensorType(tensor_type).name.lower()}")


# -- Blocks of 32, one scale: unpack(blocks [n]) -> q, scale, minimum; pack(x [n, 32], blocks [n] of zeros) ----------


def fifth(qh: np.ndarray) -> np.ndarray:
    """The fifth bits [n, 32] of Q5_0 and Q5_1: bit e of 32 belongs to value e."""
    return np.unpackbits(qh, axis=-1, bitorder="little") << 4


def column(field: np.ndarray) -> np.ndarray:
    return field.astype("f4")[:, None]


def unpack_q4_0(b):
    return spread(b["qs"], 16, 4).view("i1") - np.int8(8), column(b["d"]), None


def unpack_q4_1(b):
    return spread(b["qs"], 16, 4).view("i1"), column(b["d"]), column(b["m"])


def unpack_q5_0(b):
    return (spread(b["qs"], 16, 4) | fifth(b["qh"])).view("i1") - np.int8(16), column(b["d"]), None


def unpack_q5_1(b):
    return (spread(b["qs"], 16, 4) | fifth(b["qh"])).view("i1"), column(b["d"]), column(b["m"])


def unpack_q8_0(b):
    return b["qs"], column(b["d"]), None


def unpack_iq4_nl(b):
    return IQ4[spread(b["qs"], 16, 4)], column(b["d"]), None


def unpack_mxfp4(b):
    return FP4[spread(b["qs"], 16, 4)], POWERS[b["e"]][:, None], None


def signed(x: np.ndarray, b: np.ndarray, levels: int) -> np.ndarray:
    """Codes [n, 32] of Q4_0 and Q5_0: the furthest value becomes code 0, which stands for -levels / 2."""
    d = furthest(x) / np.float32(-levels / 2)
    b["d"] = d[:, 0]
    return (x * inverse(d) + np.float32(levels / 2 + 0.5)).astype("u1").clip(0, levels - 1)


def ranged(x: np.ndarray, b: np.ndarray, levels: int) -> np.ndarray:
    """Codes [n, 32] of Q4_1 and Q5_1: from the smallest value up to the largest."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    d = (high - low) / np.float32(levels - 1)
    b["d"], b["m"] = d[:, 0], low[:, 0]
    return ((x - low) * inverse(d) + np.float32(0.5)).astype("u1").clip(0, levels - 1)


def pack_q4_0(x, b):
    b["qs"] = gather(signed(x, b, 16), 16, 4)


def pack_q4_1(x, b):
    b["qs"] = gather(ranged(x, b, 16), 16, 4)


def pack_q5_0(x, b):
    q = signed(x, b, 32)
    b["qs"], b["qh"] = gather(q & 15, 16, 4), np.packbits(q >> 4, axis=-1, bitorder="little")


def pack_q5_1(x, b):
    q = ranged(x, b, 32)
    b["qs"], b["qh"] = gather(q & 15, 16, 4), np.packbits(q >> 4, axis=-1, bitorder="little")


def pack_q8_0(x, b):
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * inverse(d)
    size = np.abs(scaled)
    whole = np.floor(size)
    b["d"], b["qs"] = d[:, 0], np.copysign(whole + (size - whole >= 0.5), scaled)  # halves go away from zero


def pack_iq4_nl(x, b):
    d = furthest(x) / np.float32(IQ4[0])
    b["d"], b["qs"] = d[:, 0], gather(nearest(IQ4, x * inverse(d)), 16, 4)


def pack_mxfp4(x, b):
    largest = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore"):
        exponent = np.where(largest > 0, np.floor(np.log2(largest)) + 125, 0)
    b["e"] = exponent.clip(0, 254)
    distances = np.abs(POWERS[b["e"]][:, None, None] * FP4.astype("f4") - x[..., None])
    b["qs"] = gather(distances.argmin(axis=-1).astype("u1"), 16, 4)


@dataclass(frozen=True)
class Format:
    """A block format: how many neighbours share a scale, blocks taken apart, blocks put together."""

    group: int
    unpack: Callable
    pack: Callable


FORMATS = {
    TensorType.Q4_0: Format(32, unpack_q4_0, pack_q4_0),
    TensorType.Q4_1: Format(32, unpack_q4_1, pack_q4_1),
    TensorType.Q5_0: Format(32, unpack_q5_0, pack_q5_0),
    TensorType.Q5_1: Format(32, unpack_q5_1, pack_q5_1),
    TensorType.Q8_0: Format(32, unpack_q8_0, pack_q8_0),
    TensorType.Q2_K: Format(16, kquants.unpack_q2_k, kquants.pack_q2_k),
    TensorType.Q3_K: Format(16, kquants.unpack_q3_k, kquants.pack_q3_k),
    TensorType.Q4_K: Format(32, kquants.unpack_q4_k, kquants.pack_q4_k),
    TensorType.Q5_K: Format(32, kquants.unpack_q5_k, kquants.pack_q5_k),
    TensorType.Q6_K: Format(16, kquants.unpack_q6_k, kquants.pack_q6_k),
    TensorType.IQ4_NL: Format(32, unpack_iq4_nl, pack_iq4_nl),
    TensorType.IQ4_XS: Format(32, kquants.unpack_iq4_xs, kquants.pack_iq4_xs),
    TensorType.MXFP4: Format(32, unpack_mxfp4, pack_mxfp4),
}
