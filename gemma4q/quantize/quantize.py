"""A model file in other types: everything is decided and looked at before a byte is written.

`planned` follows a mixture and what a person asks for beyond it; `rewritten` takes the type of each tensor as given,
wherever that comes from, and is what all else stands on.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from ..abi import BLOCKS, TensorType
from ..convert.output import Late, Planned, Progress, write_files
from ..convert.split import SPLIT_TYPES, parts_of, stem_of
from ..errors import Gemma4qError
from ..gguf.reader import GGUF, Tensor, open_gguf
from ..gguf.types import TENSOR_TYPES, type_name
from ..gguf.writer import TensorData
from ..model.config import read_config
from .grid import FOUR_BITS, Grid
from .mixtures import ALIASES, HEAD, MIXTURES, TABLES, Mixture, Traits, asked, fitting, wishes
from .overrides import Overrides, Setting, changed
from .stream import Importance, Stream

QUANTIZATION_VERSION = 2
RECIPE = "gemma4q.recipe"  # the key of the recipe that chose a file's types
OF_ANOTHER = ("quantize.imatrix.", RECIPE, "gemma4q.quality.")  # how keys begin that say how this very file was made


@dataclass(frozen=True)
class Change:
    """One tensor: as it is, its type to be, and the type that was wished for, which its rows may not be blocks of."""

    tensor: Tensor
    type: int
    wish: int

    @property
    def data(self) -> TensorData:
        """The tensor to be, without its bytes."""
        return TensorData(self.tensor.name, self.type, self.tensor.shape, tuple)

    @property
    def is_rounded(self) -> bool:
        return self.type != self.tensor.type


@dataclass(frozen=True)
class Quantization:
    """What would be written: `changes` has every tensor, in the order of the file."""

    gguf: GGUF
    files: list[Planned]
    changes: list[Change]
    importance: Importance | None
    grid: Grid

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(c.data.nbytes for c in self.changes) / sum(prod(c.tensor.shape) for c in self.changes)

    @property
    def fallbacks(self) -> list[Change]:
        """Tensors whose rows are no whole blocks of the type that was wished for."""
        return [change for change in self.changes if change.type != change.wish]

    @property
    def on_grid(self) -> frozenset[str]:
        """Names of tensors that would get four bits and have Q4_0's grid, which Q4_0 keeps exactly."""
        four = [change.tensor for change in self.changes if change.is_rounded and change.type in FOUR_BITS]
        return frozenset(tensor.name for tensor in four if self.grid.has(tensor))

    @property
    def kept(self) -> list[str]:
        """Tensors that get the scales and codes of Q4_0 that they were trained with."""
        on_grid = self.on_grid
        return [c.tensor.name for c in self.changes if c.tensor.name in on_grid and c.type == TensorType.Q4_0]

    @property
    def unweighed(self) -> list[str]:
        """Matrices that are rounded to blocks without importance, though there is some for others.

        A table alone, of which rows are looked up and no columns multiplied, has none.
        """
        if self.importance is None:
            return []
        rounded = [c.tensor for c in self.changes if c.is_rounded and BLOCKS[c.type][0] > 1]
        return [t.name for t in rounded if t.name != TABLES[1] and self.importance.of(t.name, t.shape[-1]) is None]

    def retyped(self, types: Mapping[str, int], settings: Iterable[Setting] = ()) -> "Quantization":
        """The same with other types, all of which fit the rows, and some keys set. Raises bad_option for a setting."""
        changes = [Change(c.tensor, types[c.tensor.name], types[c.tensor.name]) for c in self.changes]
        data, settings, files = {c.tensor.name: c.data for c in changes}, list(settings), []
        for number, file in enumerate(self.files):
            metadata, kinds = changed(file.metadata, file.types, () if number else settings)
            tensors = [data[tensor.name] for tensor in file.tensors]
            files.append(Planned(file.path, metadata, kinds, tensors))
        return replace(self, files=files, changes=changes)

    def alone(self, path: Path) -> "Quantization":
        """The same as one file of this name."""
        first, tensors = self.files[0], [change.data for change in self.changes]
        metadata = {key: value for key, value in first.metadata.items() if key not in SPLIT_TYPES}
        kinds = {key: first.types[key] for key in metadata}
        return replace(self, files=[Planned(path, metadata, kinds, tensors)])

    def write(self, progress: Progress | None = None, threads: int | None = None, late: Late | None = None) -> None:
        """Writes all files or none, on all CPUs we may run on or so many threads. `late`: as for `write_files`.

        Raises the kinds of `write_files`; no_native; numeric for a value that is not finite or too large for its type;
        model_changed.
        """
        types = {change.tensor.name: change.type for change in self.changes}
        tensors = [self.gguf.tensors[data.name] for file in self.files for data in file.tensors]
        with closing(Stream(self.gguf, tensors, types, self.importance, threads, frozenset(self.kept))) as stream:
            data = {tensor.name: tensor for tensor in stream.data()}
            files = [replace(file, tensors=[data[tensor.name] for tensor in file.tensors]) for file in self.files]
            write_files(files, [source.fileno for source in self.gguf.files], progress, late)


