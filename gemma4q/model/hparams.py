"""The keys of a Gemma 4 file: one row each, and what must hold between them and the tensors that are there.

Sizes are the file's: any width, window, pattern of layers or number of heads that the kernels can compute is accepted.
`config` turns the values into a geometry. Keys: spec of `gemma4.*` as llama.cpp's converter writes them.
"""

import numpy as np

from ..abi import TensorType
from ..errors import Gemma4qError
from ..gguf.quants import dequantize
from ..gguf.reader import GGUF
from .metadata import Faults, Key

ROPE_FREQS = "rope_freqs.weight"
UNTURNED = 1e29  # a factor from here on stands for infinity: the pair does not turn
VECTOR_TYPES = (TensorType.F32, TensorType.F16, TensorType.BF16)  # of norms, scales and factors

_INT32 = 2**31 - 1

# One row a key, after the architecture's name and a dot; read before everything else, since arrays have this length.
BLOCK_COUNT = (Key("block_count", "integer", 1, 512),)

KEYS = (
    Key("context_length", "integer", 1, 1 << 24),
    Key("embedding_length", "integer", 32, 1 << 17, multiple=32),
    Key("feed_forward_length", "integer", 32, 1 << 20, multiple=32, length="layers"),
    Key("attention.head_count", "integer", 1, 1024, length="layers"),
    Key("attention.head_count_kv", "integer", 1, 1024, length="layers"),
    Key("attention.key_length", "integer", 16, 1024, multiple=16),
    Key("attention.key_length_swa", "integer", 16, 1024, multiple=16),
    Key("attention.value_length", "integer", 16, 1024, multiple=16, optional=True),
    Key("attention.value_length_swa", "integer", 16, 1024, multiple=16, optional=True),
    Key("attention.sliding_window", "integer", 1, _INT32),
    Key("attention.sliding_window_pattern", "bool", length="layers"),
    Key("attention.shared_kv_layers", "integer", 0, 512, default=0),
    Key("attention.layer_norm_rms_epsilon", "float", 1e-12, 0.1),
    Key("rope.freq_base", "float", 1.001, 1e15),
    Key("rope.freq_base_swa", "float", 1.001, 1e15),
    Key("rope.dimension_count", "integer", 16, 1024, optional=True),
    Key("rope.dimension_count_swa", "integer", 16, 1024, optional=True),
    Key("embedding_length_per_layer_input", "integer", 0, 1 << 14, multiple=32, default=0),
    Key("final_logit_softcapping", "float", 0, 1e6, default=0.0),
    Key("expert_count", "integer", 0, 4096, default=0),
    Key("expert_used_count", "integer", 0, 4096, default=0),
    Key("expert_feed_forward_length", "integer", 0, 1 << 20, multiple=32, default=0, length="layers"),
)

# Only in drafters ("assistants", MTP heads): the width of the model they draft for.
DRAFTER_KEYS = (
    Key("embedding_length_out", "integer", 32, 1 << 17, multiple=32),
    Key("nextn_predict_layers", "integer", 1, 64, optional=True),
)

ARCHITECTURES = {"gemma4": KEYS, "gemma4-assistant": KEYS + DRAFTER_KEYS}

OTHER_ARCHITECTURES = {
    "clip": "this is an image and sound encoder (mmproj): give the model's own file first",
    "gemma4_mtp": "a drafter in ik_llama.cpp's format: convert the original to gemma4-assistant",
    "gemma4_assistant": "a drafter in an old format: convert the original to gemma4-assistant",
}

# The tensors a mixture of experts is known by, in any layer.
_EXPERT_TENSORS = ("ffn_gate_inp.weight", "ffn_gate_up_exps.weight", "ffn_gate_exps.weight", "ffn_down_exps.weight")


