"""Types chosen tensor by tensor: the least harm that a number of bytes allows.

Harm of a tensor in a type is `noise`, times what is usual for its part where nothing else is known. Where somebody can
measure a whole model, it is what the model's Kullback-Leibler divergence says of it: of models of which one part alone
is rounded, of halves of parts, and of models with what was the best choice so far. All else stays as it was: in Q8_0 a
trial would be faster, but errors of many tensors do not merely add up, and hid those of one. What is chosen depends on
nothing but the model, the importance, and what was measured.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ..errors import Gemma4qError
from ..gguf.reader import Tensor
from .choose import Option, choose
from .noise import Errors, size_of

MOST_MEASURED = 200  # models
# How wide the factors are by which the harm of a tensor is off, in all types and in one; and by what share of itself a
# divergence is, being a mean over a few thousand tokens: 0.03 chose what was good on those and not on others.
OF_TENSOR, OF_TYPE, MEASURED = 0.5, 0.3, 0.25
LEAST = 0.1  # of what a harm was thought to be
# How much noise of a part matters where nobody can measure, 1 for the others: about as in both trained models, but
# nearer to each other (tools/recipe_trials.py).
USUAL = {
    "token_embd": 32.0, "output": 32.0, "attn_v": 4.0, "attn_output": 4.0, "ffn_down": 3.0,
    "ffn_gate_up_exps": 0.25, "ffn_down_exps": 0.25,
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d+)\.(.*)\.weight")

Types = Mapping[str, int]
Measure = Callable[[Types], float | None]  # types of all tensors -> divergence; None: no time is left


@dataclass(frozen=True)
class Point:
    """One measurement: which tensors were rounded, to what types; sum of their noise; the divergence in nats, and what
    was foretold of it; None: nothing was known yet."""

    name: str
    types: Types
    noise: float
    divergence: float
    foretold: float | None = None


@dataclass(frozen=True)
class Allocation:
    """types: of every tensor; nbytes: of all of them; harm: what it is thought to be; points: what was measured."""

    types: dict[str, int]
    nbytes: int
    harm: float
    points: Sequence[Point] = field(default=())

    @property
    def of_noise(self) -> float | None:
        """Spearman's rank correlation of noise and measured divergence."""
        return correlation([(point.noise, point.divergence) for point in self.points])

    @property
    def of_foretold(self) -> float | None:
        """The same of what was foretold from the measurements before, where there were some."""
        return correlation([(p.foretold, p.divergence) for p in self.points if p.foretold is not None])


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's; None of less than three pairs, or of equal values."""
    if len(pairs) < 3:
        return None
    ranks = [_ranks(values) for values in zip(*pairs, strict=True)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(r) for r in ranks) else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    values = np.asarray(values)
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) - 1) / 2


def allocate(
    tensors: Mapping[str, Tensor], lost: Errors, fixed: Types, budget: int,
    measure: Measure | None = None, starts: Mapping[str, Types] | None = None,
) -> Allocation:  # fmt: skip
    """A type for every tensor, all together of no more than `budget` bytes.

    fixed: types that are not ours to choose; what is neither there nor in `lost` stays as it is. starts: choices that
    somebody else made, by a name for them, which are measured too. Raises bad_option where the smallest types take
    more.
    """
    stay = {name: tensor.type for name, tensor in tensors.items()} | dict(fixed)
    others = sum(size_of(tensor, stay[name]) for name, tensor in tensors.items() if name not in lost)
    smallest = sum(min(size_of(tensors[name], type) for type in types) for name, types in lost.items())
    if others + smallest > budget:
        least = f"the smallest types take {others + smallest:,} bytes of tensors, and {budget:,} are to be had"
        raise Gemma4qError("bad_option", f"the target is too small: {least}")
    stay |= {name: next(iter(types)) for name, types in lost.items() if len(types) == 1}
    free = {name: types for name, types in lost.items() if len(types) > 1}
    taken = sum(size_of(tensor, stay[name]) for name, tensor in tensors.items() if name not in free)
    search = Search(tensors, free, budget - taken, measure)
    if measure is not None and free:
        search.run(starts or {})
    types, harms = search.best(), search.harms()
    return Allocation(stay | types, taken + search.nbytes(types), _sum(harms, types), search.points)


