"""Tensor types: against gguf-py bit for bit where it has the same function, against bounds where it has none."""

import warnings

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as oracle
from hypothesis import given
from hypothesis import strategies as st

from gemma4q import abi
from gemma4q.abi import TensorType
from gemma4q.errors import Gemma4qError
from gemma4q.gguf import quants
from gemma4q.gguf.bits import gather, spread

ALL = list(abi.BLOCKS)
BLOCK_FORMATS = list(quants.FORMATS)
SAME_QUANTISER = [TensorType[n] for n in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")]
HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01]  # zeros to NaNs
# Largest error over the largest value of 32: the codes' step, for K formats and IQ4_XS with room for the scales' own.
BOUND = {"Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q8_0": 1 / 254, "Q2_K": 0.5, "Q3_K": 0.32}
BOUND |= {"Q4_K": 0.09, "Q5_K": 0.05, "Q6_K": 0.04, "IQ4_NL": 0.12, "IQ4_XS": 0.14, "MXFP4": 0.34}


def theirs(data: np.ndarray, tensor_type: int) -> np.ndarray:
    """gguf-py's decoder; it returns F16 and F32 by view, without a change of shape it could get wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oracle.dequantize(data, GGMLQuantizationType(int(tensor_type)))


def assert_same_bits(a: np.ndarray, b: np.ndarray):
    """Equal bits, or NaN in the same places."""
    assert a.dtype == b.dtype == np.float32 and a.shape == b.shape
    nan = np.isnan(a)
    np.testing.assert_array_equal(nan, np.isnan(b))
    np.testing.assert_array_equal(np.where(nan, 0, a).view("u4"), np.where(nan, 0, b).view("u4"))


def random_rows(tensor_type: int, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, int(tensor_type)])
    return rng.integers(0, 256, (rows, blocks * abi.BLOCKS[tensor_type][1]), dtype=np.uint8)


def test_the_types_are_ggufs_with_its_block_sizes():
    from gguf.constants import GGML_QUANT_SIZES

    assert len(ALL) == 16
    for t in ALL:
        assert abi.BLOCKS[t] == GGML_QUANT_SIZES[GGMLQuantizationType[t.name]]
        assert t == GGMLQuantizationType[t.name]


@pytest.mark.parametrize("tensor_type", ALL, ids=lambda t: t.name)
def test_random_bytes_mean_what_gguf_says(tensor_type):
    data = random_rows(tensor_type, 64, 24)
    assert_same_bits(quants.dequantize(data, tensor_type), theirs(data, tensor_type))


@pytest.mark.parametrize("tensor_type", ALL, ids=lambda t: t.name)
def test_extreme_blocks_mean_what_gguf_says(tensor_type):
    """All zeros, all ones, and every half float of a block set to each of zero, denormal, largest, infinity and NaN."""
    size = abi.BLOCKS[tensor_type][1]
    rows = [np.zeros(size, "u1"), np.full(size, 255, "u1")]
    if tensor_type in quants.FORMATS:
        dtype = quants.block_dtype(tensor_type)
        halves = [name for name in dtype.names if dtype[name] == np.dtype("f2")]
        for field in halves:
            for bits in HALVES:
                for fill in (0, 255, 0x5A):
                    block = np.full(size, fill, "u1").view(dtype)
                    block[field] = np.uint16(bits).view("f2")
                    rows.append(block.view("u1"))
    if tensor_type == TensorType.MXFP4:
        exponents = np.repeat(np.arange(256, dtype="u1")[:, None], size, axis=1)
        rows += list(exponents)
    data = np.stack(rows)
    assert_same_bits(quants.dequantize(data, tensor_type), theirs(data, tensor_type))


@pytest.mark.parametrize("tensor_type", ALL, ids=lambda t: t.name)
def test_any_shape_and_any_strides_give_the_same_values(tensor_type):
    data = random_rows(tensor_type, 6, 2)
    flat = quants.dequantize(data, tensor_type)
    assert_same_bits(quants.dequantize(data.reshape(2, 3, -1), tensor_type), flat.reshape(2, 3, -1))
    wide = np.zeros((6, data.shape[1] + 3), "u1")
    wide[:, 3:] = data
    assert_same_bits(quants.dequantize(wide[:, 3:], tensor_type), flat)
    assert_same_bits(quants.dequantize(np.asfortranarray(data), tensor_type), flat)
    assert_same_bits(quants.dequantize(data[::2], tensor_type), flat[::2])
    assert quants.dequantize(data[:0], tensor_type).shape == (0, flat.shape[1])
    assert quants.quantize(flat[:0], tensor_type).shape == (0, data.shape[1])


@pytest.mark.parametrize("tensor_type", BLOCK_FORMATS, ids=lambda t: t.name)
def test_planes_are_integers_scales_and_minima_of_the_same_values(tensor_type):
    data = random_rows(tensor_type, 16, 4)
    planes = quants.planes(data, tensor_type)
    cols = 4 * abi.BLOCKS[tensor_type][0]
    assert planes.q.dtype == np.int8 and planes.q.shape == (16, cols)
    assert planes.scale.dtype == np.float32 and planes.scale.shape == (16, cols // planes.group)
    with np.errstate(all="ignore"):
        x = planes.q.astype("f4") * np.repeat(planes.scale, planes.group, axis=1)
    if planes.minimum is not None:
        assert planes.minimum.dtype == np.float32
        with np.errstate(all="ignore"):
            x = x + np.repeat(planes.minimum, planes.group, axis=1)
    assert_same_bits(x, theirs(data, tensor_type))
    assert (planes.minimum is not None) == (tensor_type.name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))


@pytest.mark.parametrize("tensor_type", SAME_QUANTISER, ids=lambda t: t.name)
def test_quantize_gives_ggufs_bytes(tensor_type):
    rng = np.random.default_rng(int(tensor_type))
    x = rng.standard_normal((64, 256), "f4") * np.exp2(rng.integers(-30, 15, (64, 1))).astype("f4")
    x[0] = 0
    x[1, ::3] = 0
    x[2] = 1.5
    x[3] = np.abs(x[3])
    x[4] = np.round(x[4])
    if tensor_type == TensorType.BF16:
        x[5, :8] = [np.nan, np.inf, -np.inf, -0.0, 3.4e38, -3.4e38, 1e-45, -np.nan]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = oracle.quantize(x, GGMLQuantizationType(int(tensor_type))).view("u1")
    np.testing.assert_array_equal(quants.quantize(x, tensor_type), expected)


@pytest.mark.parametrize("tensor_type", BLOCK_FORMATS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_quantising_loses_no_more_than_the_formats_step(tensor_type, size):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((64, 1024), "f4") * np.float32(size)
    back = quants.dequantize(quants.quantize(x, tensor_type), tensor_type)
    blocks = (64, -1, 32)
    error = np.abs(back - x).reshape(blocks).max(axis=-1) / np.abs(x).reshape(blocks).max(axis=-1)
    assert error.max() <= BOUND[tensor_type.name] + 2**-10  # half floats round the scale
    assert np.corrcoef(back.ravel(), x.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("tensor_type", BLOCK_FORMATS, ids=lambda t: t.name)
def test_what_a_format_can_hold_it_holds(tensor_type):
    """Zeros, tiny numbers and values of one sign come back finite, and zero as zero."""
    x = np.zeros((6, 256), "f4")
    x[1], x[2], x[3], x[4], x[5] = 1e-44, 1e-9, 3.0, -3.0, np.linspace(0, 1, 256)
    back = quants.dequantize(quants.quantize(x, tensor_type), tensor_type)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_allclose(back[3:5], x[3:5], rtol=0.35 if tensor_type == TensorType.MXFP4 else 0.02)


@pytest.mark.parametrize("tensor_type", BLOCK_FORMATS, ids=lambda t: t.name)
def test_what_a_block_format_cannot_hold_is_refused(tensor_type):
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 256), "f4")
        x[1, 77] = bad
        with pytest.raises(Gemma4qError) as error:
            quants.quantize(x, tensor_type)
        assert error.value.kind == "numeric" and tensor_type.name in error.value.message
    with pytest.raises(Gemma4qError) as error:
        quants.quantize(np.ones((2, 255), "f4"), tensor_type)
    assert error.value.kind == "bad_block_size"
    with pytest.raises(Gemma4qError) as error:
        quants.dequantize(np.zeros((2, abi.BLOCKS[tensor_type][1] + 1), "u1"), tensor_type)
    assert error.value.kind == "bad_block_size"


@pytest.mark.parametrize("number", [4, 9, 16, 31, 40, 99, 2**31])
def test_an_unknown_type_is_refused_by_number(number):
    for function in (quants.dequantize, quants.quantize, quants.planes):
        with pytest.raises(Gemma4qError) as error:
            function(np.zeros((1, 256), "u1"), number)
        assert error.value.kind == "bad_quant_type" and str(number) in error.value.message


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gather_undoes_spread(bits, run, runs, seed):
    packed = np.random.default_rng(seed).integers(0, 256, (3, run * runs), dtype=np.uint8)
    codes = spread(packed, run, bits)
    assert codes.shape == (3, run * runs * 8 // bits) and codes.max() < 1 << bits
    np.testing.assert_array_equal(gather(codes, run, bits), packed)


def test_spread_takes_the_low_bits_of_a_run_first():
    packed = np.array([[0x21, 0x43, 0x65, 0x87]], "u1")
    assert spread(packed, 2, 4).tolist() == [[1, 3, 2, 4, 5, 7, 6, 8]]
    assert spread(packed, 4, 4).tolist() == [[1, 3, 5, 7, 2, 4, 6, 8]]
