"""A Gemma 4 model's geometry as its GGUF file gives it, checked once and frozen.

Facts that have no key are read off the tensors that are there: whether values are the raw keys, where the experts are,
how many pairs turn. Which keys there are is `hparams`' table, the vocabulary `vocabulary`'s, tensor shapes `weights`'.
"""

from dataclasses import dataclass

from ..errors import Gemma4qError
from ..gguf.reader import GGUF
from ..plan.builder import Rope
from .hparams import (
    ARCHITECTURES,
    BLOCK_COUNT,
    OTHER_ARCHITECTURES,
    ROPE_FREQS,
    has_experts,
    has_values,
    relations,
    tensor_relations,
    turned_pairs,
)
from .metadata import read

TARGET = -1  # a drafter's layers attend to another model's keys and values


@dataclass(frozen=True)
class Layer:
    """One layer's geometry.

    `kv` is the layer whose keys and values this one attends to (`TARGET` in a drafter). `keys_from_values`: that layer
    has no attn_v, and its values are the raw keys.
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # feed-forward width
    window: int  # positions seen, itself included; 0: all
    kv: int
    rope: Rope
    keys_from_values: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_hidden: int = 0
    per_layer_width: int = 0  # 0: no per-layer input

    @property
    def owns_kv(self) -> bool:
        return self.kv == self.index

    def weight(self, name: str, kind: str = "weight") -> str:
        return f"blk.{self.index}.{name}.{kind}"


@dataclass(frozen=True)
class Config:
    """A model's geometry. Widths are in values."""

    architecture: str
    width: int
    vocab: int  # rows of token_embd
    context_length: int
    eps: float
    softcap: float  # 0: none
    per_layer_width: int  # 0: no per-layer inputs
    target_width: int  # of the model a drafter drafts for; 0: this is no drafter
    layers: tuple[Layer, ...]

    @property
    def bidirectional_images(self) -> bool:
        """Whether the tokens of an image see each other on sliding layers. No key says so; this rule fits all files."""
        return self.per_layer_width == 0

    def donor(self, local: bool) -> int:
        """The last layer with keys and values of its own, sliding (`local`) or global: what a drafter attends to."""
        return max(layer.index for layer in self.layers if layer.owns_kv and (layer.window > 0) == local)


def read_config(gguf: GGUF) -> Config:
    """The model's geometry. Raises the first fault: bad_arch, missing_key, bad_type, bad_array, bad_hparam, ..."""
    config, faults = examine(gguf)
    if faults:
        raise faults[0]
    return config


def examine(gguf: GGUF) -> tuple[Config | None, list[Gemma4qError]]:
    """The model's geometry, or None, and all that is wrong with it."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture is None:
        return None, [Gemma4qError("missing_key", "general.architecture is not in the file")]
    if not isinstance(architecture, str):
        return None, [Gemma4qError("bad_type", "general.architecture is not a string")]
    if architecture not in ARCHITECTURES:
        hint = OTHER_ARCHITECTURES.get(architecture, f"gemma4q runs {' and '.join(ARCHITECTURES)}")
        return None, [Gemma4qError("bad_arch", f"general.architecture is {architecture[:80]!r}: {hint}")]
    values, prefix = {}, architecture + "."
    faults = list(read(gguf, prefix, BLOCK_COUNT, {}, values))
    if not faults:
        faults = list(read(gguf, prefix, ARCHITECTURES[architecture], {"layers": values["block_count"]}, values))
    if not faults:
        faults = list(relations(values, prefix))
    if not faults:
        faults = list(tensor_relations(gguf, values, prefix))
    return (None, faults) if faults else (_config(gguf, architecture, values), [])


def _config(gguf: GGUF, architecture: str, v: dict) -> Config:
    """The geometry, once nothing is wrong with it."""
    count, local, table = v["block_count"], v["attention.sliding_window_pattern"], gguf.tensors.get("token_embd.weight")
    drafter, owners = "embedding_length_out" in v, count - v["attention.shared_kv_layers"]
    turned = turned_pairs(gguf) if gguf.tensors and not all(local) else 0

    def donor(i: int) -> int:
        return TARGET if drafter else i if i < owners else max(j for j in range(owners) if local[j] == local[i])

    def layer(i: int) -> Layer:
        head_dim = v["attention.key_length_swa" if local[i] else "attention.key_length"]
        base = v["rope.freq_base_swa" if local[i] else "rope.freq_base"]
        routed = has_experts(gguf, i)
        return Layer(
            index=i,
            heads=v["attention.head_count"][i],
            kv_heads=v["attention.head_count_kv"][i],
            head_dim=head_dim,
            hidden=v["feed_forward_length"][i],
            window=v["attention.sliding_window"] if local[i] else 0,
            kv=donor(i),
            rope=Rope(base, head_dim, head_dim // 2) if local[i] else Rope(base, head_dim, turned, ROPE_FREQS),
            keys_from_values=bool(gguf.tensors) and not drafter and not has_values(gguf, donor(i)),
            experts=v["expert_count"] if routed else 0,
            experts_used=v["expert_used_count"] if routed else 0,
            expert_hidden=v["expert_feed_forward_length"][i] if routed else 0,
            per_layer_width=v["embedding_length_per_layer_input"],
        )

    return Config(
        architecture=architecture,
        width=v["embedding_length"],
        vocab=table.shape[0] if table else len(gguf.metadata.get("tokenizer.ggml.tokens", ())),
        context_length=v["context_length"],
        eps=v["attention.layer_norm_rms_epsilon"],
        softcap=v["final_logit_softcapping"],
        per_layer_width=v["embedding_length_per_layer_input"],
        target_width=v.get("embedding_length_out", 0),
        layers=tuple(map(layer, range(count))),
    )
