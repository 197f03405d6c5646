"""How far a model with tensors of other types lies from itself: what the choice of types is calibrated by.

Each answer is a model file that is written, read beside the original, and taken away again; answers are kept in a file
of their own, so that a run that was stopped goes on, and the next one begins with what is known.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path

import numpy as np

from ..convert.output import appearing
from ..engine.model import Model
from ..quantize.quantize import Quantization
from .evaluate import Speaking, evaluate
from .texts import Passage, conversations, passages

TOKENS = 6000  # read for an answer, about: whole texts, of each kind in turn
MOST_KEPT = 256 << 20  # bytes of what the original says
LONGEST = 2048  # tokens of a text


def some(found: Sequence[Passage], most: int) -> list[Passage]:
    """The first texts of every kind, kinds in turn, until they have so many tokens."""
    kinds = dict.fromkeys(passage.kind for passage in found)
    rows = [[p for p in found if p.kind == kind and len(p.ids) <= LONGEST] for kind in kinds]
    chosen: list[Passage] = []
    for number in range(max(map(len, rows), default=0)):
        for passage in (row[number] for row in rows if number < len(row)):
            if chosen and sum(len(p.ids) for p in chosen) + len(passage.ids) > most:
                return chosen
            chosen.append(passage)
    return chosen


class Remembered:
    """What a model said of some passages, kept as far as it is not too much: it need not read them for each answer."""

    known_above = None

    def __init__(self, model: Speaking):
        self.model, self.kept, self.room = model, {}, MOST_KEPT

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """As `Rows` of `evaluate` has it."""
        if (number, start, end) in self.kept:
            return self.kept[number, start, end]
        rows = self.model.rows(number, start, end)
        if rows.nbytes <= self.room:
            self.kept[number, start, end] = rows
            self.room -= rows.nbytes
        return rows


class Divergence:
    """Mean KL(original || model) in nats for the types of all tensors; also a context manager.

    Called with types it answers at once what is known, else measures while `seconds` last, then answers None.
    """

    def __init__(
        self, plan: Quantization, texts: Path, seconds: float, threads: int | None = None,
        told: Callable[[int], None] = lambda count: None,
    ):  # fmt: skip
        """plan: whose model, importance and keys count, and beside whose file work is done. texts: conversations.

        told: how many answers were given. Raises what `Model` and `conversations` raise.
        """
        self.plan, self.texts, self.seconds, self.threads, self.told = plan, texts, seconds, threads, told
        out = plan.files[0].path
        self.trial, self.kept = out.with_name(out.name + ".trial.gguf"), out.with_name(out.name + ".measured.json")
        self.started, self.count = time.monotonic(), 0
        self.origin = self._origin()
        self.known = self._read()
        self.base: Model | None = None
        self.passages: list[Passage] = []
        self.said: Remembered | None = None

    def __call__(self, types: Mapping[str, int]) -> float | None:
        changed = {n: int(type) for n, type in types.items() if type != self.plan.gguf.tensors[n].type}
        key = hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest()
        if key not in self.known:
            if time.monotonic() - self.started >= self.seconds:
                return None
            self.known[key] = self._measured(types)
            self._write()
        self.count += 1
        self.told(self.count)
        return self.known[key]

    def _measured(self, types: Mapping[str, int]) -> float:
        if self.base is None:
            self.base = Model(self.plan.gguf.path, threads=self.threads, context=LONGEST)
            found = passages(conversations(self.texts), self.base.tokenizer, self.base.flavour)
            self.passages = some(found, TOKENS)
            self.said = Remembered(Speaking(self.base, self.passages))
        trial = self.plan.retyped(types).alone(self.trial)
        try:
            trial.write(threads=self.base.threads.count)
            with Model(self.trial, threads=self.threads, context=LONGEST) as model:
                sides = Speaking(model, self.passages), self.said
                scores = evaluate(self.passages, range(len(self.passages)), *sides, threads=model.threads.count)
        finally:
            self.trial.unlink(missing_ok=True)
        return float(scores.divergence.mean())

    def _origin(self) -> str:
        """What an answer depends on beyond the types: model, importance and texts."""
        gguf, importance = self.plan.gguf, self.plan.importance
        digest = hashlib.sha256(self.texts.read_bytes() + f"{TOKENS} {LONGEST}".encode() + gguf.fingerprint())
        for tensor in gguf.tensors.values() if importance else ():
            if (weights := importance.of(tensor.name, tensor.shape[-1])) is not None:
                digest.update(tensor.name.encode() + weights.tobytes())
        return digest.hexdigest()

    def _read(self) -> dict[str, float]:
        """What was measured of this model; nothing where the file is another's."""
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.kept.read_text("utf-8"))
            if isinstance(found, dict) and found.get("of") == self.origin and isinstance(found.get("measured"), dict):
                values = found["measured"].items()
                return {k: v for k, v in values if isinstance(v, float) and isfinite(v)}
        return {}

    def _write(self) -> None:
        with appearing(self.kept) as out:
            out.write(json.dumps({"of": self.origin, "measured": self.known}, indent=1).encode())

    def close(self) -> None:
        if self.base is not None:
            self.base.close()

    def __enter__(self) -> "Divergence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
