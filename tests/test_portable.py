"""The portable backend against the numpy reference: every format, every op, every way a row may see others."""

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4q.abi import BLOCKS, PAGE, RowFlag, Space, Status, TensorType
from gemma4q.backends import get, portable_kernels, portable_panels
from gemma4q.backends.native import KV_TYPES
from gemma4q.backends.portable_panels import Crew, Panels, product, repack
from gemma4q.backends.portable_session import NUMBA, NUMPY, TOP, best_of
from gemma4q.backends.reference import Reference
from gemma4q.errors import Gemma4qError
from gemma4q.gguf.quants import FORMATS, dequantize, quantize
from gemma4q.plan.batch import BIAS, Batch, Limits, Step
from gemma4q.plan.builder import Builder, Rope
from gemma4q.plan.plan import Plan, Weight

WIDTH, VOCAB, HEADS, KV_HEADS, HEAD, HIDDEN, EXPERTS, USED, PART = 256, 300, 4, 2, 64, 256, 5, 2, 256
EPS = np.finfo(np.float32).eps
LIMITS = Limits(rows=160, wanted=8, sequences=3, context=320, global_pages=20, local_pages=20)
# Of the largest output: float32 sums of 256 products, eight matrices deep. A wrong kernel is wrong by 1.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class File:
    """Tensors of a file as backends get them."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray
    fileno: int
    offset: int


def shapes() -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    layer = {
        "norm": (WIDTH,), "qkv": (q + 2 * kv, WIDTH), "k_norm": (HEAD,), "output": (WIDTH, q), "gate": (HIDDEN, WIDTH),
        "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN), "router": (EXPERTS, WIDTH), "gates": (EXPERTS, HIDDEN, WIDTH),
        "ups": (EXPERTS, HIDDEN, WIDTH), "downs": (EXPERTS, WIDTH, HIDDEN), "shares": (EXPERTS,), "scalar": (1,),
        "inp_gate": (PART, WIDTH), "proj": (WIDTH, PART),
    }  # fmt: skip
    table = {"embd": (VOCAB, WIDTH), "small": (VOCAB, 3 * PART), "freqs": (HEAD // 2,)}
    return table | {f"{i}.{name}": shape for i in range(2) for name, shape in layer.items()}


def plan() -> Plan:
    """A local layer with keys of its own and a global one whose keys are its values; dense and mixed feed-forwards."""
    b = Builder(shapes(), 1e-6)
    x = b.embed("embd", scale=1.5)
    small = b.embed_rows("small", PART, 2 * PART, 8.0, Space.ROW)
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    for i, rope in enumerate((Rope(1e4, HEAD, HEAD // 2), Rope(1e6, HEAD, 8, "freqs"))):
        b.layer = i
        normed = b.rms_norm(x, f"{i}.norm")
        k = b.matmul(normed, Weight(f"{i}.qkv", q, kv))
        v = b.rms_norm(k if i else b.matmul(normed, Weight(f"{i}.qkv", q + kv, kv)), None, size=HEAD)
        k = b.rope(b.rms_norm(k, f"{i}.k_norm", size=HEAD), HEAD, rope)
        b.store_kv(k, v, i, HEAD, local=i == 0, from_values=rope.pairs if i else 0)
        turned = b.rope(b.rms_norm(b.matmul(normed, Weight(f"{i}.qkv", 0, q)), None, size=HEAD), HEAD, rope)
        seen = b.attend(turned, i, 0 if i else 100, f"{i}.k_norm" if i else None)
        x = b.add(x, b.matmul(seen, f"{i}.output"), scale=0.5)
        dense = b.matmul(b.gelu_mul(b.matmul(x, f"{i}.gate"), b.matmul(x, f"{i}.up")), f"{i}.down")
        names = (f"{i}.gates", f"{i}.ups"), f"{i}.downs", f"{i}.shares"
        mixed = b.experts(x, b.matmul(x, f"{i}.router"), *names, USED)
        x = b.scale(b.add(b.rms_norm(dense, f"{i}.norm"), b.rms_norm(mixed, f"{i}.norm")), f"{i}.scalar")
        x = b.add(x, b.matmul(b.gelu_mul(b.matmul(x, f"{i}.inp_gate"), small, part=i), f"{i}.proj"))
    hidden = b.rms_norm(b.wanted(x), "0.norm")
    return b.finish(hidden, b.softcap(b.matmul(hidden, "embd"), 30.0))


def tensors(path, kind: TensorType, names: dict[str, tuple[int, ...]]) -> dict[str, File]:
    """Random tensors in a file at `path`, matrices as `kind`."""
    rng = np.random.default_rng(3)
    found, at, parts = {}, 0, []
    for name, shape in names.items():
        x = rng.standard_normal(shape).astype("f4") * (1 if name in ("embd", "small") else shape[-1] ** -0.5)
        if len(shape) == 1:
            x = rng.uniform(0.5, 1.5, shape).astype("f4")
        t = kind if len(shape) > 1 else TensorType.F32
        data = quantize(x, t).reshape(-1)
        parts.append(data)
        found[name] = File(name, t, shape, data, 0, at)
        at += len(data)
    path.write_bytes(b"".join(p.tobytes() for p in parts))
    opened = path.open("rb")
    return {name: replace(f, fileno=opened.fileno()) for name, f in found.items()} | {"": opened}


@pytest.fixture(scope="module", params=list(BLOCKS), ids=lambda t: t.name)
def model(request, tmp_path_factory):
    found = tensors(tmp_path_factory.mktemp("model") / "file", request.param, shapes())
    yield plan(), found
    found[""].close()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    found = tensors(tmp_path_factory.mktemp("model") / "file", TensorType.Q8_0, shapes())
    yield plan(), found
    found[""].close()


def both(model, kv=TensorType.F32, threads=2):
    return [b.load(*model, LIMITS, kv, threads, None) for b in (Reference(), get("portable"))]


def prompt(tokens, start=0, pages=range(5), **more) -> Step:
    pages = np.array(pages, np.int32)
    return Step(np.asarray(tokens), start, pages, pages[::-1] + 5, **more)


def compare(sessions, steps: list[Step]):
    """Runs a batch in both; logits, the rows' hidden vectors and the best agree."""
    results = []
    for session in sessions:
        batch = Batch(LIMITS, WIDTH, VOCAB)
        batch.fill(steps)
        results.append(session.run(batch))
    a, b = results
    assert a.status == b.status == Status.OK and a.logits.shape == b.logits.shape
    np.testing.assert_allclose(b.logits, a.logits, rtol=0, atol=TOLERANCE * np.abs(a.logits).max())
    np.testing.assert_allclose(b.hidden, a.hidden, rtol=0, atol=TOLERANCE * np.abs(a.hidden).max())
    np.testing.assert_allclose(b.top_values, a.top_values, rtol=0, atol=TOLERANCE * np.abs(a.logits).max())
    np.testing.assert_allclose(b.logsumexp, a.logsumexp, rtol=1e-4)
    return results


