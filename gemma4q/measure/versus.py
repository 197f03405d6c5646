"""gemma4q beside llama.cpp: the same file and work, in pairs of one sitting until enough of them are clean."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from .pairs import BUSY, Pairs, Start, Test, pair
from .verdict import Row, judge

TRIES = 4  # times as many pairs as asked for are started before the machine is called too noisy


def beside(
    starts: Sequence[Start], tests: Sequence[Test], runs: int, busy: float = BUSY,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[Row], list[Pairs], list[dict]]:  # fmt: skip
    """`runs` clean pairs of each test, or fewer: rows of the tests, the pairs, and what the two say of themselves."""
    with ExitStack() as stack:
        progress("loading")
        workers = {side: stack.enter_context(start()) for side, start in enumerate(starts)}
        all_pairs = [Pairs(test) for test in tests]
        for pairs in all_pairs:
            progress(pairs.test.name)
            for worker in workers.values():
                pairs.test.run(worker)
            for number in range(TRIES * runs):
                if len(pairs.kept) < runs:
                    pair(workers, pairs, (0, 1) if number % 2 == 0 else (1, 0), 0, busy)
        about = [worker.about for worker in workers.values()]
    return [row for row in judge(all_pairs, 0.0) if not row.kernel], all_pairs, about
