"""Attention over pages, natively: every KV type, group of heads, window edge, order of pages and cut of the work.

A plan picks q, k and v out of a row's vector with matrices of zeros and ones, so that tests choose them. Softmax in
float64 over what a row may see, written here from the contract alone, is the oracle, `twin` the judge of every bit.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import ISAS, LIMITS, Model, Runner, same, step
from twin import SCALED, Twin, kept

from gemma4q.abi import PAGE, OpCode
from gemma4q.backends.native import KV_TYPES
from gemma4q.gguf.quants import planes, quantize
from gemma4q.plan.builder import Builder, Rope

F32, F16, BF16, Q8, Q4 = KV_TYPES
VOCAB = 32
each_type = pytest.mark.parametrize("kv", KV_TYPES, ids=lambda kv: kv.name)
each_isa = pytest.mark.parametrize("isa", ISAS)


class Tensor:
    """float32 values as a backend gets a file's tensor."""

    def __init__(self, name: str, values: np.ndarray):
        self.name, self.type, self.shape, self.fileno, self.offset = name, F32, values.shape, -1, 0
        self.data = np.ascontiguousarray(values, "f4").reshape(-1).view("u1")


def attention(heads=4, kv_heads=2, dim=32, window=0, pairs=0, rope: Rope | None = None) -> Model:
    """hidden = attend(q) of rows of vectors [q, k, v]; `pairs` > 0: keys are values, but for so many rotated pairs."""
    q, kv = heads * dim, kv_heads * dim
    width = q + 2 * kv
    eye = np.eye(width, dtype="f4")
    norm = np.random.default_rng(9).uniform(0.5, 2, dim)
    values = {"embd": np.zeros((VOCAB, width)), "q": eye[:q], "k": eye[q : q + kv], "v": eye[q + kv :], "norm": norm}
    tensors = {name: Tensor(name, x) for name, x in values.items()}
    tensors["head"] = Tensor("head", np.random.default_rng(8).standard_normal((VOCAB, q)))
    b = Builder({name: t.shape for name, t in tensors.items()}, 1e-6)
    x = b.embed("embd", 1.0)
    b.store_kv(b.matmul(x, "k"), b.matmul(x, "v"), 0, dim, window > 0, pairs)
    queries = b.matmul(x, "q")
    queries = b.rope(queries, dim, rope) if rope else queries
    hidden = b.wanted(b.attend(queries, 0, window, "norm" if pairs else None))
    return Model(b.finish(hidden, b.matmul(hidden, "head")), tensors, width, VOCAB)


def vectors(model: Model, tokens: int, seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, model.width)).astype("f4")
    return x / np.float32(2)


def rows(x: np.ndarray, start=0, **more):
    return step(np.zeros(len(x), int), start, vector=np.arange(len(x)), vectors=x, **more)


def exactly(x, kv, heads, kv_heads, dim, window=0, pairs=0, norm=None, reach=None, positions=None) -> np.ndarray:
    """Attention in float64 over keys and values as `kv` keeps them."""
    q, k, v = (p.reshape(len(x), -1, dim) for p in np.split(x, [heads * dim, (heads + kv_heads) * dim], axis=1))
    turned = np.arange(dim) % (dim // 2) < pairs
    both = []
    for part in (k[..., turned] if pairs else k, v):
        numbers, scales = kept(part, kv)
        both.append(numbers.astype("f8") * np.repeat(scales, 32, -1)[..., : numbers.shape[-1]])
    k, v = both
    if pairs:
        k, rotated = v * norm, k
        k[..., turned] = rotated
    out = np.zeros(q.shape)
    positions = np.arange(len(x)) if positions is None else positions
    for r, p in enumerate(positions):
        end = p if reach is None else reach[r]
        seen = [j for j in range(len(x)) if (p - window < j <= end if window else j <= min(p, end))]
        for h in range(heads):
            s = k[seen, h * kv_heads // heads] @ q[r, h].astype("f8")
            e = np.exp(s - s.max())
            out[r, h] = e / e.sum() @ v[seen, h * kv_heads // heads]
    return out.reshape(len(x), -1)


def agree(model: Model, kv, wanted: np.ndarray, *steps, isas=ISAS, threads=(1,)) -> None:
    """Native is the twin on every instruction set, and close to the oracle."""
    bound = 1e-5 * np.abs(wanted).max()
    expected = Runner(model, Twin(), kv=kv).run(*steps).hidden
    assert np.abs(expected - wanted).max() <= bound
    for isa in isas:
        for count in threads:
            found = Runner(model, isa=isa, kv=kv, threads=count).run(*steps).hidden
            same(found, expected)


@each_type
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16])
def test_every_group_of_heads(kv, group):
    heads, kv_heads = (2 * group, 2) if group < 5 else (group, 1)
    model = attention(heads, kv_heads, 32)
    x = vectors(model, 70, seed=group)
    agree(model, kv, exactly(x, kv, heads, kv_heads, 32), rows(x), threads=(1, 3))


@each_type
@pytest.mark.parametrize("dim", [16, 32, 48, 80, 256, 512])
def test_every_width_of_head(kv, dim):
    """16 and 48 leave half a group that shares a scale empty."""
    heads, kv_heads = (4, 2) if dim < 256 else (2, 1)
    model = attention(heads, kv_heads, dim)
    x = vectors(model, 67 if dim < 256 else 9, seed=dim) * np.float32(4 / dim**0.5)
    agree(model, kv, exactly(x, kv, heads, kv_heads, dim), rows(x))


@each_type
@pytest.mark.parametrize("pairs", [1, 4, 8, 15, 16])
def test_keys_that_are_values(kv, pairs):
    """All pairs rotated included: then nothing of the values is in a key."""
    model = attention(6, 2, 32, pairs=pairs)
    norm = model.tensors["norm"].data.view("f4").astype("f8")
    x = vectors(model, 69, seed=pairs)
    agree(model, kv, exactly(x, kv, 6, 2, 32, pairs=pairs, norm=norm), rows(x))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 65, 100])