def planned(
    path: str | os.PathLike,
    to: str | os.PathLike | None,
    mixture: Mixture,
    overrides: Overrides = Overrides(),
    settings: Iterable[Setting] = (),
    importance: Importance | None = None,
    importance_keys: Iterable[Setting] = (),
    keep_split: bool = False,
    allow_requantize: bool = False,
    label: str | None = None,
) -> Quantization:
    """A model file in the types of a mixture. `to`: a file, a directory, or None for a name beside the model, which
    ends in `label`, or in the mixture's name.

    Raises the reader's kinds, those of `read_config`, bad_option for a setting, and those of `rewritten`.
    """
    gguf, settings = open_gguf(path), list(settings)
    to = _target(gguf.path, to, label or mixture.name)
    if mixture.base is None:
        return rewritten(gguf, to, {name: t.type for name, t in gguf.tensors.items()}, settings, keep_split=keep_split)
    if gguf.metadata.get("general.architecture") == "clip":
        remedy = "`gemma4q convert --mmproj --outtype` chooses their type, COPY copies them"
        raise Gemma4qError("bad_arch", f"{gguf.path} holds encoders, which have no mixtures: {remedy}")
    metadata, kinds = changed(gguf.metadata, gguf.types, settings)
    traits = Traits.of(read_config(replace(gguf, metadata=metadata, types=kinds)))
    grid = Grid(gguf)
    wished = wishes(gguf.tensors, traits, mixture, overrides, importance is not None)
    if mixture.base == TensorType.Q4_0:
        wished |= _larger_for_nothing(gguf, grid, wished, overrides)
    named = [("general.quantization_version", QUANTIZATION_VERSION), ("general.file_type", mixture.file_type)]
    gguf = replace(gguf, metadata={k: value for k, value in gguf.metadata.items() if not k.startswith(OF_ANOTHER)})
    settings = [*named, *importance_keys, *settings]
    return rewritten(gguf, to, wished, settings, importance, keep_split, allow_requantize, grid)


def rewritten(
    gguf: GGUF,
    to: Path,
    types: Mapping[str, int],
    settings: Iterable[Setting] = (),
    importance: Importance | None = None,
    keep_split: bool = False,
    allow_requantize: bool = False,
    grid: Grid | None = None,
) -> Quantization:
    """An open model with a type for every tensor, or the next one that fits its rows, and some keys set.

    `keep_split`: in the parts that the model is in, else in one file. Raises requantize where blocks would be rounded
    again, bad_quant_type where they are not read, shape_mismatch where importance is another model's, missing_tensor.
    """
    if not gguf.tensors:
        raise Gemma4qError("missing_tensor", f"{gguf.path} holds no tensors")
    changes = [Change(t, fitting(types[t.name], t.shape[-1]), types[t.name]) for t in gguf.tensors.values()]
    check_sources([change.tensor for change in changes if change.is_rounded], allow_requantize)
    if importance is not None:
        for tensor in (change.tensor for change in changes if change.is_rounded):
            _check_importance(tensor, importance.of(tensor.name, tensor.shape[-1]))
    metadata = {key: value for key, value in gguf.metadata.items() if key not in SPLIT_TYPES}
    metadata, kinds = changed(metadata, {key: gguf.types[key] for key in metadata}, settings)
    parts = range(len(gguf.files)) if keep_split else range(1)
    groups = [[c.data for c in changes if not keep_split or c.tensor.file == part] for part in parts]
    return Quantization(gguf, parts_of(to, metadata, kinds, groups), changes, importance, grid or Grid(gguf))


def _larger_for_nothing(gguf: GGUF, grid: Grid, wished: Mapping[str, int], overrides: Overrides) -> dict[str, int]:
    """Q4_0 for what the mixture of that name would round to more bits, though Q4_0 keeps it exactly."""
    tied = HEAD not in gguf.tensors
    free = [t for t in gguf.tensors.values() if asked(t.name, tied, overrides) is None and wished[t.name] != t.type]
    larger = [tensor for tensor in free if wished[tensor.name] != TensorType.Q4_0]
    return {tensor.name: TensorType.Q4_0 for tensor in larger if grid.has(tensor)}


def check_sources(tensors: Iterable[Tensor], allow_requantize: bool) -> None:
    """That tensors can be rounded. Raises requantize, bad_quant_type."""
    tensors = list(tensors)
    for tensor in tensors:
        if not tensor.readable:
            fault = f"{tensor.name} is {type_name(tensor.type)}, which gemma4q does not read: start from another file"
            raise Gemma4qError("bad_quant_type", fault)
    again = [tensor for tensor in tensors if TENSOR_TYPES[tensor.type][1] > 1]
    if again and not allow_requantize:
        more = f" and {len(again) - 1} more are" if len(again) > 1 else " is"
        remedy = "start from the file in BF16, F16 or F32, or take the loss with --allow-requantize"
        fault = f"{again[0].name}{more} quantised already ({type_name(again[0].type)}), and would be rounded twice"
        raise Gemma4qError("requantize", f"{fault}: {remedy}")


def _check_importance(tensor: Tensor, weights: np.ndarray | None) -> None:
    wanted = (prod(tensor.shape[:-2]), tensor.shape[-1])
    if weights is None:
        return
    if weights.shape != wanted:
        found, want = (" x ".join(map(str, shape)) for shape in (weights.shape, wanted))
        fault = f"{tensor.name} has importance of {found} columns; want {want}: it is another model's"
        raise Gemma4qError("shape_mismatch", fault)


def _target(path: Path, to: str | os.PathLike | None, label: str) -> Path:
    """The file to write: as given, or in a directory the model's name with another type."""
    to = path.parent if to is None else Path(to)
    if not to.is_dir():
        return to
    stem = stem_of(path)
    base, dash, type = stem.rpartition("-")
    known = type.upper() in {*MIXTURES, *ALIASES}
    return to / f"{base if dash and known else stem}-{label}.gguf"
