"""Makes a tiny Gemma 4 with random weights, and what transformers computes with it: the yardstick of the forward pass.

    python tools/golden.py e2b-like out/            a model of 30 MB as out/e2b-like.gguf, out/e2b-like.npz
    python tools/golden.py e2b-like tests/data/golden --tiny      one of 1 MB: what the tests keep

Needs torch and transformers (the `peers` extra). Weights are rounded to bf16, computed with and stored in float32;
every norm and scale is perturbed so that forgetting one shows. The archive holds, in float32 or int32:
`ids [T]`, `logits [T, V]` (softcapped), `hidden [L + 1, T, D]` (scaled embedding, then each layer's output),
`final_norm [T, D]`, `greedy [N]`; `ple [T, L, P]`; `router_index`, `router_weights [L, T, K]`; for models that see
images both ways `vision_ids`, `vision_type [T]`, `vision_soft [S, D]`, `vision_logits`, `vision_mask_sliding`,
`vision_mask_full [T, T]`.
"""

import argparse
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from shapes import Shape, metadata, tensors
from small_vocab import vocabulary
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig
from transformers.models.gemma4.modeling_gemma4 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from gemma4q.abi import TensorType
from gemma4q.gguf.writer import TensorData, write_gguf

SMALL = Shape(6, 256, 512, 4, (2, 1), (64, 128), window=16, context=4096, vocab=1024)
VARIANTS = {
    "e2b-like": replace(SMALL, layers=10, ffn=256, heads=2, kv_heads=(1, 1), head_dim=(128, 256), period=5, shared=5,
                        wide_shared=True, per_layer=128, values_from_keys=False),
    "e4b-like": replace(SMALL, layers=15, ffn=256, kv_heads=(2, 2), shared=3, per_layer=64, values_from_keys=False),
    "moe-like": replace(SMALL, ffn=192, heads=8, kv_heads=(4, 2), experts=12, used=4, expert_ffn=64),
    "dense-like": replace(SMALL, layers=12, heads=8, kv_heads=(4, 2), head_dim=(32, 64)),
    "unified-like": SMALL,
}  # fmt: skip
LESS = {"hidden": 64, "head_dim": (16, 32), "vocab": 512, "period": 3}
TINY = {
    "e2b-like": LESS | {"layers": 6, "ffn": 64, "heads": 4, "shared": 3, "per_layer": 32},
    "e4b-like": LESS | {"layers": 8, "ffn": 96, "shared": 2, "per_layer": 32},
    "moe-like": LESS | {"layers": 3, "ffn": 96, "heads": 4, "kv_heads": (2, 1), "experts": 8, "used": 3},
    "dense-like": LESS | {"layers": 6, "ffn": 128},
    "unified-like": LESS | {"layers": 4, "ffn": 128, "head_dim": (32, 64), "period": 4},
}
CLEAR_EXPERT = 0.065  # least lead of a chosen expert's probability, times the number of choices: no rounding turns it
CLEAR_TOKEN = 0.02  # least lead of a greedy token's logit

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}
MODEL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        return MODEL_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def reference(variant: str, shape: Shape) -> torch.nn.Module:
    """The transformers model of this shape, weights not yet drawn."""
    layers = ["full_attention" if shape.is_global(layer) else "sliding_attention" for layer in range(shape.layers)]
    given = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads[0],
        "num_global_key_value_heads": shape.kv_heads[1],
        "head_dim": shape.head_dim[0],
        "global_head_dim": shape.head_dim[1],
        "layer_types": layers,
        "sliding_window": shape.window,
        "max_position_embeddings": shape.context,
        "attention_k_eq_v": shape.values_from_keys,
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": shape.shared,
        "use_double_wide_mlp": shape.wide_shared,
        "use_bidirectional_attention": None if shape.per_layer else "vision",
    }
    if variant == "unified-like":
        return Gemma4UnifiedForCausalLM._from_config(Gemma4UnifiedTextConfig(**given), attn_implementation="eager")
    given |= {"hidden_size_per_layer_input": shape.per_layer, "vocab_size_per_layer_input": shape.vocab}
    if shape.experts:
        given |= {"enable_moe_block": True, "num_experts": shape.experts, "top_k_experts": shape.used}
        given["moe_intermediate_size"] = shape.expert_ffn
    return Gemma4ForCausalLM._from_config(Gemma4TextConfig(**given), attn_implementation="eager")


