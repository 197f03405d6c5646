"""Scores a model on texts: alone, beside another that runs with it, or beside what a file kept of one.

Owns the order of work, the memory of two models at once, and how scores are grouped. What is scored is `texts`'s, what
two rows and many come to `divergence`'s, what a file holds `logits_file`'s part.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import isfinite
from typing import Any, Protocol

import numpy as np

from ..engine.memory import MB, WEIGHTS, MemoryPlan
from ..engine.model import Model
from ..errors import Gemma4qError
from ..gguf.reader import GGUF
from .divergence import Scores, score, summary
from .logits_file import Stored
from .texts import Passage

ROW_BYTES = 24  # for a token of the vocabulary: two rows, and one that is being made or kept in float64
BLOCK = 32  # rows at a time: as many as a step of the engine gives
FIRST_DEPTH = 128  # ranges of positions end here, and at each power of two beyond
IN_TURN = "run `gemma4q eval BASE --save-logits FILE`, and then say --base-file FILE instead of --against"
Progress = Callable[[int, int], None]


class Rows(Protocol):
    """Who says what comes after each token of some passages."""

    known_above: float | None  # as `divergence.compare` has it

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """Logits [rows, vocab] after positions start ... end of passage `number`."""
        ...


class Speaking:
    """A loaded model that reads passages."""

    known_above = None

    def __init__(self, model: Model, passages: Sequence[Passage]):
        self.model, self.passages = model, passages

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """float32 [rows, vocab]; what was read before is still in the cache."""
        return self.model.logits(self.passages[number].ids[:end], range(start, end))


def evaluate(
    passages: Sequence[Passage], numbers: Sequence[int], model: Rows, base: Rows | None = None, threads: int = 1,
    keep: Callable[[np.ndarray], None] | None = None, progress: Progress = lambda done, total: None,
) -> Scores:  # fmt: skip
    """Every scored token of the passages `numbers`, in their order.

    keep: is given the model's rows. progress: how many tokens were read of how many.
    """
    total, done, parts = sum(len(passages[number].ids) for number in numbers), 0, []
    with ThreadPoolExecutor(threads) as pool:
        for number in numbers:
            passage = passages[number]
            for start in range(passage.first - 1, len(passage.ids) - 1, BLOCK):
                end = min(start + BLOCK, len(passage.ids) - 1)
                logits = model.rows(number, start, end)
                if keep:
                    keep(logits)
                known = (base.rows(number, start, end), base.known_above) if base else ()
                columns = score(logits, passage.ids[start + 1 : end + 1], pool, *known)
                parts.append(
                    Scores(
                        text=np.full(end - start, passage.text),
                        kind=np.full(end - start, passage.kind),
                        position=np.arange(start + 1, end + 1),
                        **columns,
                    )
                )
                progress(done + end, total)
            done += len(passage.ids)
            progress(done, total)
    return Scores.joined(parts)


def run(
    path: str, passages: Sequence[Passage], numbers: Sequence[int], base: Stored | str | None = None,
    keep: Callable[[np.ndarray], None] | None = None, progress: Progress = lambda done, total: None, **load: Any,
) -> Scores:  # fmt: skip
    """Loads a model, and the one at `base` if that is a path, to `evaluate` them; `load`: arguments of `Model`."""
    with ExitStack() as stack:
        model = stack.enter_context(Model(path, **load))
        other = Speaking(stack.enter_context(Model(base, **load)), passages) if isinstance(base, str) else base
        return evaluate(passages, numbers, Speaking(model, passages), other, model.threads.count, keep, progress)


# -- What was found ------------------------------------------------------------------------------------------


def report(scores: Scores) -> dict[str, Any]:
    """A `divergence.summary` of `all`, of `kinds` {name: ...} and of `depths` [{from, to, ...}]; None: infinite."""
    deep = []
    for first, last in depths(int(scores.position.max())):
        within = (scores.position >= first) & (scores.position <= last)
        if within.any():
            deep.append({"from": first, "to": last} | summary(scores.where(within)))
    kinds = {kind: summary(scores.where(scores.kind == kind)) for kind in dict.fromkeys(scores.kind.tolist())}
    return finite({"all": summary(scores), "kinds": kinds, "depths": deep})


def depths(deepest: int) -> list[tuple[int, int]]:
    """First and last position of each range: 0 to 127, 128 to 255, 256 to 511, ..."""
    found = [(0, FIRST_DEPTH - 1)]
    while found[-1][1] < deepest:
        found.append((found[-1][1] + 1, 2 * found[-1][1] + 1))
    return found


def finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


# -- Two models ----------------------------------------------------------------------------------------------


def vocabulary_of(gguf: GGUF) -> str:
    """A digest of the tokens of a file: models can be compared where it is the same."""
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    found = hashlib.sha256(np.ascontiguousarray(tokens.lengths, "<i8").tobytes())
    found.update(tokens.data[tokens.offsets[0] : tokens.offsets[-1]].tobytes())
    return found.hexdigest()


def check_vocabulary(model: Mapping, base: Mapping) -> None:
    """Of both {name, vocab, vocabulary}; a vocabulary of "" is not known. Raises `bad_base`."""
    if model["vocab"] != base["vocab"]:
        sizes = f"{base['name']} has a vocabulary of {base['vocab']:,}, {model['name']} of {model['vocab']:,}"
        raise Gemma4qError("bad_base", f"{sizes}: they cannot be compared")
    if base["vocabulary"] and model["vocabulary"] != base["vocabulary"]:
        fault = f"{base['name']} and {model['name']} have other tokens in their vocabularies"
        raise Gemma4qError("bad_base", f"{fault}: they cannot be compared")


def check_memory(paths: Sequence[str], plans: Sequence[MemoryPlan], vocab: int, remedy: str = IN_TURN) -> str:
    """What one model or two will take with the rows of a block, in a line. Raises `too_big`, for two with `remedy`.

    Of one model the weights may be larger than memory, which is slow; two that take turns would then wait for the disk
    in every block.
    """
    have, why = plans[0].available
    needed = sum(plan.needed for plan in plans) + BLOCK * vocab * ROW_BYTES
    files = dict(zip(paths, plans, strict=True))  # a file that is on both sides is mapped once
    weights = sum(entry.bytes for plan in files.values() for entry in plan.entries if entry.name == WEIGHTS)
    what = f"{needed / MB:,.0f} MB of memory, beside {weights / MB:,.0f} MB of weights in files"
    there = f"{have / MB:,.0f} MB are there ({why})"
    if len(plans) > 1 and needed + weights > have:
        raise Gemma4qError("too_big", f"both models take {what}; {there}: {remedy}")
    if needed > have:
        raise Gemma4qError("too_big", f"{what} are needed; {there}: use less context, or a smaller model")
    return f"{what}; {there}"
