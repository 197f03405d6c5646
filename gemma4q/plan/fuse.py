"""Rewrites plan -> plan, one function each; each leaves the numbers as they are, up to what its docstring says."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..abi import BufferType, OpCode, TensorType, dtype
from .plan import Buffer, Op, Plan

FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
MATRICES = (OpCode.MATMUL, OpCode.EXPERTS_UP, OpCode.EXPERTS_DOWN)


def a8_bytes(width: int) -> int:
    """Bytes of a row of so many values."""
    return width // 32 * dtype("block_a8").itemsize


def quantize_inputs(plan: Plan, types: Mapping[str, TensorType], row_bytes: Callable[[int], int] = a8_bytes) -> Plan:
    """Rows that meet a quantised matrix become int8 with a scale per 32 values, once for all the matrices they meet.

    row_bytes: of a row of so many values, where kernels need more room than that.
    """
    quantized: dict[Buffer, Buffer] = {}
    ops: list[Op] = []
    for op in plan.ops:
        if op.code in MATRICES and types[op.weights[0].tensor] not in FLOATS:
            x = op.inputs[0]
            if x not in quantized:
                quantized[x] = Buffer(f"{x.name}.a8", x.width, x.space, BufferType.A8, 0, row_bytes(x.width))
                ops.append(Op(OpCode.QUANTIZE, quantized[x], (x,), (), op.layer))
            op = replace(op, inputs=(quantized[x], *op.inputs[1:]))
        ops.append(op)
    return replace(plan, ops=tuple(ops))
