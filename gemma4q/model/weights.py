"""A Gemma 4 model's tensors by name, each with the shape and a type that its place in the model needs.

One table says which tensors there are; the geometry is `config`'s. Tensors that nothing reads (keys and values of
layers that borrow them, and unknown ones) are listed and left alone. No kernel ever meets a tensor that did not pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import Gemma4qError
from ..gguf.quants import dequantize
from ..gguf.reader import GGUF, Tensor
from ..gguf.types import readable_types, type_name
from .config import Config, Layer
from .hparams import VECTOR_TYPES, has_fused
from .metadata import Faults


class Row(NamedTuple):
    """A tensor: name, shape in words of `dimensions`, and the word that must not be 0 for it to be there.

    One dimension makes a vector (norm, scale), more a matrix of any type that can be read.
    """

    name: str
    shape: str
    when: str = "always"
    optional: bool = False


MODEL = (
    Row("token_embd.weight", "vocab width"),
    Row("output_norm.weight", "width"),
    Row("output.weight", "vocab width", optional=True),
    Row("rope_freqs.weight", "pairs", "global"),
    Row("per_layer_token_embd.weight", "vocab per_layers", "per_layer"),
    Row("per_layer_model_proj.weight", "per_layers width", "per_layer"),
    Row("per_layer_proj_norm.weight", "per_layer", "per_layer"),
    Row("nextn.pre_projection.weight", "width target_pair", "target"),
    Row("nextn.post_projection.weight", "target width", "target"),
)

LAYER = (
    Row("attn_norm.weight", "width"),
    Row("attn_qkv.weight", "qkv width", "fused"),
    Row("attn_q.weight", "q width", "separate"),
    Row("attn_k.weight", "kv width", "separate_k"),
    Row("attn_v.weight", "kv width", "separate_v"),
    Row("attn_q_norm.weight", "head_dim"),
    Row("attn_k_norm.weight", "head_dim", "owns_kv"),
    Row("attn_output.weight", "width q"),
    Row("post_attention_norm.weight", "width"),
    Row("ffn_norm.weight", "width"),
    Row("ffn_gate.weight", "hidden width"),
    Row("ffn_up.weight", "hidden width"),
    Row("ffn_down.weight", "width hidden"),
    Row("post_ffw_norm.weight", "width"),
    Row("layer_output_scale.weight", "one", optional=True),
    Row("inp_gate.weight", "per_layer width", "per_layer"),
    Row("proj.weight", "width per_layer", "per_layer"),
    Row("post_norm.weight", "width", "per_layer"),
    Row("ffn_gate_inp.weight", "experts width", "experts"),
    Row("ffn_gate_inp.scale", "width", "experts"),
    Row("ffn_gate_up_exps.weight", "experts gate_up width", "experts_fused"),
    Row("ffn_gate_exps.weight", "experts expert_hidden width", "experts_split"),
    Row("ffn_up_exps.weight", "experts expert_hidden width", "experts_split"),
    Row("ffn_down_exps.weight", "experts width expert_hidden", "experts"),
    Row("ffn_down_exps.scale", "experts", "experts"),
    Row("pre_ffw_norm_2.weight", "width", "experts"),
    Row("post_ffw_norm_1.weight", "width", "experts"),
    Row("post_ffw_norm_2.weight", "width", "experts"),
)

# Names other programs write for the same tensor.
_ALIASES = {"ffn_gate_inp.per_expert_scale": "ffn_down_exps.scale"}
_KEYS_AND_VALUES = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")


@dataclass(frozen=True)
class Weights:
    """The tensors a model computes with, by GGUF's names.

    An `X.scale` beside an `X.weight` multiplies what that matrix gives. `dead` are keys and values of layers
    that borrow theirs, `ignored` all other tensors in the file.
    """

    tensors: dict[str, Tensor]
    dead: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What `forward.build` needs to know of the tensors: slowest dimension first."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def vector(self, name: str) -> np.ndarray:
        """A norm, scale or list of factors as f32; may lie in the mapped file, so not to be written."""
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.type)


def bind(gguf: GGUF, config: Config) -> Weights:
    """The model's tensors. Raises the first fault: missing_tensor, shape_mismatch or bad_tensor_type."""
    weights, faults = examine(gguf, config)
    if faults:
        raise faults[0]
    return weights


