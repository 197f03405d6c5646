"""llama.cpp's mixtures: the type that each tensor of a Gemma 4 gets under a name as Q4_K_M.

Owns the table of names and the order in which wishes win; what a person asks for beyond a name is `overrides`'.
Tests hold the types to llama.cpp's own answers in tests/data/mixtures.json.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from ..abi import BLOCKS, TensorType
from ..errors import Gemma4qError
from ..model.config import Config
from .overrides import Overrides

T = TensorType


class Stored(Protocol):
    """What is asked of a tensor: `shape`, slowest dimension first, and ggml's number of its type."""

    shape: tuple[int, ...]
    type: int


@dataclass(frozen=True)
class Traits:
    """What mixtures ask of a model. `grouped`: four query heads or more of layer 0 share their keys and values."""

    layers: int
    grouped: bool
    experts: int

    @classmethod
    def of(cls, config: Config) -> "Traits":
        first = config.layers[0]
        return cls(len(config.layers), first.heads // first.kv_heads >= 4, max(la.experts for la in config.layers))


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: number `index` of `count` of its kind."""

    index: int
    count: int
    grouped: bool
    importance: bool


Rule = tuple[TensorType, Callable[[Place], bool]]  # the type, where this holds


def everywhere(_: Place) -> bool:
    return True


def grouped(place: Place) -> bool:
    return place.grouped


def first(n: int) -> Callable[[Place], bool]:
    return lambda place: place.index < n


def first_part(n: int) -> Callable[[Place], bool]:
    return lambda place: place.index < place.count // n


def outer(place: Place) -> bool:
    """The first and the last eighth, and every third between."""
    i, n = place.index, place.count
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def early_if_measured(place: Place) -> bool:
    return place.importance and first_part(8)(place)


def early_unless_measured(place: Place) -> bool:
    return not place.importance and first_part(8)(place)


@dataclass(frozen=True)
class Mixture:
    """A name, what general.file_type calls it, the type of most tensors, and by kind of tensor those that differ.

    `dense`: the type of all that is no expert, where that is another one. `base` None: each tensor stays as it is.
    """

    name: str
    file_type: int | None
    base: TensorType | None
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    dense: TensorType | None = None


IQ4_RULES = {"attn_v": ((T.Q5_K, grouped),), "ffn_down": ((T.Q5_K, early_unless_measured),)}
OUTER_RULES = {"attn_v": ((T.Q6_K, outer),), "ffn_down": ((T.Q6_K, outer),)}
MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("Q2_K", 10, T.Q2_K, {
            "attn_v": ((T.Q4_K, grouped), (T.Q3_K, everywhere)),
            "attn_output": ((T.Q3_K, everywhere),),
            "ffn_down": ((T.Q3_K, everywhere),),
        }),
        Mixture("Q2_K_S", 21, T.Q2_K, {"attn_v": ((T.Q4_K, grouped),), "ffn_down": ((T.Q4_K, first_part(8)),)}),
        Mixture("Q3_K_S", 11, T.Q3_K),
        Mixture("Q3_K_M", 12, T.Q3_K, {
            "attn_v": ((T.Q5_K, first(2)), (T.Q4_K, everywhere)),
            "attn_output": ((T.Q4_K, everywhere),),
            "ffn_down": ((T.Q5_K, first_part(16)), (T.Q4_K, everywhere)),
        }),
        Mixture("Q3_K_L", 13, T.Q3_K, dict.fromkeys(("attn_v", "attn_output", "ffn_down"), ((T.Q5_K, everywhere),))),
        Mixture("IQ4_XS", 30, T.IQ4_XS, IQ4_RULES),
        Mixture("IQ4_NL", 25, T.IQ4_NL, IQ4_RULES),
        Mixture("Q4_0", 2, T.Q4_0, {"ffn_down": ((T.Q4_1, early_if_measured),)}),
        Mixture("Q4_1", 3, T.Q4_1),
        Mixture("Q4_K_S", 14, T.Q4_K, {"attn_v": ((T.Q5_K, first(4)),), "ffn_down": ((T.Q5_K, first_part(8)),)}),
        Mixture("Q4_K_M", 15, T.Q4_K, OUTER_RULES),
        Mixture("MXFP4_MOE", 38, T.MXFP4, dense=T.Q8_0),
        Mixture("Q5_0", 8, T.Q5_0, {"ffn_down": ((T.Q5_1, early_if_measured),)}),
        Mixture("Q5_1", 9, T.Q5_1),
        Mixture("Q5_K_S", 16, T.Q5_K),
        Mixture("Q5_K_M", 17, T.Q5_K, OUTER_RULES),
        Mixture("Q6_K", 18, T.Q6_K),
        Mixture("Q8_0", 7, T.Q8_0),
        Mixture("F16", 1, T.F16),
        Mixture("BF16", 32, T.BF16),
        Mixture("F32", 0, T.F32),
        Mixture("COPY", None, None),
    )
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# llama.cpp's others, of blocks that gemma4q does not read: what comes nearest.
INSTEAD = {
    **dict.fromkeys(("Q1_0", "TQ1_0", "IQ1_S", "IQ1_M", "TQ2_0", "Q2_0", "IQ2_XXS", "IQ2_XS"), "Q2_K_S"),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), "Q2_K"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q3_K_S"),
    "IQ3_M": "Q3_K_M",
}

# Kinds of tensors by what is in their names.
KINDS = {
    "attn_v": ("attn_v.weight", "attn_qkv.weight"),
    "attn_k": ("attn_k.weight",),
    "attn_output": ("attn_output.weight",),
    "ffn_down": ("ffn_down",),
}
TABLES = ("token_embd.weight", "per_layer_token_embd.weight")
HEAD = "output.weight"
NEVER = ("_norm.weight", "ffn_gate_inp.weight", "per_layer_model_proj")  # small, and much depends on them
# With exactly eight experts attention is cheap beside them; attn_output only under these names, elsewhere `base`.
OF_EIGHT = {"attn_v": T.Q8_0, "attn_k": T.Q8_0}
OUTPUT_OF_EIGHT = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M")
# Where a row is no multiple of 256: the next type in blocks of 32.
NARROW = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}
_LAYER = re.compile(r"blk\.(\d+)\.")


def mixture(name: str) -> Mixture:
    """The mixture of a name, in any case. Raises bad_quant_type, which says what to take instead."""
    upper = name.upper()
    if upper in INSTEAD:
        fault = f"{upper}: gemma4q neither reads nor writes its blocks; {INSTEAD[upper]} comes nearest"
        raise Gemma4qError("bad_quant_type", fault)
    if ALIASES.get(upper, upper) not in MIXTURES:
        raise Gemma4qError("bad_quant_type", f"{name!r} is no type: choose {', '.join(MIXTURES)}")
    return MIXTURES[ALIASES.get(upper, upper)]


def types(
    tensors: Mapping[str, Stored], traits: Traits, mixture: Mixture, overrides: Overrides, importance: bool = False
) -> dict[str, int]:
    """The type of every tensor. `importance`: whether errors will be weighed, which a few rules ask."""
    wanted = wishes(tensors, traits, mixture, overrides, importance)
    return {name: fitting(type, tensors[name].shape[-1]) for name, type in wanted.items()}


def wishes(
    tensors: Mapping[str, Stored], traits: Traits, mixture: Mixture, overrides: Overrides, importance: bool = False
) -> dict[str, int]:
    """As `types`, before rows are asked whether they are whole blocks."""
    if mixture.base is None:
        return {name: tensor.type for name, tensor in tensors.items()}
    ruled, tied, out = _Ruled(tensors, traits, mixture, importance), HEAD not in tensors, {}
    for name in _in_order(tensors):
        type, shape = tensors[name].type, tensors[name].shape
        if is_rounded(name, shape) and not (overrides.leave_output and name == HEAD):
            asked_for = asked(name, tied, overrides)
            plain = overrides.pure or not _in_blocks(mixture.base)
            type = asked_for if asked_for is not None else mixture.base if plain else ruled.type(name)
        out[name] = type
    return {name: out[name] for name in tensors}


def asked(name: str, tied: bool, overrides: Overrides) -> TensorType | None:
    """What a person wants of a tensor beyond the mixture: the first of their words that is about it."""
    named = overrides.named(name)
    if name == TABLES[0] or (name == TABLES[1] and named is None):
        named = named if overrides.embedding is None else overrides.embedding
    if name == HEAD and overrides.output is not None:
        return overrides.output
    return overrides.output if named is None and tied and name in TABLES else named


def is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a mixture touches a tensor: the weights of matrices, but for a few small ones."""
    return name.endswith("weight") and prod(shape[:-1]) > 1 and not any(part in name for part in NEVER)


def fitting(type: int, cols: int) -> int:
    """The type itself where rows of `cols` are whole blocks of it, else its substitute, and F16 at the last."""
    for candidate in (type, NARROW.get(type, T.F16)):
        if candidate not in BLOCKS or cols % BLOCKS[candidate][0] == 0:
            return candidate
    return T.F16


def _in_order(names: Iterable[str]) -> list[str]:
    """As llama.cpp counts: what is in no layer, then layer by layer."""
    return sorted(names, key=lambda name: (int(found[1]) if (found := _LAYER.match(name)) else -1, name))


class _Ruled:
    """What a mixture's rules say, tensor by tensor in the order of layers."""

    def __init__(self, tensors: Mapping[str, Stored], traits: Traits, mixture: Mixture, importance: bool):
        self.tensors, self.traits, self.mixture, self.importance = tensors, traits, mixture, importance
        self.counts = {"attn_v": sum(_kind(name) == "attn_v" for name in tensors), "ffn_down": traits.layers}
        self.seen = dict.fromkeys(self.counts, 0)

    def type(self, name: str) -> TensorType:
        """The type of the next tensor."""
        shape, base, dense = self.tensors[name].shape, self.mixture.base, self.mixture.dense
        if name == HEAD or (name in TABLES and HEAD not in self.tensors):
            return T.Q8_0 if dense or base == T.Q8_0 else T.Q6_K
        if dense is not None:
            return base if len(shape) > 2 and shape[0] > 1 else dense
        kind = _kind(name)
        place = self.place(kind, name)
        if self.traits.experts == 8 and kind in (*OF_EIGHT, "attn_output"):
            return OF_EIGHT.get(kind, T.Q5_K if self.mixture.name in OUTPUT_OF_EIGHT else base)
        return next((type for type, holds in self.mixture.rules.get(kind, ()) if holds(place)), base)

    def place(self, kind: str, name: str) -> Place:
        """Counted, but for ffn_down where there are experts: two of them a layer have the number of the layer."""
        index = self.seen.get(kind, 0)
        if kind in self.seen:
            self.seen[kind] += 1
        if kind == "ffn_down" and self.traits.experts > 1 and (found := _LAYER.match(name)):
            index = int(found[1])
        return Place(index, self.counts.get(kind, 0), self.traits.grouped, self.importance)


def _in_blocks(type: int) -> bool:
    return BLOCKS[type][0] > 1


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "")
