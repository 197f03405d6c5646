"""Collects an importance matrix from the engine's own forward pass: sums of squares of what every matrix meets.

A plan is run in stretches. Before the first op that takes a buffer to a matrix, rounded or not, its rows are read and
squared: once for all matrices they meet, per expert where a router chose. Every row is wanted, so that layers behind
`Builder.wanted` see all of them; the plan ends at the head, of which only the input counts. The file is
`quantize.importance`'s, texts are `measure.texts`'.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..abi import OpCode, Space, Status
from ..backends import Session, StepResult
from ..engine.engine import Engine
from ..engine.kv_cache import global_pages, local_pages, pages
from ..engine.memory import MemoryPlan, available_memory, entries
from ..engine.model import Prepared
from ..engine.prompt import Prompt
from ..engine.sequence import Scoring
from ..errors import Gemma4qError
from ..plan.batch import Batch, Limits
from ..plan.fuse import MATRICES
from ..plan.plan import Buffer, Plan
from ..quantize.importance import Entry, Importance, merge, read

ROWS = 512  # of a step
TOGETHER = 8  # texts of a step
MOST_PIECES = 64  # texts of a chunk
CHUNK, LEAST_CHUNK = 2048, 16  # tokens
SAVE_SECONDS = 60
SQUARED = 32  # rows whose squares are summed in float32; these sums are added in float64

Chunk = list[np.ndarray]  # texts that are read one beside the other, int32 [tokens] each


@dataclass(frozen=True)
class Meeting:
    """Rows, and the matrices of `tensors` that they meet from op `at` on; `route`: who chose which expert for them.

    slots: what a row holds is so many rows, one for each expert that was chosen.
    """

    at: int
    rows: Buffer
    route: Buffer | None
    tensors: tuple[str, ...]
    used: int = 0
    slots: int = 1


def meetings(plan: Plan) -> list[Meeting]:
    """In the order of the plan. Of a tensor that several ops take rows of, its first rows' op counts."""
    original: dict[Buffer, Buffer] = {}
    first: dict[Buffer, int] = {}
    found: dict[Buffer, Meeting] = {}
    for number, op in enumerate(plan.ops):
        if op.code == OpCode.QUANTIZE:
            original[op.out] = op.inputs[0]
            first.setdefault(op.inputs[0], number)
        if op.code not in MATRICES:
            continue
        rows = original.get(op.inputs[0], op.inputs[0])
        route, used = (op.inputs[1], op.args["used"]) if op.code != OpCode.MATMUL else (None, 0)
        slots = used if op.code == OpCode.EXPERTS_DOWN else 1
        before = found.get(rows) or Meeting(first.setdefault(rows, number), rows, route, (), used, slots)
        names = tuple(weight.tensor for weight in op.weights if not weight.first)
        found[rows] = replace(before, tensors=before.tensors + names)
    return sorted(found.values(), key=lambda meeting: meeting.at)


def headless(plan: Plan) -> tuple[Plan, Meeting]:
    """The plan without its head, and where the head meets rows. `logits` is then what the head would be given."""
    at, head = next((i, op) for i, op in enumerate(plan.ops) if plan.hidden in op.inputs)
    meeting = Meeting(at, plan.hidden, None, (head.weights[0].tensor,))
    return replace(plan, ops=plan.ops[:at], logits=plan.hidden, vocab=plan.hidden.width), meeting


def squares(x: np.ndarray) -> np.ndarray:
    """Sums float64 [cols] of the squares of float32 x [rows, cols]."""
    sums = np.zeros(x.shape[1])
    for at in range(0, len(x), SQUARED):
        part = x[at : at + SQUARED]
        sums += np.einsum("ij,ij->j", part, part)
    return sums


