"""Makes tiny Hugging Face directories of every sort that `gemma4q convert` reads: random weights, a small tokenizer.

    python tools/tiny_hf.py e2b out/e2b              one
    python tools/tiny_hf.py --all out                all, each under its name

Needs numpy alone, and gives the same bytes everywhere: tests hold the converter to digests of what llama.cpp's makes of
these directories (convert_oracle.py). `sparse` makes directories of published sizes, for tests of memory and time.
"""

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from shapes import SHAPES, Shape, tensors
from small_vocab import CONTROL, MEDIA, USER_DEFINED, vocabulary

from gemma4q.convert import names

LESS = {"hidden": 64, "head_dim": (16, 32), "window": 8, "context": 4096, "vocab": 512}
TINY = {
    "e2b": replace(SHAPES["e2b"], **LESS, layers=4, period=2, shared=2, ffn=64, heads=4, per_layer=32),
    "e4b": replace(SHAPES["e4b"], **LESS, layers=4, period=2, shared=2, ffn=96, heads=4, per_layer=32, dead_kv=True),
    "12b": replace(SHAPES["12b"], **LESS, layers=3, period=3, ffn=128, heads=4, kv_heads=(2, 1)),
    "26b": replace(SHAPES["26b"], **LESS, layers=2, period=2, ffn=96, heads=4, kv_heads=(2, 1), experts=4, used=2,
                   expert_ffn=32),
    "31b": replace(SHAPES["31b"], **LESS, layers=2, period=2, ffn=128, heads=8, kv_heads=(4, 2)),
}  # fmt: skip
ASSISTANTS = {"e2b-assistant": "e2b", "12b-assistant": "12b", "31b-assistant": "31b"}
KINDS = (*TINY, *ASSISTANTS)

DTYPE = {"e4b": "F16", "31b": "F32", "31b-assistant": "F32"}  # the others: BF16
SHARDS = {"26b": 3}
ASSISTANT_HIDDEN, ASSISTANT_LAYERS, CENTROIDS = 32, 4, 16
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}

# Rows of vectors that rounding meets rarely: nothing, the ends of a half float's range, ties, a block's very largest.
RARE = (0.0, -0.0, 6.0e4, -6.5e4, 1.0e-40, -3.0e-8, 6.1e-5, 1.0009766, 2.0029297, 127.5, -0.5, 65504.0)
CORPUS = Path(__file__).parents[1] / "LICENSE"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}<|turn>model\n"
)


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights that depend on name and shape alone; raw bits, since only those are promised to stay."""
    count = math.prod(shape)
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    if name.endswith(("input_min", "output_min")):
        return np.full(shape, -9.5, np.float32)
    if name.endswith(("input_max", "output_max")):
        return np.full(shape, np.inf if "mlp" in name else 9.5, np.float32)
    if len(shape) < 2 or name.endswith("norm.weight"):
        return (1 + uniform / 4).reshape(shape)
    values = (uniform * np.float32(1.7 / math.sqrt(shape[-1]))).reshape(shape)
    if name.endswith("embed_tokens.weight"):
        values[5, : len(RARE)] = RARE
        values[6] = 0
    return values


def stored(values: np.ndarray, dtype: str) -> bytes:
    """The bytes of a tensor; BF16 by cutting off, which is a rounding like any other here."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()


