"""The regression gate: this build beside another on one machine at one time, sitting by sitting until it is clear.

How turns are taken is pairs.py's, what they mean verdict.py's; here is when to stop, and what follows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .pairs import Pairs, Start, Test, take_turns
from .verdict import Row, judge

SITTINGS, MOST_SITTINGS = 5, 9
SITTING_SECONDS, MOST_SECONDS = 7.0, 85.0
TESTS = (Test(prompt=32, depth=256), Test(decode=1, depth=256))
BUSY = 0.9  # less than pairs.py asks: a moment's company disturbs some ops, and verdict.py sees to those
PASSED, SLOWER, NOISY = 0, 1, 3


@dataclass(frozen=True)
class Outcome:
    """rows: of all tests. pairs: what they were made of. exit: 0 no row is slower, 1 one is, 3 the noise hides it."""

    rows: list[Row]
    pairs: list[Pairs]
    seconds: float

    @property
    def exit(self) -> int:
        verdicts = {row.verdict for row in self.rows}
        return SLOWER if "slower" in verdicts else NOISY if "unclear" in verdicts else PASSED

    @property
    def discarded(self) -> float:
        """Share of the pairs that had company on their cores."""
        discarded = sum(pairs.discarded for pairs in self.pairs)
        return discarded / max(1, discarded + sum(len(pairs.kept) for pairs in self.pairs))


def compare(
    starts: Sequence[Start], threshold: float, tests: Sequence[Test] = TESTS, busy: float = BUSY,
    seconds: float = MOST_SECONDS, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:  # fmt: skip
    """Times `starts` [2], this build and the other, in turns until every row is clear or the time is over."""
    began, taken = time.perf_counter(), 0.0
    each = min(SITTING_SECONDS, seconds / SITTINGS / 2)
    turns = take_turns(starts, tests, each, busy)
    for number in range(1, MOST_SITTINGS + 1):
        before = time.perf_counter()
        pairs = next(turns)
        progress(number, MOST_SITTINGS)
        taken = max(taken, time.perf_counter() - before)
        over = time.perf_counter() - began + taken > seconds
        if number < SITTINGS and not over:
            continue
        outcome = Outcome(judge(pairs, threshold), pairs, time.perf_counter() - began)
        if over or outcome.exit != NOISY:
            break
    turns.close()
    return outcome
