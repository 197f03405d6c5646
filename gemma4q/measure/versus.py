"""gemma4q beside llama.cpp: the same file and work, in pairs of one sitting until enough of them are clean."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median

from .pairs import BUSY, Pairs, Start, Test, pair

TRIES = 4  # times as many pairs as asked for are started before the machine is called too noisy


def beside(
    starts: Sequence[Start], tests: Sequence[Test], runs: int, busy: float = BUSY,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """A row for each test, of `runs` clean pairs or as many as there were, and what the two sides say of themselves."""
    with ExitStack() as stack:
        progress("loading")
        workers = {side: stack.enter_context(start()) for side, start in enumerate(starts)}
        rows = []
        for test in tests:
            progress(test.name)
            pairs = Pairs(test)
            for worker in workers.values():
                test.run(worker)
            for number in range(TRIES * runs):
                if len(pairs.kept) < runs:
                    pair(workers, pairs, (0, 1) if number % 2 == 0 else (1, 0), 0, busy)
            rows.append(row(pairs))
        return rows, [worker.about for worker in workers.values()]


def row(pairs: Pairs) -> dict:
    """Medians of both sides' tokens a second and of the pairs' ratios, least and greatest ratio; None: no pair."""
    tokens = pairs.test.tokens
    rates = [[tokens / run.seconds for run in side] for side in zip(*pairs.kept, strict=True)] or [[], []]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    return {
        "test": pairs.test.name,
        "pairs": len(ratios),
        "discarded": pairs.discarded,
        "ts": median(rates[0]) if ratios else None,
        "other_ts": median(rates[1]) if ratios else None,
        "ratio": median(ratios) if ratios else None,
        "least": min(ratios, default=None),
        "most": max(ratios, default=None),
        "samples_ts": rates[0],
        "other_samples_ts": rates[1],
    }