def test_window_edges(window):
    """W - 1, W, W + 1 and 2 W + 3 rows, one after the other and all at once."""
    model = attention(4, 2, 16, window)
    x = vectors(model, 2 * window + 3 if window < 60 else 128, seed=window)
    for count in {max(window - 1, 1), window, window + 1, len(x)}:
        part = x[: min(count, 128)]
        agree(model, F32, exactly(part, F32, 4, 2, 16, window), rows(part))


@each_type
@pytest.mark.parametrize("window", [0, 16])
def test_rows_one_by_one_are_rows_all_at_once(kv, window):
    model = attention(4, 2, 32, window)
    x = vectors(model, 100)
    for isa in ISAS:
        whole = Runner(model, isa=isa, kv=kv, threads=2).run(rows(x)).hidden
        runner = Runner(model, isa=isa, kv=kv)
        for chunk in (1, 2, 3, 5, 8, 13, 31, 37):
            start = sum(c for c in (1, 2, 3, 5, 8, 13, 31, 37) if c < chunk)
            same(runner.run(rows(x[start : start + chunk], start)).hidden, whole[start : start + chunk])


def test_softmax_blocks_of_512_positions_are_merged():
    """600 positions: two blocks; windows that begin in one and end in the other."""
    limits = replace(LIMITS, rows=600, wanted=600)
    for window in (0, 100, 512, 513):
        model = attention(2, 1, 16, window)
        x = vectors(model, 600, seed=window)
        expected = Runner(model, Twin(), limits=limits).run(rows(x)).hidden
        assert np.abs(expected - exactly(x, F32, 2, 1, 16, window)).max() < 1e-5
        for isa in ISAS:
            same(Runner(model, isa=isa, limits=limits, threads=2).run(rows(x)).hidden, expected)


@each_isa
def test_spans_of_1024_positions_are_merged_whoever_computes_them(isa):
    """2,100 positions: three spans. The last rows among many, and alone, when threads share their spans."""
    pages = range(33)
    limits = replace(LIMITS, rows=700, wanted=700, context=2112, global_pages=33)
    model = attention(2, 1, 16)
    x = vectors(model, 2100)
    twin = Runner(model, Twin(), limits=limits)
    expected = [twin.run(rows(x[at : at + 700], at, pages=pages)).hidden for at in (0, 700, 1400)][-1]
    assert np.abs(expected[-60:] - exactly(x, F32, 2, 1, 16)[-60:]).max() < 1e-5
    for threads in (1, 2, 3):
        runner = Runner(model, isa=isa, limits=limits, threads=threads)
        for at in (0, 700):
            runner.run(rows(x[at : at + 700], at, pages=pages))
        same(runner.run(rows(x[1400:2040], 1400, pages=pages)).hidden, expected[:640])
        for at, count in [(2040, 7), (2047, 1), (2048, 1), (2049, 3), (2052, 48)]:
            found = runner.run(rows(x[at : at + count], at, pages=pages)).hidden
            same(found, expected[at - 1400 : at - 1400 + count])


