"""The forward pass on every backend: transformers' numbers, and on native one answer however a prompt is cut or mixed.

The goldens are F32 files that transformers 5.23 computed in float32; logits reach 30. Lines of 1e-3 hold for keys and
values kept as F32. Quantised copies of the goldens are held to `twin`, which rounds activations as the kernels do.
"""

from functools import cache

import numpy as np
import pytest
from cases import (
    BLOCKS,
    FLOATS,
    GOLDEN,
    GOLDENS,
    ISAS,
    LOGITS,
    QUANTS,
    Model,
    Runner,
    quantized,
    same,
    step,
)
from twin import SCALED, kept, on_each_isa

from gemma4q.abi import OpCode, Space, TensorType
from gemma4q.backends.native import KV_TYPES
from gemma4q.backends.reference import Reference

LINE = 1e-3
F32 = TensorType.F32
EVERYWHERE = [("reference", None), *(("native", isa) for isa in ISAS), ("portable", None)]
TWO_WAY = GOLDENS[2:]

SMALL_BLOCKS = [*FLOATS[1:], *(kind for kind in QUANTS if BLOCKS[kind][0] == 32)]

each_golden = pytest.mark.parametrize("name", GOLDENS)
each_isa = pytest.mark.parametrize("isa", ISAS)
everywhere = pytest.mark.parametrize("backend, isa", EVERYWHERE, ids=["-".join(filter(None, x)) for x in EVERYWHERE])


@cache
def model(name: str) -> Model:
    return Model.open(GOLDEN / f"{name}.gguf")


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as numbers:
        return dict(numbers)


@cache
def whole(name: str, kv=F32) -> np.ndarray:
    """Native's logits of the golden text in one step, by the best instruction set."""
    return Runner(model(name), kv=kv).logits(step(golden(name)["ids"]))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a.astype("f8") - b) ** 2).mean()))


# -- Against transformers ---------------------------------------------------------------------------------------------


@each_golden
@everywhere
def test_logits_and_hidden_vectors_are_those_of_transformers(name, backend, isa):
    numbers = golden(name)
    r = Runner(model(name), backend, isa, threads=2).run(step(numbers["ids"]))
    assert np.abs(r.logits - numbers["logits"]).max() < LINE
    assert np.abs(r.hidden - numbers["final_norm"]).max() < LINE
    np.testing.assert_array_equal(r.top_ids[:, 0], numbers["logits"].argmax(1))
    exact = np.log(np.exp(numbers["logits"].astype("f8")).sum(1))
    assert np.abs(r.logsumexp - exact).max() < LINE


@pytest.mark.parametrize("name", TWO_WAY)
@everywhere
def test_images_are_seen_both_ways_as_in_transformers(name, backend, isa):
    """The reach of each row comes from the mask transformers made, not from our own reading of it."""
    numbers = golden(name)
    kinds, sliding = numbers["vision_type"], numbers["vision_mask_sliding"]
    reach = np.array([np.flatnonzero(row)[-1] for row in sliding])
    vector = np.where(kinds > 0, np.cumsum(kinds > 0) - 1, -1)
    given = step(numbers["vision_ids"], reach=reach, vector=vector, vectors=numbers["vision_soft"])
    r = Runner(model(name), backend, isa).run(given)
    assert np.abs(r.logits - numbers["vision_logits"]).max() < LINE


@each_golden
@everywhere
def test_the_best_token_24_times_over_is_transformers_choice(name, backend, isa):
    numbers, runner = golden(name), Runner(model(name), backend, isa)
    ids, chosen, tokens = numbers["ids"], [], numbers["ids"]
    for _ in range(24):
        start = len(ids) + len(chosen) - len(tokens)
        r = runner.run(step(tokens, start, want=LOGITS | 2, generated=len(tokens) == 1))
        chosen.append(int(r.top_ids[0, 0]))
        tokens = chosen[-1:]
    assert chosen == numbers["greedy"].tolist()


