"""Types chosen tensor by tensor: the least harm that a number of bytes allows.

Harm of a tensor in a type: the share of its output's energy that rounding turns into noise, times how much its group of
tensors matters. The first is worked out from a sample of rows; the second, where somebody can measure a whole model, is
Kullback-Leibler divergence over noise of models of which one group alone is rounded, else 1 for all. What is chosen
depends on nothing but the model, the importance, and what was measured.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd, prod

import numpy as np

from ..abi import BLOCKS, TensorType, row_bytes
from ..errors import Gemma4qError
from ..gguf.pieces import ahead
from ..gguf.reader import GGUF, Tensor
from .encode import Encoder
from .grid import is_on_grid
from .mixtures import is_rounded
from .stream import Importance

T = TensorType
CANDIDATES = tuple(t for t in BLOCKS if BLOCKS[t][0] > 1)
SURE = ("inp_gate.weight", "proj.weight")  # per-layer projections: small, and every layer's noise goes through them
SURE_TYPE = T.Q8_0
SAMPLE, SPOTS = 1 << 18, 16  # values of a tensor that are rounded to see what is lost; in rows at so many places
MOST_MEASURED = 48  # models
MOST_EXCHANGES = 200
UNITS = 1 << 14  # that room is counted in
_LAYER = re.compile(r"blk\.(\d+)\.(.*)\.weight")

Progress = Callable[[int, int], None]
Measure = Callable[[Mapping[str, int]], float | None]  # types of all tensors -> divergence; None: no time is left
Errors = Mapping[str, Mapping[int, float]]  # by tensor and type: noise over energy


@dataclass(frozen=True)
class Option:
    """A type that a tensor may get, the bytes it then has, and its harm."""

    type: int
    nbytes: int
    harm: float


@dataclass(frozen=True)
class Point:
    """One measurement: tensors that were rounded, the proxy's word for the harm, and the divergence in nats."""

    name: str
    tensors: tuple[str, ...]
    proxy: float
    divergence: float


@dataclass(frozen=True)
class Allocation:
    """types: of every tensor; nbytes: of all of them; harm: what the proxy says; points: what was measured."""

    types: dict[str, int]
    nbytes: int
    harm: float
    points: Sequence[Point] = field(default=())

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of proxy and measured divergence; None of less than three points."""
        if len(self.points) < 3:
            return None
        ranks = [_ranks([getattr(point, name) for point in self.points]) for name in ("proxy", "divergence")]
        return float(np.corrcoef(*ranks)[0, 1])


def free(tensors: Mapping[str, Tensor], fixed: Mapping[str, int]) -> list[Tensor]:
    """Tensors whose type is ours to choose: matrices that mixtures round, but for those whose type is `fixed`."""
    return [t for t in tensors.values() if is_rounded(t.name, t.shape) and t.name not in fixed]


def allowed(tensor: Tensor, candidates: Iterable[int] = CANDIDATES) -> list[int]:
    """The types that rows of a tensor are whole blocks of, none below what is sure for the few that need it."""
    if tensor.name.endswith(SURE):
        candidates = (SURE_TYPE,)
    return [type for type in candidates if tensor.shape[-1] % BLOCKS[type][0] == 0] or [tensor.type]


def size_of(tensor: Tensor, type: int) -> int:
    if type == tensor.type:
        return tensor.nbytes
    return prod(tensor.shape[:-1]) * row_bytes(type, tensor.shape[-1])


# -- What is lost ----------------------------------------------------------------------------------------------


def errors(
    gguf: GGUF, tensors: Sequence[Tensor], importance: Importance | None, threads: int,
    candidates: Iterable[int] = CANDIDATES, progress: Progress = lambda done, total: None,
) -> dict[str, dict[int, float]]:  # fmt: skip
    """For each tensor and each of its types: sum of importance * (x - rounded)^2 over that of importance * x^2.

    Of up to 2^18 values: whole rows, at evenly spaced places of all experts. Raises no_native, numeric.
    """
    candidates, found = tuple(candidates), {}
    encoders = [Encoder(1) for _ in range(threads)]

    def work(tensor: Tensor) -> dict[int, float]:
        encoder = encoders.pop()
        try:
            return _lost(gguf, tensor, importance, encoder, allowed(tensor, candidates))
        finally:
            encoders.append(encoder)

    with ThreadPoolExecutor(threads) as pool:
        for number, lost in enumerate(ahead(pool, work, tensors, 2 * threads)):
            found[tensors[number].name] = lost
            progress(number + 1, len(tensors))
    return found


def _lost(
    gguf: GGUF, tensor: Tensor, importance: Importance | None, encoder: Encoder, types: Sequence[int]
) -> dict[int, float]:
    cols, weights = tensor.shape[-1], importance.of(tensor.name, tensor.shape[-1]) if importance else None
    energy, lost, kept = 0.0, dict.fromkeys(types, 0.0), {tensor.type}
    if T.Q4_0 in types and is_on_grid(gguf, tensor):
        kept.add(T.Q4_0)
    for row, count in sample(tensor.shape):
        size = row_bytes(tensor.type, cols)
        data = gguf.files[tensor.file].read(tensor.offset + row * size, count * size)
        x = encoder.decode(data, tensor.type).reshape(count, cols)
        if not np.isfinite(x).all():
            raise Gemma4qError("numeric", f"{tensor.name} holds NaN or infinity: the model is damaged")
        weight = None if weights is None else weights[row // tensor.shape[-2]]
        energy += float((x.astype("f8") ** 2 @ (np.ones(cols) if weight is None else weight)).sum())
        for type in types:
            if type not in kept:
                lost[type] += float(encoder.errors(x, type, weight).sum())
    held = {type: error for type, error in lost.items() if np.isfinite(error)} or lost  # no scale reaches the others
    return {type: error / energy if energy else 0.0 for type, error in held.items()}


def sample(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First row and count of rows of pieces that stand for a tensor: no piece has rows of two matrices."""
    rows, cols, all_rows = shape[-2], shape[-1], prod(shape[:-1])
    wanted = max(1, SAMPLE // cols)
    if wanted >= all_rows:
        return [(first, rows) for first in range(0, all_rows, rows)]
    count = max(1, wanted // SPOTS)
    spots = sorted({int(at) for at in np.linspace(0, all_rows - count, min(SPOTS, wanted))})
    return [(at, min(count, rows - at % rows)) for at in spots]


# -- What matters ----------------------------------------------------------------------------------------------


def part(name: str) -> str:
    """What tensors of all layers have in common: `attn_q` of `blk.3.attn_q.weight`."""
    found = _LAYER.fullmatch(name)
    return found[2] if found else name.removesuffix(".weight")


def sensitivities(
    tensors: Mapping[str, Tensor], lost: Errors, bits: float, measure: Measure
) -> tuple[dict[str, float], list[Point]]:
    """How much each tensor of `lost` matters, and what was measured to know that.

    Of each part of the layers first, all others left as they are; then of halves, in layers, of what does most harm, as
    long as there is time. bits: of a weight, about as many as tensors will have. A part that was not measured matters
    as the median of the others.
    """
    groups: dict[str, list[str]] = {}
    for name in lost:
        groups.setdefault(part(name), []).append(name)
    left = {name: tensor.type for name, tensor in tensors.items()}
    found: dict[str, float] = {}
    points: list[Point] = []
    queue = sorted(groups.items(), key=lambda item: -sum(tensors[name].nbytes for name in item[1]))
    open_points: list[Point] = []
    while queue and len(points) < MOST_MEASURED:
        name, names = queue.pop(0)
        types = {n: probe(tensors[n], lost[n], bits) for n in names}
        proxy = sum(lost[n][type] for n, type in types.items())
        if proxy > 0:
            divergence = measure(left | types)
            if divergence is None:
                break
            point = Point(name, tuple(names), proxy, divergence)
            points.append(point)
            open_points.append(point)
            found |= dict.fromkeys(names, max(divergence, 0.0) / proxy)
        if not queue:
            queue = _halves(open_points)
    usual = float(np.median(list(found.values()))) if found else 1.0
    return {name: found.get(name, usual) for name in lost}, points


def _halves(points: list[Point]) -> list[tuple[str, list[str]]]:
    """Takes the point of most divergence that several tensors share out of the list, and halves it."""
    shared = [point for point in points if len(point.tensors) > 1]
    if not shared:
        return []
    most = max(shared, key=lambda point: point.divergence)
    points.remove(most)
    middle = len(most.tensors) // 2
    return [(f"{most.name} {side}", list(names)) for side, names in (
        ("first", most.tensors[:middle]), ("last", most.tensors[middle:])
    )]  # fmt: skip


def probe(tensor: Tensor, lost: Mapping[int, float], bits: float) -> int:
    """The largest type of at most so many bits a weight, else the smallest."""
    sizes = {type: 8 * size_of(tensor, type) / prod(tensor.shape) for type in lost}
    fitting = [type for type in lost if sizes[type] <= bits]
    return max(fitting, key=sizes.get) if fitting else min(lost, key=sizes.get)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    values = np.asarray(values)
    return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1) - 1) / 2


