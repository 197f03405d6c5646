"""The constants of GGUF: metadata value types, and every ggml tensor type with the size of its blocks.

Types that gemma4q cannot compute with are listed too, so that a file which holds one of them in a tensor nobody needs
can be bounds-checked and opened. Which types can be computed with is `abi.BLOCKS`' word, not this file's.
"""

from enum import IntEnum

import numpy as np

from .. import abi


class ValueType(IntEnum):
    """Types of metadata values, by their number in the file."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


INTEGERS = frozenset(ValueType[name] for name in ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))

# Little-endian numpy dtypes of the values that have a fixed size.
SCALARS = {
    ValueType.BOOL: np.dtype("?"),
    **{t: np.dtype(f"<{t.name[0].lower()}{int(t.name[1:]) // 8}") for t in ValueType if t.name[1:].isdigit()},
}

# ggml's type number: name, values in a block, bytes of a block. From ggml.h and ggml-common.h.
_OTHERS = {
    9: ("Q8_1", 32, 36),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
TENSOR_TYPES: dict[int, tuple[str, int, int]] = _OTHERS | {
    int(t): (t.name, values, size) for t, (values, size) in abi.BLOCKS.items()
}


def type_name(tensor_type: int) -> str:
    """What people call a tensor type: `Q4_K`, or `type 36` where ggml knows none."""
    known = TENSOR_TYPES.get(int(tensor_type))
    return known[0] if known else f"type {tensor_type}"


def readable_types() -> str:
    """The tensor types gemma4q computes with, for messages."""
    return ", ".join(t.name for t in sorted(abi.BLOCKS))
