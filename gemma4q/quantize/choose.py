"""The choice: for each of many an option, all together of no more than so many bytes, and the least harm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

MOST_EXCHANGES = 200
UNITS = 1 << 14  # that room is counted in


@dataclass(frozen=True)
class Option:
    """A type that a tensor may get, the bytes it then has, and its harm."""

    type: int
    nbytes: int
    harm: float


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The least harm together of at most so many bytes, nearly; the same for options in any order.

    Two ways, then exchanges, and the better of both: steps along each tensor's convex hull in the order of harm that a
    byte takes away (Everett's multipliers), good where there are many tensors; and the best sums of rounded sizes, good
    where there are few.
    """
    hulls = {name: hull(options[name]) for name in sorted(options)}
    found = [_stepped(hulls, budget), _summed(hulls, budget)]
    found = [_exchanged(options, chosen, budget - sum(o.nbytes for o in chosen.values())) for chosen in found]
    return min(found, key=lambda chosen: sum(option.harm for option in chosen.values()))


def _stepped(hulls: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    chosen = {name: line[0] for name, line in hulls.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    steps = [(name, a, b) for name, line in hulls.items() for a, b in pairwise(line)]
    for name, before, after in sorted(steps, key=lambda step: -_gain(step[1], step[2])):
        if chosen[name] == before and after.nbytes - before.nbytes <= left:
            chosen[name] = after
            left -= after.nbytes - before.nbytes
    return chosen


def _summed(hulls: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """By dynamic programming: for each tensor and room, in units of bytes, the option of the least harm so far."""
    room = budget - sum(line[0].nbytes for line in hulls.values())
    common = gcd(*(option.nbytes - line[0].nbytes for line in hulls.values() for option in line)) or 1
    unit = common * -(-max(room, 1) // (common * UNITS))
    least, picks = np.zeros(room // unit + 1), []
    for line in hulls.values():
        rows = np.full((len(line), len(least)), np.inf)
        for row, option in zip(rows, line, strict=True):
            units = -(-(option.nbytes - line[0].nbytes) // unit)
            row[units:] = least[: max(0, len(least) - units)] + option.harm
        picks.append(rows.argmin(0))
        least = rows.min(0)
    chosen, at = {}, len(least) - 1
    for (name, line), pick in reversed(list(zip(hulls.items(), picks, strict=True))):
        chosen[name] = line[pick[at]]
        at -= -(-(chosen[name].nbytes - line[0].nbytes) // unit)
    return chosen


def _exchanged(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """What is chosen after all changes of one tensor, or of two at once, that do less harm and fit in what is left."""
    names = sorted(options)
    moves = [(i, option) for i, name in enumerate(names) for option in options[name]]
    of = np.array([i for i, _ in moves] + [-1])  # the last one changes nothing
    sizes, harms = (np.array([getattr(o, what) for _, o in moves] + [0]) for what in ("nbytes", "harm"))
    for _ in range(MOST_EXCHANGES):
        now = [chosen[name] for name in names]
        more = sizes - np.append([o.nbytes for o in now], 0)[of]
        gain = np.append([o.harm for o in now], 0)[of] - harms
        pair = _best_pair(of, more, gain, left)
        if sum(gain[list(pair)]) <= 1e-15:
            break
        for move in pair:
            if move < len(moves):
                chosen[names[of[move]]] = moves[move][1]
                left -= int(more[move])
    return chosen


def _best_pair(of: np.ndarray, more: np.ndarray, gain: np.ndarray, left: int) -> tuple[int, int]:
    """The two moves of different tensors that gain most, of those that take no more than `left` together."""
    nothing = len(of)
    of, more, gain = np.append(of, -2), np.append(more, 0), np.append(gain, -np.inf)
    order, bests = np.argsort(more[:nothing], kind="stable"), [(nothing, nothing)]
    best = second = nothing  # of the moves that take no more than this one; the second is of another tensor
    for move in order.tolist():
        if gain[move] > gain[best]:
            best, second = move, best if of[move] != of[best] else second
        elif of[move] != of[best] and gain[move] > gain[second]:
            second = move
        bests.append((best, second))
    firsts, seconds = np.array(bests)[np.searchsorted(more[order], left - more, side="right")].T
    other = np.where(of[firsts] != of, firsts, seconds)
    move = int((gain + gain[other]).argmax())
    return move, int(other[move])


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of harm over bytes, from the fewest bytes to the least harm."""
    line: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.harm, option.type)):
        if line and option.harm >= line[-1].harm:
            continue
        while len(line) > 1 and _gain(line[-2], line[-1]) <= _gain(line[-1], option):
            line.pop()
        line.append(option)
    return line


def _gain(before: Option, after: Option) -> float:
    """Harm that each further byte takes away; where none is needed, all the more."""
    more = after.nbytes - before.nbytes
    return (before.harm - after.harm) / more if more > 0 else float("inf")
