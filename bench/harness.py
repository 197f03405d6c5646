"""What the benches share: a model driven with raw tokens, what memory gives meanwhile, CSV files, one-line errors."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import gemma4q
from gemma4q.abi import RowFlag, Status, ffi, lib
from gemma4q.engine.kv_cache import History
from gemma4q.engine.prompt import token_keys
from gemma4q.errors import Gemma4qError
from gemma4q.measure.worker import FEW, Timed
from gemma4q.plan.batch import Batch, Step
from gemma4q.plan.fuse import MATRICES

READ_BYTES = 1 << 30  # beyond every cache
GAP = 1 << 20  # between two matrices: what lies there is read too


class Driver:
    """A model whose steps are given by hand, in rows of random tokens; it knows no prompt and no answer.

    Tokens are of a fixed few, so that rows of a table on disk are read but once.
    """

    def __init__(self, path: str, threads: int, context: int, sequences: int = 1):
        self.model = gemma4q.load(path, threads=threads, sequences=sequences, context=context)
        self.session, self.threads = self.model.session, threads
        self.batch = Batch(self.session.limits, self.model.plan.width, self.model.plan.vocab)
        self.random = np.random.default_rng(1)
        self.few = self.random.integers(5, self.model.plan.vocab, FEW)
        self.spans = list(spans(self._matrices()))

    def tokens(self, count: int) -> np.ndarray:
        return self.random.choice(self.few, count)

    def open(self, depth: int = 0) -> History:
        """A new sequence that holds `depth` tokens."""
        history = self.model.engine.cache.open(token_keys(self.tokens(0), False))
        while history.length < depth:
            self.step([(history, min(depth - history.length, self.session.limits.rows))], False)
        return history

    def step(self, work: Sequence[tuple[History, int]], generated: bool = True) -> Timed:
        """The next tokens of some sequences, (history, how many) each.

        The best tokens are wanted: of every generated row, of a prompt's last one.
        """
        steps, ids = [], [self.tokens(count) for _, count in work]
        for (history, count), tokens in zip(work, ids, strict=True):
            start = history.length
            history.extend(count)
            want = np.full(count, RowFlag.WANT_TOP) if generated else int(RowFlag.WANT_TOP)
            steps.append(Step(tokens, start, *history.tables(start + count), generated=generated, want=want))
        self.batch.fill(steps)
        with Timed() as timed:
            result = self.session.run(self.batch)
        if result.status != Status.OK:
            raise SystemExit(f"step failed: {result.status.name}")
        for (history, _), tokens in zip(work, ids, strict=True):
            history.commit(token_keys(tokens, generated))
        return timed

    def read(self) -> float:
        """Bytes a second of a plain read of the matrices, by the session's threads, where the file maps them."""
        pool, places = self.session.pool, [(ffi.cast("uint8_t *", at), size) for at, size in self.spans]
        seconds = sum(size / lib.read_bandwidth(pool, at, size) for at, size in places)
        return sum(size for _, size in places) / seconds

    def _matrices(self) -> Iterator[np.ndarray]:
        """What rows are multiplied with, READ_BYTES of it or a little more."""
        left = READ_BYTES
        for tensor in dict.fromkeys(w.tensor for op in self.model.plan.ops if op.code in MATRICES for w in op.weights):
            if left > 0:
                yield self.model.weights.tensors[tensor].data
            left -= self.model.weights.tensors[tensor].data.nbytes


def spans(arrays: Iterable[np.ndarray]) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what lies behind each other."""
    first = end = 0
    for at, size in sorted((array.ctypes.data, array.nbytes) for array in arrays):
        if end and at - end > GAP:
            yield first, end - first
            end = 0
        first, end = (first if end else at), at + size
    if end:
        yield first, end - first


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping], add: bool = False) -> None:
    """A new file of `rows`, or (`add`) more rows of one that may be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not (add and path.exists())
    with path.open("a" if add else "w", newline="") as file:
        out = csv.DictWriter(file, columns)
        if fresh:
            out.writeheader()
        out.writerows({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def named(pattern: Path, model: str) -> Path:
    """Where a picture of a model goes: NAME in the file's name becomes the model's."""
    return pattern.with_name(pattern.name.replace("NAME", Path(model).stem))


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@contextmanager
def said_plainly() -> Iterator[None]:
    """What is wrong with a file, an option or the machine ends the program in one line."""
    try:
        yield
    except (Gemma4qError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
