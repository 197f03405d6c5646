"""Every kept golden is there, is a model this package opens, and covers the trait it is named for.

What they are for, comparing the forward pass, is the business of other tests; tools/golden.py makes them.
"""

from pathlib import Path

import numpy as np
import pytest

from gemma4q.gguf.quants import dequantize, to_bf16
from gemma4q.model import open_model
from gemma4q.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "data" / "golden"
VARIANTS = ["e2b-like", "e4b-like", "moe-like", "dense-like", "unified-like"]
PER_LAYER = VARIANTS[:2]
TWO_WAY = VARIANTS[2:]


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    gguf, config, weights = open_model(GOLDEN / f"{request.param}.gguf")
    return request.param, gguf, config, weights, np.load(GOLDEN / f"{request.param}.npz")


def test_numbers_have_the_shapes_of_the_model(golden):
    variant, _, config, _, numbers = golden
    tokens, layers = len(numbers["ids"]), len(config.layers)
    shapes = {
        "logits": (tokens, config.vocab),
        "hidden": (layers + 1, tokens, config.width),
        "final_norm": (tokens, config.width),
        "greedy": (24,),
    }
    if variant in PER_LAYER:
        shapes["ple"] = (tokens, layers, config.per_layer_width)
    if variant == "moe-like":
        shapes["router_index"] = shapes["router_weights"] = (layers, tokens, config.layers[0].experts_used)
    if variant in TWO_WAY:
        soft = int(numbers["vision_type"].sum())
        shapes |= {"vision_logits": (tokens, config.vocab), "vision_soft": (soft, config.width)}
        shapes |= {"vision_mask_sliding": (tokens, tokens), "vision_mask_full": (tokens, tokens)}
    assert {name: numbers[name].shape for name in shapes} == shapes
    assert all(np.isfinite(numbers[name]).all() for name in shapes)


def test_the_text_crosses_the_window_and_a_page(golden):
    _, _, config, _, numbers = golden
    window = max(layer.window for layer in config.layers)
    assert len(numbers["ids"]) >= 2 * window + 3
    assert len(numbers["ids"]) > 64


def test_the_softcap_shows_but_does_not_swallow(golden):
    _, _, config, _, numbers = golden
    assert 12 < np.abs(numbers["logits"]).max() < config.softcap - 0.5


def test_weights_are_exactly_bf16(golden):
    *_, weights, _ = golden
    for name, tensor in weights.tensors.items():
        if name != "rope_freqs.weight":
            values = dequantize(tensor.data, tensor.type)
            assert np.array_equal(dequantize(to_bf16(values).view(np.uint8), 30), values), name


def test_no_vector_is_left_at_one(golden):
    """A norm or scale of ones would let a forward pass forget it unseen."""
    *_, weights, _ = golden
    for name, tensor in weights.tensors.items():
        if len(tensor.shape) == 1 and name != "rope_freqs.weight":
            assert (weights.vector(name) != 1).any(), name


def test_each_variant_has_the_trait_it_is_named_for(golden):
    variant, _, config, _, _ = golden
    borrowing = [layer for layer in config.layers if not layer.owns_kv]
    assert bool(borrowing) == (variant in PER_LAYER) == (config.per_layer_width > 0)
    assert {layer.window > 0 for layer in borrowing} in (set(), {True, False})
    assert any(layer.keys_from_values for layer in config.layers) == (variant in TWO_WAY)
    assert (config.layers[0].experts > 0) == (variant == "moe-like")
    widths = {layer.hidden / config.layers[0].hidden for layer in borrowing}
    assert widths == {"e2b-like": {2}, "e4b-like": {1}}.get(variant, set())
    assert config.layers[-1].kv_heads == {"e2b-like": 1, "e4b-like": 2, "dense-like": 2}.get(variant, 1)


@pytest.mark.parametrize("variant", TWO_WAY)
def test_one_image_is_longer_than_the_window_and_sliding_layers_alone_look_ahead(variant):
    numbers = np.load(GOLDEN / f"{variant}.npz")
    kinds, sliding, full = (numbers[f"vision_{name}"] for name in ("type", "mask_sliding", "mask_full"))
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, kinds, 0])))[::2]
    assert len(runs) == 2
    assert runs.max() > open_model(GOLDEN / f"{variant}.gguf")[1].layers[0].window
    assert np.array_equal(full, np.tri(len(kinds), dtype=bool))
    assert (sliding & ~full).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vocabulary_reads_and_writes_text(variant):
    tokenizer = Tokenizer.from_gguf(open_model(GOLDEN / f"{variant}.gguf")[0])
    text = "Licensed under the terms below:\n  ümlaut, 漢字 and more.\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
