"""quantize/encode.py against gguf-py: its bytes where it has quantisers, and what its decoder makes of ours."""

import warnings

import numpy as np
import pytest
from cases import ISAS
from gguf import GGMLQuantizationType
from gguf import quants as oracle

from gemma4q import abi
from gemma4q.abi import TensorType
from gemma4q.errors import Gemma4qError
from gemma4q.quantize.encode import Encoder

SAME = [TensorType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]
each_same = pytest.mark.parametrize("kind", SAME, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(2)


def kinds_of_data(rows: int = 16, cols: int = 512) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    normal = random.standard_normal((rows, cols), "f4")
    sparse = normal * (random.random((rows, cols)) < 0.05)
    return {
        "normal": normal,
        "heavy-tailed": random.standard_t(2, (rows, cols)).astype("f4"),
        "tied": random.integers(-3, 4, (rows, cols)).astype("f4"),
        "sparse": sparse.astype("f4") + np.float32(0),
        "constant": np.repeat(normal[:, ::32], 32, axis=1),
        "of one sign": -np.abs(normal),
        "small": normal * np.float32(1e-6),
        "large": normal * np.float32(1e4),
    }


def theirs(x: np.ndarray, kind: TensorType) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.quantize(x, GGMLQuantizationType(int(kind))).view("u1")


@each_same
@pytest.mark.parametrize("data", kinds_of_data())
def test_without_importance_the_bytes_are_ggufs(encoder, kind, data):
    x = kinds_of_data()[data]
    np.testing.assert_array_equal(encoder.encode(x, kind), theirs(x, kind))


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q5_0], ids=lambda kind: kind.name)
def test_a_block_of_negative_zeros_is_what_llama_cpp_makes_of_it(encoder, kind):
    """Its scale is +0 / -8, so -0, where gguf-py has -0 / -8."""
    found = encoder.encode(np.full((1, 32), -0.0, "f4"), kind).tobytes()
    assert found == bytes.fromhex({"Q4_0": "0080" + "88" * 16, "Q5_0": "0080" + "ffffffff" + "00" * 16}[kind.name])


@each_same
def test_every_instruction_set_and_number_of_threads_gives_the_same_bytes(encoder, kind):
    x = np.concatenate(list(kinds_of_data().values()))
    wanted = encoder.encode(x, kind)
    for isa in ISAS:
        for threads in (1, 3):
            np.testing.assert_array_equal(Encoder(threads, isa).encode(x, kind), wanted)


@each_same
def test_errors_are_those_of_what_was_written(encoder, kind):
    x = np.concatenate(list(kinds_of_data().values()))
    importance = np.random.default_rng(1).random(x.shape[1], "f4")
    for weights in (None, importance):
        decoded = oracle.dequantize(encoder.encode(x, kind, weights), GGMLQuantizationType(int(kind)))
        off = (x.astype("f8") - decoded) ** 2 * (1 if weights is None else weights)
        np.testing.assert_allclose(encoder.errors(x, kind, weights), off.sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_no_block_can_hold_is_refused_by_its_index(encoder, bad):
    x = np.ones((300, 256), "f4")
    x[217, 31] = x[217, 40] = x[299, 0] = bad
    with pytest.raises(Gemma4qError) as error:
        encoder.encode(x, TensorType.Q4_0)
    assert error.value.kind == "numeric" and "[217, 31]" in error.value.message and "Q4_0" in error.value.message


@pytest.mark.parametrize("shape", [(2, 33), (2, 0), (64,), (1, 2, 32)])
def test_rows_of_broken_blocks_are_refused(encoder, shape):
    with pytest.raises(Gemma4qError) as error:
        encoder.encode(np.ones(shape, "f4"), TensorType.Q4_0)
    assert error.value.kind == "bad_block_size"


@pytest.mark.parametrize("number", [4, 9, 16, 40, 2**31])
def test_an_unknown_type_is_refused_by_number(encoder, number):
    with pytest.raises(Gemma4qError) as error:
        encoder.encode(np.ones((1, 256), "f4"), number)
    assert error.value.kind == "bad_quant_type" and str(number) in error.value.message


@pytest.mark.parametrize("importance", [np.ones(31), np.ones((1, 32)), np.full(32, -1), np.full(32, np.nan)])
def test_bad_importance_is_refused(encoder, importance):
    with pytest.raises(Gemma4qError) as error:
        encoder.encode(np.ones((1, 32), "f4"), TensorType.Q4_0, importance)
    assert error.value.kind == "bad_importance"


def test_without_the_compiled_part_a_word_says_so(monkeypatch):
    monkeypatch.setattr("gemma4q.quantize.encode.missing", "the C kernels were not built (as a test would have it)")
    with pytest.raises(Gemma4qError) as error:
        Encoder()
    assert error.value.kind == "no_native" and "C compiler" in error.value.message


@pytest.mark.parametrize("asked", [{"threads": 0}, {"threads": 1025}, {"isa": "mmx"}])
def test_threads_and_instruction_sets_that_cannot_be_are_refused(asked):
    with pytest.raises(Gemma4qError) as error:
        Encoder(**asked)
    assert error.value.kind in ("bad_option", "unavailable")


def test_floats_go_through(encoder):
    x = np.array([[1.0, np.inf, 1e-9, -3.0]], "f4")
    for kind in (TensorType.F32, TensorType.F16, TensorType.BF16):
        assert encoder.encode(x, kind).shape == (1, abi.row_bytes(kind, 4))
    assert encoder.errors(x[:, ::3], TensorType.F16) == 0
