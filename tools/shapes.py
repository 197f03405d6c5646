"""The five published Gemma 4 geometries, and any smaller one of the same make: tensors, metadata, and types by recipe.

Owns what follows from a geometry alone: which tensors exist, their shapes, the `gemma4.*` keys, and the type that
llama-quantize would give each tensor. What the weights are is left to those who write files (synth.py, golden.py).
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from gemma4q.abi import TensorType, row_bytes
from gemma4q.quantize.mixtures import MIXTURES, Traits, types
from gemma4q.quantize.overrides import Overrides

ALIGNMENT = 32  # bytes, of every tensor in the file


@dataclass(frozen=True)
class Shape:
    """One text model. Pairs are (sliding, global). Field by field the published config, under this project's names."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: tuple[int, int]
    head_dim: tuple[int, int] = (256, 512)
    window: int = 1024
    period: int = 6  # every period-th layer is global, and the last
    context: int = 262144
    vocab: int = 262144
    shared: int = 0  # layers at the end that read another layer's keys and values
    wide_shared: bool = False  # those have twice the FFN width
    per_layer: int = 0  # width of the per-layer embeddings
    values_from_keys: bool = True  # global layers have no attn_v
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    dead_kv: bool = False  # shared layers carry attn_k, attn_v, attn_k_norm that nobody reads

    def is_global(self, layer: int) -> bool:
        return layer % self.period == self.period - 1 or layer == self.layers - 1

    def ffn_width(self, layer: int) -> int:
        return self.ffn * (2 if self.wide_shared and layer >= self.layers - self.shared else 1)


SHAPES = {
    "e2b": Shape(35, 1536, 6144, 8, (1, 1), window=512, period=5, context=131072, shared=20, wide_shared=True,
                 per_layer=256, values_from_keys=False),
    "e4b": Shape(42, 2560, 10240, 8, (2, 2), window=512, context=131072, shared=18, per_layer=256,
                 values_from_keys=False),
    "12b": Shape(48, 3840, 15360, 16, (8, 1)),
    "26b": Shape(30, 2816, 2112, 16, (8, 2), experts=128, used=8, expert_ffn=704),
    "31b": Shape(60, 5376, 21504, 32, (16, 4)),
}  # fmt: skip


