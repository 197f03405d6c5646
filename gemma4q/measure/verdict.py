"""What pairs of runs say: how much slower each row of one build is than the other's, how surely, and what follows.

A row is a test, or one kernel's part of it. What disturbs a run makes it slower, never faster: of every two pairs, A B
and B A, each op's shorter times are compared. log(time / other's time) of these is put together from all ops, and a
row's change is the Hodges-Lehmann estimate over all of them, between the limits of Wilcoxon's signed ranks at a level
shared by all rows: of a hundred comparisons of equals one may have a row whose limits leave out zero, and an alarm
needs them beyond the threshold. Beside that, most sittings by themselves must be nearer to the threshold than to
nothing: a process that lies badly in memory is slow for as long as it lives, however often it is timed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist, mean

import numpy as np

from .pairs import Pairs

ALARMS = 0.01  # false ones, in one comparison of equals
MOST_SITTINGS = 0.75  # that must agree
LEAST, MOST_RANKED = 8, 300  # differences
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
    """(pairs, kernel or None, seconds [n, 2, parts], share) of a test and of each kernel that matters to it."""
    if not pairs.kept:
        yield pairs, None, np.zeros((0, 2, 1)), 1.0
        return
    whole = np.array([[run.seconds for run in runs] for runs in pairs.kept])[:, :, None]
    ops = [np.array([runs[side].ops for runs in pairs.kept]) / 1e9 for side in (0, 1)]
    names = [np.array(run.names) for run in pairs.kept[0]]
    alike = np.array_equal(*names)
    yield pairs, None, (parts_of(np.stack(ops, 1), whole) if alike else whole), 1.0
    found = []
    for kernel in set(pairs.kept[0][0].names) & set(pairs.kept[0][1].names):
        own = [op[:, name == kernel] for op, name in zip(ops, names, strict=True)]
        total = np.stack([op.sum(1, keepdims=True) for op in own], 1)
        share = float(np.median(total / whole))
        if share >= LEAST_SHARE and total.min() > 0:
            found.append((pairs, kernel, parts_of(np.stack(own, 1), total) if alike else total, share))
    yield from sorted(found, key=lambda sample: -sample[3])


def parts_of(ops: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Seconds [n, 2, ops + 1]: the ops that always took time, and what is left of `total` [n, 2, 1] where that did."""
    parts = np.concatenate([ops, total - ops.sum(2, keepdims=True)], 2)
    always = parts.min((0, 1)) > 1e-9
    return parts[:, :, always] if always.any() else total


def better_of_two(times: np.ndarray, sittings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every two pairs that follow each other in a sitting, each part's shorter time on each side; their sittings."""
    rounds = [times[:0]]
    for number in sorted(set(sittings)):
        own = times[sittings == number]
        rounds.append(np.minimum(own[0 : len(own) - 1 : 2], own[1::2]))
    return np.concatenate(rounds), np.repeat(sorted(set(sittings)), [len(part) for part in rounds[1:]])


def differences(times: np.ndarray) -> np.ndarray:
    """log(time / other's time) of each pair [n], from the seconds [n, 2, parts] of what both do.

    The mean over the parts by their share of the time. What disturbs one op of hundreds for a moment should move no
    pair by much, so each part is drawn in to one (robust) standard deviation around its median, and stretched by the
    share of pairs that lay within: the pseudo-values of Huber's estimate, which spread as that estimate does.
    """
    each = np.log(times[:, 0] / times[:, 1])
    middle = np.median(each, axis=0)
    off = each - middle
    deviation = 1.4826 * np.median(np.abs(off), axis=0)
    within = (np.abs(off) <= deviation).mean(axis=0)
    share = np.median(times, axis=(0, 1))
    return (middle + np.clip(off, -deviation, deviation) / within) @ (share / share.sum())


def row(pairs: Pairs, kernel: str | None, times: np.ndarray, share: float, threshold: float, z: float) -> Row:
    better, sittings = better_of_two(times, np.array(pairs.sitting))
    found = differences(better) if len(better) else np.zeros(0)
    change, low, high = interval(found, z)
    each = [mean(found[sittings == number]) for number in sorted(set(sittings))]
    seconds = tuple(np.median(times.sum(2), axis=0).tolist()) if len(times) else (0.0, 0.0)
    said = verdict(low, high, each, log(1 + threshold))
    return Row(pairs.test.name, kernel, seconds, share, exp(change) - 1, exp(low) - 1, exp(high) - 1, len(times), said)


def interval(differences: np.ndarray, z: float) -> tuple[float, float, float]:
    """Estimate and limits, `z` standard deviations of the rank sum away; no limit where there are too few.

    Of more than a few hundred, those that follow each other are put together by their medians.
    """
    if len(differences) > MOST_RANKED:
        differences = np.array([np.median(part) for part in np.array_split(differences, MOST_RANKED)])
    n = len(differences)
    if n < LEAST:
        return (float(np.median(differences)) if n else 0.0), -np.inf, np.inf
    i, j = np.triu_indices(n)
    averages = np.sort((differences[i] + differences[j]) / 2)
    spread = z * sqrt(n * (n + 1) * (2 * n + 1) / 24)
    k = max(0, int(n * (n + 1) / 4 - spread))
    return float(np.median(averages)), float(averages[k]), float(averages[len(averages) - 1 - k])


def verdict(low: float, high: float, sittings: Sequence[float], limit: float) -> str:
    """In logarithms. A change of 1.5 limits is always told from none, or it is `unclear`."""
    if low > limit and agreed(sum(s > limit / 2 for s in sittings), sittings):
        return "slower"
    if high < -limit and agreed(sum(s < -limit / 2 for s in sittings), sittings):
        return "faster"
    return "unclear" if low > limit or (high > limit and high - low > limit) else "same"


def agreed(count: int, sittings: Sequence[float]) -> bool:
    return count >= MOST_SITTINGS * len(sittings)