def test_scores_of_any_size_leave_a_softmax():
    """Scores of +-3,000: one position has it all; a block merged later may outweigh all before it."""
    limits = replace(LIMITS, rows=600, wanted=600)
    model = attention(2, 1, 16)
    x = vectors(model, 600)
    x[:, :48] *= 60
    wanted = exactly(x, F32, 2, 1, 16)
    for isa in ISAS:
        found = Runner(model, isa=isa, limits=limits).run(rows(x)).hidden
        assert np.isfinite(found).all() and np.abs(found - wanted).max() < 1e-2


@each_type
def test_an_image_block_is_seen_to_its_end_in_sliding_layers_alone(kv):
    reach = np.arange(60)
    reach[20:45] = 44  # longer than the window
    for window in (0, 16):
        model = attention(4, 2, 16, window)
        x = vectors(model, 60, seed=3)
        wanted = exactly(x, kv, 4, 2, 16, window, reach=reach)
        agree(model, kv, wanted, rows(x, reach=reach), threads=(1, 2))
        assert (np.abs(wanted - exactly(x, kv, 4, 2, 16, window)).max() > 0.1) == (window > 0)


@each_type
def test_sequences_of_one_batch_do_not_meet_whatever_their_order_and_pages(kv):
    for window, pairs in ((0, 0), (0, 4), (16, 0)):
        model = attention(6, 2, 32, window, pairs)
        parts = [vectors(model, n, seed=n) for n in (70, 1, 33, 20)]
        pages = np.random.default_rng(5).permutation(24).reshape(4, 6)
        steps = [rows(x, pages=p, local=p[::-1], generated=len(x) == 1) for x, p in zip(parts, pages, strict=True)]
        for isa in ISAS:
            alone = [Runner(model, isa=isa, kv=kv).run(s).hidden for s in steps]
            for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
                together = Runner(model, isa=isa, kv=kv, threads=2).run(*(steps[i] for i in order)).hidden
                same(together, np.concatenate([alone[i] for i in order]))


@each_type
def test_what_was_rolled_back_is_forgotten(kv):
    """Positions written again, behind them NaN: nothing but the new rows is seen."""
    for window, pairs in ((0, 0), (0, 4), (16, 0)):
        model = attention(4, 2, 32, window, pairs)
        x, other = vectors(model, 90), vectors(model, 90, seed=1)
        fresh, used = (Runner(model, kv=kv) for _ in range(2))
        wanted = fresh.run(rows(x)).hidden
        used.run(rows(np.concatenate([x[:40], other[:50]])))
        used.run(rows(np.full_like(other[:10], np.nan), 80))
        same(used.run(rows(x[40:], 40)).hidden, wanted[40:])


@each_type
def test_rows_that_are_not_stored_change_no_page(kv):
    model = attention(4, 2, 32)
    runner, x = Runner(model, kv=kv), vectors(model, 12)
    runner.run(rows(x))
    before = runner.session.pages.copy()
    seen = rows(vectors(model, 1, seed=4), 12, reach=np.array([11]), store=False, generated=True)
    hidden = runner.run(seen).hidden
    np.testing.assert_array_equal(runner.session.pages, before)
    twin = Runner(model, Twin(), kv=kv)
    twin.run(rows(x))
    same(hidden, twin.run(seen).hidden)


@each_isa
def test_garbage_in_pages_is_never_seen(isa):
    """Every byte that was not stored is 0xff, NaN in each type: results are those of pages full of zeros."""
    for kv in KV_TYPES:
        for window, pairs in ((0, 0), (0, 4), (16, 0)):
            model = attention(4, 2, 32, window, pairs)
            x = vectors(model, 35)
            runners = [Runner(model, isa=isa, kv=kv) for _ in range(2)]
            assert (runners[0].session.pages == 0xFF).all()
            runners[1].session.pages[:] = 0
            found = [[runner.run(rows(x[:33])), runner.run(rows(x[33:], 33))] for runner in runners]
            for a, b in zip(*found, strict=True):
                assert np.isfinite(a.hidden).all()
                same(a.hidden, b.hidden)


