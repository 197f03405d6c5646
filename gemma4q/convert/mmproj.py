"""The vision and audio encoders of a checkpoint as an `mmproj` file: its keys, tensors, and how some are rearranged.

Three makes: towers for images (all but the 12B), a tower for sound (E2B, E4B), and the 12B's few projections. Names are
`names`' word; this file owns the shapes that config.json asks for and what llama.cpp wants laid out differently.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from math import isqrt

import numpy as np

from ..abi import TensorType
from ..errors import Gemma4qError
from ..gguf.writer import TensorData
from .config import Source
from .files import is_count, optional_json
from .names import AUDIO, CLIPS, UNIFIED, VISION, bare, is_encoder, target_name, with_clips
from .pack import Change, packed, stored_type
from .safetensors import Checkpoint, Stored
from .softplus import softplus, softplus_half

EPS = 1e-6
MEL_BINS = 128
IMAGE_SIZE = 224  # a word that readers want and nobody uses
CHANNELS = 3
# What transformers assumes where config.json is silent, of a tower or of the 12B's projections.
DEFAULTS = {
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16, "pooling_kernel_size": 3,
        "position_embedding_size": 10240, "mm_embed_dim": 3840, "mm_posemb_size": 1120,
    },
    "audio_config": {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "conv_kernel_size": 5,
        "subsampling_conv_channels": [128, 32], "output_proj_dims": 1536, "audio_embed_dim": 640,
        "input_feat_size": MEL_BINS,
    },
}  # fmt: skip
CONV_KERNEL = 3  # of the two convolutions that thin out a spectrogram
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """What becomes of a tensor: the shape it must have, the one it is written in, how it is made, a type of its own."""

    shape: Shape
    written: Shape
    change: Change | None = None
    type: TensorType | None = None
    optional: bool = False


def encoder_keys(source: Source) -> dict[str, object]:
    """The `clip.*` keys. Raises no_encoder, or bad_config naming the key of config.json."""
    vision, audio = _part(source, "vision_config"), _part(source, "audio_config")
    if vision is None:
        raise Gemma4qError("no_encoder", f"{source.folder} has no vision encoder: --mmproj needs a multimodal model")
    width = _whole(source, source.text, "hidden_size")
    keys = {"has_vision_encoder": True, "vision.projection_dim": width, "vision.image_size": IMAGE_SIZE}
    keys["vision.patch_size"] = _whole(source, vision, "patch_size")
    sizes = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    if source.unified:
        keys |= _sizes("vision", sizes, (_whole(source, vision, "mm_embed_dim"), 0, 0, 0))
    else:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        keys |= _sizes("vision", sizes, [_whole(source, vision, name) for name in names])
    keys |= _pixels(source)
    keys |= {"vision.projector_type": "gemma4uv" if source.unified else "gemma4v"}
    keys |= {"vision.attention.layer_norm_epsilon": _eps(source, vision)}
    if audio is not None:
        keys |= {"has_audio_encoder": True, "audio.projection_dim": width}
        if source.unified:
            keys |= _sizes("audio", sizes, (_whole(source, audio, "audio_embed_dim"), 0, 0, 0))
        else:
            inner = _whole(source, audio, "hidden_size")
            counts = [_whole(source, audio, name) for name in ("num_hidden_layers", "num_attention_heads")]
            keys |= _sizes("audio", sizes, (inner, 4 * inner, *counts))
        keys |= {"audio.projector_type": "gemma4ua" if source.unified else "gemma4a"}
        keys |= {"audio.num_mel_bins": _whole(source, audio, "input_feat_size")}
        keys |= {"audio.attention.layer_norm_epsilon": _eps(source, audio)}
    return {f"clip.{key}": value for key, value in keys.items()}


def encoder_tensors(
    source: Source, checkpoint: Checkpoint, outtype: TensorType, pool: Executor
) -> Iterator[TensorData]:
    """The tensors to write. Raises missing_tensor, extra_tensor, shape_mismatch."""
    table = UNIFIED if source.unified else with_clips(VISION | AUDIO)
    rules = dict(_unified_rules(source) if source.unified else _tower_rules(source))
    found: dict[str, Stored] = {}
    for name, stored in checkpoint.items():
        if is_encoder(name):
            plain = bare(name)
            if target_name(name, table) is None or plain not in rules:
                raise Gemma4qError("extra_tensor", f"{name} has no place in an encoder of this config.json")
            found[plain] = stored
    for name, rule in rules.items():
        if name not in found:
            if rule.optional:
                continue
            raise Gemma4qError("missing_tensor", f"model.{name} is not in {source.folder}")
        stored = found[name]
        if stored.shape != rule.shape and not (name.endswith(CLIPS) and stored.shape == (1,)):
            fault = f"{stored.name} has shape {list(stored.shape)}; want {list(rule.shape)}"
            raise Gemma4qError("shape_mismatch", fault)
        target = target_name(name, table)
        forced = TensorType.F32 if rule.type == TensorType.F16 and outtype != TensorType.F16 else rule.type
        kind = stored_type(target, rule.written, outtype, forced)
        change = softplus_half if rule.change is softplus and stored.dtype == "F16" else rule.change
        yield packed(target, stored, rule.written, kind, pool, change)


def _unified_rules(source: Source) -> Iterator[tuple[str, Rule]]:
    vision, audio = _part(source, "vision_config"), _part(source, "audio_config")
    side = _whole(source, vision, "patch_size") * _whole(source, vision, "pooling_kernel_size")
    side = vision.get("model_patch_size", side)
    patch, width = CHANNELS * side * side, _whole(source, vision, "mm_embed_dim")
    positions, text = _whole(source, vision, "mm_posemb_size"), _whole(source, source.text, "hidden_size")
    order = _by_channel(side)
    for part in ("weight", "bias"):
        yield f"vision_embedder.patch_ln1.{part}", Rule((patch,), (patch,), lambda x: x[order])
        yield f"vision_embedder.patch_ln2.{part}", _plain(width)
        yield f"vision_embedder.pos_norm.{part}", _plain(width)
    change = Rule((width, patch), (width, patch), lambda x: x[:, order], TensorType.F16)
    yield "vision_embedder.patch_dense.weight", change
    yield "vision_embedder.patch_dense.bias", _plain(width)
    table = Rule((positions, 2, width), (2, positions, width), lambda x: x.transpose(1, 0, 2), TensorType.F32)
    yield "vision_embedder.pos_embedding", table
    yield "embed_vision.embedding_projection.weight", _plain(text, width)
    if audio is not None:
        yield "embed_audio.embedding_projection.weight", _plain(text, _whole(source, audio, "audio_embed_dim"))


def _tower_rules(source: Source) -> Iterator[tuple[str, Rule]]:
    text = _whole(source, source.text, "hidden_size")
    vision, audio = _part(source, "vision_config"), _part(source, "audio_config")
    width = _whole(source, vision, "hidden_size")
    yield from _vision_rules(lambda name: _whole(source, vision, name), bool(vision.get("standardize")))
    yield "embed_vision.embedding_projection.weight", _plain(text, width)
    if audio is not None:
        channels = audio.get("subsampling_conv_channels")
        if not isinstance(channels, list) or len(channels) != 2 or not all(is_count(c, 1 << 16) for c in channels):
            raise _bad(source, "audio_config.subsampling_conv_channels must be two whole numbers")
        yield from _audio_rules(lambda name: _whole(source, audio, name), *channels)
        yield "embed_audio.embedding_projection.weight", _plain(text, _whole(source, audio, "output_proj_dims"))


def _vision_rules(size: Callable[[str], int], standardized: bool) -> Iterator[tuple[str, Rule]]:
    width, hidden, side = size("hidden_size"), size("intermediate_size"), size("patch_size")
    positions, dim = size("position_embedding_size"), size("head_dim")
    heads, kv_heads = size("num_attention_heads") * dim, size("num_key_value_heads") * dim
    written = (width, CHANNELS, side, side)
    pixels = Rule((width, CHANNELS * side * side), written, _channels_first, TensorType.F16)
    yield "vision_tower.patch_embedder.input_proj.weight", pixels
    table = Rule((2, positions, width), (2, positions, width), type=TensorType.F32)
    yield "vision_tower.patch_embedder.position_embedding_table", table
    for layer in range(size("num_hidden_layers")):
        at = f"vision_tower.encoder.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{at}{norm}_layernorm.weight", _plain(width)
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield from _linear(f"{at}self_attn.{name}_proj", rows, width)
        yield from _linear(f"{at}self_attn.o_proj", width, heads)
        yield f"{at}self_attn.q_norm.weight", _plain(dim)
        yield f"{at}self_attn.k_norm.weight", _plain(dim)
        yield from _linear(f"{at}mlp.gate_proj", hidden, width)
        yield from _linear(f"{at}mlp.up_proj", hidden, width)
        yield from _linear(f"{at}mlp.down_proj", width, hidden)
    if standardized:
        yield "vision_tower.std_bias", _plain(width)
        yield "vision_tower.std_scale", _plain(width)


def _audio_rules(size: Callable[[str], int], first: int, second: int) -> Iterator[tuple[str, Rule]]:
    width, dim = size("hidden_size"), size("hidden_size") // max(1, size("num_attention_heads"))
    kernel = size("conv_kernel_size")
    at = "audio_tower.subsample_conv_projection."
    for layer, (rows, cols) in enumerate(((first, 1), (second, first))):
        shape = (rows, cols, CONV_KERNEL, CONV_KERNEL)
        yield f"{at}layer{layer}.conv.weight", Rule(shape, shape, type=TensorType.F32)
        yield f"{at}layer{layer}.norm.weight", _plain(rows)
    shape = (width, first // 4 * second)
    yield f"{at}input_proj_linear.weight", Rule(shape, shape, type=TensorType.F32)
    for layer in range(size("num_hidden_layers")):
        at = f"audio_tower.layers.{layer}."
        for part in ("feed_forward1", "feed_forward2"):
            yield f"{at}{part}.pre_layer_norm.weight", _plain(width)
            yield f"{at}{part}.post_layer_norm.weight", _plain(width)
            yield from _linear(f"{at}{part}.ffw_layer_1", 4 * width, width)
            yield from _linear(f"{at}{part}.ffw_layer_2", width, 4 * width)
        for part in ("q_proj", "k_proj", "v_proj", "post"):
            yield from _linear(f"{at}self_attn.{part}", width, width)
        yield f"{at}self_attn.relative_k_proj.weight", _plain(width, width)
        yield f"{at}self_attn.per_dim_scale", Rule((dim,), (dim,), softplus)
        yield from _linear(f"{at}lconv1d.linear_start", 2 * width, width)
        yield from _linear(f"{at}lconv1d.linear_end", width, width)
        depthwise = Rule((width, 1, kernel), (width, kernel), lambda x: x[:, 0], TensorType.F32)
        yield f"{at}lconv1d.depthwise_conv1d.weight", depthwise
        for norm in ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"):
            yield f"{at}{norm}.weight", _plain(width)
    out = size("output_proj_dims")
    yield "audio_tower.output_proj.weight", _plain(out, width)
    yield "audio_tower.output_proj.bias", _plain(out)


def _plain(*shape: int) -> Rule:
    return Rule(shape, shape)


def _linear(name: str, rows: int, cols: int) -> Iterator[tuple[str, Rule]]:
    """A matrix, and the ranges it clips to where the checkpoint has them."""
    yield f"{name}.linear.weight", _plain(rows, cols)
    yield from ((f"{name}.{clip}", Rule((), (1,), optional=True)) for clip in CLIPS)


def _by_channel(side: int) -> np.ndarray:
    """int [3 * side * side]: places in (row, column, channel) order, listed in the order (channel, row, column)."""
    return np.arange(side * side * CHANNELS).reshape(side, side, CHANNELS).transpose(2, 0, 1).reshape(-1)


def _channels_first(x: np.ndarray) -> np.ndarray:
    """[width, side * side * 3] by pixels as [width, 3, side, side] by channels."""
    side = isqrt(x.shape[1] // CHANNELS)
    return x.reshape(-1, side, side, CHANNELS).transpose(0, 3, 1, 2)


def _sizes(part: str, names, values) -> dict[str, int]:
    return {f"{part}.{name}": value for name, value in zip(names, values, strict=True)}


def _pixels(source: Source) -> dict[str, object]:
    """Mean and deviation that pixels are normalised with: none in Gemma 4."""
    settings = optional_json(source.folder / "preprocessor_config.json")
    later = optional_json(source.folder / "processor_config.json")
    for place in (later, later.get("image_processor")):
        settings |= place if isinstance(place, dict) else {}
    keys = {}
    for name, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3)):
        value = settings.get(name, default)
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
            raise Gemma4qError("bad_config", f"{source.folder}: {name} of the processor must be three numbers")
        keys[f"vision.{name}"] = np.array(value, "<f4")
    return keys


def _part(source: Source, name: str) -> dict | None:
    part = source.config.get(name)
    if part is not None and not isinstance(part, dict):
        raise _bad(source, f"{name} is not an object")
    return DEFAULTS[name] | {key: value for key, value in part.items() if value is not None} if part else None


def _whole(source: Source, part: Mapping, name: str) -> int:
    value = part.get(name)
    if not is_count(value, 1 << 20):
        raise _bad(source, f"{name} is {'missing' if value is None else repr(value)[:60]}; want a whole number")
    return value


def _eps(source: Source, part: Mapping) -> float:
    value = part.get("layer_norm_eps", EPS)
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise _bad(source, f"layer_norm_eps is {value!r:.60}; want a number between 0 and 1")
    return float(value)


def _bad(source: Source, text: str) -> Gemma4qError:
    return Gemma4qError("bad_config", f"{source.folder / 'config.json'}: {text}")
