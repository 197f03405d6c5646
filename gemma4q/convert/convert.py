"""A Hugging Face directory as a GGUF file: everything is looked at before a byte is written.

`planned` reads headers and small files and says what would be written; its `write` does it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError
from ..gguf.types import ValueType
from ..gguf.writer import TensorData, Types
from .card import file_name, general_keys, sampling_keys
from .config import Source, model_keys, open_source
from .files import is_count
from .mmproj import encoder_keys, encoder_tensors
from .names import CENTROIDS, ORDERING, is_encoder
from .output import Planned, Progress, write_files
from .pack import FILE_TYPES, OUTTYPES, own_outtype
from .safetensors import Checkpoint, Stored, open_checkpoint
from .split import in_parts
from .text import check_clusters, chosen, text_tensors
from .tokenizer import tokenizer_keys

MOST_THREADS = 4
QUANTIZATION_VERSION = 2
# Keys whose type is not what their value's would be written as.
TYPES: dict[str, Types] = {
    "general.sampling.top_k": (ValueType.I32,),
    "general.sampling.penalty_last_n": (ValueType.I32,),
}


@dataclass(frozen=True)
class Conversion:
    """What would be written: the files, and the type that was asked for or found."""

    files: list[Planned]
    outtype: str
    checkpoint: Checkpoint

    @property
    def tensors(self) -> list[TensorData]:
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def has_centroids(self) -> bool:
        """Whether there is a clustered head among the tensors, which llama.cpp would not load."""
        return any(tensor.name == CENTROIDS for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def write(self, progress: Progress | None = None) -> None:
        """Writes all files, or none. Raises what `write_files` raises, and numeric for a value that is not finite."""
        write_files(self.files, self.checkpoint.files, progress)


@contextmanager
def planned(
    folder: str | os.PathLike,
    to: str | os.PathLike | None = None,
    outtype: str = "auto",
    mmproj: bool = False,
    part_bytes: int | None = None,
    centroids: bool = True,
) -> Iterator[Conversion]:
    """What converting a directory would write; nothing of it is, before `write` is called within the `with`.

    folder: config.json, tokenizer and safetensors. to: the file, or a directory for it; None: `folder`. outtype: f32,
    bf16, f16, q8_0, or auto for the checkpoint's own 16-bit type. mmproj: the encoders and not the text model.
    part_bytes: most bytes of tensors in one file. centroids: keep an assistant's clustered head.
    Raises `Gemma4qError` naming the file, key or tensor at fault.
    """
    source = open_source(Path(folder))
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        if mmproj:
            keys, tensors, outtype, checkpoint = _encoders(source, outtype, pool)
        else:
            keys, tensors, outtype, checkpoint = _text(source, outtype, pool, centroids)
        general = general_keys(source.folder, source.config, _parameters(tensors))
        path = _path(source.folder, to, file_name(general, outtype, mmproj), outtype)
        metadata = {
            "general.architecture": "clip" if mmproj else source.architecture,
            "general.type": "mmproj" if mmproj else "model",
            **sampling_keys(source.generation),
            **general,
            "general.file_type": FILE_TYPES[outtype],
            "general.quantization_version": QUANTIZATION_VERSION,
            **keys,
        }
        yield Conversion(in_parts(path, metadata, TYPES, tensors, part_bytes), outtype, checkpoint)


def _text(
    source: Source, outtype: str, pool: Executor, centroids: bool
) -> tuple[dict[str, object], list[TensorData], str, Checkpoint]:
    keys = model_keys(source) | _suppressed(source) | tokenizer_keys(source.folder, source.config)
    checkpoint = open_checkpoint(source.folder)
    found = chosen(source, checkpoint)
    check_clusters(source, found)
    if not centroids:
        found = {name: stored for name, stored in found.items() if name not in (CENTROIDS, ORDERING)}
    outtype = _outtype(outtype, [t for name, t in checkpoint.items() if not is_encoder(name)])
    described = keys | {"general.architecture": source.architecture}
    return keys, text_tensors(source, found, described, TYPES, OUTTYPES[outtype], pool), outtype, checkpoint


def _encoders(
    source: Source, outtype: str, pool: Executor
) -> tuple[dict[str, object], list[TensorData], str, Checkpoint]:
    if source.is_assistant:
        raise Gemma4qError("no_encoder", f"{source.folder} is an assistant: it has no encoders")
    keys, checkpoint = encoder_keys(source), open_checkpoint(source.folder)
    outtype = _outtype(outtype, [t for name, t in checkpoint.items() if is_encoder(name)])
    return keys, list(encoder_tensors(source, checkpoint, OUTTYPES[outtype], pool)), outtype, checkpoint


def _outtype(asked: str, tensors: list[Stored]) -> str:
    return own_outtype(tensors) if asked == "auto" else asked


def _suppressed(source: Source) -> dict[str, object]:
    """Tokens that the 12B's makers forbid, from generation_config.json."""
    ids = source.generation.get("suppress_tokens")
    if not source.unified or source.is_assistant or ids is None:
        return {}
    if not isinstance(ids, list) or not all(is_count(i, 1 << 30) for i in ids):
        raise Gemma4qError(
            "bad_config", f"{source.folder / 'generation_config.json'}: suppress_tokens are no token ids"
        )
    return {"tokenizer.ggml.suppress_tokens": np.array(ids, "<i4")}


def _parameters(tensors: list[TensorData]) -> tuple[int, int, int]:
    """How many weights there are in all, how many of them in experts, and how many experts."""
    sizes = {t.name: prod(t.shape) for t in tensors if t.name not in (CENTROIDS, ORDERING)}
    routed = [t for t in tensors if "_exps." in t.name and len(t.shape) > 2]
    return sum(sizes.values()), sum(sizes[t.name] for t in routed), routed[0].shape[0] if routed else 0


def _path(folder: Path, to: str | os.PathLike | None, name: str, outtype: str) -> Path:
    """The file to write: as given, `{ftype}` in it replaced, or under its usual name in a directory."""
    path = folder if to is None else Path(to)
    if path.is_dir():
        return path / name
    filled = path.name.replace("{ftype}", outtype).replace("{outtype}", outtype)
    return path.with_name(filled.replace("{FTYPE}", outtype.upper()).replace("{OUTTYPE}", outtype.upper()))
