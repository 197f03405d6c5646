"""Reads safetensors checkpoints: one file, or shards and their index, every length, offset and name checked first.

Nothing is allocated on a file's word alone and no tensor is read before it is asked for, piece by piece, so that a
checkpoint of any size needs little memory. Format: github.com/huggingface/safetensors (README, "Format"). What tensors
mean is `names`' and `text`'s business.
"""

import math
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError
from .files import is_count, parse_json, read_json, read_text_file

LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
LARGEST_DIM, MOST_DIMS = 1 << 40, 8
INDEX = "model.safetensors.index.json"

# Bytes of a value, and what numpy calls it; BF16 is read as the uint16 that holds it.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
_SHARD = re.compile(r"[^/\\\0]{1,250}\.safetensors")


@dataclass(frozen=True)
class Stored:
    """A tensor in its file: `offset` is from the file's beginning, `shape` has the slowest dimension first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    fileno: int
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` values from value `start` on, flat, as DTYPES says. Raises truncated when the file became shorter."""
        out = np.empty(count, DTYPES[self.dtype])
        view, at = memoryview(out).cast("B"), self.offset + start * out.itemsize
        while len(view):
            got = os.preadv(self.fileno, [view], at)
            if got == 0:
                raise Gemma4qError("truncated", f"{self.path}: the file became shorter while it was read")
            view, at = view[got:], at + got
        return out


class Checkpoint(dict[str, Stored]):
    """All tensors of a directory by name, in the files' order; files stay open as long as this object lives."""

    def __init__(self, folder: Path, filenos: list[int]):
        super().__init__()
        self.folder, self.files = folder, filenos
        weakref.finalize(self, _close, filenos)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of `model.safetensors`, or of the shards that its index names.

    Raises `Gemma4qError` with the file and field at fault: not_found, truncated, bad_safetensors, bad_index, ...
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if index.exists() else None
    paths = [folder / name for name in sorted(set(weight_map.values()))] if weight_map else _single(folder)
    checkpoint = Checkpoint(folder, [])
    for path in paths:
        for tensor in _read_header(path, checkpoint.files):
            if tensor.name in checkpoint:
                other = checkpoint[tensor.name].path.name
                raise Gemma4qError("duplicate_tensor", f"{tensor.name} is in {other} and in {path.name}")
            checkpoint[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if name not in checkpoint or checkpoint[name].path.name != shard:
            raise Gemma4qError("missing_tensor", f"{name} is not in {shard}, where {INDEX} says it is")
    if weight_map and (extra := checkpoint.keys() - weight_map.keys()):
        name = min(extra)
        raise Gemma4qError("extra_tensor", f"{name} is in {checkpoint[name].path.name} but not in {INDEX}")
    return checkpoint


def _single(folder: Path) -> list[Path]:
    """The files of a directory without an index: one, or shards whose numbers are complete."""
    found = sorted(path for path in folder.glob("model*.safetensors"))
    if not found:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            hint = "its weights are PyTorch files: get the safetensors ones"
        elif any(folder.glob("*.gguf")):
            hint = "it holds a GGUF file, which needs no conversion"
        else:
            hint = "download all of the model's files"
        raise Gemma4qError("not_found", f"{folder} has no model.safetensors: {hint}")
    if len(found) > 1:
        counts = {match[1] for path in found if (match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", path.name))}
        if len(counts) != 1 or int(counts.pop()) != len(found):
            raise Gemma4qError("bad_index", f"{folder} has {len(found)} model*.safetensors and no {INDEX}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Gemma4qError("bad_index", f"{index} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard) or shard.startswith("."):
            fault = f"{index}: {name} is said to be in {shard!r}, which is no file name of this directory"
            raise Gemma4qError("bad_index", fault)
    if missing := sorted({shard for shard in weight_map.values() if not (index.parent / shard).exists()}):
        raise Gemma4qError("not_found", f"{index.parent / missing[0]}: {len(missing)} shards of the index are missing")
    return weight_map


def _read_header(path: Path, filenos: list[int]) -> Iterator[Stored]:
    """The tensors of one file, sorted by offset, which together fill it exactly."""
    fileno, size = _open(path)
    filenos.append(fileno)
    head = os.pread(fileno, 8, 0)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8:
        if head.startswith(b"version "):
            raise Gemma4qError("truncated", f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`")
        what = f"claims a header of {length} bytes" if len(head) == 8 else "ends inside the header's length"
        raise Gemma4qError("truncated", f"{path} of {size} bytes {what}: cut short, or no safetensors file")
    if length > LONGEST_HEADER:
        fault = f"{path} claims a header of {length} bytes; at most {LONGEST_HEADER} are read"
        raise Gemma4qError("bad_safetensors", fault)
    header = parse_json(read_text_file(path, fileno, 8, length), path)
    start, end = 8 + length, 0
    entries = [_entry(path, name, value) for name, value in header.items() if name != "__metadata__"]
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        if first != end:
            fault = "overlaps another tensor" if first < end else f"leaves a hole of {first - end} bytes"
            raise Gemma4qError("bad_safetensors", f"{path}: {name}: offset {first} {fault}")
        if start + last > size:
            missing = start + last - size
            raise Gemma4qError("truncated", f"{path}: {name} ends {missing:,} bytes past the file: it is cut short")
        end = last
        yield Stored(name, dtype, shape, path, fileno, start + first)
    if start + end != size:
        raise Gemma4qError("bad_safetensors", f"{path}: {size - start - end:,} bytes follow the last tensor")


def _open(path: Path) -> tuple[int, int]:
    try:
        fileno = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        size = os.fstat(fileno).st_size
    except OSError as error:
        raise Gemma4qError("not_readable", f"{path}: {error.strerror}") from None
    if not path.is_file():
        os.close(fileno)
        raise Gemma4qError("not_a_file", f"{path} is not a regular file")
    return fileno, size


def _entry(path: Path, name: str, value: object) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, dtype, shape, first byte, byte after the last) of a header's entry; bytes from the data's beginning."""

    def bad(text: str) -> Gemma4qError:
        return Gemma4qError("bad_safetensors", f"{path}: {name[:200]}: {text}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"dtype {dtype!r} is not known; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMS or not all(is_count(d, LARGEST_DIM) for d in shape):
        raise bad(f"shape {shape!r} is not a list of at most {MOST_DIMS} dimensions")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(o, 1 << 62) for o in offsets):
        raise bad(f"data_offsets {offsets!r} are not two whole numbers")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise bad(f"data_offsets {offsets} span {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {needed}")
    return name, dtype, tuple(shape), *offsets


def _close(filenos: list[int]) -> None:
    for fileno in filenos:
        os.close(fileno)
