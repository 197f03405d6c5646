"""Which tensor of a Hugging Face checkpoint becomes which tensor of a GGUF file: one table for each sort of model.

Owns names alone, under which `{}` is the number of a layer. Shapes of text tensors are `model.weights`' word, those of
encoders `mmproj`'s; what is done to values on the way is said there too. The words on the right are llama.cpp's.
"""

import re
from collections.abc import Mapping

TEXT = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "layers.{}.input_layernorm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.self_attn.q_proj.weight": "blk.{}.attn_q.weight",
    "layers.{}.self_attn.k_proj.weight": "blk.{}.attn_k.weight",
    "layers.{}.self_attn.v_proj.weight": "blk.{}.attn_v.weight",
    "layers.{}.self_attn.o_proj.weight": "blk.{}.attn_output.weight",
    "layers.{}.self_attn.q_norm.weight": "blk.{}.attn_q_norm.weight",
    "layers.{}.self_attn.k_norm.weight": "blk.{}.attn_k_norm.weight",
    "layers.{}.post_attention_layernorm.weight": "blk.{}.post_attention_norm.weight",
    "layers.{}.pre_feedforward_layernorm.weight": "blk.{}.ffn_norm.weight",
    "layers.{}.mlp.gate_proj.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.mlp.up_proj.weight": "blk.{}.ffn_up.weight",
    "layers.{}.mlp.down_proj.weight": "blk.{}.ffn_down.weight",
    "layers.{}.post_feedforward_layernorm.weight": "blk.{}.post_ffw_norm.weight",
    "layers.{}.layer_scalar": "blk.{}.layer_output_scale.weight",
    "layers.{}.per_layer_input_gate.weight": "blk.{}.inp_gate.weight",
    "layers.{}.per_layer_projection.weight": "blk.{}.proj.weight",
    "layers.{}.post_per_layer_input_norm.weight": "blk.{}.post_norm.weight",
    "layers.{}.router.proj.weight": "blk.{}.ffn_gate_inp.weight",
    "layers.{}.router.scale": "blk.{}.ffn_gate_inp.scale",
    "layers.{}.router.per_expert_scale": "blk.{}.ffn_down_exps.scale",
    "layers.{}.experts.gate_up_proj": "blk.{}.ffn_gate_up_exps.weight",
    "layers.{}.experts.down_proj": "blk.{}.ffn_down_exps.weight",
    "layers.{}.pre_feedforward_layernorm_2.weight": "blk.{}.pre_ffw_norm_2.weight",
    "layers.{}.post_feedforward_layernorm_1.weight": "blk.{}.post_ffw_norm_1.weight",
    "layers.{}.post_feedforward_layernorm_2.weight": "blk.{}.post_ffw_norm_2.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

# Beside those of a text model; the last two are the clustered head that llama.cpp's converter drops.
CENTROIDS, ORDERING = "masked_embd_centroids.weight", "masked_embd_ordering"
ASSISTANT = TEXT | {
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
    "masked_embedding.centroids.weight": CENTROIDS,
    "masked_embedding.token_ordering": ORDERING,
}

VISION = {
    "vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "vision_tower.encoder.layers.{}.input_layernorm.weight": "v.blk.{}.ln1.weight",
    "vision_tower.encoder.layers.{}.self_attn.q_proj.linear.weight": "v.blk.{}.attn_q.weight",
    "vision_tower.encoder.layers.{}.self_attn.k_proj.linear.weight": "v.blk.{}.attn_k.weight",
    "vision_tower.encoder.layers.{}.self_attn.v_proj.linear.weight": "v.blk.{}.attn_v.weight",
    "vision_tower.encoder.layers.{}.self_attn.o_proj.linear.weight": "v.blk.{}.attn_out.weight",
    "vision_tower.encoder.layers.{}.self_attn.q_norm.weight": "v.blk.{}.attn_q_norm.weight",
    "vision_tower.encoder.layers.{}.self_attn.k_norm.weight": "v.blk.{}.attn_k_norm.weight",
    "vision_tower.encoder.layers.{}.post_attention_layernorm.weight": "v.blk.{}.attn_post_norm.weight",
    "vision_tower.encoder.layers.{}.pre_feedforward_layernorm.weight": "v.blk.{}.ln2.weight",
    "vision_tower.encoder.layers.{}.mlp.gate_proj.linear.weight": "v.blk.{}.ffn_gate.weight",
    "vision_tower.encoder.layers.{}.mlp.up_proj.linear.weight": "v.blk.{}.ffn_up.weight",
    "vision_tower.encoder.layers.{}.mlp.down_proj.linear.weight": "v.blk.{}.ffn_down.weight",
    "vision_tower.encoder.layers.{}.post_feedforward_layernorm.weight": "v.blk.{}.ffn_post_norm.weight",
    "vision_tower.std_bias": "v.std_bias",
    "vision_tower.std_scale": "v.std_scale",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
}

