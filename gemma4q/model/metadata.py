"""Metadata keys as a table says they must be: present, of the right type, in range; and nothing is coerced.

Owns how a table of keys is read, not which keys there are (`hparams`, `vocabulary`). Faults are yielded, not raised:
loading raises the first, `check` shows them all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Gemma4qError
from ..gguf.reader import GGUF
from ..gguf.types import INTEGERS, ValueType

# What each kind of key may be written as. An integer may have any width, one of an array 32 bits; all else is itself.
KINDS = {
    "integer": INTEGERS,
    "int32": frozenset({ValueType.I32, ValueType.U32}),
    "float": frozenset({ValueType.F32}),
    "bool": frozenset({ValueType.BOOL}),
    "string": frozenset({ValueType.STRING}),
}


@dataclass(frozen=True)
class Key:
    """A key, its kind and its range (both ends included).

    `default`: what an absent key means; None: it must be there, unless `optional`, and is then absent from the result.
    `length`: None for a single value; "layers" for one that may be an array with an entry a layer instead; any other
    word for an array, as long as the number that goes by that word says, or of any length for "any".
    """

    name: str
    kind: str
    low: float = -math.inf
    high: float = math.inf
    multiple: int = 1
    default: Any = None
    optional: bool = False
    length: str | None = None


Faults = Iterator[Gemma4qError]


def read(gguf: GGUF, prefix: str, keys: tuple[Key, ...], lengths: dict[str, int], out: dict[str, Any]) -> Faults:
    """Puts the value of every key into `out`, by its name without `prefix`, and yields what is wrong.

    A "layers" key arrives as a list with an entry a layer, an array as it was read. Faulty keys are left out.
    """
    for key in keys:
        name = prefix + key.name
        if name not in gguf.types:
            if key.default is not None:
                out[key.name] = [key.default] * lengths["layers"] if key.length == "layers" else key.default
            elif not key.optional:
                yield Gemma4qError("missing_key", f"{name} is not in the file")
            continue
        fault = _wrong_type(name, key, gguf.types[name]) or _wrong_value(name, key, gguf.metadata[name], lengths)
        if fault:
            yield fault
            continue
        value = gguf.metadata[name]
        if key.length == "layers":
            value = value.tolist() if isinstance(value, np.ndarray) else [value] * lengths["layers"]
        out[key.name] = value


def _wrong_type(name: str, key: Key, types: tuple[ValueType, ...]) -> Gemma4qError | None:
    is_array = types[0] == ValueType.ARRAY
    fits = is_array if key.length not in (None, "layers") else not is_array or key.length == "layers"
    if fits and types[-1] in KINDS[key.kind]:
        return None
    found = " of ".join(t.name.lower() for t in types)
    a_layer = {None: key.kind, "layers": f"{key.kind}, or an array of one a layer"}
    wanted = a_layer.get(key.length, f"an array of {key.kind}s")
    return Gemma4qError("bad_type", f"{name} is {found}; want {wanted}")


def _wrong_value(name: str, key: Key, value: Any, lengths: dict[str, int]) -> Gemma4qError | None:
    if key.length and not np.isscalar(value):
        wanted = lengths.get(key.length, len(value))
        if len(value) != wanted:
            return Gemma4qError("bad_array", f"{name} has {len(value)} entries; want {wanted}")
    if key.kind not in ("integer", "int32", "float") or (key.low, key.high, key.multiple) == (-math.inf, math.inf, 1):
        return None
    numbers = np.atleast_1d(value)
    good = (numbers >= key.low) & (numbers <= key.high) & (numbers % key.multiple == 0 if key.multiple > 1 else True)
    if good.all():
        return None
    wanted = f"{key.low:g} to {key.high:g}" + (f", a multiple of {key.multiple}" if key.multiple > 1 else "")
    return Gemma4qError("bad_hparam", f"{name} is {numbers[~good][0]}; want {wanted}")
