"""The vocabulary that model code is written in: each method appends one op and returns its output."""

from dataclasses import dataclass

from ..abi import BufferType, OpCode, Space
from .plan import KV, Buffer, Op, Plan, Weight

TOP = 64  # candidates kept of each row that wants them: Gemma's default top-k
STRETCH = 16384  # logits looked at in one go by top_part


@dataclass(frozen=True)
class Rope:
    """Half-split rotary positions: `pairs` of `dims` / 2 turn, by base^(-2i / dims) / factor[i]."""

    base: float
    dims: int
    pairs: int
    factors: str | None = None  # a weight that divides the frequencies


class Builder:
    """Appends ops; `shapes` are the tensors' shapes by GGUF name, slowest first."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], eps: float):
        self.shapes, self.eps = shapes, eps
        self.ops: list[Op] = []
        self.kv: list[KV] = []
        self.angles: dict[tuple[Rope, Space], Buffer] = {}
        self.layer = -1

    def has(self, tensor: str) -> bool:
        return tensor in self.shapes

    def _op(self, code, width, inputs=(), weights=(), space=None, type=BufferType.F32, **args) -> Buffer | None:
        space = space if space is not None else inputs[0].space if inputs else Space.ROW
        out = Buffer(f"{code.name.lower()}.{len(self.ops)}", width, space, type) if width else None
        weights = tuple(w if isinstance(w, Weight) else Weight(w) for w in weights)
        self.ops.append(Op(code, out, tuple(inputs), weights, self.layer, args))
        return out

    def _rows(self, weight: str | Weight) -> int:
        rows = weight.rows if isinstance(weight, Weight) else 0
        return rows or self.shapes[weight.tensor if isinstance(weight, Weight) else weight][-2]

    def embed(self, table: str, scale: float) -> Buffer:
        return self._op(OpCode.EMBED, self.shapes[table][-1], weights=[table], scale=scale)

    def embed_rows(self, table: str, first: int, width: int, scale: float, space: Space) -> Buffer:
        """Columns `first` ... `first + width` of the token's row, read from the file when needed."""
        return self._op(OpCode.EMBED_ROWS, width, weights=[table], space=space, part=first, scale=scale)

    def wanted(self, x: Buffer) -> Buffer:
        """Of the batch's rows those whose result is asked for; all that follows runs on them alone."""
        return self._op(OpCode.WANTED, x.width, [x], space=Space.WANTED)

    def matmul(self, x: Buffer, weight: str | Weight) -> Buffer:
        """x . weight', times the one value of `X.scale` where the file has that beside `X.weight`."""
        y = self._op(OpCode.MATMUL, self._rows(weight), [x], [weight])
        scale = str(getattr(weight, "tensor", weight)).removesuffix("weight") + "scale"
        return self.scale(y, scale) if self.shapes.get(scale) == (1,) else y

    def rms_norm(self, x: Buffer, weight: str | None, size: int = 0, scale: float = 1.0, eps: float = 0.0) -> Buffer:
        """Normalises every run of `size` values (the whole row when 0), times weight times scale."""
        weights = [weight] if weight else []
        return self._op(OpCode.RMS_NORM, x.width, [x], weights, size=size or x.width, scale=scale, eps=eps or self.eps)

    def rope(self, x: Buffer, head_dim: int, rope: Rope) -> Buffer:
        angles = self.angles.get((rope, x.space)) or self._angles(rope, x.space)
        return self._op(OpCode.ROPE, x.width, [x, angles], head_dim=head_dim, size=rope.dims, pairs=rope.pairs)

    def _angles(self, rope: Rope, space: Space) -> Buffer:
        weights = [rope.factors] if rope.factors else []
        args = {"base": rope.base, "size": rope.dims, "pairs": rope.pairs}
        self.angles[rope, space] = self._op(OpCode.ANGLES, 2 * rope.pairs, (), weights, space, **args)
        return self.angles[rope, space]

    def store_kv(self, k: Buffer, v: Buffer, layer: int, head_dim: int, local: bool, from_values: int) -> None:
        """`from_values`: of k keep only this many rotated pairs, since the rest is v times attn_k_norm (0: keep k)."""
        kv = KV(layer, k.width // head_dim, 2 * from_values or head_dim, head_dim, local)
        self.kv.append(kv)
        args = {"kv_layer": layer, "kv_heads": kv.kv_heads, "head_dim": head_dim, "pairs": from_values}
        self._op(OpCode.STORE_KV, 0, [k, v], from_values=int(from_values > 0), **args)

    def attend(self, q: Buffer, layer: int, window: int, k_norm: str | None = None) -> Buffer:
        """Attention over layer `layer`'s keys and values; window 0 sees everything; `k_norm` where keys are values."""
        kv = next(kv for kv in self.kv if kv.layer == layer)
        args = {
            "heads": q.width // kv.head_dim, "kv_heads": kv.kv_heads, "head_dim": kv.head_dim, "window": window,
            "from_values": int(k_norm is not None), "pairs": kv.key_dim // 2 if k_norm else 0,
        }  # fmt: skip
        return self._op(OpCode.ATTEND, q.width, [q], [k_norm] if k_norm else [], kv_layer=layer, **args)

    def add(self, a: Buffer, b: Buffer, scale: float = 1.0) -> Buffer:
        return self._op(OpCode.ADD, a.width, [a, b], scale=scale)

    def scale(self, x: Buffer, weight: str) -> Buffer:
        return self._op(OpCode.SCALE, x.width, [x], [weight])

    def gelu_mul(self, gate: Buffer, up: Buffer, part: int = 0) -> Buffer:
        """gelu(gate) times the `part`-th slice of `up` as wide as gate."""
        return self._op(OpCode.GELU_MUL, gate.width, [gate, up], part=part)

    def experts(self, x: Buffer, router: Buffer, gate_up: tuple[str, ...], down: str, scale: str, used: int) -> Buffer:
        """The `used` best experts of each row, weighted. `gate_up` is one fused tensor or gate and up."""
        shape = {"experts": router.width, "used": used}
        route = self._op(OpCode.ROUTE, 2 * used, [router], [scale], type=BufferType.I32, **shape)
        group = Buffer(f"group.{len(self.ops)}", 2 * router.width + 2, Space.FIXED, BufferType.I32, per_row=used)
        self.ops.append(Op(OpCode.GROUP, group, (route,), (), self.layer, shape))
        hidden = self.shapes[down][-1]
        gated = self._op(OpCode.EXPERTS_UP, used * 2 * hidden, [x, route, group], gate_up, **shape)
        active = self._op(OpCode.EXPERTS_GELU, used * hidden, [gated], size=hidden, **shape)
        return self._op(OpCode.EXPERTS_DOWN, x.width, [active, route, group], [down], size=hidden, **shape)

    def softcap(self, x: Buffer, cap: float) -> Buffer:
        return self._op(OpCode.SOFTCAP, x.width, [x], scale=cap) if cap else x

    def finish(self, hidden: Buffer, logits: Buffer) -> Plan:
        stretches = -(-logits.width // STRETCH)
        parts = self._op(OpCode.TOP_PART, stretches * (4 + 2 * TOP), [logits], used=TOP, size=STRETCH)
        self._op(OpCode.TOP, 0, [parts], used=TOP, size=logits.width)
        return Plan(tuple(self.ops), tuple(self.kv), logits, hidden, hidden.width, logits.width)
