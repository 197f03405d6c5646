"""What rounding loses of a tensor: noise over energy, from a sample of its rows, for each type that it may get."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from ..abi import BLOCKS, TensorType, row_bytes
from ..errors import Gemma4qError
from ..gguf.pieces import ahead
from ..gguf.reader import GGUF, Tensor
from .encode import Encoder
from .grid import Grid
from .mixtures import is_rounded
from .stream import Importance

T = TensorType
CANDIDATES = tuple(t for t in BLOCKS if BLOCKS[t][0] > 1)
SURE = ("inp_gate.weight", "proj.weight")  # per-layer projections: small, and every layer's noise goes through them
SURE_TYPE = T.Q8_0
SAMPLE, SPOTS = 1 << 18, 16  # values of a tensor that are rounded to see what is lost; in rows at so many places

Progress = Callable[[int, int], None]
Errors = Mapping[str, Mapping[int, float]]  # by tensor and type: noise over energy


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


def errors(
    gguf: GGUF, grid: Grid, tensors: Sequence[Tensor], importance: Importance | None, threads: int,
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
            types, kept = allowed(tensor, candidates), {tensor.type}
            if T.Q4_0 in types and grid.has(tensor):
                kept.add(T.Q4_0)
            return _lost(gguf, tensor, importance, encoder, types, kept)
        finally:
            encoders.append(encoder)

    with ThreadPoolExecutor(threads) as pool:
        for number, lost in enumerate(ahead(pool, work, tensors, 2 * threads)):
            found[tensors[number].name] = lost
            progress(number + 1, len(tensors))
    return found


def _lost(
    gguf: GGUF, tensor: Tensor, importance: Importance | None, encoder: Encoder, types: Sequence[int], kept: set[int]
) -> dict[int, float]:
    """kept: types in which nothing is lost."""
    cols, weights = tensor.shape[-1], importance.of(tensor.name, tensor.shape[-1]) if importance else None
    energy, lost = 0.0, dict.fromkeys(types, 0.0)
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
