"""Measures a file that is being quantised beside the file it is made from, and puts what was found into it.

The card stands before the tensors and is known after them. So the file is written with a card whose figures are
missing, measured where it lies, before it has its name, and gets the figures in place of nothing: the same bytes, no
second file, and under its name the file is never without them. What can be known is looked at before the work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.memory import MemoryPlan, available_memory, plan_memory
from ..engine.model import Model, Prepared, kv_type
from ..errors import Gemma4qError, printable
from ..gguf.writer import natural_type
from ..quantize.quantize import Quantization
from . import machine
from .card import FIGURES, LONGEST_WORD, MOST_KINDS, Card, without
from .divergence import Scores, summary
from .evaluate import Speaking, check_memory, evaluate
from .texts import Passage, conversations, passages, selected

Progress = Callable[[int, int], None]
REMEDY = "leave out --card, and measure with `gemma4q eval --save-logits` and --base-file"
UNKNOWN = {"value": None, "low": None, "high": None}
NO_DIGEST = "-" * 64


@dataclass(frozen=True)
class Named:
    """What a card calls a file of conversations or importance, and where it lies."""

    name: str
    path: Path

    @classmethod
    def after(cls, path: str | Path) -> "Named":
        return cls(Path(path).name, Path(path))


class Quality:
    """A measurement of a file to be. `left_out`: how many turns are too long for the model."""

    def __init__(
        self, plan: Quantization, texts: Named, recipe: str, imatrix: Named | None = None, threads: int | None = None,
        hashing: Progress | None = None,
    ):  # fmt: skip
        """texts: conversations. recipe: how types were chosen, in words. hashing: is told how far the digest of the
        source is; None: it is not made, as nothing will be written.

        Raises `bad_option` for a model in parts; `missing_key` and other kinds of `Prepared` for one that cannot chat;
        `too_big` where memory does not hold both models; `bad_text`, and OSError.
        """
        if len(plan.files) > 1:
            remedy = "leave out --keep-split, and cut it with `gemma4q split`, which keeps the card"
            raise Gemma4qError("bad_option", f"a card is measured of one file, not of {len(plan.files)}: {remedy}")
        self.gguf, self.threads = plan.gguf, threads
        self.source = _prepared(plan, threads)
        found = self._passages(texts.path)
        numbers, self.left_out = selected(found, (), None, self.source.config.context_length)
        self.passages = [found[number] for number in numbers]
        self.context = max(len(passage.ids) for passage in self.passages)
        self.check(plan)
        source = machine.model(str(plan.gguf.path), hashing)
        self.empty = Card(
            tool=_tool(),
            recipe=_word(recipe),
            base=_word(plan.gguf.path.name),
            base_type=source["type"],
            base_sha256=source["sha256"] or NO_DIGEST,
            conversations=_word(texts.name),
            conversations_sha256=_digest(texts.path),
            imatrix=_word(imatrix.name) if imatrix else None,
            imatrix_sha256=_digest(imatrix.path) if imatrix else None,
            all=_counted(self.passages),
            kinds={kind: _counted([p for p in self.passages if p.kind == kind]) for kind in self._kinds()},
        )

    def _passages(self, path: Path) -> list[Passage]:
        talks = conversations(path)
        try:
            return passages(talks, self.source.tokenizer, self.source.flavour)
        except Gemma4qError as error:
            if error.kind != "bad_tokenizer":
                raise
            raise _mute(error.message) from None

    def _kinds(self) -> list[str]:
        kinds = list(dict.fromkeys(passage.kind for passage in self.passages))
        if len(kinds) > MOST_KINDS:
            raise Gemma4qError("bad_text", f"there are {len(kinds)} kinds of text; a card has room for {MOST_KINDS}")
        return kinds

    def check(self, plan: Quantization) -> None:
        """Raises `too_big` where the file to be and its source do not fit into memory together."""
        sides = [memory_of(self.source, plan, self.context), self.source.memory_plan(self.context)]
        check_memory(["the file to be", "its source"], sides, self.source.plan.vocab, REMEDY)

    def carded(self, plan: Quantization) -> Quantization:
        """The plan with a card whose figures are missing, in place of any other."""
        (file,) = plan.files
        keys = self.empty.keys()
        types = without(file.types) | {key: natural_type(value) for key, value in keys.items()}
        return replace(plan, files=[replace(file, metadata=without(file.metadata) | keys, types=types)])

    def measure(self, path: Path, progress: Progress = lambda done, total: None) -> Card:
        """The card of the file at `path`, which is whole. progress: how many tokens were read of how many.

        Raises the kinds of `Model`, and `bad_numeric`, `model_changed`.
        """
        load: dict[str, Any] = {"threads": self.threads, "context": self.context}
        try:
            with Model(path, **load) as model, Model(self.gguf.path, **load) as base:
                if base.gguf.identity() != self.gguf.identity():
                    raise Gemma4qError("model_changed", f"{self.gguf.path} is no longer what was quantised")
                sides = [Speaking(each, self.passages) for each in (model, base)]
                numbers, threads = range(len(self.passages)), model.threads.count
                scores = evaluate(self.passages, numbers, *sides, threads=threads, progress=progress)
        except Gemma4qError as error:
            if error.kind != "too_big":
                raise
            raise Gemma4qError("too_big", f"to measure both models: {error.message}; or {REMEDY}") from None
        kinds = {kind: _measured(scores.where(scores.kind == kind)) for kind in self.empty.kinds}
        return replace(self.empty, all=_measured(scores), kinds=kinds)


def memory_of(source: Prepared, plan: Quantization, context: int) -> MemoryPlan:
    """What the file to be will take for a context, its tensors being those of its source in other types."""
    changes = {change.tensor.name: change for change in plan.changes}
    tensors = {}
    for name, tensor in source.weights.tensors.items():
        change = changes[tensor.name]
        tensors[name] = replace(tensor, type=change.type, data=np.broadcast_to(np.uint8(0), change.data.nbytes))
    kv = kv_type("auto", {name: tensor.type for name, tensor in tensors.items()})
    threads = source.threads.count
    return plan_memory(
        source.config, source.plan, tensors, plan.nbytes, source.backend, kv, threads, context, 1, 0,
        available_memory(threads),
    )  # fmt: skip


def _prepared(plan: Quantization, threads: int | None) -> Prepared:
    try:
        source = Prepared(plan.gguf.path, threads=threads)
    except Gemma4qError as error:
        if error.kind == "bad_option":
            raise
        raise Gemma4qError(error.kind, f"{error.message}: no card can be measured of such a model") from None
    if "tokenizer.chat_template" not in source.gguf.metadata:
        raise _mute("it has no tokenizer.chat_template")
    return source


def _mute(why: str) -> Gemma4qError:
    return Gemma4qError("missing_key", f"this model cannot chat ({why}), and a card is measured on conversations")


def _tool() -> str:
    build = machine.build()
    return f"gemma4q {build['gemma4q']}" + (f" ({build['commit']})" if build["commit"] else "")


def _word(text: str) -> str:
    return printable(text, LONGEST_WORD)


def _digest(path: Path) -> str:
    return machine.digest([path], lambda done, total: None)


def _counted(found: list[Passage]) -> dict[str, Any]:
    """Figures of which only the counts are known."""
    counts = {"texts": len({passage.text for passage in found}), "tokens": sum(passage.scored for passage in found)}
    return counts | dict.fromkeys(FIGURES.values(), UNKNOWN)


def _measured(scores: Scores) -> dict[str, Any]:
    found: Mapping[str, Any] = summary(scores)
    edges = {name: {edge: found[name][edge] for edge in UNKNOWN} for name in FIGURES.values()}
    return {"texts": found["texts"], "tokens": found["tokens"]} | edges
