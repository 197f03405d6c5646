"""The quality card: what a model file says of how far it lies from the file that it was made from.

Owns the keys, of which each is `gemma4q.quality.` and

    tool, recipe                            who made the file, and in which mixture or by which recipe
    base, base_type, base_sha256            the file it was made from, and which type most of its matrices have
    imatrix, imatrix_sha256                 the importance it was made with; missing: none
    conversations, conversations_sha256     on which it was measured, at every token of the model's turns
    texts, tokens                           U32: how many were measured on
    kl_divergence, same_top_1               F32: KL(base || model) in nats a token, and a share of 1;
      and each with .low, .high             its 95 % interval over texts, NaN where one text tells nothing of that
    kinds                                   kinds of text, and of every one in an array
    kinds.texts, kinds.kl_divergence, ...   all of these figures

Names of files are without their folders, digests are of their bytes. How it is measured is `quality`'s.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any

import numpy as np

from ..errors import Gemma4qError
from ..gguf.strings import StringArray
from .texts import KIND

PREFIX = "gemma4q.quality."
WORDS = ("tool", "recipe", "base", "base_type", "base_sha256", "conversations", "conversations_sha256")
OPTIONAL = ("imatrix", "imatrix_sha256")
COUNTS = ("texts", "tokens")
FIGURES = {"kl_divergence": "divergence", "same_top_1": "same_top"}  # as `divergence.summary` has them
EDGES = {"": "value", ".low": "low", ".high": "high"}
LONGEST_WORD, MOST_KINDS = 200, 100


@dataclass(frozen=True)
class Card:
    """What stands in a file. `all`, and `kinds` by name: {texts, tokens, divergence, same_top} as `evaluate.report` has
    them, the latter two {value, low, high}, None where something is not known."""

    tool: str
    recipe: str
    base: str
    base_type: str
    base_sha256: str
    conversations: str
    conversations_sha256: str
    imatrix: str | None
    imatrix_sha256: str | None
    all: dict[str, Any]
    kinds: dict[str, dict[str, Any]]

    def keys(self) -> dict[str, Any]:
        """For a file's metadata. Whatever the figures are, they take as many bytes."""
        words = {name: getattr(self, name) for name in (*WORDS, *OPTIONAL)}
        found: dict[str, Any] = {name: word for name, word in words.items() if word is not None}
        columns = {name: [row[name] for row in (self.all, *self.kinds.values())] for name in COUNTS}
        for key, name in FIGURES.items():
            for edge, place in EDGES.items():
                values = [row[name][place] for row in (self.all, *self.kinds.values())]
                columns[key + edge] = [nan if value is None else value for value in values]
        found |= {key: column[0] for key, column in columns.items()} | {"kinds": list(self.kinds)}
        for key, column in columns.items():
            found[f"kinds.{key}"] = np.array(column[1:], "<u4" if key in COUNTS else "<f4")
        return {PREFIX + key: value for key, value in found.items()}

    def described(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def without(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata, or their types, but for the keys of a card."""
    return {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}


def read(metadata: Mapping[str, Any]) -> Card | None:
    """The card among a file's keys; None: there is none. Raises `bad_card` for one that no program wrote like this."""
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    if not found:
        return None
    words = {name: _word(found, name) for name in WORDS}
    words |= {name: _word(found, name) if name in found else None for name in OPTIONAL}
    kinds = _kinds(found)
    single = {key: [value] for key, value in found.items() if not key.startswith("kinds")}
    rows = {kind: _row(found, "kinds.", at, len(kinds)) for at, kind in enumerate(kinds)}
    return Card(**words, all=_row(single, "", 0, 1), kinds=rows)


def _bad(key: str, what: str) -> Gemma4qError:
    return Gemma4qError("bad_card", f"{PREFIX}{key} {what}")


def _word(found: Mapping[str, Any], key: str) -> str:
    word = found.get(key)
    if not isinstance(word, str) or len(word) > LONGEST_WORD:
        raise _bad(key, "is missing" if word is None else f"is no text of at most {LONGEST_WORD} characters")
    return word


def _kinds(found: Mapping[str, Any]) -> list[str]:
    array = found.get("kinds")
    if not isinstance(array, StringArray) or not 0 < len(array) <= MOST_KINDS:
        raise _bad("kinds", f"is no array of 1 to {MOST_KINDS} names")
    names = [name.decode(errors="replace") for name in array]
    if len(set(names)) < len(names) or not all(map(KIND.fullmatch, names)):
        raise _bad("kinds", "holds what is no short name, or one twice")
    return names


def _row(found: Mapping[str, Any], prefix: str, at: int, length: int) -> dict[str, Any]:
    """The figures in place `at` of arrays of `length`."""
    row: dict[str, Any] = {}
    for key in COUNTS:
        row[key] = _item(found, prefix + key, at, length, int, 1, 1 << 63)
    for key, name in FIGURES.items():
        most = 1.0 if name == "same_top" else float("inf")
        row[name] = {
            place: _item(found, prefix + key + edge, at, length, float, 0.0, most) for edge, place in EDGES.items()
        }
    return row


def _item(
    found: Mapping[str, Any], key: str, at: int, length: int, kind: type, least: float, most: float
) -> int | float | None:
    """A number between two others; None for one that is not finite."""
    array = found.get(key)
    if not isinstance(array, list | np.ndarray) or len(array) != length:
        raise _bad(key, "is missing" if array is None else "is no array as long as kinds")
    value = array[at].item() if isinstance(array, np.ndarray) else array[at]
    if type(value) is not kind:
        raise _bad(key, f"is no {'number of texts or tokens' if kind is int else 'float'}")
    if not isfinite(value):
        return None
    if not least <= value <= most:
        raise _bad(key, f"is {value:g}, which cannot be")
    return value