# -- The choice ------------------------------------------------------------------------------------------------


def allocate(
    tensors: Mapping[str, Tensor], lost: Errors, fixed: Mapping[str, int], budget: int,
    measure: Measure | None = None,
) -> Allocation:  # fmt: skip
    """A type for every tensor, all together of no more than `budget` bytes. fixed: types that are not ours to choose;
    what is neither there nor in `lost` stays as it is. Raises bad_option where the smallest types take more."""
    stay = {name: tensor.type for name, tensor in tensors.items()} | dict(fixed)
    others = sum(size_of(tensor, stay[name]) for name, tensor in tensors.items() if name not in lost)
    smallest = sum(min(size_of(tensors[name], type) for type in types) for name, types in lost.items())
    if others + smallest > budget:
        least = f"the smallest types take {others + smallest:,} bytes of tensors, and {budget:,} are to be had"
        raise Gemma4qError("bad_option", f"the target is too small: {least}")
    weight, points = dict.fromkeys(lost, 1.0), []
    if measure is not None and lost:
        values = sum(prod(tensors[name].shape) for name in lost)
        weight, points = sensitivities(tensors, lost, 8 * (budget - others) / values, measure)
    options = {
        name: [Option(type, size_of(tensors[name], type), weight[name] * error) for type, error in types.items()]
        for name, types in lost.items()
    }
    chosen = choose(options, budget - others)
    types = stay | {name: option.type for name, option in chosen.items()}
    size = others + sum(option.nbytes for option in chosen.values())
    return Allocation(types, size, sum(option.harm for option in chosen.values()), points)


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
        best, pair = 0.0, None
        for i in range(len(of)):
            together = np.where((more + more[i] <= left) & (of != of[i]), gain + gain[i], 0)
            if together.max() > best * (1 + 1e-9) + 1e-15:
                best, pair = float(together.max()), (i, int(together.argmax()))
        if pair is None:
            break
        for move in pair:
            if move < len(moves):
                chosen[names[of[move]]] = moves[move][1]
                left -= int(more[move])
    return chosen


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
