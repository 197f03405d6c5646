"""quantize/encode.py against gguf-py: its bytes where it has quantisers, and what its decoder makes of all of ours."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import ISAS, QUANTS, fence, fenced
from gguf import GGMLQuantizationType
from gguf import quants as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peer import PYTHON, needs_llama_cpp

from gemma4q import abi
from gemma4q.abi import BLOCKS, TensorType, address, ffi, lib, row_bytes
from gemma4q.convert.safetensors import open_checkpoint
from gemma4q.errors import Gemma4qError
from gemma4q.gguf import quants
from gemma4q.quantize.encode import Encoder

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from encode_oracle import PLAIN, quantiser

DATA = Path(__file__).parent / "data"
each_plain = pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
each_kind = pytest.mark.parametrize("kind", QUANTS, ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(2)


def kinds_of_data(rows: int = 8, cols: int = 768) -> dict[str, np.ndarray]:
    """float32 [rows, cols] each: blocks of 256 that are a group's lanes full, and the last ones that are not."""
    random = np.random.default_rng(5)
    normal = random.standard_normal((rows, cols), "f4")
    return {
        "normal": normal,
        "heavy-tailed": random.standard_t(2, (rows, cols)).astype("f4"),
        "tied": random.integers(-3, 4, (rows, cols)).astype("f4"),
        "sparse": normal * (random.random((rows, cols)) < 0.05) + np.float32(0),
        "constant": np.repeat(normal[:, ::32], 32, axis=1),
        "of one sign": -np.abs(normal),
        "far from zero": normal * np.float32(0.1) + 1,
        "small": normal * np.float32(1e-6),
        "large": normal * np.float32(1e4),
    }


def weights(cols: int) -> np.ndarray:
    """Importance as it is found: a few columns have most of it."""
    return np.random.default_rng(3).standard_gamma(0.5, cols).astype("f4") + np.float32(1e-3)


def decoded(data: np.ndarray, kind: TensorType) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return oracle.dequantize(data, GGMLQuantizationType(int(kind)))


def error(x: np.ndarray, data: np.ndarray, kind: TensorType, importance=1) -> np.ndarray:
    return ((x.astype("f8") - decoded(data, kind)) ** 2 * importance).sum(axis=1)


def assert_refused(kind: str, *words: str, call) -> None:
    with pytest.raises(Gemma4qError) as refused:
        call()
    assert refused.value.kind == kind
    assert all(word in refused.value.message for word in words), refused.value.message


@each_plain
@pytest.mark.parametrize("data", kinds_of_data())
def test_without_importance_the_bytes_are_ggufs(encoder, kind, data):
    x = kinds_of_data()[data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle.quantize(x, GGMLQuantizationType(int(kind))).view("u1")
    np.testing.assert_array_equal(encoder.encode(x, kind), theirs)


@each_plain
def test_blocks_are_those_that_llama_cpp_has_written(kind):
    """Of values that gguf-py and C round differently too; and of two models, whose files llama-quantize made."""
    known = np.load(DATA / "encode.npz")
    names = [name for name in known.files if name.endswith(f" as {kind.name}")]
    assert len(names) >= 8
    for isa in ISAS:
        for name in names:
            found = Encoder(1, isa).encode(known[name.removesuffix(f" as {kind.name}")], kind)
            np.testing.assert_array_equal(found, known[name], err_msg=f"{isa} {name}")


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q5_0], ids=lambda kind: kind.name)
def test_a_block_of_negative_zeros_is_what_llama_cpp_makes_of_it(encoder, kind):
    """Its scale is +0 / -8, so -0, where gguf-py has -0 / -8."""
    found = encoder.encode(np.full((1, 32), -0.0, "f4"), kind).tobytes()
    assert found == bytes.fromhex({"Q4_0": "0080" + "88" * 16, "Q5_0": "0080" + "ffffffff" + "00" * 16}[kind.name])


@each_kind
@pytest.mark.parametrize("data", kinds_of_data())
def test_no_error_is_above_plain_roundings(encoder, kind, data):
    x = kinds_of_data()[data]
    for importance in (None, weights(x.shape[1])):
        given = 1 if importance is None else importance
        plain = error(x, quants.quantize(x, kind), kind, given).sum()
        found = error(x, encoder.encode(x, kind, importance), kind, given).sum()
        assert found <= plain * (1 + 1e-9) or found <= 1e-7 * (x.astype("f8") ** 2 * given).sum()


@each_kind
@pytest.mark.parametrize("data", ["normal", "heavy-tailed"])
def test_importance_lowers_the_error_it_weighs_and_only_that(encoder, kind, data):
    x = kinds_of_data()[data]
    importance = weights(x.shape[1])
    without, with_it = encoder.encode(x, kind), encoder.encode(x, kind, importance)
    assert error(x, with_it, kind, importance).sum() < 0.98 * error(x, without, kind, importance).sum()
    if kind not in PLAIN:  # which are not searched without importance
        assert error(x, without, kind).sum() < error(x, with_it, kind).sum()


