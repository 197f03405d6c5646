"""Who computes: the protocol of a backend and its session, their names, and which one `auto` means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..abi import Status, TensorType
from ..errors import Gemma4qError
from ..plan.batch import Batch, Limits
from ..plan.plan import Plan

NAMES = ("native", "portable", "reference")  # in the order `auto` tries them; reference is never chosen for you


class TensorData(Protocol):
    """A tensor as the file holds it: `data` are the mapped bytes, `shape` is slowest first."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray
    fileno: int
    offset: int


@dataclass(frozen=True)
class StepResult:
    """What a step gave; arrays are views, good until the next step.

    logits [wanted, vocab], soft-capped, before biases and mask; hidden [wanted, width]; top_ids and top_values
    [wanted, 64], best first, after biases and mask, -1 where fewer are allowed; logsumexp [wanted] of the logits.
    """

    status: Status
    bad_row: int
    logits: np.ndarray
    hidden: np.ndarray
    top_ids: np.ndarray
    top_values: np.ndarray
    logsumexp: np.ndarray
    barriers: int = 0
    weight_bytes: int = 0


class Session(Protocol):
    """A model's weights, keys and values, and scratch, ready for steps."""

    limits: Limits
    bytes: Mapping[str, int]  # what it allocated, by purpose

    def fetch(self, fits: bool) -> None: ...  # asks the disk for weights: all, or experts as they are chosen
    def run(self, batch: Batch, first_op: int = 0, end_op: int | None = None) -> StepResult: ...
    def read(self, buffer: str) -> np.ndarray: ...  # for diffs and tests: [rows, width]
    def cancel(self) -> None: ...  # the step that runs now stops between two layers
    def clear_pages(self, local: bool, pages: np.ndarray) -> None: ...
    def copy_page(self, local: bool, source: int, target: int) -> None: ...
    def kernels(self) -> dict[str, str]: ...  # op name -> the kernel that serves it
    def close(self) -> None: ...


class Backend(Protocol):
    name: str

    def available(self) -> str | None: ...  # None, or why it is not
    def memory(
        self, plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, kv: TensorType, threads: int,
        isa: str | None = None,
    ) -> dict[str, int]: ...  # fmt: skip
    def load(
        self, plan: Plan, tensors: Mapping[str, TensorData], limits: Limits, kv: TensorType, threads: int,
        isa: str | None,
    ) -> Session: ...  # fmt: skip


def get(name: str) -> Backend:
    """The backend of that name, or the first one available for `auto`; an error says why not."""
    if name == "auto":
        return next(b for b in map(_module, NAMES[:-1]) if b.available() is None)
    if name not in NAMES:
        raise Gemma4qError("bad_option", f"backend {name!r} is unknown: choose auto, {', '.join(NAMES)}")
    backend = _module(name)
    if reason := backend.available():
        raise Gemma4qError("unavailable", f"backend {name}: {reason}")
    return backend


def _module(name: str) -> Backend:
    from importlib import import_module

    return import_module(f".{name}", __name__).BACKEND
