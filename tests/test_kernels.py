"""Matmul, dequantisation and quantisation of every tensor type on every instruction set here: the same bits as `twin`.

All weights, activations, results and scratch end where memory ends: a kernel that reads or writes too far dies here.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import BLOCKS, COLS, FLOATS, ISAS, KINDS, NAMES, QUANTS, ROWS, TOKENS, Matmul, bits, blocks, fence, fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from twin import A8, exponential, fma, gelu, product, quantize_blocks, tree, weights

from gemma4q.abi import TensorType, address, dtype, ffi, lib, row_bytes
from gemma4q.gguf.quants import dequantize

EPS = np.finfo(np.float32).eps
each_isa = pytest.mark.parametrize("isa", ISAS)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def activations(tokens: int, cols: int, random: np.random.Generator) -> np.ndarray:
    """Rows of very different size, one of zeros among them."""
    x = random.standard_normal((tokens, cols)) * 10.0 ** random.integers(-6, 6, (tokens, 1))
    x[tokens // 2] = 0
    return x.astype("f4")


def case(kind: TensorType, rows: int, cols: int, tokens: int, seed: int = 0):
    random = np.random.default_rng(seed)
    return fence(blocks(kind, rows, cols, random)), fence(activations(tokens, cols, random))


def expected(kind: TensorType, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return product(x if kind in FLOATS else quantize_blocks(x), weights(kind, data))


def check(kind: TensorType, isa: str, data, x, cols: int, wanted: np.ndarray, threads: int = 1) -> None:
    found = bits(Matmul(isa, threads)(kind, data, cols, x))
    assert np.array_equal(found, bits(wanted)), f"{(found != bits(wanted)).sum()} of {found.size} differ"


def some_rows(data: np.ndarray, rows: int) -> np.ndarray:
    return fence(data[:rows])


@each_kind
def test_every_height_and_number_of_tokens_gives_the_same_bits(kind):
    """On all instruction sets; so a row's bits depend neither on the tile nor on its neighbours."""
    cols = BLOCKS[kind][0] if BLOCKS[kind][0] == 256 else 96
    data, x = case(kind, max(ROWS), cols, max(TOKENS))
    wanted = expected(kind, data, x)
    for rows in ROWS:
        part = some_rows(data, rows)
        for tokens in TOKENS:
            for isa in ISAS:
                check(kind, isa, part, fence(x[:tokens]), cols, wanted[:tokens, :rows])


@each_kind
def test_every_width_gives_the_same_bits(kind):
    for cols in COLS[BLOCKS[kind][0]]:
        data, x = case(kind, 65, cols, 17, seed=cols)
        wanted = expected(kind, data, x)
        for rows, tokens in ((65, 17), (65, 1), (16, 1), (17, 4)):
            for isa in ISAS:
                check(kind, isa, some_rows(data, rows), fence(x[:tokens]), cols, wanted[:tokens, :rows])


@each_kind
@each_isa
def test_threads_leave_no_trace(kind, isa):
    """Some hundred shares, so that each of them has several."""
    cols = 256
    data, x = case(kind, 1030, cols, 17)
    wanted = expected(kind, data, x)
    for threads in (1, 2, 3):
        check(kind, isa, data, x, cols, wanted, threads)
        check(kind, isa, data, fence(x[:1]), cols, wanted[:1], threads)


@each_kind
def test_calls_of_more_tokens_than_one_round_takes(kind):
    data, x = case(kind, 17, 256, 579)
    wanted = expected(kind, data, x)
    for isa in ISAS:
        check(kind, isa, data, x, 256, wanted)


@each_kind
def test_weights_may_begin_at_any_multiple_of_32(kind):
    data, x = case(kind, 33, 256, 5)
    wanted = expected(kind, data, x)
    for start in (0, 32, 96):
        for isa in ISAS:
            check(kind, isa, fence(data, start), fence(x, 4), 256, wanted)


@each_kind
def test_products_are_close_to_those_of_the_exact_weights(kind):
    """An activation is off by half a step of its block at most, each operation by half an ulp of a partial sum."""
    cols = 2304
    data, x = case(kind, 48, cols, 13)
    w = dequantize(data, kind).astype("f8")
    exact, size = x.astype("f8") @ w.T, np.abs(x).astype("f8") @ np.abs(w).T
    bound = 2 * cols * EPS * size
    if kind in QUANTS:
        steps = np.repeat(np.abs(x).reshape(len(x), -1, 32).max(-1).astype("f8") / 127, 32, -1)
        p = weights(kind, data)
        parts = np.abs(p.q.astype("f8")) * np.repeat(np.abs(p.scale), p.group, -1)
        if p.minimum is not None:
            parts += np.repeat(np.abs(p.minimum), p.group, -1)
        bound = steps @ np.abs(w).T * (0.5 + 1e-5) + 2 * cols * EPS * ((np.abs(x) + steps) @ parts.T)
    for isa in ISAS:
        y = Matmul(isa)(kind, data, cols, x)
        assert (np.abs(y - exact) <= bound).all()
    assert (bound < 0.05 * size.max(1, keepdims=True) + 1e-30).all(), "the bound says something"