@each_kind
def test_every_instruction_set_and_number_of_threads_gives_the_same_bytes(encoder, kind):
    x = np.concatenate(list(kinds_of_data().values()))
    for importance in (None, weights(x.shape[1])):
        wanted, errors = encoder.encode(x, kind, importance), encoder.errors(x, kind, importance)
        for isa in ISAS:
            np.testing.assert_array_equal(Encoder(3, isa).encode(x, kind, importance), wanted)
            np.testing.assert_array_equal(Encoder(1, isa).errors(x, kind, importance), errors)
        for rows in (1, 5):  # a row depends on no other
            np.testing.assert_array_equal(encoder.encode(x[:rows], kind, importance), wanted[:rows])


@each_kind
def test_errors_are_those_of_what_was_written(encoder, kind):
    x = np.concatenate([*kinds_of_data().values(), kinds_of_data(8)["normal"]])
    for importance in (None, weights(x.shape[1])):
        wanted = error(x, encoder.encode(x, kind, importance), kind, 1 if importance is None else importance)
        np.testing.assert_allclose(encoder.errors(x, kind, importance), wanted, rtol=1e-12)


@each_kind
@settings(max_examples=25, deadline=None)
@given(arrays("f4", (1, 512), elements=st.floats(-(2.0**127), 2.0**127, width=32)), st.integers(-149, 100))
def test_whatever_the_values_all_instruction_sets_agree(kind, x, exponent):
    for importance in (None, np.ldexp(np.abs(np.sin(np.arange(512))), exponent).astype("f4")):
        first, *others = (Encoder(1, isa).encode(x, kind, importance) for isa in ISAS)
        for other in others:
            np.testing.assert_array_equal(first, other)
        if importance is not None or kind not in PLAIN:
            assert np.isfinite(decoded(first, kind)).all()


@each_kind
@pytest.mark.parametrize("exponent", [-149, -120, -24, 16, 100, 126])
def test_values_beyond_half_floats_become_the_nearest_that_blocks_hold(encoder, kind, exponent):
    """No infinity where the format is searched; of very small values none larger than a half float's least step."""
    x = np.ldexp(np.random.default_rng(1).uniform(-1, 1, (2, 256)), exponent).astype("f4")
    back = decoded(encoder.encode(x, kind, np.ones(256, "f4")), kind)
    assert np.isfinite(back).all()
    assert (np.abs(back - x) <= np.maximum(np.abs(x).max(), 2.0**-24)).all()
    if exponent == -24 and kind != TensorType.MXFP4:
        assert np.abs(back).max() <= 2.0**-22


@each_kind
def test_nothing_is_read_or_written_beyond_the_ends(kind):
    values = BLOCKS[kind][0]
    cols = values * (3 if values == 256 else 5)
    x = fence(np.random.default_rng(1).standard_normal((3, cols)).astype("f4"))
    importance, pool = fence(weights(cols)), ffi.gc(lib.pool_new(2), lib.pool_free)
    for isa in range(lib.isa_count()):
        for weighted in (ffi.NULL, ffi.cast("float *", address(importance))):
            if not lib.isa_available(isa):
                continue
            out, errors = fenced(3 * row_bytes(kind, cols)), fenced(24)
            floats, doubles = ffi.cast("float *", address(x)), ffi.cast("double *", address(errors))
            assert lib.encode_rows(pool, isa, kind, floats, 3, cols, weighted, address(out), doubles) == 0
            found = error(x, out.reshape(3, -1), kind, 1 if weighted == ffi.NULL else importance)
            np.testing.assert_allclose(errors.view("f8"), found, rtol=1e-12)


@each_kind
def test_where_nothing_is_important_everything_is(encoder, kind):
    x = kinds_of_data()["normal"]
    none, all_the_same = np.zeros(x.shape[1], "f4"), np.full(x.shape[1], 7, "f4")
    assert error(x, encoder.encode(x, kind, none), kind).sum() <= 1.01 * error(x, encoder.encode(x, kind), kind).sum()
    np.testing.assert_array_equal(encoder.encode(x, kind, none), encoder.encode(x, kind, all_the_same))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_no_block_can_hold_is_refused_by_its_index(encoder, bad):
    x = np.ones((300, 256), "f4")
    x[217, 31] = x[217, 40] = x[299, 0] = bad
    for kind in (TensorType.Q4_0, TensorType.Q4_K):
        assert_refused("numeric", "[217, 31]", kind.name, str(bad), call=lambda kind=kind: encoder.encode(x, kind))


@pytest.mark.parametrize("shape", [(2, 33), (2, 0), (64,), (1, 2, 32)])
def test_rows_of_broken_blocks_are_refused(encoder, shape):
    assert_refused("bad_block_size", "Q4_0", call=lambda: encoder.encode(np.ones(shape, "f4"), TensorType.Q4_0))


