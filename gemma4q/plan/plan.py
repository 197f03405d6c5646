"""A plan: the ops of one forward pass, in order, over buffers that do not know their place yet (pack.py gives it)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..abi import BufferType, OpCode, Space


@dataclass(frozen=True, eq=False)
class Buffer:
    """`width` values for each row of its space; a fixed one has `per_row` more for each row the batch may have."""

    name: str
    width: int
    space: Space = Space.ROW
    type: BufferType = BufferType.F32
    per_row: int = 0
    row_bytes: int = 0  # 0: those of its values


@dataclass(frozen=True)
class Weight:
    """A tensor by its GGUF name, or `rows` of its rows from `first` on."""

    tensor: str
    first: int = 0
    rows: int = 0  # 0: all

    def __str__(self) -> str:
        return self.tensor + (f"[{self.first}:{self.first + self.rows}]" if self.rows else "")


@dataclass(frozen=True, eq=False)
class Op:
    """One step; `args` are the fields of abi.h's `op` that this code reads."""

    code: OpCode
    out: Buffer | None
    inputs: tuple[Buffer, ...] = ()
    weights: tuple[Weight, ...] = ()
    layer: int = -1
    args: dict = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """The rows this op runs over: those of its inputs, or of its output where it has none."""
        return self.inputs[0].space if self.inputs and self.code != OpCode.WANTED else self.out.space

    @property
    def name(self) -> str:
        what = self.weights[0].tensor if self.weights else self.out.name if self.out else self.code.name.lower()
        return f"{self.code.name.lower()}({what})"


@dataclass(frozen=True)
class KV:
    """What one layer keeps of each position."""

    layer: int
    kv_heads: int
    key_dim: int
    head_dim: int
    local: bool


@dataclass(frozen=True)
class Plan:
    """Ops in order; `logits` [wanted, vocab] and `hidden` [wanted, width] outlive the run."""

    ops: tuple[Op, ...]
    kv: tuple[KV, ...]
    logits: Buffer
    hidden: Buffer
    width: int
    vocab: int

    def weights(self) -> Iterator[Weight]:
        """Each weight once, in the order of first use."""
        return iter(dict.fromkeys(w for op in self.ops for w in op.weights))

    def __str__(self) -> str:
        def line(i: int, op: Op) -> str:
            out = f"{op.out.name}[{op.out.width}]" if op.out else "-"
            names = " ".join(b.name for b in op.inputs)
            return f"{i:4} {op.code.name.lower():<13} {out:<24} {names:<32} {' '.join(map(str, op.weights))}"

        return "\n".join(map(line, range(len(self.ops)), self.ops))