# -- What is at the ends of the range ---------------------------------------------------------------------------------


def scale_fields(kind: TensorType) -> list[str]:
    return [name for name in ("d", "m", "dmin") if name in dtype(f"block_{kind.name.lower()}").names]


def extremes(kind: TensorType) -> list[tuple[str, float]]:
    values = (0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, np.nan, np.inf, -np.inf)
    return [(name, value) for name in scale_fields(kind) for value in values]


def form(data: np.ndarray, kind: TensorType) -> np.ndarray:
    return data.view(dtype(f"block_{kind.name.lower()}"))


@pytest.mark.parametrize("kind", [k for k in QUANTS if k != TensorType.MXFP4], ids=lambda kind: kind.name)
def test_extreme_scales_spoil_their_own_row_alone_and_no_nan_is_lost(kind):
    data, x = case(kind, 33, 512, 5, seed=7)
    x[x == 0] = 1
    for name, value in extremes(kind):
        changed = fence(data)
        form(changed, kind)[name][[3, 20], 1] = value
        wanted = expected(kind, changed, x)
        for isa in ISAS:
            y = Matmul(isa)(kind, changed, 512, x)
            np.testing.assert_array_equal(bits(y), bits(wanted))
            if not np.isfinite(value):
                assert not np.isfinite(y[:, [3, 20]]).any()
            assert np.isfinite(np.delete(y, [3, 20], 1)).all()


def test_every_exponent_of_mxfp4():
    data, x = case(TensorType.MXFP4, 256, 32, 4)
    form(data, TensorType.MXFP4)["e"][:, 0] = np.arange(256)
    x = fence(np.clip(x, -1, 1))
    for isa in ISAS:
        check(TensorType.MXFP4, isa, data, x, 32, expected(TensorType.MXFP4, data, x))


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-45, 3.4e38, 65504.0, 6e-8])
def test_extreme_floats_spoil_their_own_row_alone(kind, value):
    random = np.random.default_rng(1)
    w = random.standard_normal((33, 96)).astype("f4")
    w[[3, 32], [0, 95]] = value
    with np.errstate(over="ignore"):
        data = fence({"F32": w, "F16": w.astype("f2"), "BF16": (w.view("u4") >> 16).astype("u2")}[kind.name].view("u1"))
    x = fence(random.standard_normal((5, 96)).astype("f4"))
    for isa in ISAS:
        y = Matmul(isa)(kind, data, 96, x)
        np.testing.assert_array_equal(bits(y), bits(expected(kind, data, x)))
        assert np.isfinite(np.delete(y, [3, 32], 1)).all()
        if not np.isfinite(value):
            assert not np.isfinite(y[:, [3, 32]]).any()