@each_golden
def test_every_layer_ends_where_transformers_layer_ends(name):
    """Scaled embedding, then each layer's output; the first number beyond the line names the layer that is wrong."""
    numbers, runner = golden(name), Runner(model(name))
    runner.batch.fill([step(numbers["ids"])])
    ops, rows, at = runner.session.plan.ops, len(numbers["ids"]), 0
    ends = [max(i for i, op in enumerate(ops) if op.layer == layer) for layer in range(len(numbers["hidden"]) - 1)]
    for layer, end in enumerate([0, *ends]):
        runner.session.run(runner.batch, at, end + 1)
        at = end + 1
        found = runner.session.read(ops[end].out.name)[:rows]
        assert np.abs(found - numbers["hidden"][layer]).max() < LINE, f"after layer {layer - 1}"


@each_golden
def test_short_keys_and_values_cost_what_their_rounding_costs(name):
    """How much a model makes of a relative error is its own: that of F16's says what shorter types may cost.

    A router near a tie goes the other way, which is no longer in proportion: hence 3.
    """
    x = np.random.default_rng(1).standard_normal((100, 32)).astype("f4")
    gains = {}
    for kv in KV_TYPES[1:]:
        numbers, scales = kept(x, kv)
        error = rms(whole(name, kv), golden(name)["logits"])
        gains[kv] = error / rms(numbers * scales, x)
        assert 0 < gains[kv] < 3 * gains[TensorType.F16]
        reference = Runner(model(name), Reference(), kv=kv).logits(step(golden(name)["ids"]))
        assert error < (1.5 if kv in SCALED else 1.1) * rms(reference, golden(name)["logits"])
    assert rms(whole(name, TensorType.F16), golden(name)["logits"]) < 0.01


# -- One answer -------------------------------------------------------------------------------------------------------


@each_golden
@each_isa
def test_all_instruction_sets_and_threads_give_the_same_bits(name, isa):
    for kv in (F32, TensorType.F16):
        for threads in (1, 2, 3):
            r = Runner(model(name), isa=isa, threads=threads, kv=kv).logits(step(golden(name)["ids"]))
            same(r, whole(name, kv))


@each_golden
@each_isa
@pytest.mark.parametrize("chunk", [7, 16, 17, 48])
def test_a_prompt_in_pieces_is_the_prompt_whole(name, isa, chunk):
    ids, runner = golden(name)["ids"], Runner(model(name), isa=isa, threads=2)
    parts = [runner.logits(step(ids[at : at + chunk], at)) for at in range(0, len(ids), chunk)]
    same(np.concatenate(parts), whole(name))


@each_golden
@each_isa
def test_tokens_one_by_one_given_or_generated_are_the_prompt_whole(name, isa):
    """On these instruction sets both classes of rows have the same arithmetic."""
    ids, runner = golden(name)["ids"], Runner(model(name), isa=isa)
    parts = [runner.logits(step(ids[i : i + 1], i, generated=i > 9)) for i in range(len(ids))]
    same(np.concatenate(parts), whole(name))


@each_golden
@each_isa
def test_a_sequence_among_others_is_the_sequence_alone(name, isa):
    """Beside a longer one and generated rows, in any order, on pages of any number."""
    ids = golden(name)["ids"]
    other, more = ids[::-1][:31], np.roll(ids, 9)[:20]
    runner = Runner(model(name), isa=isa, threads=2)
    pages = np.random.default_rng(2).permutation(24).reshape(4, 6)
    runner.run(step(more, pages=pages[2], local=pages[0]), step(ids[:30], pages=pages[0], local=pages[3]))
    steps = (
        step(more[:1], 20, pages=pages[2], local=pages[0], generated=True),
        step(other, pages=pages[1], local=pages[1]),
        step(ids[30:], 30, pages=pages[0], local=pages[3]),
    )
    for order in ((0, 1, 2), (2, 1, 0)):
        logits = runner.logits(*(steps[i] for i in order))
        found = logits[-len(ids) + 30 :] if order[-1] == 2 else logits[: len(ids) - 30]
        same(found, whole(name)[30:])


