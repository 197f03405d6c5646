"""Work on a tensor's pieces beside the writing of others."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

Piece, Result = TypeVar("Piece"), TypeVar("Result")


def ahead(pool: Executor, work: Callable[[Piece], Result], pieces: Iterable[Piece], most: int) -> Iterator[Result]:
    """`work` of every piece, in order, at most so many of them done in advance."""
    rest = iter(pieces)
    pending: deque[Future] = deque(pool.submit(work, piece) for piece in islice(rest, most))
    try:
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(work, piece) for piece in islice(rest, 1))
    finally:
        for future in pending:
            future.cancel()