def by_expert(x: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert among the numbers chosen [rows, any], with those rows of x that chose it."""
    for expert in np.unique(chosen):
        yield int(expert), x[(chosen == expert).any(1)]


class Watched:
    """A session that looks at the rows of every step: adds them to `entries`, and says how many they were."""

    def __init__(self, session: Session, ending: Meeting):
        self.session, self.limits = session, session.limits
        self.stops = [*meetings(session.plan), replace(ending, at=len(session.plan.ops))]
        self.entries: dict[str, Entry] = {}
        self.tell: Callable[[int], None] = lambda rows: None

    def run(self, batch: Batch, first_op: int = 0, end_op: int | None = None) -> StepResult:
        rows = {Space.ROW: int(batch.header["rows"]), Space.WANTED: int(batch.header["wanted"])}
        for stop in self.stops:
            if stop.at > first_op:
                result = self.session.run(batch, first_op, stop.at)
                if result.status != Status.OK:
                    return result
                first_op = stop.at
            self._look(stop, rows[stop.rows.space])
        self.tell(rows[Space.ROW])
        return result

    def _look(self, stop: Meeting, rows: int) -> None:
        x = self.session.read(stop.rows.name)[:rows].reshape(rows * stop.slots, -1)
        groups = [(0, x)]
        if stop.route is not None:
            chosen = self.session.read(stop.route.name)[:rows, : stop.used]
            groups = by_expert(x, chosen.reshape(len(x), -1))
        for expert, met in groups:
            sums = squares(met)
            if not np.isfinite(sums).all():
                fault = f"the model computed something that is not a finite number: what {stop.tensors[0]} is given"
                raise Gemma4qError("bad_numeric", fault)
            for entry in (self.entries[tensor] for tensor in stop.tensors):
                entry.sums[expert] += sums
                entry.counts[expert] += len(met)

    def cancel(self) -> None:
        self.session.cancel()

    def clear_pages(self, local: bool, numbers: np.ndarray) -> None:
        self.session.clear_pages(local, numbers)

    def copy_page(self, local: bool, source: int, target: int) -> None:
        self.session.copy_page(local, source, target)

    def close(self) -> None:
        self.session.close()


class Reading(Scoring):
    """Has every row of a text computed to the end, and wants nothing of it."""

    def __init__(self, ids: np.ndarray):
        super().__init__(Prompt(ids), np.arange(len(ids)), np.zeros((0, 0), np.float32))

    def take(self, result: StepResult, row: int, position: int) -> None:
        if position == self.wanted[-1]:
            self.end("stop")


class Calibration(Prepared):
    """A loaded model that collects; also a context manager. `chunk` is how many tokens of a text it reads at most."""

    def __init__(self, path, backend="auto", isa=None, threads=None, chunk: int | None = None):
        """chunk: None: 2,048, or as many as the model was trained for. Other arguments and errors as for `load`."""
        if chunk is not None and chunk < LEAST_CHUNK:
            raise Gemma4qError("bad_option", f"chunk: {chunk} tokens; at least {LEAST_CHUNK} are wanted")
        super().__init__(path, backend, isa, threads, chunk, sequences=TOGETHER)
        self.chunk = chunk or min(CHUNK, self.config.context_length)
        window = max(layer.window for layer in self.config.layers)
        plan, self.ending = headless(self.plan)
        self.limits = limits_for(self.chunk, window)
        batch = Batch(self.limits, plan.width, plan.vocab)
        self.memory = self._needed(plan, batch.memory.nbytes)
        self.memory.check()
        session = self.backend.load(plan, self.weights.tensors, self.limits, self.kv, self.threads.count, isa)
        session.fetch(self.memory.file_fits)
        self.watched = Watched(session, self.ending)
        self.engine = Engine(self.watched, batch, window, self.gguf.changed)

    def _needed(self, plan: Plan, batch_bytes: int) -> MemoryPlan:
        """With the sums, of which there are two while a chunk is read: before it, and with it."""
        threads, tensors = self.threads.count, self.weights.tensors
        needs = self.backend.memory(plan, tensors, self.limits, self.kv, threads, self.isa)
        needs["sums of squares"] = 2 * sum(entry.sums.nbytes for entry in self.nothing().values())
        file_bytes = sum(len(file.bytes) for file in self.gguf.files)
        lines = entries(plan, tensors, file_bytes, needs, batch_bytes, 0, self.limits)
        return MemoryPlan(self.limits, lines, available_memory(threads))

    def nothing(self) -> dict[str, Entry]:
        """Zeros for every matrix that rows meet."""
        found = {}
        for tensor in (name for stop in [*meetings(self.plan), self.ending] for name in stop.tensors):
            shape = self.weights.tensors[tensor].shape
            n = shape[0] if len(shape) == 3 else 1
            found[tensor] = Entry(np.zeros((n, shape[-1])), np.zeros(n, np.int64))
        return found

    @property
    def inputs(self) -> list[int]:
        """Descriptors of the files that are read and must not be written to."""
        return [file.fileno for file in self.gguf.files]

    def chunks(self, texts: Iterable[Sequence[int] | np.ndarray]) -> list[Chunk]:
        """Texts as they are read: whole ones side by side, what is longer than `chunk` in pieces."""
        pieces = cut(filter(len, texts), self.chunk, self.tokenizer.bos)
        return packed(pieces, self.chunk, MOST_PIECES)

    def origin(self, chunks: Sequence[Chunk], before: Importance) -> str:
        """What a run is known by: the model, what it reads in which pieces, and what it adds that to."""
        digest = hashlib.sha256(f"{self.chunk}".encode() + self.gguf.fingerprint())
        for piece in (piece for chunk in chunks for piece in chunk):
            digest.update(np.array([-1, *piece], "<i4").tobytes())  # no token is -1: it parts them
        for name, entry in sorted(before.entries.items()):
            digest.update(name.encode() + entry.sums.astype("<f4").tobytes() + entry.counts.tobytes())
        return digest.hexdigest()

    def run(
        self, chunks: Sequence[Chunk], begun: Importance,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Iterator[Importance]:  # fmt: skip
        """Reads chunk after chunk; yields what was begun and all chunks since, which a broken chunk leaves as it was.

        `progress` is told of the rows of each step. Raises `shape_mismatch` when it was begun with another model;
        `bad_numeric`, `model_changed`.
        """
        self.watched.tell = progress
        begun = replace(begun, entries=merge([Importance(self.nothing()), begun]).entries)
        for chunk in chunks:
            self.watched.entries = {n: Entry(e.sums.copy(), e.counts.copy()) for n, e in begun.entries.items()}
            readings = [Reading(piece) for piece in chunk]
            for reading in readings:
                self.engine.submit(reading)
            for reading in readings:
                self.engine.finish(reading)
            begun = replace(begun, entries=self.watched.entries, chunks=begun.chunks + 1)
            yield begun

    def collect(
        self, chunks: Sequence[Chunk], begun: Importance, save: Callable[[Importance], None],
        every: int | None = None, progress: Callable[[int], None] = lambda rows: None,
    ) -> Importance:  # fmt: skip
        """Reads all chunks and saves what they give: after `every` chunks (None: each minute), at the end, and when
        something stops it, an interrupt for one. Raises as `run` and `save` do.
        """
        found = saved = begun
        last = time.monotonic()
        try:
            for number, found in enumerate(self.run(chunks, begun, progress), start=1):
                if number % every == 0 if every else time.monotonic() - last > SAVE_SECONDS:
                    save(found)
                    saved, last = found, time.monotonic()
        finally:
            if found is not saved:
                save(found)
        return found

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "Calibration":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut(texts: Iterable[Sequence[int] | np.ndarray], size: int, bos: int) -> Iterator[np.ndarray]:
    """Texts of at most `size` tokens: what is longer goes on in further texts, each of which begins with `bos`."""
    for text in (np.asarray(text, np.int32) for text in texts):
        yield text[:size]
        for at in range(size, len(text), size - 1):
            yield np.concatenate([np.array([bos], np.int32), text[at : at + size - 1]])


def packed(pieces: Iterable[np.ndarray], size: int, most: int) -> list[Chunk]:
    """Chunks of whole pieces, in order: at most `size` tokens and `most` pieces in each."""
    chunks: list[Chunk] = []
    room = 0
    for piece in pieces:
        if not chunks or len(piece) > room or len(chunks[-1]) == most:
            chunks.append([])
            room = size
        chunks[-1].append(piece)
        room -= len(piece)
    return chunks


def limits_for(chunk: int, window: int) -> Limits:
    """Of a step, in which one text goes on and others begin: room for the first's pages and for those of all rows."""
    rows = min(ROWS, chunk)
    wide, narrow = global_pages(chunk, 1), local_pages(window, 1, rows)
    more = pages(rows) + TOGETHER
    return Limits(
        rows=rows,
        wanted=rows + TOGETHER,
        sequences=TOGETHER,
        context=chunk,
        global_pages=wide + more,
        local_pages=min(wide, narrow) + more if window else 0,
    )


def continued(path: Path | None, origin: str, before: Importance) -> Importance:
    """What a run of this origin has left in a file, else `before`. Raises `not_resumable` for another run's file."""
    if path is None or not path.exists():
        return replace(before, origin=origin)
    found = read(path)
    if found.origin != origin:
        other = "was made from another model or other texts, with another -c or other --in-file"
        raise Gemma4qError("not_resumable", f"{path} {other}: choose another name, or --no-resume to replace it")
    return found
