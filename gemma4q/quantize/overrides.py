"""What a person asks for beyond the name of a mixture: types of single tensors, metadata, whose importance counts.

Owns how these words are spelt, which is llama-quantize's way, and what is wrong with them; `mixtures` says which word
wins. Two things differ from there: a type that is asked for is given under --pure, F16, BF16 and F32 too, and a regular
expression may hold upper case and `=`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..abi import BLOCKS, TensorType
from ..errors import Gemma4qError
from ..gguf.types import INTEGERS, SCALARS, TENSOR_TYPES, ValueType, readable_types

if TYPE_CHECKING:
    from .importance import Importance

Pattern = tuple[re.Pattern[str], TensorType]
OF_THE_FILE = ("general.alignment", "split.no", "split.count", "split.tensors.count")  # say nothing about the model


@dataclass(frozen=True)
class Overrides:
    """`output`: the head's type, also of the tables where the head is one of them; `embedding`: the tables' alone."""

    pure: bool = False
    leave_output: bool = False
    output: TensorType | None = None
    embedding: TensorType | None = None
    patterns: tuple[Pattern, ...] = ()

    def named(self, name: str) -> TensorType | None:
        """The type of the first pattern that is found in a tensor's name."""
        return next((type for pattern, type in self.patterns if pattern.search(name)), None)

    def idle(self, names: Iterable[str]) -> list[str]:
        """The patterns that are found in no name: slips, perhaps."""
        names = list(names)
        return [pattern.pattern for pattern, _ in self.patterns if not any(map(pattern.search, names))]


def tensor_type(name: str) -> TensorType:
    """A type by its name, in any case. Raises bad_quant_type."""
    upper = name.upper()
    if upper in TensorType.__members__ and TensorType[upper] in BLOCKS:
        return TensorType[upper]
    known = any(upper == other for other, _, _ in TENSOR_TYPES.values())
    fault = "gemma4q does not write this type" if known else "there is no such type"
    raise Gemma4qError("bad_quant_type", f"{name}: {fault}: choose {readable_types()}")


def pattern(text: str) -> Pattern:
    """`REGEX=TYPE`, found anywhere in a tensor's name. Raises bad_option, bad_quant_type."""
    regex, equals, name = text.rpartition("=")
    if not (regex and equals and name):
        raise Gemma4qError("bad_option", f"{text!r} is not of the form REGEX=TYPE, as attn_v=q8_0")
    try:
        return re.compile(regex, re.IGNORECASE), tensor_type(name)
    except re.error as error:
        raise Gemma4qError("bad_option", f"{regex!r} is no regular expression: {error}") from None


def pattern_file(path: Path) -> list[Pattern]:
    """The words of a text file, each `REGEX=TYPE`. Raises as `pattern`, and not_readable."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Gemma4qError("not_readable", f"{path}: {reason}") from None
    return [pattern(word) for word in text.split()]


Value = bool | int | float | str
Setting = tuple[str, Value]
KINDS = {"int": int, "float": float, "bool": {"true": True, "false": False}.__getitem__, "str": str}
LARGEST = float(np.finfo(np.float32).max)
USUAL = {bool: ValueType.BOOL, int: ValueType.U32, float: ValueType.F32, str: ValueType.STRING}


def setting(text: str) -> Setting:
    """`KEY=TYPE:VALUE` as a key of the metadata and its value. Raises bad_option."""
    found = re.fullmatch(r"([!-<>-~]+)=(int|float|bool|str):(.*)", text, re.DOTALL)
    if not found:
        forms = "KEY=TYPE:VALUE with TYPE int, float, bool or str, as general.name=str:Mine"
        raise Gemma4qError("bad_option", f"{text!r} is not of the form {forms}")
    key, kind, value = found.groups()
    if key in OF_THE_FILE:
        raise Gemma4qError("bad_option", f"{key} describes the file, not the model, and is set by gemma4q alone")
    try:
        return key, KINDS[kind](value)
    except (ValueError, KeyError):
        raise Gemma4qError("bad_option", f"{key}: {value!r} is no {kind}") from None


def changed(
    metadata: Mapping[str, object], types: Mapping[str, tuple[ValueType, ...]], settings: Iterable[Setting]
) -> tuple[dict[str, object], dict[str, tuple[ValueType, ...]]]:
    """Metadata and their types after some settings; a key that was an integer keeps its width. Raises bad_option."""
    values, kinds = dict(metadata), dict(types)
    for key, value in settings:
        kind, before = USUAL[type(value)], kinds.get(key, (None,))[0]
        if type(value) is int:
            kind = before if before in INTEGERS else kind
            _check_integer(key, value, kind)
        elif type(value) is float and not abs(value) <= LARGEST:
            raise Gemma4qError("bad_option", f"{key}: {value} is no number that F32 holds")
        values[key], kinds[key] = value, (kind,)
    return values, kinds


def selected(importance: "Importance", include: Iterable[str], exclude: Iterable[str]) -> "Importance":
    """The importance of tensors whose names hold one of `include`, if there are any, and none of `exclude`.

    Raises bad_option where nothing is left.
    """
    include, exclude = tuple(include), tuple(exclude)
    kept = {
        name: entry
        for name, entry in importance.entries.items()
        if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)
    }
    if not kept:
        raise Gemma4qError("bad_option", "--include-weights and --exclude-weights leave nothing of the importance")
    return replace(importance, entries=kept)


def importance_keys(importance: "Importance", path: str) -> list[Setting]:
    """What a file says about the importance that it was made with, as llama-quantize says it."""
    keys: list[Setting] = [("quantize.imatrix.file", path)]
    keys += [("quantize.imatrix.dataset", name) for name in importance.datasets[:1]]
    keys.append(("quantize.imatrix.entries_count", len(importance.entries)))
    return keys + [("quantize.imatrix.chunks_count", importance.chunks)] * (importance.chunks > 0)


def _check_integer(key: str, value: int, kind: ValueType) -> None:
    size, signed = 8 * SCALARS[kind].itemsize, kind.name.startswith("I")
    low, high = (-(1 << size - 1), (1 << size - 1) - 1) if signed else (0, (1 << size) - 1)
    if not low <= value <= high:
        raise Gemma4qError("bad_option", f"{key}: {value} is not in {low} .. {high}, which {kind.name} holds")