class Search:
    """The best types for so many bytes, by what was measured so far, which `run` adds to."""

    def __init__(self, tensors: Mapping[str, Tensor], lost: Errors, room: int, measure: Measure | None):
        """lost: of tensors that have a choice, for which there are `room` bytes."""
        self.tensors, self.lost, self.room, self.measure = tensors, lost, room, measure
        self.left = {name: tensor.type for name, tensor in tensors.items()}
        self.parts: dict[str, list[str]] = {}
        for name in lost:
            self.parts.setdefault(part(name), []).append(name)
        self.points: list[Point] = []
        self.weight, self.weighed = {name: USUAL.get(part(name), 1.0) for name in lost}, False

    def nbytes(self, types: Types) -> int:
        return sum(size_of(self.tensors[name], type) for name, type in types.items())

    def harms(self) -> dict[str, dict[int, float]]:
        return foretold(self.lost, self.weight, self.points if self.weighed else ())

    def choice(self) -> dict[str, int]:
        """What does the least harm, going by all that was measured."""
        options = {
            name: [Option(type, size_of(self.tensors[name], type), harm) for type, harm in types.items()]
            for name, types in self.harms().items()
        }
        return {name: option.type for name, option in choose(options, self.room).items()}

    def best(self) -> dict[str, int]:
        """Of the whole choices that were measured, and were as good as any as far as that tells, the best one by all
        that was measured; where there is none, `choice`."""
        wholes = [point for point in self.points if len(point.types) == len(self.lost)]
        if not wholes:
            return self.choice()
        harms, least = self.harms(), min(point.divergence for point in wholes)
        good = [point.types for point in wholes if point.divergence <= (1 + MEASURED) * least]
        return dict(min(good, key=lambda types: _sum(harms, types)))

    def run(self, starts: Mapping[str, Types]) -> None:
        """Measures each part of the layers, others' choices, then the best choice and halves of parts in turn: until
        nothing is left to learn, or no time."""
        if not self._weigh():
            return
        for name, types in starts.items():
            if not self._measured(name, types):
                return
        halves, count = list(self.points[: len(self.parts)]), 0
        while True:
            types = self.choice()
            if types not in [point.types for point in self.points]:
                count += 1
                if not self._measured(f"choice {count}", types):
                    return
            shared = [point for point in halves if len(point.types) > 1]
            if not shared:
                return
            most = max(shared, key=lambda point: point.divergence)
            halves.remove(most)
            for name, half in zip((f"{most.name} first", f"{most.name} last"), _halved(most.types), strict=True):
                if not self._measured(name, half):
                    return
                halves.append(self.points[-1])

    def _weigh(self) -> bool:
        """Each part alone, largest first; what there was no time for is as usual beside the others."""
        bits = 8 * self.room / sum(prod(self.tensors[name].shape) for name in self.lost)
        sizes = {part: sum(self.tensors[name].nbytes for name in names) for part, names in self.parts.items()}
        in_time, found = True, {}
        for part in sorted(self.parts, key=lambda part: -sizes[part]):
            types = {name: probe(self.tensors[name], self.lost[name], bits) for name in self.parts[part]}
            in_time = self._measured(part, types)
            if not in_time:
                break
            if (point := self.points[-1]).noise > 0:
                found |= dict.fromkeys(types, point.divergence / point.noise)
        scale = float(np.median([found[name] / self.weight[name] for name in found])) if found else 1.0
        usual = {name: (scale or 1.0) * weight for name, weight in self.weight.items()}
        self.weight = {name: max(found.get(name, weight), LEAST * weight) for name, weight in usual.items()}
        self.weighed = True
        return in_time

    def _measured(self, name: str, types: Types) -> bool:
        """Whether there was time for one more point."""
        divergence = self.measure(self.left | dict(types)) if len(self.points) < MOST_MEASURED else None
        if divergence is None:
            return False
        expected = _sum(self.harms(), types) if self.weighed else None
        self.points.append(Point(name, dict(types), _sum(self.lost, types), divergence, expected))
        return True


def _sum(of: Errors, types: Types) -> float:
    return sum(of[name].get(type, 0.0) for name, type in types.items())


def foretold(lost: Errors, weight: Mapping[str, float], points: Sequence[Point]) -> dict[str, dict[int, float]]:
    """Harm of each tensor in each type: weight times noise, and corrected by what was measured of several at once.

    Harms add up. Each is off by a factor for its tensor and one for its type there, which are normal about 1; they are
    what is likeliest given the divergences (regression by a Gaussian process with the kernel that follows).
    """
    names = list(lost)
    thought = {name: {type: weight[name] * noise for type, noise in lost[name].items()} for name in names}
    if not points:
        return thought
    harms = np.array([[thought[name].get(point.types.get(name), 0.0) for name in names] for point in points])
    types = np.array([[point.types.get(name, -1) for name in names] for point in points])
    divergences = np.array([point.divergence for point in points])
    kernel = OF_TENSOR**2 * harms @ harms.T
    for row, of_row, sums in zip(harms, types, kernel, strict=True):
        sums += OF_TYPE**2 * (harms * (types == of_row)) @ row
    noise = np.diag((MEASURED * divergences) ** 2 + 1e-30)
    pull = np.linalg.solve(kernel + noise, divergences - harms.sum(1))
    of_tensor = 1 + OF_TENSOR**2 * pull @ harms
    return {
        name: {
            type: harm * max(LEAST, float(of_tensor[i] + OF_TYPE**2 * pull @ (harms[:, i] * (types[:, i] == type))))
            for type, harm in thought[name].items()
        }
        for i, name in enumerate(names)
    }


def part(name: str) -> str:
    """What tensors of all layers have in common: `attn_q` of `blk.3.attn_q.weight`."""
    found = _LAYER.fullmatch(name)
    return found[2] if found else name.removesuffix(".weight")


def probe(tensor: Tensor, lost: Mapping[int, float], bits: float) -> int:
    """The largest type of at most so many bits a weight, else the smallest."""
    sizes = {type: 8 * size_of(tensor, type) / prod(tensor.shape) for type in lost}
    fitting = [type for type in lost if sizes[type] <= bits]
    return max(fitting, key=sizes.get) if fitting else min(lost, key=sizes.get)


def _halved(types: Types) -> tuple[Types, Types]:
    """The first layers and the last."""
    items = list(types.items())
    middle = len(items) // 2
    return dict(items[:middle]), dict(items[middle:])
