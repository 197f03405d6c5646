"""What pairs of runs say: how much slower each row of one build is than the other's, how surely, and what follows.

A row is a test, or one kernel's part of it. Its change is the Hodges-Lehmann estimate of log(time / other's time) over
all pairs, between the limits of Wilcoxon's signed ranks at a level shared by all rows: of a hundred comparisons of
equals one may have a row whose limits leave out zero, and an alarm needs them beyond the threshold. Beside that, most
sittings must say the same by themselves: a process that lies badly in memory is slow for as long as it lives, however
often it is timed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist, median

import numpy as np

from .pairs import Pairs

ALARMS = 0.01  # false ones, in one comparison of equals
MOST_SITTINGS = 0.75  # that must agree
LEAST_PAIRS, MOST_RANKED = 10, 300
LEAST_SHARE = 0.02  # of a test's time: a kernel below it has no row


@dataclass(frozen=True)
class Row:
    """`change`, between `low` and `high`: how much more time the first side takes, 0.05 for 5 %.

    seconds: median times of the first and of the other. share: of the test's time. pairs: how many were compared.
    verdict: `slower`, `faster`, `same` (not beyond the threshold), or `unclear`.
    """

    test: str
    kernel: str | None
    seconds: tuple[float, float]
    share: float
    change: float
    low: float
    high: float
    pairs: int
    verdict: str

    @property
    def name(self) -> str:
        return f"{self.test}: {self.kernel}" if self.kernel else self.test


def judge(all_pairs: Sequence[Pairs], threshold: float) -> list[Row]:
    """The rows of all tests, each test's own before its kernels'. threshold: 0.03 for 3 %."""
    samples = [sample for pairs in all_pairs for sample in rows_of(pairs)]
    z = NormalDist().inv_cdf(1 - ALARMS / 2 / max(1, len(samples)))
    return [row(*sample, threshold, z) for sample in samples]


def rows_of(pairs: Pairs) -> Iterator[tuple]:
    """(pairs, kernel or None, seconds [n, 2], share) of a test and of each kernel that matters to it on both sides."""
    if not pairs.kept:
        yield pairs, None, np.zeros((0, 2)), 1.0
        return
    whole = np.array([(a.seconds, b.seconds) for a, b in pairs.kept])
    yield pairs, None, whole, 1.0
    first, other = (set(run.kernels) for run in pairs.kept[0])
    found = []
    for kernel in first & other:
        times = np.array([(a.kernels[kernel], b.kernels[kernel]) for a, b in pairs.kept])
        share = float(np.median(times / whole))
        if share >= LEAST_SHARE and times.min() > 0:
            found.append((pairs, kernel, times, share))
    yield from sorted(found, key=lambda sample: -sample[3])


def row(pairs: Pairs, kernel: str | None, times: np.ndarray, share: float, threshold: float, z: float) -> Row:
    differences = np.log(times[:, 0] / times[:, 1])
    change, low, high = interval(differences, z)
    sittings = np.array(pairs.sitting)
    each = [median(differences[sittings == number]) for number in sorted(set(pairs.sitting))]
    seconds = tuple(np.median(times, axis=0).tolist()) if len(times) else (0.0, 0.0)
    found = verdict(low, high, each, log(1 + threshold))
    return Row(pairs.test.name, kernel, seconds, share, exp(change) - 1, exp(low) - 1, exp(high) - 1, len(times), found)


def interval(differences: np.ndarray, z: float) -> tuple[float, float, float]:
    """Estimate and limits, `z` standard deviations of the rank sum away; no limit where there are too few.

    Of more than a few hundred, those that follow each other are put together by their medians.
    """
    if len(differences) > MOST_RANKED:
        differences = np.array([np.median(part) for part in np.array_split(differences, MOST_RANKED)])
    n = len(differences)
    if n < LEAST_PAIRS:
        return (float(np.median(differences)) if n else 0.0), -np.inf, np.inf
    i, j = np.triu_indices(n)
    averages = np.sort((differences[i] + differences[j]) / 2)
    spread = z * sqrt(n * (n + 1) * (2 * n + 1) / 24)
    k = max(0, int(n * (n + 1) / 4 - spread))
    return float(np.median(averages)), float(averages[k]), float(averages[len(averages) - 1 - k])


def verdict(low: float, high: float, sittings: Sequence[float], limit: float) -> str:
    """In logarithms. A change of 1.5 limits is always told from none, or it is `unclear`."""
    if low > limit and agreed(sum(s > limit for s in sittings), sittings):
        return "slower"
    if high < -limit and agreed(sum(s < -limit for s in sittings), sittings):
        return "faster"
    return "unclear" if low > limit or (high > limit and high - low > limit) else "same"


def agreed(count: int, sittings: Sequence[float]) -> bool:
    return count >= MOST_SITTINGS * len(sittings)