@torch.no_grad()
def draw(model: torch.nn.Module, seed: int, embedding: float) -> None:
    """Random weights, as bf16 holds them: matrices keep a vector's length, norms and scales lie around 1.

    Wide heads get smaller norms, and the embedding is `embedding` times what a layer adds, more in deeper models: else
    rounding grows to 1e-3 of the logits.
    """
    random = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("layer_scalar"):
            new = torch.rand(value.shape, generator=random) * 0.6 + 0.6
        elif name == "model.norm.weight":
            new = (4 + torch.randn(value.shape, generator=random)) / embedding
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            breadth = min(1, 32 / len(value)) ** 0.25
            new = (0.75 + 0.15 * torch.randn(value.shape, generator=random)) * breadth
        elif value.dim() == 1:
            new = 1 + 0.25 * torch.randn(value.shape, generator=random)
        elif "router.proj" in name:
            new = 2 * torch.randn(value.shape, generator=random)
        else:
            new = torch.randn(value.shape, generator=random) * value.shape[-1] ** -0.5
            new *= embedding if name == "model.embed_tokens.weight" else 1
        if name != "lm_head.weight":  # it is the embedding
            value.copy_(new.bfloat16().float())


def to_gguf(model: torch.nn.Module, shape: Shape, path: Path, corpus: str) -> None:
    state = {gguf_name(k): v.numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    pairs = shape.head_dim[1] // 2
    state["rope_freqs.weight"] = np.where(np.arange(pairs) < pairs // 4, 1, 1e30)
    wanted = tensors(shape)
    found = {name: value.shape for name, value in state.items()}
    if found != wanted:
        raise SystemExit(f"transformers and shapes.py disagree: {sorted(found.items() ^ wanted.items())}")
    keys = metadata(shape) | {"general.name": path.stem, "general.file_type": 0} | vocabulary(shape.vocab, corpus)
    data = [TensorData.of(name, TensorType.F32, dims, state[name].astype("<f4")) for name, dims in wanted.items()]
    write_gguf(path, keys, data)


def observed(model: torch.nn.Module, ids: np.ndarray) -> dict[str, list]:
    """A forward pass, and what its layers, routers and final norm put out on the way."""
    seen: dict[str, list] = {"layer": [], "router": [], "norm": []}
    watched = [("norm", model.model.norm), *(("layer", layer) for layer in model.model.layers)]
    watched += [("router", layer.router) for layer in model.model.layers if hasattr(layer, "router")]
    hooks = [
        module.register_forward_hook(lambda _, __, out, kind=kind: seen[kind].append(out)) for kind, module in watched
    ]
    seen["logits"] = model(torch.tensor(ids)[None]).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return seen


def text(
    model: torch.nn.Module, shape: Shape, length: int, random: np.random.Generator
) -> dict[str, np.ndarray] | None:
    """A run over random tokens and a greedy continuation; None where a choice is too close to call."""
    ids = np.concatenate([[2], random.integers(5, shape.vocab, length - 1)])
    seen = observed(model, ids)
    embedded = model.model.embed_tokens(torch.tensor(ids))
    hidden = np.stack([embedded.numpy(), *(layer[0].numpy() for layer in seen["layer"])])
    out = {"ids": ids, "logits": seen["logits"], "final_norm": seen["norm"][0][0].numpy(), "hidden": hidden}
    if shape.per_layer:
        rows = model.model.get_per_layer_inputs(torch.tensor(ids)[None])
        out["ple"] = model.model.project_per_layer_inputs(embedded[None], rows)[0].numpy()
    if shape.experts:
        probabilities, weights, index = (torch.stack(part).numpy() for part in zip(*seen["router"], strict=True))
        best = -np.sort(-probabilities)
        if (best[..., : shape.used] - best[..., 1 : shape.used + 1]).min() < CLEAR_EXPERT / index.size:
            return None
        out |= {"router_weights": weights, "router_index": index}
    greedy = list(ids)
    for _ in range(24):
        last = np.sort(step := model(torch.tensor(greedy)[None]).logits[0, -1].numpy())
        if last[-1] - last[-2] < CLEAR_TOKEN:
            return None
        greedy.append(int(step.argmax()))
    return out | {"greedy": np.array(greedy[length:])}


def images(model: torch.nn.Module, shape: Shape, ids: np.ndarray, image: int, random: np.random.Generator) -> dict:
    """The same text with two images in it, one longer than the window, seen both ways on sliding layers."""
    kinds = np.zeros(len(ids), np.int64)
    kinds[9 : 9 + shape.window + 5] = kinds[44:57] = 1
    ids = np.where(kinds == 1, image, ids)
    embedded = model.model.embed_tokens(torch.tensor(ids))
    spread = round(float(embedded.std()))  # about what tokens have
    soft = random.normal(0, spread, (int(kinds.sum()), shape.hidden)).astype(np.float32)
    embedded[torch.tensor(kinds) == 1] = torch.tensor(soft)
    blocks = get_block_sequence_ids_for_mask(torch.tensor(kinds)[None], device="cpu")
    masks = create_masks_for_vision_model(
        model.config, embedded[None], None, None, torch.arange(len(ids))[None], block_sequence_ids=blocks
    )
    logits = model(inputs_embeds=embedded[None], attention_mask=masks).logits[0].numpy()
    out = {"vision_ids": ids, "vision_type": kinds, "vision_soft": soft, "vision_logits": logits}
    for ours, theirs in (("sliding", "sliding_attention"), ("full", "full_attention")):
        mask = masks[theirs][0, 0]
        out[f"vision_mask_{ours}"] = (mask if mask.dtype == torch.bool else mask == 0).numpy()
    return out


def narrow(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == bool else value.astype(np.float32 if value.dtype.kind == "f" else np.int32)


@torch.no_grad()
def make(variant: str, out: Path, tiny: bool, seed: int, keep_hf: bool) -> None:
    shape = replace(VARIANTS[variant], **TINY[variant]) if tiny else VARIANTS[variant]
    corpus = (Path(__file__).parents[1] / "LICENSE").read_text()
    model = reference(variant, shape).float().eval()
    for attempt in count(seed):
        draw(model, attempt, embedding=1 if tiny else 5)
        random = np.random.default_rng(attempt)
        found = text(model, shape, 72 if tiny else 96, random)
        if found is not None:
            break
    if not shape.per_layer:
        image = vocabulary(shape.vocab, corpus)["tokenizer.ggml.tokens"].index("<|image|>")
        found |= images(model, shape, found["ids"], image, random)
    out.mkdir(parents=True, exist_ok=True)
    to_gguf(model, shape, out / f"{variant}.gguf", corpus)
    np.savez_compressed(out / f"{variant}.npz", **{name: narrow(value) for name, value in found.items()})
    if keep_hf:
        model.bfloat16().save_pretrained(out / f"{variant}-hf")
    print(f"{variant}: seed {attempt}, logits up to {np.abs(found['logits']).max():.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the sizes that tests/data/golden keeps")
    parser.add_argument("--seed", type=int, default=1, help="the first to try")
    parser.add_argument("--keep-hf", action="store_true", help="also the transformers checkpoint, in bf16")
    given = parser.parse_args()
    make(given.variant, given.out, given.tiny, given.seed, given.keep_hf)


if __name__ == "__main__":
    main()