def text_tensors(shape: Shape, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, dims in tensors(shape).items():
        if name != "rope_freqs.weight":
            yield prefix + names.source_name(name, names.TEXT), dims


def assistant_tensors(shape: Shape, ordered: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Four layers without keys and values, and what stands between them and the model they draft for."""
    small = replace(shape, hidden=ASSISTANT_HIDDEN, layers=ASSISTANT_LAYERS, period=4, shared=ASSISTANT_LAYERS, ffn=64,
                    wide_shared=False, per_layer=0, dead_kv=False)  # fmt: skip
    yield from text_tensors(small, "model.")
    yield "pre_projection.weight", (ASSISTANT_HIDDEN, 2 * shape.hidden)
    yield "post_projection.weight", (shape.hidden, ASSISTANT_HIDDEN)
    if ordered:
        yield "masked_embedding.centroids.weight", (CENTROIDS, ASSISTANT_HIDDEN)
        yield "masked_embedding.token_ordering", (shape.vocab,)


# Of what the encoders take in, engines fix the size: 12B's patches of 48 pixels and frames of 640 samples, and E2B's
# and E4B's 128 mel bins, which the checkpoint tells by as many channels of the first convolution.
def vision_config(kind: str) -> dict:
    if kind == "12b":
        return {"model_type": "gemma4_unified_vision", "patch_size": 16, "pooling_kernel_size": 3, "mm_embed_dim": 64,
                "mm_posemb_size": 20, "output_proj_dims": 64, "rms_norm_eps": 1e-6}  # fmt: skip
    large = kind in ("26b", "31b")
    return {"model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 80 if large else 96, "patch_size": 4,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "pooling_kernel_size": 3, "position_embedding_size": 30, "use_clipped_linears": not large,
            "standardize": large, "rms_norm_eps": 1e-6}  # fmt: skip


def audio_config(kind: str) -> dict | None:
    if kind == "12b":
        return {"model_type": "gemma4_unified_audio", "audio_embed_dim": 640, "rms_norm_eps": 1e-6}
    if kind in ("26b", "31b"):
        return None
    return {"model_type": "gemma4_audio", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "subsampling_conv_channels": [128, 4], "conv_kernel_size": 5, "output_proj_dims": 48,
            "use_clipped_linears": True, "rms_norm_eps": 1e-6}  # fmt: skip


def encoder_tensors(kind: str, text_width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    vision, audio = vision_config(kind), audio_config(kind)
    if kind == "12b":
        patch, width = 3 * (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2, vision["mm_embed_dim"]
        for name, dims in {"patch_ln1": (patch,), "patch_ln2": (width,), "pos_norm": (width,)}.items():
            yield f"vision_embedder.{name}.weight", dims
            yield f"vision_embedder.{name}.bias", dims
        yield "vision_embedder.patch_dense.weight", (width, patch)
        yield "vision_embedder.patch_dense.bias", (width,)
        yield "vision_embedder.pos_embedding", (vision["mm_posemb_size"], 2, width)
        yield "embed_vision.embedding_projection.weight", (text_width, width)
        yield "embed_audio.embedding_projection.weight", (text_width, audio["audio_embed_dim"])
        return
    yield from vision_tensors(vision)
    yield "embed_vision.embedding_projection.weight", (text_width, vision["hidden_size"])
    if audio:
        yield from audio_tensors(audio)
        yield "embed_audio.embedding_projection.weight", (text_width, audio["output_proj_dims"])


def linear(name: str, rows: int, cols: int, clipped: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.linear.weight", (rows, cols)
    if clipped:
        yield from ((f"{name}.{clip}", ()) for clip in names.CLIPS)


def vision_tensors(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ffn, clipped = c["hidden_size"], c["intermediate_size"], c["use_clipped_linears"]
    yield "vision_tower.patch_embedder.input_proj.weight", (width, 3 * c["patch_size"] ** 2)
    yield "vision_tower.patch_embedder.position_embedding_table", (2, c["position_embedding_size"], width)
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for layer in range(c["num_hidden_layers"]):
        at = f"vision_tower.encoder.layers.{layer}."
        yield from ((f"{at}{norm}_layernorm.weight", (width,)) for norm in norms)
        for part in "qkvo":
            yield from linear(f"{at}self_attn.{part}_proj", width, width, clipped)
        yield from ((f"{at}self_attn.{part}_norm.weight", (c["head_dim"],)) for part in "qk")
        yield from linear(f"{at}mlp.gate_proj", ffn, width, clipped)
        yield from linear(f"{at}mlp.up_proj", ffn, width, clipped)
        yield from linear(f"{at}mlp.down_proj", width, ffn, clipped)
    if c["standardize"]:
        yield "vision_tower.std_bias", (width,)
        yield "vision_tower.std_scale", (width,)


def audio_tensors(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, (first, second) = c["hidden_size"], c["subsampling_conv_channels"]
    sampling = "audio_tower.subsample_conv_projection."
    yield f"{sampling}layer0.conv.weight", (first, 1, 3, 3)
    yield f"{sampling}layer0.norm.weight", (first,)
    yield f"{sampling}layer1.conv.weight", (second, first, 3, 3)
    yield f"{sampling}layer1.norm.weight", (second,)
    yield f"{sampling}input_proj_linear.weight", (width, first // 4 * second)
    for layer in range(c["num_hidden_layers"]):
        at = f"audio_tower.layers.{layer}."
        for part in ("feed_forward1", "feed_forward2"):
            yield f"{at}{part}.pre_layer_norm.weight", (width,)
            yield f"{at}{part}.post_layer_norm.weight", (width,)
            yield from linear(f"{at}{part}.ffw_layer_1", 4 * width, width, True)
            yield from linear(f"{at}{part}.ffw_layer_2", width, 4 * width, True)
        for part in ("q_proj", "k_proj", "v_proj", "post"):
            yield from linear(f"{at}self_attn.{part}", width, width, True)
        yield f"{at}self_attn.relative_k_proj.weight", (width, width)
        yield f"{at}self_attn.per_dim_scale", (width // c["num_attention_heads"],)
        yield from linear(f"{at}lconv1d.linear_start", 2 * width, width, True)
        yield from linear(f"{at}lconv1d.linear_end", width, width, True)
        yield f"{at}lconv1d.depthwise_conv1d.weight", (width, 1, c["conv_kernel_size"])
        for norm in ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"):
            yield f"{at}{norm}.weight", (width,)
    yield "audio_tower.output_proj.weight", (c["output_proj_dims"], width)
    yield "audio_tower.output_proj.bias", (c["output_proj_dims"],)


def text_config(shape: Shape) -> dict:
    """`text_config` as published files have it."""
    layers = ["full_attention" if shape.is_global(i) else "sliding_attention" for i in range(shape.layers)]
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    rope["full_attention"] = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    return {
        "model_type": "gemma4_text",
        "vocab_size": shape.vocab,
        "vocab_size_per_layer_input": shape.vocab if shape.per_layer else 0,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads[0],
        "num_global_key_value_heads": shape.kv_heads[1] if shape.values_from_keys else None,
        "head_dim": shape.head_dim[0],
        "global_head_dim": shape.head_dim[1],
        "layer_types": layers,
        "rope_parameters": rope,
        "sliding_window": shape.window,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "attention_k_eq_v": shape.values_from_keys,
        "num_kv_shared_layers": shape.shared,
        "use_double_wide_mlp": shape.wide_shared,
        "hidden_size_per_layer_input": shape.per_layer,
        "enable_moe_block": bool(shape.experts),
        "num_experts": shape.experts or None,
        "top_k_experts": shape.used or None,
        "moe_intermediate_size": shape.expert_ffn or None,
        "use_bidirectional_attention": None if shape.per_layer else "vision",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def model_config(kind: str, shape: Shape) -> dict:
    unified = kind == "12b"
    text, vision, audio = text_config(shape), vision_config(kind), audio_config(kind)
    if unified:
        text["model_type"] = "gemma4_unified_text"
    architecture = "Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"
    return {"architectures": [architecture], "model_type": "gemma4_unified" if unified else "gemma4",
            "text_config": text, "vision_config": vision, "audio_config": audio, "eos_token_id": [1, 106],
            "tie_word_embeddings": True, "dtype": "bfloat16"}  # fmt: skip


def assistant_config(kind: str, shape: Shape) -> dict:
    text = text_config(replace(shape, layers=ASSISTANT_LAYERS, period=4, shared=ASSISTANT_LAYERS, per_layer=0))
    text |= {"hidden_size": ASSISTANT_HIDDEN, "intermediate_size": 64, "use_double_wide_mlp": False}
    text |= {"final_logit_softcapping": None}
    unified = kind.startswith("12b")
    return {"architectures": [f"Gemma4{'Unified' if unified else ''}AssistantForCausalLM"],
            "model_type": f"gemma4{'_unified' if unified else ''}_assistant", "text_config": text,
            "backbone_hidden_size": shape.hidden, "use_ordered_embeddings": bool(shape.per_layer),
            "num_centroids": CENTROIDS, "centroid_intermediate_top_k": 4, "tie_word_embeddings": True}  # fmt: skip


@cache
def tokenizer_files(size: int) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json of Gemma 4's make."""
    vocab = vocabulary(size, CORPUS.read_text())
    tokens, types = vocab["tokenizer.ggml.tokens"], vocab["tokenizer.ggml.token_type"]
    special = [i for i, type in enumerate(types) if type in (CONTROL, USER_DEFINED)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i]} | plain for i in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in vocab["tokenizer.ggml.merges"]],
        },
    }
    named = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad", "mask")}
    others = [tokens[i] for i in special if tokens[i] not in named.values()]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": others, "add_bos_token": True}
    assert {*MEDIA} < {*others}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config | named}


