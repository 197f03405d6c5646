"""How far a model with tensors of other types lies from itself: what the choice of types is calibrated by.

What the original says is kept in a file of logits, so that it is read once and needs no memory beside another. Each
answer is a model file that is written, read and taken away again; answers are kept in a file of their own, so that a
run that was stopped goes on, and the next one begins with what is known.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path

from ..convert.output import appearing
from ..engine.model import Model
from ..quantize.quantize import Quantization
from .evaluate import Speaking, evaluate, vocabulary_of
from .logits_file import Header, Stored, writing
from .texts import TURNS, Passage, conversations, passages

TOKENS = 6000  # read for an answer, about: whole texts, of each kind in turn
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
        self.trial, self.said, self.kept = (
            out.with_name(out.name + end) for end in (".trial.gguf", ".original.logits", ".measured.json")
        )
        self.started, self.count = time.monotonic(), 0
        self.origin = self._origin()
        self.known = self._read()
        self.original: Stored | None = None

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
        trial = self.plan.retyped(types).alone(self.trial)
        try:
            trial.write(threads=self.threads)  # first, as it says at once where there is no room
            self.original = self.original or self._read_original()
            found = self.original.passages
            with Model(self.trial, threads=self.threads, context=LONGEST) as model:
                sides = Speaking(model, found), self.original
                scores = evaluate(found, range(len(found)), *sides, threads=model.threads.count)
        finally:
            self.trial.unlink(missing_ok=True)
        return float(scores.divergence.mean())

    def _read_original(self) -> Stored:
        gguf = self.plan.gguf
        with Model(gguf.path, threads=self.threads, context=LONGEST) as model:
            found = some(passages(conversations(self.texts), model.tokenizer, model.flavour), TOKENS)
            about = {"name": gguf.path.name, "type": "", "sha256": "", "vocabulary": vocabulary_of(gguf)}
            with writing(self.said, Header(TURNS, about | {"vocab": model.plan.vocab}, found)) as keep:
                threads = model.threads.count
                evaluate(found, range(len(found)), Speaking(model, found), threads=threads, keep=keep)
        return Stored(self.said)

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
        if self.original is not None:
            self.original.close()
            self.said.unlink(missing_ok=True)

    def __enter__(self) -> "Divergence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