def test_prompt_and_generated_rows_equal_the_reference_in_every_format(model):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 160)
    sessions = both(model)
    compare(sessions, [prompt(tokens[:130])])
    for i in range(130, 133):
        a, b = compare(sessions, [prompt(tokens[i : i + 1], i, generated=True)])
        assert a.top_ids[0, 0] == b.top_ids[0, 0]


@pytest.mark.parametrize("kv", KV_TYPES[1:], ids=lambda t: t.name)
def test_keys_and_values_are_rounded_as_the_reference_rounds_them(small_model, kv):
    tokens = np.arange(70)
    sessions = both(small_model, kv)
    # A product that differs in its last bit may round to the next value of a short type.
    for steps in ([prompt(tokens)], [prompt([7], 70, generated=True)]):
        results = []
        for session in sessions:
            batch = Batch(LIMITS, WIDTH, VOCAB)
            batch.fill(steps)
            results.append(session.run(batch).logits)
        np.testing.assert_allclose(results[1], results[0], rtol=0, atol=0.02 * np.abs(results[0]).max())


def test_sequences_in_one_batch_see_only_their_own(small_model):
    sessions = both(small_model)
    compare(sessions, [prompt(np.arange(90), pages=[3, 1])])
    steps = [prompt([5], 90, pages=[3, 1], generated=True), prompt(np.arange(100, 167), pages=[4, 2])]
    a, b = compare(sessions, steps)
    alone = both(small_model)
    compare(alone, [prompt(np.arange(90), pages=[3, 1])])
    _, c = compare(alone, [steps[0]])
    np.testing.assert_allclose(b.logits[1], c.logits[0], rtol=0, atol=TOLERANCE * np.abs(c.logits).max())
    assert len(a.logits) == 2