def other_files(kind: str) -> dict[str, dict | str]:
    """What a published directory holds besides weights, config and tokenizer."""
    sampling = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "do_sample": True, "eos_token_id": [1, 106, 50]}
    if kind.startswith("12b"):
        sampling["suppress_tokens"] = [0, 4]
    card = ["---", "license: apache-2.0", "license_link: https://ai.google.dev/gemma/docs/gemma_4_license",
            "pipeline_tag: image-text-to-text", "library_name: transformers", "tags:", "- gemma4", "- tiny",
            f"base_model: google/gemma-4-{kind.upper()}", "---", "", "# A tiny model", ""]  # fmt: skip
    processor = {"image_processor": {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0], "patch_size": 16}}
    return {"generation_config.json": sampling, "README.md": "\n".join(card), "chat_template.jinja": TEMPLATE,
            "processor_config.json": processor}  # fmt: skip


def contents(kind: str) -> tuple[dict, list[tuple[str, tuple[int, ...]]]]:
    """config.json, and every tensor by name."""
    if kind in ASSISTANTS:
        shape = TINY[ASSISTANTS[kind]]
        return assistant_config(kind, shape), list(assistant_tensors(shape, bool(shape.per_layer)))
    shape = TINY[kind]
    if kind == "31b":  # as transformers has written it since 5.23: global layers' heads one by one
        config = model_config(kind, shape)
        text = config["text_config"]
        heads = {"head_dim": text.pop("global_head_dim"), "num_key_value_heads": text.pop("num_global_key_value_heads")}
        text["per_layer_config"] = {str(i): heads for i in range(shape.layers) if shape.is_global(i)}
    else:
        config = model_config(kind, shape)
    inner = [("model." + name, dims) for name, dims in encoder_tensors(kind, shape.hidden)]
    return config, [*text_tensors(shape, "model.language_model."), *inner]


