"""Gemma 4's forward pass, once, for every size: names are the GGUF file's, order is the paper's.

Nothing that follows the last layer which owns keys and values reaches another position: from there on only the rows
whose result is wanted are computed (`Builder.wanted`). For a prompt that is one row, and on E2B 20 of 35 layers.
"""

from ..plan.builder import Builder
from ..plan.plan import Buffer, Plan, Weight
from .config import Config, Layer


def build(config: Config, shapes: dict[str, tuple[int, ...]]) -> Plan:
    """The plan of one step over tensors of these shapes, by GGUF name, slowest dimension first."""
    b = Builder(shapes, config.eps)
    last = max(layer.index for layer in config.layers if layer.owns_kv)
    x = b.embed("token_embd.weight", scale=config.width**0.5)
    early = per_layer_inputs(b, config, x, 0, last)
    late = per_layer_inputs(b, config, b.wanted(x), last, len(config.layers)) if config.per_layer_width else None
    for layer in config.layers:
        b.layer = layer.index
        per_layer, first = (early, 0) if layer.index < last else (late, last)
        x = block(b, layer, x, per_layer, layer.index - first, narrow=layer.index == last)
    b.layer = -1
    hidden = b.rms_norm(x, "output_norm.weight")
    head = "output.weight" if b.has("output.weight") else "token_embd.weight"
    return b.finish(hidden, b.softcap(b.matmul(hidden, head), config.softcap))


def per_layer_inputs(b: Builder, config: Config, x: Buffer, first: int, end: int) -> Buffer | None:
    """For layers first ... end one small vector each: half looked up by token, half projected from the embedding."""
    width = config.per_layer_width
    if not width or first == end:
        return None
    rows = Weight("per_layer_model_proj.weight", first * width, (end - first) * width)
    projected = b.matmul(x, rows)
    # The projection is to be divided by sqrt(config.width) first: the norm undoes it, but for eps.
    projected = b.rms_norm(projected, "per_layer_proj_norm.weight", size=width, eps=config.eps * config.width)
    looked_up = b.embed_rows("per_layer_token_embd.weight", rows.first, rows.rows, width**0.5, x.space)
    return b.add(projected, looked_up, scale=2**-0.5)


def block(b: Builder, layer: Layer, x: Buffer, per_layer: Buffer | None, part: int, narrow: bool) -> Buffer:
    w = layer.weight
    normed = b.rms_norm(x, w("attn_norm"))
    if layer.owns_kv:
        keys_and_values(b, layer, normed)
    if narrow:
        x, normed = b.wanted(x), b.wanted(normed)
    x = b.add(x, b.rms_norm(attention(b, layer, normed), w("post_attention_norm")))

    fed = mixture(b, layer, x) if layer.experts else gated(b, layer, b.rms_norm(x, w("ffn_norm")))
    x = b.add(x, b.rms_norm(fed, w("post_ffw_norm")))

    if per_layer:
        gate = b.gelu_mul(b.matmul(x, w("inp_gate")), per_layer, part)
        x = b.add(x, b.rms_norm(b.matmul(gate, w("proj")), w("post_norm")))
    return b.scale(x, w("layer_output_scale")) if b.has(w("layer_output_scale")) else x


def keys_and_values(b: Builder, layer: Layer, x: Buffer) -> None:
    w, head = layer.weight, layer.head_dim
    k = b.matmul(x, projection(b, layer, "attn_k"))
    v = k if layer.keys_from_values else b.matmul(x, projection(b, layer, "attn_v"))
    k = b.rope(b.rms_norm(k, w("attn_k_norm"), size=head), head, layer.rope)
    from_values = layer.rope.pairs if layer.keys_from_values else 0
    b.store_kv(k, b.rms_norm(v, None, size=head), layer.index, head, layer.window > 0, from_values)


def attention(b: Builder, layer: Layer, x: Buffer) -> Buffer:
    w, head = layer.weight, layer.head_dim
    q = b.matmul(x, projection(b, layer, "attn_q"))
    q = b.rope(b.rms_norm(q, w("attn_q_norm"), size=head), head, layer.rope)
    k_norm = f"blk.{layer.kv}.attn_k_norm.weight" if layer.keys_from_values else None
    return b.matmul(b.attend(q, layer.kv, layer.window, k_norm), w("attn_output"))


def projection(b: Builder, layer: Layer, name: str) -> Weight:
    """attn_q, attn_k or attn_v: a tensor of its own, or a stretch of the rows of attn_qkv."""
    fused = layer.weight("attn_qkv")
    if not b.has(fused):
        return Weight(layer.weight(name))
    q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    first, rows = {"attn_q": (0, q), "attn_k": (q, kv), "attn_v": (q + kv, kv)}[name]
    return Weight(fused, first, rows)


def gated(b: Builder, layer: Layer, x: Buffer) -> Buffer:
    w = layer.weight
    return b.matmul(b.gelu_mul(b.matmul(x, w("ffn_gate")), b.matmul(x, w("ffn_up"))), w("ffn_down"))


def mixture(b: Builder, layer: Layer, x: Buffer) -> Buffer:
    """A dense branch and a routed one, side by side; the router reads the residual, normalised without a weight."""
    w = layer.weight
    dense = gated(b, layer, b.rms_norm(x, w("ffn_norm")))
    router = b.matmul(b.rms_norm(x, w("ffn_gate_inp", "scale"), scale=x.width**-0.5), w("ffn_gate_inp"))
    fused = b.has(w("ffn_gate_up_exps"))
    gate_up = (w("ffn_gate_up_exps"),) if fused else (w("ffn_gate_exps"), w("ffn_up_exps"))
    routed = b.experts(
        b.rms_norm(x, w("pre_ffw_norm_2")), router, gate_up, w("ffn_down_exps"), w("ffn_down_exps", "scale"),
        layer.experts_used,
    )  # fmt: skip
    return b.add(b.rms_norm(dense, w("post_ffw_norm_1")), b.rms_norm(routed, w("post_ffw_norm_2")))
