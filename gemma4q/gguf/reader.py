"""Reads GGUF files: metadata and tensors, every length, count, offset and type checked against the file before use.

Nothing is allocated or looped over on a file's word alone, nothing recurses, and no tensor is copied: `Tensor.data`
lies in the mapped file. What the values mean for Gemma is `model`'s business.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md; versions 2 and 3, little-endian.
"""

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import abi
from ..errors import Gemma4qError
from .source import MAGIC, Source, open_source, what_it_is
from .strings import LONGEST_STRING, StringArray, string_array
from .types import INTEGERS, SCALARS, TENSOR_TYPES, ValueType, readable_types, type_name

MOST_KEYS, MOST_TENSORS, MOST_ELEMENTS, MOST_STRINGS, MOST_PARTS = 65_535, 65_536, 16 << 20, 4 << 20, 256
LONGEST_KEY, LARGEST_DIM, LARGEST_ALIGNMENT = 65_535, 1 << 40, 65_536
BEGINNING = 4096  # bytes of a tensor

_KEY = re.compile(rb"[\x21-\x7e]+")
_TENSOR_NAME = re.compile(rb"[A-Za-z0-9_.\-]{1,63}")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_SCALAR = {t: struct.Struct("<" + dtype.char) for t, dtype in SCALARS.items()}

Value = bool | int | float | str | np.ndarray | StringArray


@dataclass(frozen=True)
class Tensor:
    """A tensor where it lies in its file.

    `type` is an `abi.TensorType`, or ggml's number for a type gemma4q cannot compute with. `shape` has the slowest
    dimension first: a matrix is [rows, cols]. `data` is uint8 [nbytes] over the mapped file, from byte `offset` of file
    number `file` on; `fileno` is that file's descriptor.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    file: int
    offset: int
    data: np.ndarray
    fileno: int = -1

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @property
    def readable(self) -> bool:
        """Whether gemma4q can compute with this type."""
        return self.type in abi.BLOCKS


@dataclass(frozen=True)
class GGUF:
    """An open model: one file, or all parts of a split one.

    `metadata` maps each key to a bool, int, float, str, numpy array or `StringArray`; `types` to its type in the file,
    for an array (ARRAY, element type). For a split model both are the first part's.
    """

    files: tuple[Source, ...]
    metadata: dict[str, Value]
    types: dict[str, tuple[ValueType, ...]]
    tensors: dict[str, Tensor]

    @property
    def path(self) -> Path:
        return self.files[0].path

    def identity(self) -> tuple[tuple[int, int, int, int], ...]:
        """(device, inode, size, mtime in ns) of every open file, as it is now."""
        return tuple(source.identity() for source in self.files)

    def changed(self) -> bool:
        """Whether a file was written to since it was opened. One replaced by renaming was not: it stays as it is."""
        return self.identity() != tuple(source.opened_as for source in self.files)

    def fingerprint(self) -> bytes:
        """SHA-256 of what tells models apart, not all their bytes: each tensor's name, type, shape and beginning."""
        digest = hashlib.sha256()
        for tensor in self.tensors.values():
            digest.update(f"{tensor.name} {tensor.type} {tensor.shape}".encode() + tensor.data[:BEGINNING].tobytes())
        return digest.digest()


def open_gguf(path: str | os.PathLike) -> GGUF:
    """Opens a GGUF file, or all parts of a split one when given any of them.

    Raises `Gemma4qError` naming the key, tensor or byte at fault: not_gguf, truncated, bad_..., out_of_file and so on.
    """
    path = Path(path)
    first = _read_part(path, 0)
    count = first.split_number("split.count", default=1)
    if count <= 1:
        return GGUF((first.source,), first.metadata, first.types, first.tensors)
    return _join(first, path, count)


