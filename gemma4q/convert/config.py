"""What config.json says of a text model or an assistant, as the `gemma4.*` keys of a GGUF file.

Values that the checkpoint's authors left out are those that transformers puts in. Owns which directories can be
converted, and refuses others by what they are. Whether the keys make a model is `model.hparams`' word.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import Gemma4qError
from .files import is_count, optional_json, read_json

TEXT_ARCHITECTURES = {
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4ForCausalLM": "gemma4",
    "Gemma4UnifiedForConditionalGeneration": "gemma4",
    "Gemma4UnifiedForCausalLM": "gemma4",
    "Gemma4AssistantForCausalLM": "gemma4-assistant",
    "Gemma4UnifiedAssistantForCausalLM": "gemma4-assistant",
}
MOST_LAYERS = 512
LAYER_TYPES = ("sliding_attention", "full_attention")
ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
# What transformers assumes where config.json is silent; `None`: the key is not written.
DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": None,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "rope_parameters": ROPE,
}
_PLAIN = {"max_position_embeddings": 131072, "sliding_window": 512}
_UNIFIED = {"max_position_embeddings": 262144, "sliding_window": 1024}
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """A directory that can be converted: its config.json, and the part of it that describes the text model."""

    folder: Path
    architecture: str  # as in GGUF
    unified: bool  # of the 12B's make: no encoders, a few projections instead
    config: dict
    text: dict
    generation: dict

    @property
    def is_assistant(self) -> bool:
        return self.architecture == "gemma4-assistant"


def open_source(folder: Path) -> Source:
    """What a directory holds. Raises not_found, not_a_directory, lora, bad_arch, bad_json, bad_config, quantised."""
    if not folder.is_dir():
        what = "is a file: give the directory it lies in" if folder.exists() else "does not exist"
        raise Gemma4qError("not_a_directory" if folder.exists() else "not_found", f"{folder} {what}")
    for name in _PEFT_FILES:
        if (folder / name).exists():
            hint = "merge it into its model first, or convert it with llama.cpp's convert_lora_to_gguf.py"
            raise Gemma4qError("lora", f"{folder} holds a LoRA adapter ({name}), not a model: {hint}")
    if not (folder / "config.json").exists():
        raise Gemma4qError("not_found", f"{folder} has no config.json: it is no Hugging Face model directory")
    config = read_json(folder / "config.json")
    name = _architecture(folder, config)
    if config.get("quantization_config"):
        raise Gemma4qError("quantised", f"{folder} holds quantised weights: convert the original checkpoint")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise Gemma4qError("bad_config", f"{folder / 'config.json'}: text_config is not an object")
    unified, architecture = "Unified" in name, TEXT_ARCHITECTURES[name]
    defaults = DEFAULTS | (_UNIFIED if unified else _PLAIN)
    if not unified and architecture == "gemma4" and "hidden_size_per_layer_input" not in text:
        defaults["hidden_size_per_layer_input"] = 256
    text = {**config, **defaults, **{key: value for key, value in text.items() if value is not None}}
    if text.get("use_bidirectional_attention") == "all":
        raise Gemma4qError("bad_arch", f"{folder} is an embedding model (use_bidirectional_attention is 'all')")
    generation = optional_json(folder / "generation_config.json")
    return Source(folder, architecture, unified, config, text, generation)


def _architecture(folder: Path, config: dict) -> str:
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if isinstance(name, str) and name in TEXT_ARCHITECTURES:
        return name
    found = f"is a {name}" if isinstance(name, str) else "names no architecture in its config.json"
    raise Gemma4qError("bad_arch", f"{folder} {found}; converted are {', '.join(TEXT_ARCHITECTURES)}")


def model_keys(source: Source) -> dict[str, object]:
    """The `gemma4.*` or `gemma4-assistant.*` keys. Raises bad_config naming the key of config.json."""
    text, local = source.text, sliding_layers(source)
    count, shared = len(local), source.text["num_kv_shared_layers"]
    head_dim, global_dim = whole(source, "head_dim"), global_value(source, "head_dim", "global_head_dim", 512)
    keys = {
        "block_count": count,
        "context_length": whole(source, "max_position_embeddings"),
        "embedding_length": whole(source, "hidden_size"),
        "feed_forward_length": _hidden(source, count, shared),
        "attention.head_count": whole(source, "num_attention_heads"),
        "attention.head_count_kv": _kv_heads(source, local),
        "rope.freq_base": rope(source, "full_attention", "rope_theta"),
        "rope.freq_base_swa": rope(source, "sliding_attention", "rope_theta"),
        "attention.layer_norm_rms_epsilon": number(source, "rms_norm_eps"),
        "attention.key_length": global_dim,
        "attention.value_length": global_dim,
        "attention.sliding_window": whole(source, "sliding_window"),
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": text.get("hidden_size_per_layer_input") or 0,
        "attention.sliding_window_pattern": np.array(local),
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "rope.dimension_count": global_dim,
        "rope.dimension_count_swa": head_dim,
    }
    if text["num_experts"] is not None:
        keys["expert_count"] = whole(source, "num_experts")
        keys["expert_used_count"] = whole(source, "top_k_experts")
        keys["expert_feed_forward_length"] = whole(source, "moe_intermediate_size")
    if text["final_logit_softcapping"]:
        keys["final_logit_softcapping"] = number(source, "final_logit_softcapping")
    if source.is_assistant:
        keys["embedding_length_out"] = whole(source, "backbone_hidden_size")
        keys["nextn_predict_layers"] = count
    return {f"{source.architecture}.{key}": value for key, value in keys.items()}


def sliding_layers(source: Source) -> list[bool]:
    """Which layers see a window only."""
    count = whole(source, "num_hidden_layers", MOST_LAYERS)
    types = source.text.get("layer_types")
    if types is None:  # as transformers has it: every sixth is global, and the last
        types = [LAYER_TYPES[i % 6 == 5 or i == count - 1] for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not all(t in LAYER_TYPES for t in types):
        raise _bad(source, f"layer_types must list {count} of {' and '.join(LAYER_TYPES)}")
    return [t == "sliding_attention" for t in types]


def rope_frequencies(source: Source) -> np.ndarray:
    """float32 [global head dim / 2]: 1 for pairs that turn on global layers, 1e30 for those that do not."""
    if rope(source, "full_attention", "rope_type") != "proportional":
        raise _bad(source, "rope_parameters.full_attention.rope_type must be proportional")
    pairs = global_value(source, "head_dim", "global_head_dim", 512) // 2
    turned = int(2 * pairs * rope(source, "full_attention", "partial_rotary_factor") / 2)
    return np.where(np.arange(pairs) < turned, 1, 1e30).astype("<f4")


def whole(source: Source, name: str, most: int = 1 << 31) -> int:
    """A whole number of config.json that must be there."""
    value = source.text.get(name)
    if not is_count(value, most):
        raise _bad(source, f"{name} is {_shown(value)}; want a whole number up to {most}")
    return value


def number(source: Source, name: str) -> float:
    value = source.text.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _bad(source, f"{name} is {_shown(value)}; want a number")
    return float(value)


def rope(source: Source, kind: str, name: str) -> float | str:
    """An entry of rope_parameters."""
    parameters = source.text["rope_parameters"]
    value = parameters.get(kind) if isinstance(parameters, dict) else None
    value = value.get(name) if isinstance(value, dict) else None
    if name == "rope_type" and isinstance(value, str):
        return value
    if name == "rope_type" or not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e15:
        raise _bad(source, f"rope_parameters.{kind}.{name} is {_shown(value)}")
    return float(value)


def global_value(source: Source, name: str, plain: str, default: int | None) -> int | None:
    """What global layers have in place of `name`: under a key of its own, or layer by layer as transformers writes."""
    value, layers = source.text.get(plain), source.text.get("per_layer_config")
    if value is None and isinstance(layers, dict):
        local = sliding_layers(source)
        given = (layers.get(str(i)) for i, sliding in enumerate(local) if not sliding)
        value = next((layer[name] for layer in given if isinstance(layer, dict) and name in layer), None)
    value = default if value is None else value
    if value is not None and not is_count(value, 1 << 20):
        raise _bad(source, f"{plain} is {_shown(value)}; want a whole number")
    return value


def _hidden(source: Source, layers: int, shared: int) -> int | np.ndarray:
    width = whole(source, "intermediate_size", 1 << 24)
    if not is_count(shared, layers):
        raise _bad(source, f"num_kv_shared_layers is {_shown(shared)}; there are {layers} layers")
    if not source.text["use_double_wide_mlp"]:
        return width
    return np.array([width * (1 + (i >= layers - shared)) for i in range(layers)], np.int32)


def _kv_heads(source: Source, local: list[bool]) -> int | np.ndarray:
    own = whole(source, "num_key_value_heads", 1 << 20)
    # transformers looks at the global layers' number only in models whose values are their keys.
    counts = source.text["attention_k_eq_v"] or source.is_assistant
    others = global_value(source, "num_key_value_heads", "num_global_key_value_heads", None) if counts else None
    return own if others is None else np.array([own if sliding else others for sliding in local], np.int32)


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def _bad(source: Source, text: str) -> Gemma4qError:
    return Gemma4qError("bad_config", f"{source.folder / 'config.json'}: {text}")
