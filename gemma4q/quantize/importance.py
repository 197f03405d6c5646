"""How much each column of each matrix matters: sums of squares of what the columns met, read, merged and written.

Owns llama.cpp's two forms of an importance matrix: GGUF (`NAME.in_sum2`, `NAME.counts`; written and read) and the old
.dat (read). Collecting is `measure.calibration`'s. Every length and count is checked against the file before use.
"""

import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..abi import TensorType
from ..convert import output
from ..errors import Gemma4qError
from ..gguf.reader import GGUF, Tensor, open_gguf
from ..gguf.source import MAGIC, Source, open_source, what_it_is
from ..gguf.strings import StringArray
from ..gguf.writer import TensorData

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
ORIGIN = "gemma4q.imatrix.origin"
CHUNK = 512  # tokens, llama-imatrix's default: a .dat file counts chunks and does not say how long they were
MOST_ENTRIES, MOST_COUNTED, MOST_CHUNKS, LEAST_ENTRY_BYTES = 65_536, 1 << 53, (1 << 32) - 1, 17
LARGEST = float(np.finfo(np.float32).max)

_NAME = re.compile(rb"[A-Za-z0-9_.\-]{1,63}")


@dataclass(frozen=True)
class Entry:
    """Of one tensor: `sums` float64 [n, cols] of squares and `counts` int64 [n] of rows in them; n is experts or 1."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Importance:
    """Entries by the tensors' names. datasets: what was read; chunks: how many, of `chunk_size` tokens.

    origin: what `measure.calibration` knows a run by, to go on with it; empty for files of other programs.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = CHUNK
    origin: str = ""

    def of(self, name: str, cols: int | None = None) -> np.ndarray | None:
        """Mean squares float32 [n, cols] of what the columns met, for each expert (n is 1 for other tensors).

        None: the tensor met nothing. An expert that was never chosen is given the mean of the chosen ones, column by
        column (llama.cpp: all columns alike). cols: of one row, for an old .dat file, where the rows of all experts are
        one. Raises `shape_mismatch`.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.counts.any():
            return None
        if cols is not None and entry.sums.shape[1] != cols:
            if entry.sums.size % cols or len(entry.sums) > 1:
                fault = f"{name}: importance has {entry.sums.shape[1]} columns, the tensor {cols}"
                raise Gemma4qError("shape_mismatch", fault)
            entry = _parted(entry, entry.sums.size // cols)
        chosen, counts = entry.counts > 0, entry.counts[:, None]
        pooled = entry.sums[chosen].sum(0) / counts[chosen].sum()
        return np.where(chosen[:, None], entry.sums / np.maximum(counts, 1), pooled).astype(np.float32)

    def summary(self) -> list[dict]:
        """Of each part of the model (`blk.*.attn_q.weight`): what its tensors' mean squares look like.

        mean: over columns and tensors; evenness: their entropy over its most, 1 where all columns matter alike, as
        llama-imatrix's E(norm); heaviest: share of the sum that the heaviest hundredth of the columns has; rows: that
        the least counted tensor met.
        """
        parts: dict[str, list[str]] = {}
        for name in self.entries:
            parts.setdefault(re.sub(r"[.][0-9]+[.]", ".*.", name), []).append(name)
        return [self._part(part, names) for part, names in parts.items()]

    def _part(self, part: str, names: list[str]) -> dict:
        found = [values for name in names if (values := self.of(name)) is not None]
        shapes = [self.entries[name].sums.shape for name in names]
        looks = np.array([_looks(values.ravel().astype(np.float64)) for values in found] or [[0, 1, 0]])
        facts = {"part": part, "tensors": len(names), "experts": max(n for n, _ in shapes)}
        facts |= {"cols": max(cols for _, cols in shapes)}
        facts |= {"rows": int(min(self.entries[name].counts.max() for name in names))}
        return facts | dict(zip(("mean", "evenness", "heaviest"), looks.mean(0).tolist(), strict=True))

    def never_chosen(self) -> dict[str, int]:
        """How many experts of each mixture met no row, where there are any."""
        missing = {name: int((entry.counts == 0).sum()) for name, entry in self.entries.items()}
        return {name: count for name, count in missing.items() if count}


def read(path: str | os.PathLike, chunk_size: int = CHUNK) -> Importance:
    """The importance in a file of either form; chunk_size: of a .dat file, which does not say it.

    Raises not_found, not_imatrix, truncated, bad_count, bad_string, duplicate_tensor, missing_tensor, missing_key,
    shape_mismatch, numeric, and what a damaged GGUF file raises.
    """
    source = open_source(path)
    gguf = open_gguf(path) if bytes(source.bytes[:4]) == MAGIC else None
    try:
        return _from_gguf(gguf) if gguf else _Dat(source).read(chunk_size)
    except Gemma4qError as error:
        raise Gemma4qError(error.kind, f"{source.path.name}: {error.message}") from None


def write(path: str | os.PathLike, importance: Importance) -> None:
    """Writes llama.cpp's GGUF form, sums as float32; the file appears when it is whole, in the place of an older one.

    Raises what `check_target` and `convert.output.write_files` raise.
    """
    path = Path(path)
    check_target(path)
    metadata: dict[str, object] = {
        "general.type": "imatrix",
        DATASETS: importance.datasets,
        CHUNKS: importance.chunks,
        CHUNK_SIZE: importance.chunk_size,
    }
    if importance.origin:
        metadata[ORIGIN] = importance.origin
    tensors = []
    for name, entry in sorted(importance.entries.items()):
        _check_values(name, "sum", entry.sums, LARGEST)
        counts = entry.counts[:, None].astype(np.float32)
        tensors.append(TensorData.of(name + SUMS, TensorType.F32, entry.sums.shape, entry.sums.astype(np.float32)))
        tensors.append(TensorData.of(name + COUNTS, TensorType.F32, counts.shape, counts))
    output.write_files([output.Planned(path, metadata, {}, tensors)], inputs=())


def check_target(path: Path, inputs: Iterable[int] = ()) -> None:
    """Whether a file can be written: fails now, not after hours. `inputs`: descriptors of files that must stay.

    Raises not_imatrix where the name is that of another sort of GGUF file, as a model's, and as `convert.output`.
    """
    output.check_target(path, inputs)
    try:
        part, file = output.open_part(path)
        file.close()
        part.unlink()
    except OSError as error:
        raise output.explained(error, path) from None
    if path.exists() and path.stat().st_size and open_gguf(path).metadata.get("general.type") != "imatrix":
        raise Gemma4qError("not_imatrix", f"{path} exists and is no importance matrix: choose another name")


def merge(parts: Iterable[Importance]) -> Importance:
    """Sums and counts added, tensor by tensor; datasets in order, chunks as many as all of the first's size.

    A mixture of which an old .dat file knows one count has that count for all experts. Raises `shape_mismatch`.
    """
    parts = list(parts)
    entries: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.entries.items():
            entries[name] = _added(name, entries[name], entry) if name in entries else entry
    size = parts[0].chunk_size
    chunks = min(sum(-(-part.chunks * part.chunk_size // size) for part in parts), MOST_CHUNKS)
    return Importance(entries, tuple(name for part in parts for name in part.datasets), chunks, size)


def _added(name: str, a: Entry, b: Entry) -> Entry:
    if a.sums.size != b.sums.size or (a.sums.shape != b.sums.shape and 1 not in (len(a.sums), len(b.sums))):
        shapes = f"{list(a.sums.shape)} and {list(b.sums.shape)}"
        raise Gemma4qError("shape_mismatch", f"{name}: of shapes {shapes}: these are not of one model")
    n = max(len(a.sums), len(b.sums))
    a, b = _parted(a, n), _parted(b, n)
    return Entry(a.sums + b.sums, a.counts + b.counts)


def _parted(entry: Entry, n: int) -> Entry:
    """One long row as the rows of n experts, all of them counted alike."""
    return entry if len(entry.sums) == n else Entry(entry.sums.reshape(n, -1), np.repeat(entry.counts, n))


def _from_gguf(gguf: GGUF) -> Importance:
    names = [name.removesuffix(SUMS) for name in gguf.tensors if name.endswith(SUMS)]
    if gguf.metadata.get("general.type") not in ("imatrix", None) or not names:
        raise Gemma4qError("not_imatrix", "this GGUF file holds no importance matrix")
    entries = {}
    for name in names:
        if name + COUNTS not in gguf.tensors:
            raise Gemma4qError("missing_tensor", f"{name + COUNTS} is not in the file")
        entries[name] = _entry(name, _floats(gguf.tensors[name + SUMS]), _floats(gguf.tensors[name + COUNTS]))
    if alone := {name.removesuffix(COUNTS) for name in gguf.tensors if name.endswith(COUNTS)} - set(names):
        raise Gemma4qError("missing_tensor", f"{min(alone) + SUMS} is not in the file")
    chunks, chunk_size = (_whole(gguf, key) for key in (CHUNKS, CHUNK_SIZE))
    datasets, origin = gguf.metadata.get(DATASETS), gguf.metadata.get(ORIGIN, "")
    if not isinstance(datasets, StringArray):
        raise Gemma4qError("missing_key" if datasets is None else "bad_type", f"{DATASETS}: a list of names is wanted")
    names = tuple(raw.decode("utf-8", "replace") for raw in datasets)
    return Importance(entries, names, chunks, max(chunk_size, 1), origin if isinstance(origin, str) else "")


def _looks(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, evenness and share of the heaviest hundredth."""
    total, count = values.sum(), len(values)
    if not total:
        return 0.0, 1.0, 0.0
    shares = values[values > 0] / total
    entropy = -(shares * np.log2(shares)).sum()
    heaviest = np.sort(values)[-max(1, count // 100) :].sum()
    return total / count, entropy / np.log2(count) if count > 1 else 1.0, heaviest / total


def _whole(gguf: GGUF, key: str) -> int:
    value = gguf.metadata.get(key)
    if value is None:
        raise Gemma4qError("missing_key", f"{key} is not in the file")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_CHUNKS:
        raise Gemma4qError("bad_type", f"{key} must be a whole number below 2^32")
    return value


def _floats(tensor: Tensor) -> np.ndarray:
    if tensor.type != TensorType.F32:
        raise Gemma4qError("bad_tensor_type", f"{tensor.name} must be F32")
    return np.frombuffer(tensor.data.tobytes(), "<f4").reshape(tensor.shape)


def _entry(name: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    """Values of a file as an entry, once nothing is wrong with them; counts that are no whole numbers are rounded."""
    _check_values(name, "sum", sums, LARGEST)
    _check_values(name, "count", counts, MOST_COUNTED)
    n = counts.size
    if sums.size % n or (n > 1 and n != sums.size // sums.shape[-1]):
        raise Gemma4qError("shape_mismatch", f"{name}: {n} counts for sums of shape {list(sums.shape)}")
    return Entry(sums.reshape(n, -1).astype(np.float64), np.rint(counts.ravel()).astype(np.int64))


def _check_values(name: str, what: str, values: np.ndarray, most: float) -> None:
    bad = np.flatnonzero(~((values >= 0) & (values <= most)))
    if len(bad):
        raise Gemma4qError("numeric", f"{name}: {what} {bad[0]} is {values.ravel()[bad[0]]:g}")


class _Dat:
    """An old file being read: a position that never passes the end. It has no magic: its first words must be sound."""

    def __init__(self, source: Source):
        self.source, self.view, self.position = source, memoryview(source.bytes), 0

    def read(self, chunk_size: int) -> Importance:
        head = bytes(self.view[:64])
        count = self.number("the number of entries") if len(head) >= 4 else 0
        if not 1 <= count <= MOST_ENTRIES or count * LEAST_ENTRY_BYTES > self.left:
            raise Gemma4qError("not_imatrix", f"no importance matrix: {what_it_is(head)}")
        entries: dict[str, Entry] = {}
        for _ in range(count):
            name, entry = self.entry(chunk_size)
            if name in entries:
                raise Gemma4qError("duplicate_tensor", f"{name} appears twice")
            entries[name] = entry
        chunks, datasets = 0, ()
        if self.left:  # the oldest files end here
            chunks = max(self.number("the number of chunks"), 0)
            datasets = (self.text("the data set's name").decode("utf-8", "replace"),) if self.left else ()
        return Importance(entries, datasets, chunks, chunk_size)

    @property
    def left(self) -> int:
        return len(self.view) - self.position

    def take(self, count: int, what: str) -> memoryview:
        if not 0 <= count <= self.left:
            raise Gemma4qError("truncated", f"the file ends at byte {len(self.view)}, inside {what}")
        self.position += count
        return self.view[self.position - count : self.position]

    def number(self, what: str) -> int:
        return struct.unpack("<i", self.take(4, what))[0]

    def text(self, what: str) -> bytes:
        return bytes(self.take(self.number(what), what))

    def entry(self, chunk_size: int) -> tuple[str, Entry]:
        """Values are means times `calls`, the chunks: as sums of `calls` chunks they can be added to others."""
        at = self.position
        raw = self.text(f"the name at byte {at}")
        if not _NAME.fullmatch(raw):
            raise Gemma4qError("bad_string", f"the name at byte {at} is {raw[:70]!r}: 1 to 63 letters, digits, . _ -")
        name = raw.decode("ascii")
        calls, count = self.number(name), self.number(name)
        if calls < 0 or count < 1 or 4 * count > self.left:
            raise Gemma4qError("bad_count", f"{name} claims {count} values of {calls} chunks; {self.left} bytes follow")
        calls = max(calls, 1)  # a file that counted none holds means
        values = np.frombuffer(self.take(4 * count, name), "<f4")
        entry = _entry(name, values[None], np.array([calls], np.float64))
        return name, replace(entry, sums=entry.sums * chunk_size, counts=entry.counts * chunk_size)
