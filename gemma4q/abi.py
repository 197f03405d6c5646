"""abi.h as Python sees it: the compiled library or why there is none, structs as numpy dtypes, enums as IntEnums."""

from enum import IntEnum
from pathlib import Path

import numpy as np

try:
    from gemma4q._native import ffi, lib

    missing = None
except ImportError as error:
    from cffi import FFI

    ffi, lib = FFI(), None
    ffi.cdef(Path(__file__).with_name("abi.h").read_text())
    missing = f"the C kernels were not built ({error})"

LEAF = {"f16": np.dtype("f2"), "bf16": np.dtype("u2")}


def dtype(c_type) -> np.dtype:
    """The numpy dtype with exactly the layout of a C type (a name or a cffi ctype)."""
    t = ffi.typeof(c_type) if isinstance(c_type, str) else c_type
    if t.cname in LEAF:
        return LEAF[t.cname]
    if t.kind == "struct":
        names, fields = zip(*t.fields, strict=True)
        formats = [dtype(f.type) for f in fields]
        offsets = [f.offset for f in fields]
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": ffi.sizeof(t)})
    if t.kind == "array":
        return np.dtype((dtype(t.item), t.length))
    kind = "f" if t.cname in ("float", "double") else "u" if t.cname.startswith("u") else "i"
    return np.dtype(f"{kind}{ffi.sizeof(t)}")


def enum(name: str, prefix: str) -> type[IntEnum]:
    """A C enum as an IntEnum, its members without their common prefix."""
    return IntEnum(name, {k.removeprefix(prefix): v for k, v in ffi.typeof(name).relements.items()})


TensorType = enum("tensor_type", "TYPE_")
OpCode = enum("op_code", "OP_")
Space = enum("buffer_space", "SPACE_")
BufferType = enum("buffer_type", "BUFFER_")
OpRows = enum("op_rows", "ROWS_")
Layout = enum("weight_layout", "LAYOUT_")
RowFlag = enum("row_flag", "ROW_")
Status = enum("run_status", "STATUS_")

# Values and bytes of one block of each type.
BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.BF16: (1, 2),
} | {
    t: (256 if t.name.endswith(("_K", "_XS")) else 32, ffi.sizeof(f"block_{t.name.lower()}"))
    for t in TensorType
    if t.name not in ("F32", "F16", "BF16", "COUNT")
}
PAGE = 64  # positions in a page of keys and values


def row_bytes(tensor_type: int, cols: int) -> int:
    """Bytes of a row of `cols` values; `cols` must be a multiple of the type's block."""
    values, size = BLOCKS[tensor_type]
    return cols // values * size


def address(array: np.ndarray):
    """A cffi pointer to an array's first byte; the caller keeps the array alive."""
    return ffi.cast("uint8_t *", array.ctypes.data)
