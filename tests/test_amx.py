"""Prompt rows on tiles: every bit is the twin's, whatever a row is multiplied beside; generated rows are avx512's.

Where the CPU has no AMX, tools/emulate_amx.py runs this with tiles emulated; the last test does that.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import BLOCKS, COLS, FLOATS, ISAS, KINDS, QUANTS, ROWS, Matmul, bits, fence
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import activations, blocks, case, check, expected, extremes, form, some_rows
from twin import F, fused, quantize_blocks, tile_product, weights

from gemma4q.abi import TensorType, row_bytes
from gemma4q.gguf.quants import dequantize

TOOL = Path(__file__).parent.parent / "tools" / "emulate_amx.py"
TOKENS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 97)
ON_TILES = [kind for kind in KINDS if kind != TensorType.F32]
on_amx = pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX that may be used")
each_kind = pytest.mark.parametrize("kind", ON_TILES, ids=lambda kind: kind.name)


def on_tiles(kind: TensorType, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return tile_product(x, weights(kind, data))


def agrees(kind: TensorType, data, x, cols: int, wanted: np.ndarray, threads: int = 1) -> None:
    found = bits(Matmul("amx", threads, len(x))(kind, data, cols, x))
    assert np.array_equal(found, bits(wanted)), f"{(found != bits(wanted)).sum()} of {found.size} differ"


@on_amx
@each_kind
def test_every_height_and_number_of_tokens_gives_the_twins_bits(kind):
    cols = BLOCKS[kind][0] if BLOCKS[kind][0] == 256 else 96
    data, x = case(kind, max(ROWS), cols, max(TOKENS))
    wanted = on_tiles(kind, data, x)
    for rows in ROWS:
        for tokens in TOKENS:
            agrees(kind, some_rows(data, rows), fence(x[:tokens]), cols, wanted[:tokens, :rows])


@on_amx
@each_kind
def test_every_width_gives_the_twins_bits(kind):
    """Also beyond the piece of columns that is unpacked at a time."""
    for cols in (*COLS[BLOCKS[kind][0]], 512, 1024):
        data, x = case(kind, 49, cols, 70, seed=cols)
        wanted = on_tiles(kind, data, x)
        for rows, tokens in ((49, 70), (33, 33), (16, 1)):
            agrees(kind, some_rows(data, rows), fence(x[:tokens]), cols, wanted[:tokens, :rows])


@on_amx
@each_kind
def test_threads_and_shares_leave_no_trace(kind):
    data, x = case(kind, 1030, 256, 35)
    wanted = on_tiles(kind, data, x)
    for threads in (1, 2, 3):
        agrees(kind, data, x, 256, wanted, threads)
        agrees(kind, data, fence(x[:9]), 256, wanted[:9], threads)


@on_amx
@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.BF16], ids=lambda kind: kind.name)
def test_calls_of_more_tokens_than_one_round_takes(kind):
    data, x = case(kind, 17, 256, 2 * 576 + 3)
    wanted = on_tiles(kind, data, x)
    agrees(kind, data, x, 256, wanted)
    y = Matmul("amx", 1, 600)(kind, data, 256, x)
    np.testing.assert_array_equal(bits(y[:600]), bits(wanted[:600]))
    np.testing.assert_array_equal(bits(y[600:]), bits(expected(kind, data, x[600:])))


@on_amx
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_row_has_the_arithmetic_of_its_class(kind):
    """Whatever stands beside it; F32 weights have but one."""
    data, x = case(kind, 65, 256, 40)
    generated = expected(kind, data, x)
    prompt = generated if kind == TensorType.F32 else on_tiles(kind, data, x)
    for count in (0, 1, 16, 17, 33, 39, 40):
        y = Matmul("amx", 2, count)(kind, data, 256, x)
        np.testing.assert_array_equal(bits(y[:count]), bits(prompt[:count]))
        np.testing.assert_array_equal(bits(y[count:]), bits(generated[count:]))
        for isa in set(ISAS) - {"amx"}:
            check(kind, isa, data, x, 256, generated)


@on_amx
@each_kind
def test_weights_and_activations_may_begin_anywhere(kind):
    data, x = case(kind, 33, 256, 37)
    wanted = on_tiles(kind, data, x)
    for start in (0, 32, 96):
        agrees(kind, fence(data, start), fence(x, 4), 256, wanted)


@on_amx
@each_kind
def test_products_are_nearer_to_the_exact_ones_than_those_of_8_bit_activations(kind):
    """Root of the mean square; of weights and activations as they are in use, some channels far larger than others."""
    random = np.random.default_rng(3)
    cols, loud = 2304, np.where(np.arange(2304) % 200 == 7, 20, 1)
    data = blocks(kind, 64, cols, random)
    for channels in (1, loud):
        x = fence((random.standard_normal((64, cols)) * channels).astype("f4"))
        exact = x.astype("f8") @ dequantize(data, kind).astype("f8").T
        size = np.sqrt((exact**2).mean())
        tiles, other = (np.sqrt(((y - exact) ** 2).mean()) / size for y in (
            Matmul("amx", 1, len(x))(kind, fence(data), cols, x), Matmul("amx", 1, 0)(kind, fence(data), cols, x)
        ))  # fmt: skip
        assert 1e-4 < tiles < 4e-3
        if kind in QUANTS:
            assert tiles < 0.7 * other


# -- What is at the ends of the range ---------------------------------------------------------------------------------


@on_amx
@pytest.mark.parametrize("kind", [k for k in QUANTS if k != TensorType.MXFP4], ids=lambda kind: kind.name)
def test_extreme_scales_spoil_their_own_row_alone_and_no_nan_is_lost(kind):
    data, x = case(kind, 33, 512, 35, seed=7)
    x[x == 0] = 1
    for name, value in extremes(kind):
        changed = fence(data)
        form(changed, kind)[name][[3, 20], 1] = value
        y = Matmul("amx", 1, len(x))(kind, changed, 512, x)
        np.testing.assert_array_equal(bits(y), bits(on_tiles(kind, changed, x)))
        if not np.isfinite(value):
            assert not np.isfinite(y[:, [3, 20]]).any()
        assert np.isfinite(np.delete(y, [3, 20], 1)).all()


@on_amx
def test_every_exponent_of_mxfp4():
    data, x = case(TensorType.MXFP4, 256, 32, 20)
    form(data, TensorType.MXFP4)["e"][:, 0] = np.arange(256)
    x = fence(np.clip(x, -1, 1))
    agrees(TensorType.MXFP4, data, x, 32, on_tiles(TensorType.MXFP4, data, x))


@on_amx
@each_kind
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_an_activation_that_is_no_number_makes_its_own_results_none(kind, value):
    for cols, places in ((256, range(0, 256, 15)), (2304, (2303,))):
        data, x = case(kind, 17, cols, len(places) + 1, seed=5)
        x[1] = 0
        for token, place in enumerate(places):
            x[token, place] = value
        y = Matmul("amx", 1, len(x))(kind, data, cols, x)
        np.testing.assert_array_equal(bits(y), bits(on_tiles(kind, data, x)))
        assert not np.isfinite(y[:-1]).any() and np.isfinite(y[-1]).all()


@on_amx
@pytest.mark.parametrize("kind", FLOATS[1:], ids=lambda kind: kind.name)
def test_denormal_weights_and_products_are_zeros(kind):
    random = np.random.default_rng(4)
    data = fence(random.integers(0, 2**16, (64, 96), np.uint16).view("u1"))
    data.view("u2")[:] &= 0x81FF if kind == TensorType.BF16 else 0x87FF
    for size in (1e-39, 1e-30, 1.0, 1e30):
        x = fence((random.standard_normal((40, 96)) * size).astype("f4"))
        agrees(kind, data, x, 96, on_tiles(kind, data, x))


@on_amx
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ON_TILES), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_any_bytes_at_all_give_the_twins_bits(kind, rows, tokens, seed):
    random = np.random.default_rng(seed)
    cols = 256 * int(random.integers(1, 4))
    data = fence(random.integers(0, 256, (rows, row_bytes(kind, cols)), np.uint8))
    x = fence(random.integers(0, 2**32, (tokens, cols), np.uint32).view("f4"))
    x[: tokens // 2] = activations(tokens, cols, random)[: tokens // 2]
    agrees(kind, data, x, cols, on_tiles(kind, data, x))


# -- Everywhere -------------------------------------------------------------------------------------------------------


def test_the_twin_rounds_as_the_manual_says():
    """By hand: 2^-24 is lost beside 1 in the sum of the even k, kept in that of the odd, and lost where both meet."""
    x, w = np.zeros((1, 64), F), np.zeros((1, 64), F)
    x[0, :4] = 1, 1, 2.0**-24, 2.0**-24
    w[0, :4] = 1, 0, 1, 1
    assert tile_product(x, w)[0, 0] == 1
    x[0, 32:34] = 2.0**-23, 1e-39  # the next 32 begin with a zero of their own; an activation's denormal is none
    w[0, 32:34] = 1, 1e38
    assert tile_product(x, w)[0, 0] == F(1 + 2.0**-23)
    half = F(2.0**-63), F(2.0**-64)
    assert fused(*half, F(0)) == 0 and fused(F(2.0**-63), F(2.0**-63), F(0)) == F(2.0**-126)
    assert np.isnan(tile_product(np.full((1, 32), np.nan, F), w[:, :32]))


def test_the_twin_of_tiles_is_close_to_the_twin_of_integers():
    """So that a mistake common to the kernel and its twin is seen."""
    for kind in QUANTS:
        data, x = case(kind, 8, 512, 8)
        exact = x.astype("f8") @ dequantize(data, kind).astype("f8").T
        size = np.abs(x).astype("f8") @ np.abs(dequantize(data, kind)).astype("f8").T
        assert (np.abs(on_tiles(kind, data, x) - exact) <= 2.0**-7 * size).all()
        assert (np.abs(expected(kind, data, x) - exact) <= 2.0**-4 * size.max(1, keepdims=True)).all()
    assert quantize_blocks(x).shape == (8, 16)


@pytest.mark.slow
def test_kernels_and_plans_pass_with_tiles_emulated():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