def test_rows_reach_forward_and_vectors_replace_tokens(small_model):
    reach = np.arange(20)
    reach[4:12] = 11
    vector = np.full(20, -1)
    vector[4:12] = np.arange(8)
    vectors = np.random.default_rng(1).standard_normal((8, WIDTH)).astype("f4")
    want = np.full(20, int(RowFlag.WANT_LOGITS) * 0)
    want[[4, 8, 19]] = int(RowFlag.WANT_LOGITS)
    compare(both(small_model), [prompt(np.arange(20), reach=reach, vector=vector, vectors=vectors, want=want)])


def test_rows_that_are_not_to_be_stored_leave_pages_alone(small_model):
    _, session = both(small_model)
    batch = Batch(LIMITS, WIDTH, VOCAB)
    batch.fill([prompt(np.arange(10))])
    session.run(batch)
    before = [store.copy() for stores in session.pages.values() for store in stores]
    batch.fill([prompt([3], 10, generated=True, store=False)])
    session.run(batch)
    after = [store for stores in session.pages.values() for store in stores]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_biases_and_masks_choose_the_best_as_in_the_reference(small_model):
    bias = np.array([(3, 1.3, 0.0), (4, 1.0, 50.0), (5, 1.0, -50.0)], BIAS)
    mask = np.full(-(-VOCAB // 32), 0x0F0F0F0F, np.uint32)
    a, b = compare(both(small_model), [prompt(np.arange(10), bias=bias), prompt(np.arange(7), pages=[5], mask=mask)])
    assert a.top_ids[0, 0] == b.top_ids[0, 0] == 4
    few = np.zeros_like(mask)
    few[0] = 0b1011
    a, b = compare(both(small_model), [prompt(np.arange(10), mask=few)])
    assert sorted(b.top_ids[0][:3]) == [0, 1, 3] and (b.top_ids[0][3:] == -1).all()
    np.testing.assert_array_equal(a.top_ids, b.top_ids)


def test_pages_are_cleared_and_copied_in_one_kind_alone(small_model):
    _, session = both(small_model)
    rng = np.random.default_rng(2)
    for stores in session.pages.values():
        for store in stores:
            store[:] = rng.standard_normal(store.shape)
    (local_keys, _), (global_keys, _) = session.pages[0], session.pages[1]
    kept = global_keys.copy()
    session.copy_page(True, 1, 2)
    session.clear_pages(True, np.array([1, 3]))
    assert (local_keys[[1, 3]] == 0).all() and (local_keys[2] != 0).all()
    np.testing.assert_array_equal(global_keys, kept)


# -- Kernels alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BLOCKS), ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_products_are_as_exact_as_float32_sums_allow(kind, rows):
    """|error| <= (cols + 2) eps |x| . |w|, whatever the order of the sum; NaN and infinity are not swallowed."""
    rng = np.random.default_rng(rows)
    cols = 512
    data = quantize(rng.standard_normal((2, rows, cols)).astype("f4"), kind)
    w = dequantize(data, kind).astype("f8")
    for threads in (1, 3):
        crew = Crew(threads)
        p = repack(data.reshape(-1), (2, rows, cols), kind, crew)
        for count in (2, 7, 8, 9, 24):
            x = rng.standard_normal((count, cols)).astype("f4")
            x[-1, 5] = np.nan
            y = product(x, p, 1, crew)
            assert y.shape == (count, rows) and np.isnan(y[-1]).all()
            bound = (cols + 2) * EPS * (np.abs(x[:-1]).astype("f8") @ np.abs(w[1]).T)
            assert (np.abs(y[:-1] - x[:-1].astype("f8") @ w[1].T) <= bound).all()
        crew.close()


@pytest.mark.parametrize("kind", list(BLOCKS), ids=lambda t: t.name)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_products_have_the_same_bits_whatever_the_threads(kind, count):
    rng = np.random.default_rng(count)
    data = quantize(rng.standard_normal((130, 512)).astype("f4"), kind)
    x = rng.standard_normal((count, 512)).astype("f4")
    results = []
    for threads in (1, 2, 3):
        crew = Crew(threads)
        results.append(product(x, repack(data.reshape(-1), (130, 512), kind, crew), 0, crew))
        crew.close()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("kind", list(BLOCKS), ids=lambda t: t.name)
def test_panels_stand_for_the_weights_themselves(kind):
    """A column picked by x = 1 gives the weight, to the last bits of scale * q + minimum."""
    rng, crew, cols = np.random.default_rng(5), Crew(1), 256
    data = quantize(rng.standard_normal((64, cols)).astype("f4"), kind)
    w = dequantize(data, kind)
    y = product(np.eye(cols, dtype="f4"), repack(data.reshape(-1), w.shape, kind, crew), 0, crew)
    np.testing.assert_allclose(y, w.T, rtol=0, atol=4 * EPS * np.abs(w).max())


@pytest.mark.parametrize("cols", [1, 15, 16, 40, 272])
def test_columns_of_floats_need_not_be_whole_steps(cols):
    rng, crew = np.random.default_rng(cols), Crew(2)
    w, x = rng.standard_normal((3, cols)).astype("f4"), rng.standard_normal((9, cols)).astype("f4")
    p = repack(w.view("u1").reshape(-1), w.shape, TensorType.F32, crew)
    np.testing.assert_allclose(product(x, p, 0, crew), x @ w.T, atol=1e-4)
    np.testing.assert_allclose(product(x[:1], p, 0, crew), x[:1] @ w.T, atol=1e-4)


@pytest.mark.parametrize("kind", list(BLOCKS), ids=lambda t: t.name)
def test_memory_is_what_the_panels_take(kind):
    shape = (3, 70, 256)
    size = int(np.prod(shape)) // BLOCKS[kind][0] * BLOCKS[kind][1]
    p = repack(np.zeros(size, "u1"), shape, kind, Crew(1))
    assert Panels.bytes(shape, kind) == p.q.nbytes + p.scale.nbytes + p.minimum.nbytes == 3 * p.matrix_bytes
    assert p.rows == 70 and p.group in (16, 32, 256)


def test_memory_of_a_session_is_what_it_allocates(small_model):
    _, session = both(small_model)
    held = sum(p.q.nbytes + p.scale.nbytes + p.minimum.nbytes for p in session.panels.values())
    vectors = sum(4 * t.shape[0] for t in small_model[1].values() if isinstance(t, File) and len(t.shape) == 1)
    assert held <= session.bytes["weights"] <= held + vectors
    assert session.bytes["kv"] == sum(store.nbytes for stores in session.pages.values() for store in stores)
    assert session.bytes == get("portable").memory(*small_model, LIMITS, TensorType.F32, 2)


def test_buffers_are_dropped_after_their_last_use(small_model):
    _, session = both(small_model)
    batch = Batch(LIMITS, WIDTH, VOCAB)
    batch.fill([prompt(np.arange(50))])
    result = session.run(batch)
    kept = {b.name for b in session.buffers}
    assert session.plan.logits.name in kept and session.plan.hidden.name in kept and len(kept) < 8
    assert 0 < result.weight_bytes <= session.bytes["weights"]
    session.run(batch, end_op=5)
    assert session.read(session.plan.ops[4].out.name).shape[0] == 50


def test_kernels_are_named_for_op_format_and_maker(model):
    session = get("portable").load(*model, LIMITS)
    kind = model[1]["0.gate"].type.name.lower()
    names = session.kernels()
    assert names["matmul(0.gate)"] == f"matmul_{kind}_numba"
    assert names["experts_up(0.gates)"] == f"experts_up_{kind}_numba"
    assert names["experts_down(0.downs)"] == f"experts_down_{kind}_numba"
    assert names["attend(1.k_norm)"] == "attend_numba" and names["rms_norm(0.norm)"] == "rms_norm_numpy"
    assert {op.code for op in session.plan.ops} <= {*NUMBA, *NUMPY} and not {*NUMBA} & {*NUMPY}


def test_kernels_are_compiled_for_few_types(model):
    """Panels of nibbles, bytes and floats, and nothing else: each more costs the first token half a second."""
    _, session = both(model)
    compare([_, session], [prompt(np.arange(80))])
    compare([_, session], [prompt([9], 80, generated=True)])
    for kernel, most in ((portable_kernels.matvec, 3), (portable_kernels.matmul, 3), (portable_kernels.attend, 1)):
        assert 1 <= len(kernel.signatures) <= most


# -- What goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", KV_TYPES, ids=lambda t: t.name)
def test_a_nan_is_reported_with_its_row(small_model, kv):
    _, session = both(small_model, kv)
    batch = Batch(LIMITS, WIDTH, VOCAB)
    vectors = np.full((1, WIDTH), np.nan, "f4")
    batch.fill([prompt(np.arange(3), vector=np.array([-1, -1, 0]), vectors=vectors)])
    result = session.run(batch)
    assert result.status == Status.NON_FINITE and result.bad_row == 2


def test_a_file_cut_short_is_noticed(tmp_path):
    found = tensors(tmp_path / "file", TensorType.Q4_0, shapes())
    session = get("portable").load(plan(), found, LIMITS)
    batch = Batch(LIMITS, WIDTH, VOCAB)
    batch.fill([prompt([VOCAB - 1])])
    assert session.run(batch).status == Status.OK
    (tmp_path / "file").write_bytes(b"short")
    assert session.run(batch).status == Status.MODEL_CHANGED
    session.close()


def test_a_session_reads_its_own_descriptor_and_closes_it(tmp_path):
    found = tensors(tmp_path / "file", TensorType.Q4_0, shapes())
    session = get("portable").load(plan(), found, LIMITS)
    found.pop("").close()
    batch = Batch(LIMITS, WIDTH, VOCAB)
    batch.fill([prompt([1, 2, 3])])
    assert session.run(batch).status == Status.OK
    session.close()
    session.close()
    for file in session.files.values():
        with pytest.raises(OSError):
            os.fstat(file)


def test_a_run_is_cancelled_between_ops(small_model, monkeypatch):
    _, session = both(small_model)
    batch = Batch(LIMITS, WIDTH, VOCAB)
    batch.fill([prompt(np.arange(5))])
    monkeypatch.setattr(session, "softcap", lambda op, x: session.cancel() or x)
    assert session.run(batch).status == Status.CANCELLED
    monkeypatch.undo()
    assert session.run(batch).status == Status.OK


def test_an_isa_is_refused(small_model):
    with pytest.raises(Gemma4qError) as error:
        get("portable").load(*small_model, LIMITS, TensorType.F32, 1, "avx2")
    assert error.value.kind == "bad_option" and "avx2" in error.value.message


def test_kernels_run_where_nothing_can_be_written(monkeypatch):
    """Without a place for its cache Numba refuses at definition; the kernel is compiled all the same."""
    given_options = []

    def njit(**options):
        def make(function):
            given_options.append(options)
            if options.get("cache"):
                raise RuntimeError("cannot cache function: no locator available")
            return function

        return make

    monkeypatch.setattr(portable_kernels, "njit", njit)
    assert portable_kernels.kernel(len) is len
    assert [options.get("cache", False) for options in given_options] == [True, False]


def test_work_is_shared_and_its_errors_are_seen():
    crew, seen = Crew(3), []
    crew.work(lambda share, shares: seen.append((share, shares)))
    assert sorted(seen) == [(0, 3), (1, 3), (2, 3)]
    crew.work(lambda share, shares: seen.append((share, shares)), shared=False)
    assert seen[-1] == (0, 1)
    with pytest.raises(ZeroDivisionError):
        crew.work(lambda share, shares: time.sleep(0.001) or 1 // (1 - share))
    crew.close()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_the_best_are_those_of_a_stable_sort(count, different, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, different, count).astype("f4")
    x[rng.random(count) < 0.3] = -np.inf
    expected = np.argsort(-x, kind="stable")[:TOP]
    expected = expected[x[expected] > -np.inf]
    ids, values = best_of(x)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, x[expected])


def test_panels_hold_rows_side_by_side():
    x = np.arange(66 * 16, dtype="f4").reshape(66, 16)
    p = repack(x.view("u1").reshape(-1), x.shape, TensorType.F32, Crew(1))
    assert p.q.shape == (1, 3, 16, portable_panels.LANES)
    assert p.q[0, 0, 3, 5] == x[5, 3] and p.q[0, 2, 15, 1] == x[65, 15] and (p.q[0, 2, :, 2:] == 0).all()
    assert (p.scale == 1).all() and p.minimum.size == 0 and set(FORMATS) < set(BLOCKS) and PAGE == 64
