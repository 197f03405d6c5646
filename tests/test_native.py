"""The C executor beyond one kernel: whole plans in every tensor type, candidates, look-up tables, and mishaps."""

import threading
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import test_portable as small
from cases import FLOATS, ISAS, KINDS, LIMITS, LOGITS, Model, Runner, same, step
from tiny import tiny
from twin import Twin, on_each_isa

from gemma4q.abi import PAGE, BufferType, OpCode, RowFlag, Status, TensorType, lib
from gemma4q.backends import get
from gemma4q.backends.native import KV_TYPES, isas, page_bytes
from gemma4q.errors import Gemma4qError
from gemma4q.plan.batch import BIAS, Batch
from gemma4q.plan.builder import STRETCH, TOP, Builder
from gemma4q.plan.plan import KV

F32 = TensorType.F32
TOKENS = np.random.default_rng(0).integers(0, small.VOCAB, 90)


def model_in(kind: TensorType, path) -> Model:
    """Every op of a plan, all matrices of one type, 256 wide: keys that are values, experts, per-layer inputs."""
    found = small.tensors(path / "file", kind, small.shapes())
    return Model(small.plan(), found, small.WIDTH, small.VOCAB, found.pop(""))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def model(request, tmp_path_factory):
    return model_in(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def q4(tmp_path_factory):
    return model_in(TensorType.Q4_0, tmp_path_factory.mktemp("model"))


def vocabulary(vocab: int, width: int = 32) -> Model:
    """logits = vector . table', `vocab` of them, and their candidates."""
    from test_attend import Tensor

    table = np.random.default_rng(vocab).standard_normal((vocab, width))
    tensors = {"embd": Tensor("embd", np.zeros((vocab, width))), "head": Tensor("head", table)}
    b = Builder({name: t.shape for name, t in tensors.items()}, 1e-6)
    hidden = b.wanted(b.embed("embd", 1.0))
    return Model(b.finish(hidden, b.matmul(hidden, "head")), tensors, width, vocab)


def rows(x: np.ndarray, start=0, **more):
    return step(np.zeros(len(x), int), start, vector=np.arange(len(x)), vectors=x.astype("f4"), **more)


# -- Whole plans ------------------------------------------------------------------------------------------------------


def test_a_plan_gives_the_twins_bits_in_every_type(model):
    """A prompt, then two tokens one by one, the last beside a prompt, on every instruction set, one thread or three."""
    generated = [step(TOKENS[i : i + 1], i, generated=True) for i in (34, 35)]
    steps = [(step(TOKENS[:34]),), generated[:1], (step(TOKENS[40:61], pages=[9]), generated[1])]
    twins = on_each_isa(lambda twin: [runner.run(*s) for runner in [Runner(model, twin)] for s in steps])
    for isa, expected in twins.items():
        for threads in (1, 3):
            runner = Runner(model, isa=isa, threads=threads)
            for s, wanted in zip(steps, expected, strict=True):
                found = runner.run(*s)
                assert found.status == Status.OK
                for name in ("logits", "hidden", "top_values", "top_ids"):
                    same(getattr(found, name), getattr(wanted, name))
                np.testing.assert_allclose(found.logsumexp, wanted.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("moe", [False, True])
def test_a_file_of_mixed_types_gives_the_twins_bits(tmp_path, moe):
    """Q4_0, Q8_0, Q4_K, Q6_K, F16, BF16 and F32 in one file, of which rows are quantised once for several matrices."""
    (tmp_path / "tiny.gguf").write_bytes(tiny(moe).bytes())
    tiny_model = Model.open(tmp_path / "tiny.gguf")
    ids = np.random.default_rng(1).integers(0, tiny_model.vocab, 50)
    for isa, wanted in on_each_isa(lambda twin: Runner(tiny_model, twin).logits(step(ids))).items():
        same(Runner(tiny_model, isa=isa, threads=2).logits(step(ids)), wanted)


def test_every_op_is_served_by_a_kernel_named_for_its_type_and_instruction_set(model):
    by_type = {OpCode.MATMUL: "matmul", OpCode.EXPERTS_UP: "matmul", OpCode.EXPERTS_DOWN: "matmul"}
    by_type |= {OpCode.EMBED: "row", OpCode.EMBED_ROWS: "row"}
    for isa in ISAS:
        session = Runner(model, isa=isa).session
        names, seen = session.kernels(), set()
        for op in session.plan.ops:
            seen.add(op.code)
            if op.code in by_type:
                kind = model.tensors[op.weights[0].tensor].type.name.lower()
                assert names[op.name] == f"{by_type[op.code]}_{kind}_{isa}"
            else:
                assert names[op.name] == f"{op.code.name.lower()}_{isa}"
        quantized = model.tensors["0.gate"].type not in FLOATS
        assert seen == set(OpCode) - {OpCode.COUNT} - (set() if quantized else {OpCode.QUANTIZE})


@pytest.mark.parametrize("isa", ISAS)
def test_buffers_can_be_read_between_ops(q4, isa):
    """Where the buffers differ in kind: floats, activations rounded in either class, and choices of experts."""
    native, twin = Runner(q4, isa=isa), Runner(q4, Twin(isa))
    given = step(TOKENS[:12], pages=[1]), step(TOKENS[12:20], pages=[0], generated=True)
    for runner in (native, twin):
        runner.batch.fill(given)
    compared = set()
    for number, op in enumerate(native.session.plan.ops):
        for runner in (native, twin):
            runner.session.run(runner.batch, number, number + 1)
        if op.out is None or op.code in (OpCode.GROUP, OpCode.TOP_PART):
            continue
        found, wanted = (runner.session.read(op.out.name)[:20] for runner in (native, twin))
        if op.out.type == BufferType.A8:
            wanted = (wanted["d"][..., None] * wanted["qs"]).reshape(20, -1), wanted["bf16"].reshape(20, -1)
            wanted = np.where((isa == "amx") & (np.arange(20) < 12)[:, None], *wanted[::-1])
        if op.out.type == BufferType.I32:
            np.testing.assert_array_equal(found, wanted)
        else:
            same(found, wanted)
        compared.add(op.code)
    assert len(compared) == 17


def test_memory_is_what_was_said_before(q4):
    for isa, kv in [*product(ISAS, KV_TYPES), (None, TensorType.F16)]:
        said = get("native").memory(q4.plan, q4.tensors, LIMITS, kv, 3, isa)
        assert Runner(q4, threads=3, kv=kv, isa=isa).session.bytes == said


@pytest.mark.parametrize("kv, bits", [*zip(KV_TYPES, (32, 16, 16, 8.5, 4.5), strict=True)])
def test_a_page_takes_the_bits_of_its_type(kv, bits):
    """Whole groups of 32 share scales of 16 bits; of 48 dimensions the second group is half empty."""
    assert 8 * page_bytes(KV(0, 2, 128, 256, False), kv) == PAGE * 2 * (128 + 256) * bits
    half_empty = 8 if bits in (8.5, 4.5) else 0
    assert 8 * page_bytes(KV(0, 1, 48, 48, False), kv) == PAGE * 2 * (48 * bits + half_empty)


def test_weights_are_counted_once_a_step_and_experts_once_each(q4):
    runner = Runner(q4)
    chosen = {op.weights[0] for op in q4.plan.ops if op.code == OpCode.MATMUL}
    rows = {w: q4.tensors[w.tensor].shape[0] for w in chosen}
    dense = sum(q4.tensors[w.tensor].data.nbytes // rows[w] * (w.rows or rows[w]) for w in chosen)
    one, many = runner.run(step(TOKENS[:1])).weight_bytes, runner.run(step(TOKENS[:60])).weight_bytes
    expert = sum(q4.tensors[f"0.{name}"].data.nbytes for name in ("gates", "ups", "downs")) // small.EXPERTS
    assert one == dense + 2 * small.USED * expert
    assert many == dense + 2 * small.EXPERTS * expert


# -- Look-up tables ---------------------------------------------------------------------------------------------------


def test_rows_of_a_table_come_and_go_in_a_small_cache(q4, monkeypatch):
    """Five rows more than a step takes, of 300 tokens: every row is fetched again and again, and is right each time."""
    monkeypatch.setattr("gemma4q.backends.native.SPARE_ROWS", 5)
    limits = replace(LIMITS, rows=8, wanted=8)
    runner, twin = Runner(q4, limits=limits), Runner(q4, Twin(), limits=limits)
    assert runner.session.bytes["rows"] < 14 * q4.tensors["small"].data.nbytes / small.VOCAB + 4 * small.VOCAB + 14 * 8
    random = np.random.default_rng(4)
    for _ in range(60):
        tokens = random.choice([0, 1, 2, *range(small.VOCAB)], random.integers(1, 9))
        same(runner.logits(step(tokens)), twin.logits(step(tokens)))


def test_vectors_stand_between_tokens_and_have_the_row_of_token_0(q4):
    vector = np.full(40, -1)
    vector[[0, 3, 4, 5, 39]] = np.arange(5)[::-1]
    vectors = np.random.default_rng(5).standard_normal((5, small.WIDTH)).astype("f4")
    given = step(TOKENS[:40], vector=vector, vectors=vectors)
    tokens = TOKENS[:40].copy()
    tokens[vector >= 0] = -1  # of no meaning there
    for isa, wanted in on_each_isa(lambda twin: Runner(q4, twin).logits(given)).items():
        same(Runner(q4, isa=isa).logits(step(tokens, vector=vector, vectors=vectors)), wanted)
        same(Runner(q4, isa=isa).logits(step(TOKENS[40:42], pages=[9]), given)[2:], wanted)


def test_a_table_cut_short_is_noticed(tmp_path):
    cut = model_in(TensorType.Q4_0, tmp_path)
    runner = Runner(cut)
    assert runner.run(step([small.VOCAB - 1])).status == Status.OK
    end = cut.tensors["small"].offset
    with open(tmp_path / "file", "r+b") as file:
        file.truncate(end)
    assert runner.run(step([5])).status == Status.MODEL_CHANGED
    assert runner.run(step([small.VOCAB - 1])).status == Status.OK, "what was read is still here"


# -- Candidates -------------------------------------------------------------------------------------------------------


def best(logits, bias=(), mask=None):
    """Ids and values of the best, from the definition: biases, then the mask, ties to the lower id."""
    x = logits.astype("f4").copy()
    for token, scale, add in bias:
        x[token] = (x[token] * np.float32(scale) if x[token] <= 0 else x[token] / np.float32(scale)) + np.float32(add)
    if mask is not None:
        x[~mask] = -np.inf
    order = np.argsort(-x, kind="stable")[:TOP]
    order = order[x[order] > -np.inf]
    ids = np.full(TOP, -1)
    ids[: len(order)] = order
    return ids, np.where(ids >= 0, x[ids], -np.inf).astype("f4")


@pytest.mark.parametrize("vocab", [32, 63, 64, 65, 1000, STRETCH - 1, STRETCH, STRETCH + 1, 2 * STRETCH + 33])
def test_the_best_are_those_of_a_stable_sort_after_biases_and_mask(vocab):
    """Also where ids on either side of a stretch's edge are equally good."""
    m, random = vocabulary(vocab), np.random.default_rng(vocab)
    m.tensors["head"].data.view("f4").reshape(vocab, -1)[random.integers(0, vocab, vocab // 2)] = 0.25
    x = random.standard_normal((3, m.width))
    bias = np.array(
        [(t, 1.3, a) for t, a in zip(random.integers(0, vocab, 6), (0, 9, -9, 1, 50, 0), strict=True)], BIAS
    )
    allowed = random.random(vocab) < 0.4
    few = np.zeros(vocab, bool)
    few[[0, vocab - 1, vocab // 2]] = True
    for isa in ISAS:
        runner = Runner(m, isa=isa, threads=2)
        for mask in (None, allowed, few):
            words = None if mask is None else np.packbits(mask, bitorder="little")
            words = None if mask is None else np.pad(words, (0, -len(words) % 4)).view("u4")
            r = runner.run(rows(x, bias=bias, mask=words), rows(x[:1], pages=[9]))
            for i in range(3):
                ids, values = best(r.logits[i], bias.tolist(), mask)
                np.testing.assert_array_equal(r.top_ids[i], ids)
                same(r.top_values[i], values)
            np.testing.assert_array_equal(r.top_ids[3], best(r.logits[3])[0])
            exact = r.logits.astype("f8")
            np.testing.assert_allclose(r.logsumexp, np.log(np.exp(exact).sum(1)), rtol=1e-6)


def test_a_token_biased_twice_is_biased_twice_and_infinity_bans():
    m = vocabulary(100)
    x = np.random.default_rng(1).standard_normal((1, m.width))
    bias = [(7, 1.0, 30.0), (7, 2.0, 1.0), (9, 1.0, -np.inf), (99, 1.5, 0.0)]
    for isa in ISAS:
        r = Runner(m, isa=isa).run(rows(x, bias=np.array(bias, BIAS)))
        ids, values = best(r.logits[0], bias)
        np.testing.assert_array_equal(r.top_ids[0], ids)
        same(r.top_values[0], values)
        assert r.top_ids[0, 0] == 7 and 9 not in r.top_ids[0]


def test_rows_that_want_no_candidates_get_none():
    m = vocabulary(100)
    r = Runner(m).run(rows(np.ones((2, m.width)), want=np.array([LOGITS, LOGITS | RowFlag.WANT_TOP])))
    assert (r.top_ids[0] == -1).all() and (r.top_ids[1] >= 0).all() and np.isfinite(r.logsumexp).all()


# -- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_no_number_is_named(value):
    """Its number in the batch, not among the wanted; in any stretch of the vocabulary; the others' results stand."""
    m = vocabulary(2 * STRETCH + 5)
    x = np.random.default_rng(2).standard_normal((6, m.width))
    clean = Runner(m).run(rows(x, want=np.array([0, 0, 1, 0, 3, 3])))
    x[[0, 4, 5], 3] = value
    for isa in ISAS:
        r = Runner(m, isa=isa, threads=2).run(rows(x, want=np.array([0, 0, 1, 0, 3, 3])))
        assert r.status == Status.NON_FINITE and r.bad_row == 4
        same(r.logits[0], clean.logits[0])
    m.tensors["head"].data.view("f4")[-1] = value
    r = Runner(m).run(rows(np.ones((1, m.width))))
    assert r.status == Status.NON_FINITE and r.bad_row == 0


def test_a_nan_anywhere_in_a_plan_reaches_the_status_and_no_other_sequence(model):
    """Rows of its own sequence that are attended together with it may be spoiled too."""
    vectors = np.full((1, small.WIDTH), 1e-3, "f4")
    vectors[0, 77] = np.nan
    bad = step(TOKENS[:20], vector=np.r_[np.full(19, -1), 0], vectors=vectors)
    good = step(TOKENS[:7], pages=[9])
    for isa in ISAS:
        clean = Runner(model, isa=isa).run(good)
        r = Runner(model, isa=isa).run(good, bad)
        assert r.status == Status.NON_FINITE and 7 + 12 <= r.bad_row <= 7 + 19 and np.isnan(r.logits[-1]).all()
        same(r.logits[:7], clean.logits)


def test_a_step_is_cancelled_from_another_thread_and_the_next_one_runs(q4):
    limits = replace(LIMITS, rows=512, wanted=1)
    runner = Runner(q4, threads=2, limits=limits)
    ids = np.resize(TOKENS, 512)
    done, statuses = threading.Event(), []

    def cancel():
        while not done.is_set():
            runner.session.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    for _ in range(50):
        statuses.append(runner.run(step(ids, want=LOGITS)).status)
        if statuses[-1] == Status.CANCELLED:
            break
    done.set()
    canceller.join()
    assert statuses[-1] == Status.CANCELLED
    fresh = Runner(q4, limits=limits).run(step(ids, want=LOGITS))
    again = runner.run(step(ids, want=LOGITS))
    assert again.status == Status.OK
    same(again.logits, fresh.logits)


def test_two_models_share_a_process(q4, tmp_path):
    other = model_in(TensorType.Q6_K, tmp_path)
    alone = [Runner(m, threads=2).logits(step(TOKENS)) for m in (q4, other)]
    runners, found = [Runner(m, threads=2) for m in (q4, other)], [None, None]

    def run(i: int) -> None:
        for _ in range(5):
            found[i] = runners[i].logits(step(TOKENS))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, alone, strict=True):
        same(a, b)


def test_a_session_is_closed_once_or_twice(q4):
    runner = Runner(q4)
    runner.session.close()
    runner.session.close()


def test_what_is_not_here_is_refused_by_name(q4):
    for given, kind in (({"isa": "altivec"}, "unavailable"), ({"kv": TensorType.Q4_1}, "bad_option")):
        with pytest.raises(Gemma4qError) as error:
            get("native").load(q4.plan, q4.tensors, LIMITS, **given)
        assert error.value.kind == kind and "choose" in error.value.message


def test_instruction_sets_are_listed_best_first_and_each_serves_every_type():
    assert isas()[-1] == "scalar" and isas() == ISAS
    for number in range(lib.isa_count()):
        for code in OpCode:
            named = [lib.kernel_name(number, code, kind) for kind in [-1, *KINDS]] if code != OpCode.COUNT else [1]
            assert all(named)


def test_a_batch_is_laid_out_within_its_memory(q4):
    batch = Batch(LIMITS, q4.width, q4.vocab)
    ends = [getattr(batch, n).ctypes.data + getattr(batch, n).nbytes for n in ("rows", "sequences", "pages", "masks")]
    assert max(ends) <= batch.memory.ctypes.data + batch.memory.nbytes