def relations(v: dict, prefix: str) -> Faults:
    """What must hold between keys."""

    def bad(text: str) -> Gemma4qError:
        return Gemma4qError("bad_hparam", prefix + text)

    layers, local, shared = v["block_count"], v["attention.sliding_window_pattern"], v["attention.shared_kv_layers"]
    for i, (heads, kv_heads) in enumerate(zip(v["attention.head_count"], v["attention.head_count_kv"], strict=True)):
        if heads % kv_heads:
            yield bad(f"attention.head_count_kv: {kv_heads} does not divide the {heads} heads of layer {i}")
        if heads * v["attention.key_length_swa" if local[i] else "attention.key_length"] % 32:
            yield bad(f"attention.head_count: layer {i}'s {heads} heads are not a multiple of 32 values wide")
    for suffix in ("", "_swa"):
        key = v["attention.key_length" + suffix]
        for name in ("attention.value_length", "rope.dimension_count"):
            if v.get(name + suffix, key) != key:
                yield bad(f"{name}{suffix} is {v[name + suffix]}; want {key}, as attention.key_length{suffix}")
    if "embedding_length_out" in v:
        if shared != layers:
            yield bad(f"attention.shared_kv_layers is {shared}; all {layers} layers of a drafter share")
    elif shared >= layers:
        yield bad(f"attention.shared_kv_layers is {shared} of {layers} layers: none has keys and values of its own")
    elif orphans := {*local[layers - shared :]} - {*local[: layers - shared]}:
        kind = "sliding" if orphans.pop() else "global"
        yield bad(f"attention.shared_kv_layers is {shared}: no {kind} layer is left with keys and values of its own")
    experts, used = v["expert_count"], v["expert_used_count"]
    if experts and not (1 <= used <= experts and min(v["expert_feed_forward_length"])):
        hidden = min(v["expert_feed_forward_length"])
        yield bad(f"expert_count is {experts}, expert_used_count {used}, expert_feed_forward_length {hidden}")


def tensor_relations(gguf: GGUF, v: dict, prefix: str) -> Faults:
    """What must hold between keys and the tensors that are there; nothing in a file without, which is a vocabulary."""
    if not gguf.tensors:
        return
    layers, local = range(v["block_count"]), v["attention.sliding_window_pattern"]
    routed = [i for i in layers if has_experts(gguf, i)]
    if bool(routed) != bool(v["expert_count"]):
        where = f"layer {routed[0]} has experts" if routed else "no layer has experts"
        yield Gemma4qError("bad_hparam", f"{prefix}expert_count is {v['expert_count']}, but {where}")
    owners = layers[: len(layers) - v["attention.shared_kv_layers"]]
    without = [i for i in owners if not has_values(gguf, i)]
    for i in without:
        # Values are keys in all global layers or in none; anything else is a lost tensor.
        if local[i] or any(j not in without for j in owners if not local[j]):
            yield Gemma4qError("missing_tensor", f"blk.{i}.attn_v.weight is not in the file")
    if not all(local):
        yield from _rope_faults(gguf, v["attention.key_length"] // 2)


def _rope_faults(gguf: GGUF, pairs: int) -> Faults:
    tensor = gguf.tensors.get(ROPE_FREQS)
    if tensor is None:
        yield Gemma4qError("missing_tensor", f"{ROPE_FREQS} is not in the file")
    elif tensor.shape != (pairs,):
        yield Gemma4qError("shape_mismatch", f"{ROPE_FREQS} has shape {list(tensor.shape)}; want [{pairs}]")
    elif tensor.type not in VECTOR_TYPES:
        yield Gemma4qError("bad_tensor_type", f"{ROPE_FREQS} must be F32, F16 or BF16")
    elif not (rope_factors(gguf) > 0).all():
        yield Gemma4qError("numeric", f"{ROPE_FREQS} holds a factor that is not above zero")
    elif not turned_pairs(gguf):
        yield Gemma4qError("bad_hparam", f"{ROPE_FREQS} turns no pair")


def rope_factors(gguf: GGUF) -> np.ndarray:
    """f32 [head_dim / 2]: what divides the frequency of each pair on global layers."""
    tensor = gguf.tensors[ROPE_FREQS]
    return dequantize(tensor.data, tensor.type)


def turned_pairs(gguf: GGUF) -> int:
    """How many of the first pairs turn on global layers; those behind them do not."""
    turned = np.flatnonzero(rope_factors(gguf) < UNTURNED)
    return int(turned[-1]) + 1 if len(turned) else 0


def has_experts(gguf: GGUF, layer: int) -> bool:
    return any(f"blk.{layer}.{name}" in gguf.tensors for name in _EXPERT_TENSORS)


def has_values(gguf: GGUF, layer: int) -> bool:
    return f"blk.{layer}.attn_v.weight" in gguf.tensors or has_fused(gguf, layer)


def has_fused(gguf: GGUF, layer: int) -> bool:
    """Whether queries, keys and values are one tensor; it counts only where there is no attn_q of its own."""
    return f"blk.{layer}.attn_qkv.weight" in gguf.tensors and f"blk.{layer}.attn_q.weight" not in gguf.tensors
