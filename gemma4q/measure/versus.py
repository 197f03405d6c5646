"""gemma4q beside llama.cpp: the same file and work, in pairs of one sitting until enough of them are clean.

Where memory does not hold both at once, each run is a process of its own, before which the file is read through, so
that no side pays for the other's pages.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from .client import Worker
from .pairs import BUSY, Pairs, Run, Start, Test, pair

TRIES = 4  # times as many pairs as asked for are started before the machine is called too noisy
WARM_PROMPT, WARM_DECODE = 64, 4  # tokens before a process of one run is timed: all of the weights are touched

CHUNK = 1 << 24

Progress = Callable[[str], None]
Found = tuple[list[dict], list[dict]]


def beside(
    starts: Sequence[Start],
    tests: Sequence[Test],
    runs: int,
    busy: float = BUSY,
    progress: Progress = lambda what: None,
) -> Found:
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
                    pair(workers, pairs, order_of(number), 0, busy)
            rows.append(row(pairs))
        return rows, [worker.about for worker in workers.values()]


def apart(
    starts: Sequence[Start],
    tests: Sequence[Test],
    runs: int,
    busy: float = BUSY,
    progress: Progress = lambda what: None,
    files: Sequence[str] = (),
) -> Found:
    """As `beside`, with one process alive at a time: it runs every test once, and a pair is two such processes.

    files: the model, brought back to memory before each.
    """
    all_pairs, about = [Pairs(test) for test in tests], {}
    for number in range(TRIES * runs):
        if all(len(pairs.kept) >= runs for pairs in all_pairs):
            break
        progress(f"pair {number + 1}, {min(len(pairs.kept) for pairs in all_pairs)} of {runs} clean")
        found = {}
        for side in order_of(number):
            read_through(files)
            with starts[side]() as worker:
                about[side], found[side] = worker.about, alone(worker, tests)
        for i, pairs in enumerate(all_pairs):
            if len(pairs.kept) < runs:
                pairs.add((found[0][i], found[1][i]), number, busy)
    return [row(pairs) for pairs in all_pairs], [about[side] for side in sorted(about)]


def read_through(files: Sequence[str]) -> None:
    """Leaves in the page cache what it can hold of them."""
    buffer = bytearray(CHUNK)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def alone(worker: Worker, tests: Sequence[Test]) -> list[Run]:
    """Each test once, after a little of the same work."""
    found = []
    for test in tests:
        few = replace(test, prompt=min(test.prompt, WARM_PROMPT), decode=min(test.decode, WARM_DECODE))
        few.run(worker)
        found.append(test.run(worker))
    return found


def order_of(number: int) -> tuple[int, int]:
    return (0, 1) if number % 2 == 0 else (1, 0)


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


def described(side: Mapping) -> str:
    """One side in a line: what it is, of which version, and what it was built for."""
    if side["engine"] == "gemma4q":
        return f"{side['isa'] or side['backend']}, {side['threads']} threads, keys and values {side['kv']}"
    return f"{side['version']}, {side['threads']} threads: {' '.join(side['system'].split())}"