def _join(given: "_Part", path: Path, count: int) -> GGUF:
    """All parts of a split model as one, checked to belong together and to be complete."""
    name = _PART.fullmatch(path.name)
    if count > MOST_PARTS:
        raise Gemma4qError("bad_split", f"{path}: split.count is {count}; at most {MOST_PARTS} parts can be opened")
    if not name or int(name[3]) != count:
        wanted = f"NAME-00001-of-{count:05}.gguf"
        raise Gemma4qError("bad_split", f"{path} is one of {count} parts (split.count) but is not called {wanted}")
    parts, tensors = [], {}
    for number in range(count):
        part_path = path.with_name(f"{name[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part_path.exists():
            raise Gemma4qError("bad_split", f"part {number + 1} of {count} is missing: {part_path}")
        part = given if part_path == path and number == 0 else _read_part(part_path, number)
        found = part.split_number("split.no", -1), part.split_number("split.count", 1)
        if found != (number, count):
            raise Gemma4qError("bad_split", f"{part_path}: split.no, split.count are {found}, want {(number, count)}")
        if twice := tensors.keys() & part.tensors.keys():
            raise Gemma4qError("duplicate_tensor", f"{part_path}: {min(twice)} is in an earlier part too")
        parts.append(part)
        tensors |= part.tensors
    total = parts[0].split_number("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise Gemma4qError("bad_split", f"{path}: split.tensors.count is {total}, the parts hold {len(tensors)}")
    return GGUF(tuple(part.source for part in parts), parts[0].metadata, parts[0].types, tensors)


def _read_part(path: Path, number: int) -> "_Part":
    part = _Part(open_source(path), number)
    try:
        part.read()
    except Gemma4qError as error:
        raise Gemma4qError(error.kind, f"{path.name}: {error.message}") from None
    return part


class _Part:
    """One file being read: a position that never passes the end."""

    def __init__(self, source: Source, number: int):
        self.source, self.number = source, number
        self.view, self.size, self.position = memoryview(source.bytes), len(source.bytes), 0
        self.metadata: dict[str, Value] = {}
        self.types: dict[str, tuple[ValueType, ...]] = {}
        self.tensors: dict[str, Tensor] = {}

    def read(self) -> None:
        tensors, keys = self.header()
        for _ in range(keys):
            self.key_value()
        alignment = self.alignment()
        infos = [self.tensor_info(alignment) for _ in range(tensors)]
        start = -(-self.position // alignment) * alignment
        end = 0
        for name, tensor_type, shape, offset, size in sorted(infos, key=lambda info: info[3]):
            if offset != end:
                fault = "overlaps another tensor" if offset < end else f"leaves a hole of {offset - end} bytes"
                raise Gemma4qError("bad_offset", f"{name}: offset {offset} {fault}")
            if start + offset + size > self.size:
                missing = start + offset + size - self.size
                raise Gemma4qError("out_of_file", f"{name} ends {missing:,} bytes past the file: it is cut short")
            end = -(-(offset + size) // alignment) * alignment
            data = self.source.bytes[start + offset : start + offset + size]
            self.tensors[name] = Tensor(name, tensor_type, shape, self.number, start + offset, data, self.source.fileno)
        self.tensors = {info[0]: self.tensors[info[0]] for info in infos}

    def header(self) -> tuple[int, int]:
        """Counts of tensors and keys."""
        head = bytes(self.view[:64])
        if not head.startswith(MAGIC[: len(head)]):
            raise Gemma4qError("not_gguf", f"not a GGUF file: {what_it_is(head)}")
        self.take(4, "the magic")
        version = self.number_at("<I", "the version")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                raise Gemma4qError("bad_endian", "a big-endian GGUF file: convert it to little-endian")
            raise Gemma4qError("unsupported_version", f"GGUF version {version}; versions 2 and 3 can be read")
        tensors, keys = self.number_at("<Q", "the tensor count"), self.number_at("<Q", "the key count")
        left = self.size - self.position
        # A key takes at least 14 bytes (length, one letter, type, value), a tensor 33.
        for what, count, most, least in (("keys", keys, MOST_KEYS, 14), ("tensors", tensors, MOST_TENSORS, 33)):
            if count > most or count * least > left:
                raise Gemma4qError("bad_count", f"{count} {what} in {left} bytes (at most {most} can be read)")
        return tensors, keys

    def take(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they begin."""
        if count > self.size - self.position:
            raise Gemma4qError("truncated", f"the file ends at byte {self.size}, inside {what}")
        start = self.position
        self.position += count
        return start

    def number_at(self, layout: str, what: str) -> int:
        return struct.unpack_from(layout, self.view, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str, longest: int) -> bytes:
        length = self.number_at("<Q", what)
        left = self.size - self.position
        if length > longest or length > left:
            raise Gemma4qError("bad_string", f"{what} claims {length} bytes; {left} follow: cut short or damaged")
        start = self.take(length, what)
        return bytes(self.view[start : start + length])

    def key_value(self) -> None:
        at = self.position
        raw = self.string(f"key {len(self.types)} at byte {at}", LONGEST_STRING)
        if len(raw) > LONGEST_KEY or not _KEY.fullmatch(raw):
            raise Gemma4qError("bad_key", f"key {len(self.types)} at byte {at} is not ASCII text: {raw[:40]!r}")
        key = raw.decode("ascii")
        if key in self.types:
            raise Gemma4qError("duplicate_key", f"{key} appears twice")
        value_type = self.value_type(key)
        self.types[key] = (value_type,)
        if value_type == ValueType.ARRAY:
            self.metadata[key] = self.array(key)
        elif value_type == ValueType.STRING:
            self.metadata[key] = self.text(key)
        else:
            self.metadata[key] = self.scalars(key, value_type, 1)[0].item()

    def value_type(self, key: str) -> ValueType:
        number = self.number_at("<I", key)
        if number > max(ValueType):
            raise Gemma4qError("bad_type", f"{key}: value type {number} does not exist")
        return ValueType(number)

    def text(self, key: str) -> str:
        try:
            return self.string(key, LONGEST_STRING).decode()
        except UnicodeDecodeError as error:
            raise Gemma4qError("bad_string", f"{key} is not UTF-8 ({error.reason} at byte {error.start})") from None

    def scalars(self, key: str, value_type: ValueType, count: int) -> np.ndarray:
        """A read-only copy, aligned, of `count` values."""
        dtype = SCALARS[value_type]
        start = self.take(count * dtype.itemsize, key)
        raw = self.source.bytes[start : self.position]
        if value_type == ValueType.BOOL and raw.max(initial=0) > 1:
            raise Gemma4qError("bad_type", f"{key}: a bool holds {raw.max()}")
        values = raw.view(dtype).copy()
        values.flags.writeable = False
        return values

    def array(self, key: str) -> np.ndarray | StringArray:
        element = self.value_type(key)
        self.types[key] = (ValueType.ARRAY, element)
        if element == ValueType.ARRAY:
            raise Gemma4qError("bad_array", f"{key}: arrays of arrays are not read")
        count, left = self.number_at("<Q", key), self.size - self.position
        least, most = (8, MOST_STRINGS) if element == ValueType.STRING else (SCALARS[element].itemsize, MOST_ELEMENTS)
        if count > most or count * least > left:
            raise Gemma4qError("bad_array", f"{key} claims {count} elements; {left} bytes follow, {most} can be read")
        if element != ValueType.STRING:
            return self.scalars(key, element, count)
        strings = string_array(self.source.bytes, self.position, count, key)
        self.take(len(strings.data), key)
        return strings

    def alignment(self) -> int:
        key = "general.alignment"
        value = self.metadata.get(key, 32)
        if self.types.get(key, (ValueType.U32,)) != (ValueType.U32,):
            raise Gemma4qError("bad_type", f"{key} must be a U32")
        if not 8 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
            raise Gemma4qError("bad_alignment", f"{key} is {value}; want a power of two, 8 to {LARGEST_ALIGNMENT}")
        return value

    def tensor_info(self, alignment: int) -> tuple[str, int, tuple[int, ...], int, int]:
        """(name, type, shape, offset in the data, bytes) of the next tensor."""
        what = f"tensor {len(self.tensors)} at byte {self.position}"
        raw = self.string(what, LONGEST_STRING)
        if not _TENSOR_NAME.fullmatch(raw):
            raise Gemma4qError("bad_tensor_name", f"{what} is called {raw[:70]!r}: 1 to 63 letters, digits, . _ -")
        name = raw.decode("ascii")
        if name in self.tensors:
            raise Gemma4qError("duplicate_tensor", f"{name} appears twice")
        self.tensors[name] = None  # its place is known when all are read
        dims = self.number_at("<I", name)
        if not 1 <= dims <= 4:
            raise Gemma4qError("bad_dims", f"{name} has {dims} dimensions; 1 to 4 can be read")
        shape = tuple(self.number_at("<Q", name) for _ in range(dims))[::-1]
        number, offset = self.number_at("<I", name), self.number_at("<Q", name)
        if number not in TENSOR_TYPES:
            raise Gemma4qError("bad_quant_type", f"{name} is of type {number}; readable are {readable_types()}")
        if not all(1 <= dim <= LARGEST_DIM for dim in shape):
            raise Gemma4qError("bad_dims", f"{name} has shape {list(shape)}; each must be 1 to 2^40")
        _, values, block_bytes = TENSOR_TYPES[number]
        if shape[-1] % values:
            fault = f"{name}: rows of {shape[-1]} values are not whole blocks of {values}, as {type_name(number)} needs"
            raise Gemma4qError("bad_block_size", fault)
        size = math.prod(shape) // values * block_bytes
        if size >= 1 << 63 or offset >= 1 << 63:
            raise Gemma4qError("overflow", f"{name} of shape {list(shape)} at {offset} would take {size} bytes")
        if offset % alignment:
            raise Gemma4qError("bad_offset", f"{name}: offset {offset} is no multiple of {alignment}")
        return name, abi.TensorType(number) if number in abi.BLOCKS else number, shape, offset, size

    def split_number(self, key: str, default: int) -> int:
        if key not in self.types:
            return default
        if self.types[key][0] not in INTEGERS:
            raise Gemma4qError("bad_type", f"{self.source.path.name}: {key} must be an integer")
        return self.metadata[key]
