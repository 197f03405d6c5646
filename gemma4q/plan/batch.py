"""A step's input as abi.h lays it out: one flat block of fixed capacity, filled anew for each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..abi import PAGE, RowFlag, dtype

HEADER, ROW, SEQUENCE, BIAS = dtype("batch"), dtype("batch_row"), dtype("batch_sequence"), dtype("logit_bias")
NO_BIAS = np.zeros(0, BIAS)
WANTS = RowFlag.WANT_LOGITS | RowFlag.WANT_TOP | RowFlag.WANT_HIDDEN


@dataclass(frozen=True)
class Limits:
    """What one step may hold; memory is planned for exactly this.

    rows: rows of a step; wanted: rows of a step whose result is asked for; sequences: in one step;
    context: positions of one sequence; global_pages, local_pages: in the store; biases: in one step.
    """

    rows: int
    wanted: int
    sequences: int
    context: int
    global_pages: int
    local_pages: int
    biases: int = 8192

    @property
    def table(self) -> int:
        """Page numbers that one sequence may have."""
        return -(-self.context // PAGE)


@dataclass
class Step:
    """One sequence's rows in a step: `tokens` stand at positions start, start + 1, ...

    want: row_flag bits for each row, or for the last row alone when an int. pages: ids by position / 64.
    reach: last position each row sees (None: its own). vector: for each row an index into `vectors` or -1.
    bias: array of logit_bias; mask: u32 bits, set = allowed.
    """

    tokens: Sequence[int] | np.ndarray
    start: int
    global_pages: np.ndarray
    local_pages: np.ndarray
    generated: bool = False
    want: int | np.ndarray = int(RowFlag.WANT_TOP)
    reach: np.ndarray | None = None
    vector: np.ndarray | None = None
    vectors: np.ndarray | None = None
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None
    store: bool = True


class Batch:
    """`memory` is what an executor reads; `rows`, `sequences`, ... are views into it."""

    def __init__(self, limits: Limits, width: int, vocab: int):
        self.limits = limits
        shapes = {
            "row": (ROW, (limits.rows,)),
            "sequence": (SEQUENCE, (limits.sequences,)),
            "wanted": (np.dtype("i4"), (limits.wanted,)),
            "page": (np.dtype("i4"), (2 * limits.sequences * limits.table,)),
            "vector": (np.dtype("f4"), (limits.rows, width)),
            "bias": (BIAS, (limits.biases,)),
            "mask": (np.dtype("u4"), (limits.sequences, -(-vocab // 32))),
        }
        at, places = 64 * -(-HEADER.itemsize // 64), {}
        for name, (kind, shape) in shapes.items():
            places[name] = at
            at += 64 * -(-kind.itemsize * int(np.prod(shape)) // 64)
        self.memory = np.zeros(at, np.uint8)
        self.header = self.memory[: HEADER.itemsize].view(HEADER)[0]
        for name, (kind, shape) in shapes.items():
            self.header[f"{name}_at"] = places[name]
            size = kind.itemsize * int(np.prod(shape))
            plural = {"bias": "biases", "wanted": "wanted"}.get(name, name + "s")
            setattr(self, plural, self.memory[places[name] : places[name] + size].view(kind).reshape(shape))

    def fill(self, steps: Sequence[Step]) -> list[tuple[int, int]]:
        """Lays out `steps`, prompts first; returns (step, row within it) of each wanted row, in result order."""
        order = sorted(range(len(steps)), key=lambda i: steps[i].generated)
        at = {"row": 0, "page": 0, "bias": 0, "vector": 0, "mask": 0}
        wanted = []
        for slot, i in enumerate(order):
            step, first = steps[i], at["row"]
            flags = self._rows(step, slot, at)
            wanted += [(i, int(r), first + int(r)) for r in np.nonzero(flags & WANTS)[0]]
            entry = self.sequences[slot]
            entry["first_row"], entry["rows"], entry["stored"] = first, at["row"] - first, step.start
            for name, pages in (("global_pages", step.global_pages), ("local_pages", step.local_pages)):
                entry[name] = at["page"]
                self.pages[at["page"] : at["page"] + len(pages)] = pages
                at["page"] += len(pages)
            bias = step.bias if step.bias is not None else NO_BIAS
            entry["bias"], entry["biases"] = at["bias"], len(bias)
            self.biases[at["bias"] : at["bias"] + len(bias)] = bias
            at["bias"] += len(bias)
            entry["mask"] = -1
            if step.mask is not None:
                entry["mask"] = at["mask"]
                self.masks[at["mask"]] = step.mask
                at["mask"] += 1
        self.header["rows"], self.header["sequences"], self.header["wanted"] = at["row"], len(steps), len(wanted)
        self.header["prompt_rows"] = sum(len(s.tokens) for s in steps if not s.generated)
        self.wanted[: len(wanted)] = [row for _, _, row in wanted]
        return [(i, r) for i, r, _ in wanted]

    def _rows(self, step: Step, slot: int, at: dict[str, int]) -> np.ndarray:
        n = len(step.tokens)
        rows = self.rows[at["row"] : at["row"] + n]
        at["row"] += n
        rows["token"], rows["sequence"], rows["adapter"] = step.tokens, slot, -1
        rows["position"] = np.arange(step.start, step.start + n)
        rows["reach"] = rows["position"] if step.reach is None else step.reach
        flags = np.zeros(n, np.uint16)
        if isinstance(step.want, np.ndarray):
            flags |= step.want.astype(np.uint16)
        else:
            flags[-1] = step.want
        flags |= (RowFlag.GENERATED if step.generated else 0) | (0 if step.store else RowFlag.NO_STORE)
        rows["flags"], rows["vector"] = flags, -1
        if step.vectors is not None:
            count = len(step.vectors)
            rows["vector"] = np.where(step.vector >= 0, step.vector + at["vector"], -1)
            self.vectors[at["vector"] : at["vector"] + count] = step.vectors
            at["vector"] += count
        return flags