@pytest.mark.parametrize("number", [4, 9, 16, 40, 2**31])
def test_an_unknown_type_is_refused_by_number(encoder, number):
    assert_refused("bad_quant_type", str(number), call=lambda: encoder.encode(np.ones((1, 256), "f4"), number))


@pytest.mark.parametrize("importance", [np.ones(31), np.ones((1, 32)), np.full(32, -1), np.full(32, np.nan)])
def test_bad_importance_is_refused(encoder, importance):
    assert_refused("bad_importance", call=lambda: encoder.encode(np.ones((1, 32), "f4"), TensorType.Q4_0, importance))


def test_without_the_compiled_part_a_word_says_so(monkeypatch):
    monkeypatch.setattr("gemma4q.quantize.encode.missing", "the C kernels were not built (as a test would have it)")
    assert_refused("no_native", "C compiler", call=Encoder)


@pytest.mark.parametrize("asked", [{"threads": 0}, {"threads": 1025}, {"isa": "mmx"}])
def test_threads_and_instruction_sets_that_cannot_be_are_refused(asked):
    assert_refused("unavailable" if "isa" in asked else "bad_option", call=lambda: Encoder(**asked))


def test_floats_go_through(encoder):
    x = np.array([[1.0, np.inf, 1e-9, -3.0]], "f4")
    for kind in (TensorType.F32, TensorType.F16, TensorType.BF16):
        assert encoder.encode(x, kind).shape == (1, abi.row_bytes(kind, 4))
    assert encoder.errors(x[:, ::3], TensorType.F16) == 0
    assert encoder.errors(x[:, 2:], TensorType.F16, np.array([1e18, 1], "f4")) > 0


# -- llama.cpp's own, of this interpreter or of GEMMA4Q_PEER_PYTHON ----------------------------------------------------


@pytest.fixture(scope="module")
def ggml():
    """ggml_quantize_chunk(type, x, importance) -> bytes."""
    needs_llama_cpp()
    found = quantiser(PYTHON)
    assert found, f"{PYTHON} has no llama-cpp-python"
    return found


def trained() -> dict[str, np.ndarray]:
    """Every matrix of the two trained models whose rows are whole blocks of 256; experts one below the other."""
    found = {}
    for folder in sorted((DATA / "trained").iterdir()):
        for tensor in open_checkpoint(folder).values():
            if len(tensor.shape) > 1 and tensor.shape[-1] % 256 == 0:
                bits = tensor.read(0, tensor.size)
                x = (bits.astype("u4") << 16).view("f4") if tensor.dtype == "BF16" else bits.astype("f4")
                found[f"{folder.name} {tensor.name}"] = x.reshape(-1, tensor.shape[-1])
    return found


@pytest.mark.peers
@each_plain
def test_the_bytes_are_llama_cpps_whatever_the_values(encoder, ggml, kind):
    random = np.random.default_rng(0)
    normal = random.standard_normal((64, 1024))
    data = [*(np.concatenate(list(kinds_of_data(16, 1024).values())),), np.where(normal < 0, -0.0, 0.0).astype("f4")]
    data += [np.clip(np.ldexp(normal, n), -3.4e38, 3.4e38).astype("f4") for n in (*range(-150, -120), 16, 20, 120, 126)]
    bits = random.integers(0, 2**32, (64, 1024), dtype="u4").view("f4")
    data.append(np.where(np.isfinite(bits), bits, np.float32(0)))
    close = np.ldexp(1 - np.ldexp(random.integers(0, 6, (64, 1024)), -24), random.integers(-126, 127, (64, 1)))
    data.append(close.astype("f4"))
    for x in data:
        np.testing.assert_array_equal(encoder.encode(x, kind), ggml(kind, x))


@pytest.mark.peers
@each_kind
def test_no_tensor_has_a_larger_error_than_llama_cpp_leaves(encoder, ggml, kind):
    random = np.random.default_rng(0)
    data = kinds_of_data(32, 1024) | trained()
    data = {name: x for name, x in data.items() if name not in ("tied", "sparse", "constant")} | {
        f"heavy-tailed {tail}": random.standard_t(tail, (32, 1024)).astype("f4") for tail in (1.2, 3, 5)
    }
    ratios = {}
    for name, x in data.items():
        for importance in (None, weights(x.shape[1])):
            given = 1 if importance is None else importance
            found = error(x, encoder.encode(x, kind, importance), kind, given).sum()
            ratios[name, importance is None] = found / error(x, ggml(kind, x, importance), kind, given).sum()
    worst = max(ratios, key=ratios.get)
    median = {plain: np.median([ratio for (_, p), ratio in ratios.items() if p == plain]) for plain in (True, False)}
    print(f"{kind.name}: {len(ratios)} ratios, worst {ratios[worst]:.4f} ({worst[0]}), median {median[True]:.4f}, with "
          f"importance {median[False]:.4f}")  # fmt: skip
    assert ratios[worst] <= 1.0
