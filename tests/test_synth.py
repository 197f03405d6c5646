"""The published geometries add up to the published sizes, and a synthetic file of a small one is a model."""

import sys
from pathlib import Path

import numpy as np
import pytest

from gemma4q.abi import BLOCKS, TensorType
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.writer import write_gguf

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import shapes
import synth

GIB = 2**30

# Parameters, text tensors, and GiB of Q4_0, Q8_0, Q4_K_M: counts of the published checkpoints, sizes of llama-quantize.
# E2B and E4B with the K and V tensors of shared layers, as Google published them.
PUBLISHED = {
    "e2b": (4.647e9, 601, 3.11, 4.61, 3.18),
    "e4b": (7.518e9, 720, 4.82, 7.46, 4.95),
    "12b": (11.907e9, 667, 6.48, 11.78, 6.86),
    "26b": (25.233e9, 658, 13.43, 25.00, 15.63),
    "31b": (30.697e9, 833, 16.42, 30.38, 17.39),
}


def published(model: str) -> shapes.Shape:
    shape = shapes.SHAPES[model]
    return shapes.with_dead_kv(shape) if shape.shared else shape


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_and_tensor_counts_are_the_published_ones(model):
    parameters, count, *_ = PUBLISHED[model]
    shape = published(model)
    assert shapes.parameters(shape) == pytest.approx(parameters, abs=0.6e6)
    assert len(shapes.tensors(shape)) == count


@pytest.mark.parametrize("model", PUBLISHED)
def test_file_sizes_are_those_of_llama_quantize(model):
    sizes = [shapes.file_bytes(published(model), scheme) / GIB for scheme in ("q4_0", "q8_0", "q4_k_m")]
    assert sizes == pytest.approx(PUBLISHED[model][2:], abs=0.0061)


@pytest.mark.parametrize("model, parameters", [("e2b", 4.629e9), ("e4b", 7.463e9)])
def test_without_dead_tensors_only_what_is_read_counts(model, parameters):
    assert shapes.parameters(shapes.SHAPES[model]) == pytest.approx(parameters, abs=0.6e6)


def test_26b_falls_back_where_rows_are_no_multiple_of_256():
    types = shapes.tensor_types(shapes.SHAPES["26b"], "q4_k_m")
    for kind in ("ffn_down", "ffn_down_exps"):
        down = [types[f"blk.{layer}.{kind}.weight"] for layer in range(30)]
        assert (down.count(TensorType.Q5_0), down.count(TensorType.Q8_0)) == (16, 14)
    assert types["token_embd.weight"] == TensorType.Q6_K


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q4_K"])
def test_random_blocks_are_finite_centred_and_small(name):
    type = TensorType[name]
    size = BLOCKS[type][1] * 4096
    values = dequantize(synth.blocks(type, np.random.default_rng(1))[:size], type)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.003
    assert 0.01 < values.std() < 0.04


def test_tiling_repeats_the_chunk_from_any_start():
    chunk = np.arange(7, dtype=np.uint8)
    assert [int(byte) for piece in synth.tiled(chunk, 5, 11) for byte in piece] == [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_a_small_synthetic_file_holds_every_tensor_at_its_type(tmp_path):
    vocabulary = tmp_path / "vocabulary.gguf"
    write_gguf(
        vocabulary, {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)]}, []
    )
    shape = shapes.Shape(6, 256, 256, 2, (2, 1), (128, 256), vocab=64, experts=4, used=2, expert_ffn=96)
    synth.synthesize(shape, "q4_k_m", tmp_path / "out.gguf", vocabulary)
    written = open_gguf(tmp_path / "out.gguf")
    assert {name: tensor.shape for name, tensor in written.tensors.items()} == shapes.tensors(shape)
    assert {name: tensor.type for name, tensor in written.tensors.items()} == shapes.tensor_types(shape, "q4_k_m")
    assert written.metadata["gemma4.attention.head_count_kv"].tolist() == [2, 2, 2, 2, 2, 1]
    assert len(written.metadata["tokenizer.ggml.tokens"]) == 64
