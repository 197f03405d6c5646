"""Places a plan's buffers in one arena and writes it as the flat records of abi.h that every executor walks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..abi import OpCode, OpRows, Space, dtype
from .batch import Limits
from .plan import Buffer, Op, Plan, Weight

OP, BUFFER = dtype("op"), dtype("buffer")
ALIGN = 64
IN_PLACE = (OpCode.RMS_NORM, OpCode.ADD, OpCode.SCALE, OpCode.GELU_MUL, OpCode.ROPE, OpCode.SOFTCAP)


@dataclass(frozen=True)
class Packed:
    """Records for one set of limits: `ops` and `buffers` are abi.h's structs, `weights` and `names` go by number."""

    plan: Plan
    limits: Limits
    ops: np.ndarray
    buffers: np.ndarray
    numbers: Mapping[Buffer, int]
    weights: tuple[Weight, ...]
    names: tuple[str, ...]
    arena_bytes: int


def stride(buffer: Buffer) -> int:
    """Bytes of one row."""
    return buffer.row_bytes or buffer.width * 4


def size(buffer: Buffer, limits: Limits) -> int:
    """Bytes of all its rows, rounded up to whole cache lines."""
    rows = {Space.ROW: limits.rows, Space.WANTED: limits.wanted, Space.FIXED: 1}[buffer.space]
    return -(-(stride(buffer) * rows + 4 * buffer.per_row * limits.rows) // ALIGN) * ALIGN


def place(plan: Plan, limits: Limits) -> tuple[dict[Buffer, int], dict[Buffer, int], int]:
    """First-fit offsets, last uses, bytes in all: two buffers share bytes only when their lives do not overlap.

    An elementwise op writes over an input that dies with it.
    """
    last = {b: i for i, op in enumerate(plan.ops) for b in op.inputs} | {plan.logits: 1 << 30, plan.hidden: 1 << 30}
    offsets: dict[Buffer, int] = {}
    live: dict[Buffer, int] = {}
    top = 0
    for i, op in enumerate(plan.ops):
        dying = [b for b in live if last.get(b, -1) <= i]
        if op.out is not None:
            heir = op.inputs[0] if op.code in IN_PLACE else None
            if heir in dying and heir.space == op.out.space and stride(heir) == stride(op.out):
                offset = live[heir]
            else:
                offset = first_fit(live, size(op.out, limits), limits)
            offsets[op.out] = offset
            top = max(top, offset + size(op.out, limits))
        for b in dying:
            del live[b]
        if op.out is not None and last.get(op.out, -1) > i:
            live[op.out] = offsets[op.out]
    return offsets, last, top


def first_fit(live: Mapping[Buffer, int], wanted: int, limits: Limits) -> int:
    at = 0
    for b in sorted(live, key=live.__getitem__):
        if at + wanted <= live[b]:
            break
        at = max(at, live[b] + size(b, limits))
    return at


def waits(plan: Plan, spans: Mapping[Buffer, tuple[int, int]]) -> list[bool]:
    """Which ops touch memory that an op since the last wait wrote, or write what one read."""
    flags: list[bool] = []
    read: list = []
    written: list = []

    def clash(a, b) -> bool:
        return a[0] == b[0] if isinstance(a[0], str) or isinstance(b[0], str) else a[0] < b[1] and b[0] < a[1]

    for op in plan.ops:
        reads = [spans[b] for b in op.inputs]
        writes = [spans[op.out]] if op.out is not None else []
        if op.code == OpCode.STORE_KV:
            writes.append((f"kv {op.args['kv_layer']}", ""))
        if op.code == OpCode.ATTEND:
            reads.append((f"kv {op.args['kv_layer']}", ""))
        wait = any(clash(a, b) for a in reads for b in written)
        wait |= any(clash(a, b) for a in writes for b in read + written)
        if wait:
            read, written = [], []
        flags.append(wait)
        read += reads
        written += writes
    return flags


def pack(plan: Plan, limits: Limits) -> Packed:
    """The records of `plan` for batches within `limits`."""
    offsets, last, arena_bytes = place(plan, limits)
    weights = tuple(plan.weights())
    weight_numbers = {w: i for i, w in enumerate(weights)}
    numbers = {b: i for i, b in enumerate(offsets)}
    buffers = np.zeros(len(offsets), BUFFER)
    for b, i in numbers.items():
        buffers[i] = (b.space, b.type, b.width, min(last.get(b, -1), len(plan.ops)), offsets[b], stride(b))
    spans = {b: (at, at + size(b, limits)) for b, at in offsets.items()}
    ops = np.zeros(len(plan.ops), OP)
    for i, (op, wait) in enumerate(zip(plan.ops, waits(plan, spans), strict=True)):
        ops[i] = record(op, numbers, weight_numbers, wait)
        ops[i]["name"] = i
    return Packed(plan, limits, ops, buffers, numbers, weights, tuple(op.name for op in plan.ops), arena_bytes)


def record(op: Op, numbers: Mapping[Buffer, int], weights: Mapping[Weight, int], wait: bool) -> np.void:
    r = np.zeros((), OP)
    r["code"], r["layer"], r["wait"] = op.code, op.layer, wait
    r["rows"] = OpRows.WANTED if op.space == Space.WANTED else OpRows.ALL
    r["in"], r["weight"] = -1, -1
    r["in"][: len(op.inputs)] = [numbers[b] for b in op.inputs]
    r["weight"][: len(op.weights)] = [weights[w] for w in op.weights]
    r["out"] = numbers[op.out] if op.out is not None else -1
    for name, value in op.args.items():
        r[name] = value
    return r
