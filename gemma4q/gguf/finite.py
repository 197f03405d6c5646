"""NaNs and infinities in a tensor's bytes, found without decoding: a block holds one where its scales do."""

from collections.abc import Iterator

import numpy as np

from ..abi import BLOCKS, TensorType, dtype

LARGEST_E8M0 = 252  # 2^(e - 128) times the largest FP4, 12, overflows an f32 beyond it


def fields(chunk: np.ndarray, tensor_type: TensorType) -> Iterator[tuple[np.ndarray, int]]:
    """Of uint8 in whole blocks: values, or half floats that blocks are multiplied by, as unsigned integers [blocks];
    and the bits of their exponent. None of MXFP4, whose scales are exponents."""
    match tensor_type:
        case TensorType.F32:
            yield chunk.view("<u4"), 0x7F800000
        case TensorType.F16:
            yield chunk.view("<u2"), 0x7C00
        case TensorType.BF16:
            yield chunk.view("<u2"), 0x7F80
        case _:
            blocks = chunk.view(dtype(f"block_{tensor_type.name.lower()}"))
            for name in blocks.dtype.names:
                if blocks.dtype[name] == np.float16:
                    yield blocks[name].view("<u2"), 0x7C00


def broken(chunk: np.ndarray, tensor_type: TensorType) -> Iterator[np.ndarray]:
    """bool [blocks] for each of a block's scales: which are NaN or infinite."""
    if tensor_type == TensorType.MXFP4:
        yield chunk.view(dtype("block_mxfp4"))["e"] > LARGEST_E8M0
    for field, exponent in fields(chunk, tensor_type):
        yield field & exponent == exponent


def first_broken(chunk: np.ndarray, tensor_type: TensorType) -> int | None:
    """The number of the first value that a NaN or an infinity is, or has as a scale; None in a sound tensor."""
    firsts = [int(bad.argmax()) for bad in broken(chunk, tensor_type) if bad.any()]
    return min(firsts) * BLOCKS[tensor_type][0] if firsts else None
