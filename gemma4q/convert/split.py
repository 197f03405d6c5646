"""A model in parts, and in one piece again: how tensors are shared out, and the keys that parts carry.

As llama.cpp splits: parts are called NAME-00001-of-00003.gguf, the first holds all metadata, and each its own tensors.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError
from ..gguf.reader import GGUF, MOST_PARTS, Tensor, open_gguf
from ..gguf.types import ValueType
from ..gguf.writer import TensorData, Types
from .output import Planned, Progress, write_files

PIECE = 8 << 20  # bytes copied at once
SPLIT_TYPES: dict[str, Types] = {
    "split.no": (ValueType.U16,),
    "split.count": (ValueType.U16,),
    "split.tensors.count": (ValueType.I32,),
}
_UNITS = {"K": 1000, "M": 1000**2, "G": 1000**3}
_PART_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}")


def part_size(text: str) -> int:
    """Bytes of a size as llama.cpp spells it: `2G`, `500M`, `100000`. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,15})([KMG]?)", text)
    if not found or not int(found[1]):
        raise ValueError(f"{text!r} is no size: give bytes, or a number and K, M or G")
    return int(found[1]) * _UNITS.get(found[2], 1)


def in_parts(
    path: Path, metadata: Mapping, types: Mapping[str, Types], tensors: Sequence[TensorData], most_bytes: int | None
) -> list[Planned]:
    """The files of a model of which none holds more than `most_bytes` of tensors, where one tensor alone does not."""
    groups: list[list[TensorData]] = [[]]
    for tensor in tensors:
        held = sum(other.nbytes for other in groups[-1])
        if most_bytes and groups[-1] and held + tensor.nbytes > most_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) > MOST_PARTS:
        fault = f"parts of {most_bytes:,} bytes are {len(groups)}; at most {MOST_PARTS} are read"
        raise Gemma4qError("too_many_parts", fault)
    return parts_of(path, metadata, types, groups)


def parts_of(
    path: Path, metadata: Mapping, types: Mapping[str, Types], groups: Sequence[Sequence[TensorData]]
) -> list[Planned]:
    """The files of a model, each with its group of tensors; a single one is called `path`."""
    count, tensors = len(groups), sum(map(len, groups))
    if count == 1:
        return [Planned(path, metadata, types, groups[0])]
    out = []
    for number, group in enumerate(groups):
        keys = {"split.no": number, "split.count": count, "split.tensors.count": tensors}
        own = {**metadata, **keys} if number == 0 else keys
        if number and "general.alignment" in metadata:
            own["general.alignment"] = metadata["general.alignment"]
        name = f"{path.stem}-{number + 1:05}-of-{count:05}.gguf"
        out.append(Planned(path.with_name(name), own, {**types, **SPLIT_TYPES}, group))
    return out


def split(path: str | os.PathLike, to: Path | None, most_bytes: int, progress: Progress | None = None) -> list[Path]:
    """Cuts a GGUF file into parts of at most `most_bytes`, called after `to`; returns them.

    Raises the reader's kinds, those of `write_files`, too_many_parts, and fits where one part would be all.
    """
    gguf = open_gguf(path)
    to = Path(to) if to else gguf.path.with_name(stem_of(gguf.path) + ".gguf")
    to = to if to.suffix == ".gguf" else to.with_name(to.name + ".gguf")
    planned = in_parts(to, *_unsplit(gguf), most_bytes)
    if len(planned) == 1:
        fault = f"{gguf.path} holds {planned[0].nbytes:,} bytes, which fit in one part of {most_bytes:,}"
        raise Gemma4qError("fits", fault)
    return _written(gguf, planned, progress)


def merge(path: str | os.PathLike, to: Path | None, progress: Progress | None = None) -> Path:
    """Joins the parts of a model, of which any is given, into one file; returns it. Raises as `split` and not_split."""
    gguf = open_gguf(path)
    if len(gguf.files) == 1:
        raise Gemma4qError("not_split", f"{gguf.path} is a whole model")
    to = Path(to) if to else gguf.path.with_name(stem_of(gguf.path) + ".gguf")
    metadata, types, tensors = _unsplit(gguf)
    return _written(gguf, [Planned(to, metadata, types, tensors)], progress)[0]


def _written(gguf: GGUF, planned: list[Planned], progress: Progress | None) -> list[Path]:
    write_files(planned, [source.fileno for source in gguf.files], progress)
    return [file.path for file in planned]


def stem_of(path: Path) -> str:
    """A model's name without the number of a part."""
    found = _PART_NAME.fullmatch(path.stem)
    return found[1] if found else path.stem


def _unsplit(gguf: GGUF) -> tuple[dict, dict[str, Types], list[TensorData]]:
    """Metadata, their types and tensors of an open model, as one file holds them."""
    metadata = {key: value for key, value in gguf.metadata.items() if key not in SPLIT_TYPES}
    types = {key: gguf.types[key] for key in metadata}
    return metadata, types, [_copied(tensor, gguf) for tensor in gguf.tensors.values()]


def _copied(tensor: Tensor, gguf: GGUF) -> TensorData:
    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, tensor.nbytes, PIECE):
            yield gguf.files[tensor.file].read(tensor.offset + start, min(PIECE, tensor.nbytes - start))

    return TensorData(tensor.name, tensor.type, tensor.shape, chunks)