def with_dead_kv(shape: Shape) -> Shape:
    return replace(shape, dead_kv=True)


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model by GGUF name: its shape, slowest dimension first; a matrix is [rows, cols]."""
    out = {"token_embd.weight": (shape.vocab, shape.hidden)}
    if shape.per_layer:
        out["per_layer_token_embd.weight"] = (shape.vocab, shape.layers * shape.per_layer)
        out["per_layer_model_proj.weight"] = (shape.layers * shape.per_layer, shape.hidden)
        out["per_layer_proj_norm.weight"] = (shape.per_layer,)
    out["rope_freqs.weight"] = (shape.head_dim[1] // 2,)
    for layer in range(shape.layers):
        out |= {f"blk.{layer}.{name}": dims for name, dims in layer_tensors(shape, layer).items()}
    return out | {"output_norm.weight": (shape.hidden,)}


def layer_tensors(shape: Shape, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, ffn, which = shape.hidden, shape.ffn_width(layer), shape.is_global(layer)
    dim = shape.head_dim[which]
    out = {"attn_norm.weight": (hidden,), "attn_q.weight": (shape.heads * dim, hidden), "attn_q_norm.weight": (dim,)}
    if layer < shape.layers - shape.shared or shape.dead_kv:
        out["attn_k.weight"] = (shape.kv_heads[which] * dim, hidden)
        out["attn_k_norm.weight"] = (dim,)
        if not (which and shape.values_from_keys):
            out["attn_v.weight"] = (shape.kv_heads[which] * dim, hidden)
    out |= {"attn_output.weight": (hidden, shape.heads * dim), "post_attention_norm.weight": (hidden,)}
    out |= {"ffn_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,), "layer_output_scale.weight": (1,)}
    out |= {"ffn_gate.weight": (ffn, hidden), "ffn_up.weight": (ffn, hidden), "ffn_down.weight": (hidden, ffn)}
    if shape.per_layer:
        out |= {"inp_gate.weight": (shape.per_layer, hidden), "proj.weight": (hidden, shape.per_layer)}
        out["post_norm.weight"] = (hidden,)
    if shape.experts:
        out |= {"ffn_gate_inp.weight": (shape.experts, hidden), "ffn_gate_inp.scale": (hidden,)}
        out["ffn_gate_up_exps.weight"] = (shape.experts, 2 * shape.expert_ffn, hidden)
        out["ffn_down_exps.weight"] = (shape.experts, hidden, shape.expert_ffn)
        out["ffn_down_exps.scale"] = (shape.experts,)
        out |= {f"{name}.weight": (hidden,) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
    return out


def metadata(shape: Shape) -> dict[str, object]:
    """`general.architecture` and the `gemma4.*` keys, as values that write_gguf gives the usual types."""
    layers, kv_heads = range(shape.layers), shape.kv_heads
    widths = [shape.ffn_width(layer) for layer in layers]
    per_layer_heads = [kv_heads[shape.is_global(layer)] for layer in layers]
    keys = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": np.array(widths, np.int32) if shape.wide_shared else shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": kv_heads[0] if len(set(kv_heads)) == 1 else np.array(per_layer_heads, np.int32),
        "attention.key_length": shape.head_dim[1],
        "attention.value_length": shape.head_dim[1],
        "attention.key_length_swa": shape.head_dim[0],
        "attention.value_length_swa": shape.head_dim[0],
        "attention.sliding_window": shape.window,
        "attention.sliding_window_pattern": np.array([not shape.is_global(layer) for layer in layers]),
        "attention.shared_kv_layers": shape.shared,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": shape.head_dim[1],
        "rope.dimension_count_swa": shape.head_dim[0],
        "embedding_length_per_layer_input": shape.per_layer,
        "final_logit_softcapping": 30.0,
    }
    if shape.experts:
        keys |= {"expert_count": shape.experts, "expert_used_count": shape.used}
        keys["expert_feed_forward_length"] = shape.expert_ffn
    return {"general.architecture": "gemma4"} | {f"gemma4.{key}": value for key, value in keys.items()}


# -- Types by recipe: what llama-quantize makes of a checkpoint in BF16 ---------------------------------

T = TensorType
SCHEMES = {"f32": "F32", "bf16": "BF16", "q4_0": "Q4_0", "q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
FILE_TYPE = {scheme: MIXTURES[name].file_type for scheme, name in SCHEMES.items()}


@dataclass(frozen=True)
class Kind:
    """A tensor's shape and type."""

    shape: tuple[int, ...]
    type: TensorType


def checkpoint(shape: Shape, matrices: TensorType = T.BF16) -> dict[str, Kind]:
    """Every tensor of `tensors(shape)` as `convert` writes it."""
    return {
        name: Kind(dims, T.F32 if len(dims) == 1 or name.endswith("ffn_gate_inp.weight") else matrices)
        for name, dims in tensors(shape).items()
    }


def traits(shape: Shape) -> Traits:
    return Traits(shape.layers, shape.heads // shape.kv_heads[0] >= 4, shape.experts)


def tensor_types(shape: Shape, scheme: str) -> dict[str, TensorType]:
    """The type of every tensor of `tensors(shape)` under a recipe of SCHEMES."""
    source = checkpoint(shape, T.F32 if scheme == "f32" else T.BF16)
    return types(source, traits(shape), MIXTURES[SCHEMES[scheme]], Overrides())


def tensor_bytes(dims: tuple[int, ...], type: TensorType) -> int:
    """Bytes of a tensor's data, without padding."""
    return row_bytes(type, dims[-1]) * prod(dims[:-1])


def parameters(shape: Shape) -> int:
    """Weights that are counted in a model's size: all but the generated rope factors."""
    return sum(prod(dims) for name, dims in tensors(shape).items() if name != "rope_freqs.weight")


def file_bytes(shape: Shape, scheme: str) -> int:
    """Bytes of all tensor data in a file, padded as there; the vocabulary and keys come on top."""
    types = tensor_types(shape, scheme)
    sizes = (tensor_bytes(dims, types[name]) for name, dims in tensors(shape).items())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
