"""What tests of `quantize` share: models in F16, models changed and written anew, files made and refusals caught."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma4q import Gemma4qError
from gemma4q.abi import TensorType as T
from gemma4q.gguf.quants import dequantize, quantize
from gemma4q.gguf.reader import GGUF, open_gguf
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.quantize.importance import Entry, Importance
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.quantize import planned
from gemma4q.shipped import shipped


def in_halves(folder: Path) -> Path:
    """The shipped models in F16, whose rows are whole blocks of every type for the most part."""
    for name in ("tiny", "tiny-moe"):
        written(shipped(name), folder / f"{name}-F16.gguf", "F16", allow_requantize=True)
    return folder


def written(source: Path, to: Path | None, name: str, threads: int | None = None, **options) -> GGUF:
    plan = planned(source, to, mixture(name), **options)
    plan.write(threads=threads)
    return open_gguf(plan.files[0].path)


def refused(source: Path, to: Path | None, name: str, **options) -> str:
    with pytest.raises(Gemma4qError) as caught:
        written(source, to, name, **options)
    return str(caught.value)


def contents(model: GGUF) -> dict[str, bytes]:
    return {name: tensor.data.tobytes() for name, tensor in model.tensors.items()}


def copied(
    source: Path, to: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None, **keys
) -> Path:
    """A model written anew in F32 after a change of its tensors, float32 arrays by name."""
    model = open_gguf(source)
    tensors = {t.name: dequantize(t.data, t.type).reshape(t.shape).copy() for t in model.tensors.values()}
    change(tensors)
    data = [TensorData.of(name, T.F32, values.shape, quantize(values, T.F32)) for name, values in tensors.items()]
    write_gguf(to, {**model.metadata, **keys}, data, model.types)
    return to


def measured(model: GGUF, names=None) -> Importance:
    """Made-up importance of all matrices, or of some."""
    random, entries = np.random.default_rng(3), {}
    for tensor in model.tensors.values():
        if len(tensor.shape) > 1 and (names is None or tensor.name in names):
            shape = math.prod(tensor.shape[:-2]), tensor.shape[-1]
            entries[tensor.name] = Entry(random.uniform(0, 9, shape), np.full(shape[0], 3, "i8"))
    return Importance(entries, ("a.txt", "b.txt"), chunks=7)