@each_kind
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_an_activation_that_is_no_number_makes_its_own_results_none(kind, value):
    """In every place of a block; also in a block of otherwise zeros."""
    for cols, places in ((256, range(0, 256, 23)), (2304, (2303,))):
        data, x = case(kind, 17, cols, len(places) + 1, seed=5)
        x[1] = 0
        for token, place in enumerate(places):
            x[token, place] = value
        for isa in ISAS:
            y = Matmul(isa)(kind, data, cols, x)
            np.testing.assert_array_equal(bits(y), bits(expected(kind, data, x)))
            assert not np.isfinite(y[:-1]).any() and np.isfinite(y[-1]).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_any_bytes_at_all_give_the_same_bits(kind, rows, tokens, seed):
    random = np.random.default_rng(seed)
    cols = 256 * int(random.integers(1, 3))
    data = fence(random.integers(0, 256, (rows, row_bytes(kind, cols)), np.uint8))
    x = fence(random.integers(0, 2**32, (tokens, cols), np.uint32).view("f4"))
    x[: tokens // 2] = random.standard_normal((tokens // 2, cols))
    wanted = expected(kind, data, x)
    for isa in ISAS:
        check(kind, isa, data, x, cols, wanted)


def test_a_matrix_that_is_longer_than_its_bytes_is_refused():
    data, x = case(TensorType.Q4_0, 3, 32, 1)
    with pytest.raises(AssertionError):
        Matmul(ISAS[0])(TensorType.Q4_0, data[:2].repeat(2, 0)[:, :9], 32, x)


# -- Rows alone -------------------------------------------------------------------------------------------------------


@each_kind
@each_isa
def test_rows_of_any_bytes_are_the_floats_of_the_oracle(kind, isa):
    random = np.random.default_rng(2)
    for cols in (256, 1024):
        anything = random.integers(0, 256, row_bytes(kind, cols), np.uint8)
        for data in (fence(blocks(kind, 1, cols, random)[0]), fence(anything)):
            y = fenced(4 * cols).view("f4")
            out = ffi.cast("float *", y.ctypes.data)
            assert lib.dequantize_row(NAMES.index(isa), kind, address(data), out, cols) == 0
            np.testing.assert_array_equal(bits(y), bits(dequantize(data, kind)))


def test_types_that_do_not_exist_are_refused():
    data = fenced(1024)
    for kind in (-1, 4, 5, 9, 40, 1000):
        assert lib.dequantize_row(0, kind, address(data), ffi.cast("float *", data.ctypes.data), 32) == -1


@each_isa
def test_activations_are_rounded_as_the_twin_rounds_them(isa):
    random = np.random.default_rng(3)
    x = random.standard_normal((40, 32)).astype("f4") * np.float32(10) ** random.integers(-40, 38, (40, 1)).astype("f4")
    x[:8] = 0
    x[1, 5], x[2, 31], x[3, 0], x[4, 16], x[5, 3], x[6, 7] = np.nan, -np.nan, np.inf, -np.inf, 1e-44, -3.4e38
    x[7] = np.arange(32) * 2 - 31  # times 127 / 31: no ties; the next row has nothing but ties
    x[8], x[8, 0] = np.arange(32) + 0.5, 127
    x = fence(x.reshape(-1))
    y = fenced(A8.itemsize * 40).view(A8)
    lib.quantize_row(
        NAMES.index(isa), ffi.cast("float *", x.ctypes.data), ffi.cast("block_a8 *", y.ctypes.data), x.size
    )
    with np.errstate(all="ignore"):
        wanted = quantize_blocks(x)
    for name in A8.names:
        exactly = bits if A8[name].kind == "f" else np.asarray
        np.testing.assert_array_equal(exactly(y[name]), exactly(wanted[name]), name)
    assert np.abs(y["qs"].astype(int)).max() == 127
    np.testing.assert_array_equal(y["qs"][8][1:], np.rint(np.arange(32) + 0.5)[1:])


@pytest.mark.parametrize("beyond", [-1, 100])
def test_a_byte_beyond_a_fence_kills(beyond):
    """Or the fences would prove nothing."""
    start = None if beyond > 0 else 0
    code = f"import ctypes, cases; x = cases.fenced(100, {start}); a = x.ctypes.data; ctypes.string_at(a, 100)"
    for more, status in (("", 0), (f"; ctypes.string_at(a + {beyond}, 1)", -signal.SIGSEGV)):
        assert subprocess.run([sys.executable, "-c", code + more], cwd=Path(__file__).parent).returncode == status


# -- The twin itself, against arithmetic that knows nothing of it ------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(*[st.integers(0, 2**32 - 1)] * 3)
def test_fma_rounds_once(a, b, c):
    from fractions import Fraction

    a, b, c = (np.uint32(x).view("f4") for x in (a, b, c))
    with np.errstate(all="ignore"):
        found = fma(a, b, c)
    if not np.isfinite([a, b, c, found]).all():
        return
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = [np.nextafter(found, np.float32(way)) for way in (-np.inf, np.inf)]
    apart = abs(Fraction(float(found)) - exact)
    for other in near:
        if np.isfinite(other):
            further = abs(Fraction(float(other)) - exact)
            assert apart < further or (apart == further and found.view("u4") % 2 == 0)


def test_fma_sees_past_a_tie_that_float64_makes():
    """Half an ulp of 1 and 2^-60 more, or less, which float64 does not hold beside a 1: 2^36 + 1 = 658529 * 104353."""
    above = np.float32(658529 * 2.0**-30), np.float32(104353 * 2.0**-30)
    below = np.float32((1 + 2.0**-18) * 2.0**-12), np.float32((1 - 2.0**-18) * 2.0**-12)
    one, next_one = np.float32(1), np.float32(1 + 2.0**-23)
    assert fma(*above, one) == next_one and np.float32(np.float64(above[0]) * above[1] + one) == one
    assert fma(*below, next_one) == next_one and np.float32(np.float64(below[0]) * below[1] + next_one) > next_one


def test_the_polynomials_are_the_functions_they_stand_for():
    x = np.linspace(-87, 88, 20001).astype("f4")
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(exponential(x), np.exp(x.astype("f8")), rtol=2.5e-7)
        z = np.linspace(-30, 30, 20001)
        exact = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        np.testing.assert_allclose(gelu(z.astype("f4")), exact, rtol=1e-5, atol=1e-6)
        assert exponential(np.float32([-np.inf, -88, 89, np.inf])).tolist() == [0, 0, np.inf, np.inf]
        assert np.isnan(exponential(np.float32([np.nan]))).all() and exponential(np.float32([0.0])) == 1
    assert tree(np.arange(16, dtype="f4")) == 120