def examine(gguf: GGUF, config: Config) -> tuple[Weights, list[Gemma4qError]]:
    """The tensors that are right, and all that is wrong with the others."""
    given = _renamed(gguf)
    tensors: dict[str, Tensor] = {}
    faults: list[Gemma4qError] = []
    if not given:
        vocabulary = Gemma4qError("missing_tensor", "the file holds no tensors: it is a vocabulary, not a model")
        return Weights({}, (), ()), [vocabulary]
    for name, shape, optional in _wanted(gguf, config):
        if name in given:
            faults.extend(_faults(name, given[name], shape))
            tensors[name] = given[name]
        elif not optional:
            faults.append(Gemma4qError("missing_tensor", f"{name} is not in the file"))
    unused = [name for name in given if name not in tensors]
    for name in [name for name in unused if name.endswith(".scale")]:
        matrix = tensors.get(name.removesuffix("scale") + "weight")
        if matrix is None:
            continue
        if given[name].shape == (1,) and given[name].type in VECTOR_TYPES and len(matrix.shape) == 2:
            tensors[name] = given[name]
            unused.remove(name)
        else:
            found = f"{list(given[name].shape)} {type_name(given[name].type)}"
            faults.append(Gemma4qError("bad_tensor_type", f"{name} is {found}: one F32 is the only scale that is read"))
    dead = {layer.weight(*name.split(".")) for layer in config.layers if not layer.owns_kv for name in _KEYS_AND_VALUES}
    ignored = tuple(name for name in unused if name not in dead)
    return Weights(tensors, tuple(name for name in unused if name in dead), ignored), faults


def _renamed(gguf: GGUF) -> dict[str, Tensor]:
    """The file's tensors under the names of the table."""
    given = dict(gguf.tensors)
    for name in gguf.tensors:
        for alias, proper in _ALIASES.items():
            if name.endswith("." + alias) and (own := name.removesuffix(alias) + proper) not in given:
                given[own] = given.pop(name)
    return given


def _wanted(gguf: GGUF, config: Config) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it may be missing, of every tensor of this model."""
    words = _model_dimensions(config)
    for row in MODEL:
        if words[row.when]:
            yield row.name, tuple(words[word] for word in row.shape.split()), row.optional
    for layer in config.layers:
        words = _model_dimensions(config) | _layer_dimensions(gguf, config, layer)
        for row in LAYER:
            if words[row.when]:
                yield f"blk.{layer.index}.{row.name}", tuple(words[word] for word in row.shape.split()), row.optional


def _model_dimensions(config: Config) -> dict[str, int]:
    global_pairs = [layer.rope.dims // 2 for layer in config.layers if not layer.window]
    return {
        "always": 1,
        "one": 1,
        "width": config.width,
        "vocab": config.vocab,
        "global": len(global_pairs),
        "pairs": max(global_pairs, default=0),
        "per_layer": config.per_layer_width,
        "per_layers": config.per_layer_width * len(config.layers),
        "target": config.target_width,
        "target_pair": 2 * config.target_width,
    }


def _layer_dimensions(gguf: GGUF, config: Config, layer: Layer) -> dict[str, int]:
    fused = has_fused(gguf, layer.index)
    q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    split = layer.weight("ffn_gate_up_exps") not in gguf.tensors and layer.weight("ffn_gate_exps") in gguf.tensors
    return {
        "head_dim": layer.head_dim,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "fused": fused,
        "separate": not fused,
        "separate_k": not fused and layer.owns_kv,
        "separate_v": not fused and layer.owns_kv and not layer.keys_from_values,
        "owns_kv": layer.owns_kv,
        "hidden": layer.hidden,
        "experts": layer.experts,
        "experts_fused": layer.experts if not split else 0,
        "experts_split": layer.experts if split else 0,
        "expert_hidden": layer.expert_hidden,
        "gate_up": 2 * layer.expert_hidden,
    }


def _faults(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Faults:
    if tensor.shape != shape:
        yield Gemma4qError("shape_mismatch", f"{name} has shape {list(tensor.shape)}; want {list(shape)}")
    if len(shape) == 1 and tensor.type not in VECTOR_TYPES:
        wanted = ", ".join(t.name for t in VECTOR_TYPES)
        yield Gemma4qError("bad_tensor_type", f"{name} is {type_name(tensor.type)}; want one of {wanted}")
    elif not tensor.readable:
        yield Gemma4qError("bad_tensor_type", f"{name} is {type_name(tensor.type)}; readable are {readable_types()}")