def header(entries: list[tuple[str, tuple[int, ...], str]]) -> bytes:
    """A safetensors header: its length, then JSON padded to eight bytes."""
    described, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dims, dtype in entries:
        end = offset + math.prod(dims) * ITEM_BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tensors(folder: Path, entries: list[tuple[str, tuple[int, ...]]], dtype: str, shards: int = 1) -> None:
    """model.safetensors, or its shards and their index."""
    typed = [(name, dims, "I64" if name.endswith("token_ordering") else dtype) for name, dims in sorted(entries)]
    weight_map = {}
    for number in range(shards):
        part = typed[number::shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(header(part))
            for name, dims, kind in part:
                order = np.random.PCG64(7).random_raw(math.prod(dims)).argsort(kind="stable")
                out.write(stored(order if kind == "I64" else random(name, dims), kind))
        weight_map |= {name: file for name, *_ in part}
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def make(kind: str, folder: Path) -> Path:
    """One tiny directory; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config, entries = contents(kind)
    write_tensors(folder, entries, DTYPE.get(kind, "BF16"), SHARDS.get(kind, 1))
    write_json(folder / "config.json", config)
    for name, value in (tokenizer_files(512) | other_files(kind)).items():
        if isinstance(value, str):
            (folder / name).write_text(value)
        else:
            write_json(folder / name, value)
    return folder


def sparse(shape: Shape, folder: Path, shards: int = 4) -> Path:
    """A text model of any size whose weights are holes in the files: no disk, all zeros. Tokens are filled up."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = sorted(text_tensors(shape, "model.language_model."))
    weight_map = {}
    for number in range(shards):
        part = [(name, dims, "BF16") for name, dims in entries[number::shards]]
        path = folder / f"model-{number + 1:05}-of-{shards:05}.safetensors"
        path.write_bytes(head := header(part))
        os.truncate(path, len(head) + sum(2 * math.prod(dims) for _, dims, _ in part))
        weight_map |= {name: path.name for name, *_ in part}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(
        folder / "config.json", {"architectures": ["Gemma4ForConditionalGeneration"], "text_config": text_config(shape)}
    )
    files = tokenizer_files(512)
    model = files["tokenizer.json"]["model"]
    vocab = model["vocab"] | {f"<unused{i}>": i for i in range(512, shape.vocab)}
    files |= {"tokenizer.json": files["tokenizer.json"] | {"model": model | {"vocab": vocab}}}
    for name, value in files.items():
        write_json(folder / name, value)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true", help="every kind, each in a folder of its name")
    given = parser.parse_args()
    if given.all == bool(given.kind):
        parser.error("give a kind, or --all")
    for kind in KINDS if given.all else (given.kind,):
        make(kind, given.folder / kind if given.all else given.folder)


if __name__ == "__main__":
    main()
