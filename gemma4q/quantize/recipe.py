"""The recipe `gemma`: types of a model's tensors by what rounding does to it, for as many bytes as a person gives.

Owns what is given (a mixture's bytes, or a file's size), which tensors have a type already, and what the file then says
of itself. How types are chosen is `allocate`'s.
"""

import re
from collections import Counter
from dataclasses import dataclass

from ..abi import BLOCKS
from ..errors import Gemma4qError
from .allocate import Allocation, Measure, allocate
from .mixtures import HEAD, MIXTURES, asked, is_rounded
from .noise import CANDIDATES, Errors, Progress, errors, free
from .overrides import Overrides
from .quantize import RECIPE, Quantization, check_sources

NAME = "gemma"
ALIGNMENT = 32  # of tensors in a file: what lies between two of them is less
UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB"))}
UNITS |= {unit: 1024**power for power, unit in enumerate(("KIB", "MIB", "GIB"), 1)}


def size(text: str) -> int:
    """Bytes of `12GB`, `900MB` or `7.5GiB`: KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    Raises bad_option.
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = found[2] + ("" if found[2].endswith("B") else "B") if found else ""
    if not found or unit not in UNITS or not (nbytes := int(float(found[1]) * UNITS[unit])):
        raise Gemma4qError("bad_option", f"{text!r} is no size: 12GB, 900MB and 7.5GiB are")
    return nbytes


@dataclass(frozen=True)
class Recipe:
    """What is to be chosen.

    base: the plan of a mixture, which has the file's name and keys; budget: bytes of all tensors; fixed: types that a
    person asked for.
    """

    base: Quantization
    budget: int
    fixed: dict[str, int]

    def errors(self, threads: int, progress: Progress = lambda done, total: None, candidates=CANDIDATES) -> Errors:
        """What rounding to each type loses of each tensor. Raises no_native, numeric."""
        gguf, grid, importance = self.base.gguf, self.base.grid, self.base.importance
        return errors(gguf, grid, free(gguf.tensors, self.fixed), importance, threads, candidates, progress)

    def choose(self, lost: Errors, measure: Measure | None = None) -> tuple[Quantization, Allocation]:
        """What to write, and why. measure: as in `allocate`; None: there is none.

        Raises bad_option where the budget is too small; what `measure` raises.
        """
        found = allocate(self.base.gguf.tensors, lost, self.fixed, self.budget, measure, self._starts(lost))
        keys = [(RECIPE, NAME), ("general.file_type", _file_type(self.base, found.types))]
        return self.base.retyped(found.types, keys), found

    def _starts(self, lost: Errors) -> dict[str, dict[str, int]]:
        """The mixture's own choice, if it is one of ours and no larger."""
        types = {c.tensor.name: c.type for c in self.base.changes if len(lost.get(c.tensor.name, ())) > 1}
        fits = sum(change.data.nbytes for change in self.base.changes) <= self.budget
        return {"mixture": types} if fits and all(type in lost[name] for name, type in types.items()) else {}


def recipe(base: Quantization, overrides: Overrides, target: int | None, allow_requantize: bool) -> Recipe:
    """base: planned with a mixture of blocks. target: bytes of all files; None: the tensors take what the mixture's do.

    Raises requantize, bad_quant_type, bad_option where a file of that size holds no tensors.
    """
    if target is None and all(
        BLOCKS[c.type][0] == 1 for c in base.changes if is_rounded(c.tensor.name, c.tensor.shape)
    ):
        raise Gemma4qError("bad_option", "F32, F16 and BF16 leave a recipe nothing to choose: give a type of blocks")
    tensors, tied = base.gguf.tensors, HEAD not in base.gguf.tensors
    fixed = {c.tensor.name: c.type for c in base.changes if asked(c.tensor.name, tied, overrides) is not None}
    if overrides.leave_output and not tied:
        fixed[HEAD] = tensors[HEAD].type
    check_sources(free(tensors, fixed), allow_requantize)
    budget = taken = sum(change.data.nbytes for change in base.changes)
    if target is not None:
        budget = target - (base.nbytes - taken) - ALIGNMENT * len(base.changes)
    if budget <= 0:
        raise Gemma4qError("bad_option", f"{target:,} bytes are less than the model's vocabulary and keys alone take")
    return Recipe(base, budget, fixed)


def _file_type(base: Quantization, types: dict[str, int]) -> int:
    """The number of the mixture whose type most bytes have."""
    sizes = Counter[int]()
    for change in base.changes:
        if BLOCKS[types[change.tensor.name]][0] > 1:
            sizes[types[change.tensor.name]] += change.tensor.nbytes
    most = sizes.most_common(1)[0][0] if sizes else None
    return next((m.file_type for m in MIXTURES.values() if m.base == most), MIXTURES["Q8_0"].file_type)