def test_pages_are_cleared_and_copied_in_one_kind_alone():
    for window in (0, 16):
        model = attention(2, 1, 16, window)
        runner = Runner(model)
        x = vectors(model, 2 * PAGE)
        runner.run(rows(x, pages=[3, 1]))
        pages = runner.session.regions[0]
        kept_page = pages[3].copy()
        runner.session.copy_page(window == 0, 3, 5)
        runner.session.clear_pages(window == 0, np.array([1]))
        assert (pages[5] == 0xFF).all() and not (pages[1] == 0).all()
        runner.session.copy_page(window > 0, 3, 5)
        runner.session.clear_pages(window > 0, np.array([1]))
        np.testing.assert_array_equal(pages[5], kept_page)
        assert (pages[1] == 0).all()
        generated = rows(vectors(model, 1, seed=2), PAGE, generated=True, pages=[5, 2])
        expected = Runner(model)
        expected.run(rows(x[:PAGE], pages=[5]))
        same(runner.run(generated).hidden, expected.run(generated).hidden)


@each_type
def test_a_page_keeps_what_its_type_can_hold(kv):
    """F32 all, halves to nearest, the others to half a step of 32's largest, and in Q4_0 to a whole one where it is

    met from the other side; infinity and NaN come back as no number."""
    random = np.random.default_rng(6)
    x = (random.standard_normal((200, 64)) * 10.0 ** random.integers(-3, 3, (200, 1))).astype("f4")
    numbers, scales = kept(x, kv)
    back = numbers * np.repeat(scales, 32, -1)
    ulp = {F16: 2.0**-11, BF16: 2.0**-8}.get(kv, 0)
    most = np.abs(x).reshape(200, 2, 32).max(-1).repeat(32, -1)
    step = {Q8: most / 254, Q4: most / 8}.get(kv, 0)
    assert (np.abs(back - x) <= np.abs(x) * ulp + step + (most * 2.0**-11 if kv in SCALED else 0) + 1e-7).all()
    model = attention(2, 1, 16)
    for value in (np.nan, np.inf, -np.inf):
        x = vectors(model, 4)
        x[2, 32:] = value
        for isa in ISAS:
            found = Runner(model, isa=isa, kv=kv).run(rows(x)).hidden
            assert np.isfinite(found[:2]).all() and not np.isfinite(found[2:]).any()


@each_isa
def test_q4_0_is_rounded_as_ggml_rounds_it(isa):
    """A page of 64 dimensions by its bytes: two neighbours of a position share one, and 32 a half float."""
    model = attention(2, 1, 64)
    random = np.random.default_rng(7)
    x = vectors(model, PAGE, seed=7) * 10.0 ** random.integers(-45, 6, (PAGE, 1)).astype("f4")
    x[1] = 0
    x[2], x[3] = random.choice([-1.5, 1.5], (2, model.width))  # the first of the farthest says which sign is whole
    x[4] = random.integers(-16, 17, model.width) / 2  # halves between codes
    runner = Runner(model, isa=isa, kv=Q4)
    runner.run(rows(x, pages=[0]))
    half, scales = PAGE * 32, PAGE * 4
    keys, key_d, values, value_d = np.split(runner.session.regions[0][0], np.cumsum([half, scales, half]))
    keys = keys.reshape(4, 32, 16).swapaxes(1, 2).reshape(PAGE, 32)
    key_d = key_d.view("f2").reshape(4, 2, 16).swapaxes(1, 2).reshape(PAGE, 2)
    found = (keys, key_d), (values.reshape(PAGE, 32), value_d.view("f2").reshape(PAGE, 2))
    for (two, d), part in zip(found, (x[:, 128:192], x[:, 192:]), strict=True):
        expected = planes(quantize(part, Q4), Q4)
        np.testing.assert_array_equal(np.stack([two & 15, two >> 4], -1).reshape(PAGE, 64), expected.q & 15)
        np.testing.assert_array_equal(d.view("u2"), expected.scale.astype("f2").view("u2"))


def test_angles_far_out_are_exact_to_a_float():
    """At position 200,000 a product in float32 is wrong by 1e-2."""
    model = attention(2, 1, 32, rope=Rope(1e4, 32, 16))
    angle = 200_000 * 1e4 ** (-np.arange(16) / 16)
    for isa in ISAS:
        runner = Runner(model, isa=isa, limits=replace(LIMITS, context=200_064))
        runner.batch.fill([rows(vectors(model, 1), 200_000, pages=np.zeros(3126, int))])
        number, op = next((i, op) for i, op in enumerate(runner.session.plan.ops) if op.code == OpCode.ANGLES)
        runner.session.run(runner.batch, 0, number + 1)
        found = runner.session.read(op.out.name)[0]
        np.testing.assert_allclose(found, np.concatenate([np.cos(angle), np.sin(angle)]), atol=1e-7)
