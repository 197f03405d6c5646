"""What each op of a model must move and compute: bytes of weights, keys and values, and multiply-adds, from its plan.

Activations are left out: they stay in cache. An expert is counted once, in as many as the rows are likely to choose.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..abi import BLOCKS, OpCode, Space, TensorType
from ..model import open_model
from ..model.forward import build
from ..plan.fuse import quantize_inputs
from ..plan.plan import Op
from .pairs import Test

EXPERTS = (OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN)


@dataclass
class Cost:
    """bytes that are read from memory, operations (two for a multiply-add)."""

    bytes: float = 0.0
    operations: float = 0.0


class Costs:
    """Of the model in a file, as the native backend runs it; `kinds` [ops]: the part of the model an op belongs to."""

    def __init__(self, path: str, kv: str):
        _, config, self.weights = open_model(path)
        tensors = self.weights.tensors
        plan = quantize_inputs(build(config, self.weights.shapes), {name: t.type for name, t in tensors.items()})
        self.ops, self.kv = plan.ops, {kv.layer: kv for kv in plan.kv}
        values, size = BLOCKS[TensorType[kv.upper()]]
        self.kv_bytes = size / values
        self.kinds = [self._kind(op) for op in self.ops]

    def _kind(self, op: Op) -> str:
        """`matmul blk.*.ffn_up.weight` for what reads a matrix, else the op's code: `rms_norm`."""
        code = op.code.name.lower()
        if op.code != OpCode.MATMUL and op.code not in EXPERTS:
            return code
        return f"{code} {re.sub(r'[.][0-9]+[.]', '.*.', op.weights[0].tensor)}"

    def of(self, test: Test) -> list[Cost]:
        """Of each op, for all steps of a test."""
        costs = [Cost() for _ in self.ops]
        for start, rows in steps(test):
            for op, cost in zip(self.ops, costs, strict=True):
                if op.code == OpCode.ATTEND:
                    self._attend(op, 1 if op.space == Space.WANTED else rows, start + rows, cost)
                elif op.code == OpCode.MATMUL or op.code in EXPERTS:
                    self._multiply(op, 1 if op.space == Space.WANTED else rows, cost)
        return costs

    def _multiply(self, op: Op, rows: int, cost: Cost) -> None:
        for weight in op.weights:
            tensor = self.weights.tensors[weight.tensor]
            bytes, values = tensor.data.nbytes, 1
            for n in tensor.shape:
                values *= n
            if op.code in EXPERTS:
                experts, used = op.args["experts"], op.args["used"]
                bytes *= 1 - (1 - used / experts) ** rows
                values *= used / experts
            elif weight.rows:
                bytes, values = (n * weight.rows / tensor.shape[0] for n in (bytes, values))
            cost.bytes += bytes
            cost.operations += 2 * rows * values

    def _attend(self, op: Op, rows: int, end: int, cost: Cost) -> None:
        kv, window = self.kv[op.args["kv_layer"]], op.args["window"] or end
        seen = [min(window, end - i) for i in range(rows)]
        cost.bytes += min(end, window + rows - 1) * kv.kv_heads * (kv.key_dim + kv.head_dim) * self.kv_bytes
        cost.operations += 4 * sum(seen) * op.args["heads"] * kv.head_dim


def steps(test: Test) -> Sequence[tuple[int, int]]:
    """(first position, rows) of each step."""
    end = test.depth + test.prompt
    prompt = [(at, min(test.batch, end - at)) for at in range(test.depth, end, test.batch)]
    return [*prompt, *((at, 1) for at in range(end, end + test.decode))]