@each_golden
@each_isa
def test_rows_whose_result_is_not_wanted_need_not_be_computed(name, isa):
    """The shortcut: past the last layer with keys of its own only the wanted rows run, and they have the same bits."""
    ids = golden(name)["ids"]
    runner = Runner(model(name), isa=isa)
    narrow = [op for op in runner.session.plan.ops if op.out and op.out.space == Space.WANTED]
    assert len({op.layer for op in narrow}) > 1 and OpCode.ATTEND in {op.code for op in narrow}
    for wanted in ([len(ids) - 1], [0], [3, 17, 18, 64], range(40, 72)):
        want = np.zeros(len(ids), int)
        want[list(wanted)] = LOGITS
        same(runner.logits(step(ids, want=want)), whole(name)[list(wanted)])


@each_golden
@everywhere
def test_a_step_of_which_nothing_is_wanted_prepares_the_next(name, backend, isa):
    """As a prompt of several steps has it: the first only fills the cache."""
    ids = golden(name)["ids"]
    runner = Runner(model(name), backend, isa)
    assert runner.logits(step(ids[:70], want=np.zeros(70, int))).size == 0
    assert np.abs(runner.logits(step(ids[70:], 70)) - golden(name)["logits"][70:]).max() < LINE


@each_golden
@each_isa
def test_what_is_rolled_back_leaves_no_trace(name, isa):
    ids, runner = golden(name)["ids"], Runner(model(name), isa=isa)
    runner.logits(step(np.concatenate([ids[:50], ids[:22]])))
    same(runner.logits(step(ids[50:], 50)), whole(name)[50:])


@each_golden
def test_every_op_has_a_kernel_of_its_instruction_set(name):
    for isa in ISAS:
        session = Runner(model(name), isa=isa).session
        names = session.kernels()
        assert set(names) == {op.name for op in session.plan.ops}
        assert all(kernel.endswith(f"_{isa}") for kernel in names.values())
        assert {names[op.name] for op in session.plan.ops if op.code == OpCode.MATMUL} == {f"matmul_f32_{isa}"}


# -- Quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL_BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["e2b-like", "moe-like"])
def test_quantised_files_give_the_bits_of_a_reference_that_rounds_as_the_kernels_do(name, kind, tmp_path):
    """Super-blocks need rows of 256, which these models have not: test_native has them."""
    other = Model.open(quantized(GOLDEN / f"{name}.gguf", tmp_path / "model.gguf", kind))
    given = step(golden(name)["ids"][:40])
    for isa, wanted in on_each_isa(lambda twin: Runner(other, twin).logits(given)).items():
        same(Runner(other, isa=isa, threads=2).logits(given), wanted)


@each_golden
def test_rounded_activations_cost_what_they_cost_the_reference(name, tmp_path):
    """Whose sums run in another order, so that here and there a value is rounded to its other side."""
    for kind in (TensorType.Q8_0, TensorType.Q4_0):
        other = Model.open(quantized(GOLDEN / f"{name}.gguf", tmp_path / "model.gguf", kind))
        given = step(golden(name)["ids"])
        exact = Runner(other, Reference()).logits(given)
        rounded = Runner(other, Reference(quantize_activations=True)).logits(given)
        for isa in ISAS:
            native = Runner(other, isa=isa).logits(given)
            assert 0 < rms(native, exact) < 1.5 * rms(rounded, exact)
            if isa != "amx":  # where a prompt's activations are rounded less, and its weights too
                assert rms(native, rounded) < rms(rounded, exact)


@each_golden
@everywhere
def test_a_model_of_halves_is_computed_from_its_exact_values(name, backend, isa, tmp_path):
    """The goldens' weights are bfloat16 values: as BF16 they are the same model, and the line is the same.

    But for prompt rows on amx, whose activations become bfloat16 too.
    """
    other = Model.open(quantized(GOLDEN / f"{name}.gguf", tmp_path / "model.gguf", TensorType.BF16))
    logits = Runner(other, backend, isa).logits(step(golden(name)["ids"], generated=isa == "amx"))
    assert np.abs(logits - golden(name)["logits"]).max() < LINE
    if backend == "native":
        same(logits, whole(name))