AUDIO = {
    "audio_tower.subsample_conv_projection.layer0.conv.weight": "a.conv1d.0.weight",
    "audio_tower.subsample_conv_projection.layer0.norm.weight": "a.conv1d.0.norm.weight",
    "audio_tower.subsample_conv_projection.layer1.conv.weight": "a.conv1d.1.weight",
    "audio_tower.subsample_conv_projection.layer1.norm.weight": "a.conv1d.1.norm.weight",
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": "a.input_projection.weight",
    "audio_tower.layers.{}.feed_forward1.pre_layer_norm.weight": "a.blk.{}.ffn_norm.weight",
    "audio_tower.layers.{}.feed_forward1.ffw_layer_1.linear.weight": "a.blk.{}.ffn_up.weight",
    "audio_tower.layers.{}.feed_forward1.ffw_layer_2.linear.weight": "a.blk.{}.ffn_down.weight",
    "audio_tower.layers.{}.feed_forward1.post_layer_norm.weight": "a.blk.{}.ffn_post_norm.weight",
    "audio_tower.layers.{}.norm_pre_attn.weight": "a.blk.{}.attn_pre_norm.weight",
    "audio_tower.layers.{}.self_attn.q_proj.linear.weight": "a.blk.{}.attn_q.weight",
    "audio_tower.layers.{}.self_attn.k_proj.linear.weight": "a.blk.{}.attn_k.weight",
    "audio_tower.layers.{}.self_attn.v_proj.linear.weight": "a.blk.{}.attn_v.weight",
    "audio_tower.layers.{}.self_attn.relative_k_proj.weight": "a.blk.{}.attn_k_rel.weight",
    "audio_tower.layers.{}.self_attn.per_dim_scale": "a.blk.{}.per_dim_scale.weight",
    "audio_tower.layers.{}.self_attn.post.linear.weight": "a.blk.{}.attn_out.weight",
    "audio_tower.layers.{}.norm_post_attn.weight": "a.blk.{}.attn_post_norm.weight",
    # The convolution's norms are called the other way round there.
    "audio_tower.layers.{}.lconv1d.pre_layer_norm.weight": "a.blk.{}.conv_norm.weight",
    "audio_tower.layers.{}.lconv1d.linear_start.linear.weight": "a.blk.{}.conv_pw1.weight",
    "audio_tower.layers.{}.lconv1d.depthwise_conv1d.weight": "a.blk.{}.conv_dw.weight",
    "audio_tower.layers.{}.lconv1d.conv_norm.weight": "a.blk.{}.norm_conv.weight",
    "audio_tower.layers.{}.lconv1d.linear_end.linear.weight": "a.blk.{}.conv_pw2.weight",
    "audio_tower.layers.{}.feed_forward2.pre_layer_norm.weight": "a.blk.{}.ffn_norm_1.weight",
    "audio_tower.layers.{}.feed_forward2.ffw_layer_1.linear.weight": "a.blk.{}.ffn_up_1.weight",
    "audio_tower.layers.{}.feed_forward2.ffw_layer_2.linear.weight": "a.blk.{}.ffn_down_1.weight",
    "audio_tower.layers.{}.feed_forward2.post_layer_norm.weight": "a.blk.{}.ffn_post_norm_1.weight",
    "audio_tower.layers.{}.norm_out.weight": "a.blk.{}.ln2.weight",
    "audio_tower.output_proj.weight": "a.pre_encode.out.weight",
    "audio_tower.output_proj.bias": "a.pre_encode.out.bias",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}

UNIFIED = {
    "vision_embedder.patch_ln1.weight": "v.patch_norm.1.weight",
    "vision_embedder.patch_ln1.bias": "v.patch_norm.1.bias",
    "vision_embedder.patch_dense.weight": "v.patch_embd.weight",
    "vision_embedder.patch_dense.bias": "v.patch_embd.bias",
    "vision_embedder.patch_ln2.weight": "v.patch_norm.2.weight",
    "vision_embedder.patch_ln2.bias": "v.patch_norm.2.bias",
    "vision_embedder.pos_embedding": "v.position_embd.weight",
    "vision_embedder.pos_norm.weight": "v.patch_norm.3.weight",
    "vision_embedder.pos_norm.bias": "v.patch_norm.3.bias",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
}

# The ranges of a linear layer that clips: `X.linear.weight` has them beside it as `X.input_min` and so on.
CLIPS = ("input_min", "input_max", "output_min", "output_max")

ENCODER_PARTS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "vision_embedder.")
_LAYER = re.compile(r"\b(layers|blk)\.(0|[1-9]\d{0,3})\.")


def with_clips(table: Mapping[str, str]) -> dict[str, str]:
    """A table with the ranges of every linear layer that can clip."""
    out = dict(table)
    for source, target in table.items():
        if source.endswith(".linear.weight"):
            out |= {f"{source.removesuffix('linear.weight')}{c}": f"{target.removesuffix('weight')}{c}" for c in CLIPS}
    return out


def bare(name: str) -> str:
    """A checkpoint's name without the prefixes that differ between text-only and multimodal checkpoints."""
    return name.replace("language_model.", "").removeprefix("model.")


def is_encoder(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a vision or audio encoder."""
    return bare(name).startswith(ENCODER_PARTS)


def target_name(name: str, table: Mapping[str, str]) -> str | None:
    """The GGUF name of a checkpoint's tensor, None where the table has none."""
    plain = bare(name)
    layer = _LAYER.search(plain)
    if layer is None:
        return table.get(plain)
    found = table.get(plain[: layer.start(2)] + "{}" + plain[layer.end(2) :])
    return found and found.format(layer[2])


def source_name(name: str, table: Mapping[str, str]) -> str:
    """What a checkpoint calls a GGUF tensor, without prefixes; the inverse of `target_name`."""
    layer = _LAYER.search(name)
    plain = name if layer is None else name[: layer.start(2)] + "{}" + name[layer.end(2) :]
    found = next((source for source, target in table.items() if target == plain), name)
    return found.format(layer[2]) if layer else found
