"""How requests are cut, mixed, resumed or ended never changes what they say: nearly in numpy, to the bit in C."""

import os
from dataclasses import replace

import numpy as np
import pytest
from tiny import TOKENS, WINDOW, tiny

import gemma4q
from gemma4q import abi
from gemma4q.abi import RowFlag, Status
from gemma4q.engine.engine import BUSY_ROWS, Engine
from gemma4q.engine.kv_cache import local_pages
from gemma4q.engine.memory import limits_for
from gemma4q.engine.prompt import Prompt, Soft
from gemma4q.engine.sequence import Answer, Scoring
from gemma4q.errors import Gemma4qError
from gemma4q.plan.batch import Batch, Step
from gemma4q.text.options import SamplingOptions
from gemma4q.text.stream import OutputStream

VOCAB = len(TOKENS)
GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(scope="module", params=["dense reference", "routed reference", "dense native", "routed native"])
def model(request, tmp_path_factory):
    kind, backend = request.param.split()
    if backend == "native" and abi.lib is None:
        pytest.skip(str(abi.missing))
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny(kind == "routed").bytes())
    with gemma4q.load(path, backend=backend, threads=1) as loaded:
        yield loaded


def engine(model, rows=256, sequences=1, wanted=32, context=256) -> Engine:
    """One of its own on the model's backend; the more sequences, the more threads."""
    limits = limits_for(context, sequences, WINDOW)
    limits = replace(limits, rows=rows, wanted=wanted, local_pages=local_pages(WINDOW, sequences, rows))
    kv = model.kv if model.backend.name == "native" else abi.TensorType.F32  # numpy's sums are not fit for rounding
    session = model.backend.load(model.plan, model.weights.tensors, limits, kv, min(sequences, 2), None)
    return Engine(session, Batch(limits, model.plan.width, model.plan.vocab), WINDOW)


def ids(seed, count) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(11, VOCAB, count - 1).tolist()]


def score(engine, prompt) -> np.ndarray:
    """Logits after every position."""
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
    scoring = Scoring(prompt, np.arange(len(prompt)), np.empty((len(prompt), VOCAB), np.float32))
    engine.submit(scoring)
    engine.finish(scoring)
    return scoring.logits


def answer(model, prompt, count=8, options=GREEDY) -> Answer:
    return Answer(Prompt(prompt), model.tokenizer, OutputStream(model.tokenizer, plain=True), options, count, None)


def run(engine, *answers) -> list[list[int]]:
    for each in answers:
        engine.submit(each)
    for each in answers:
        engine.finish(each)
    return [each.tokens for each in answers]


def classes_differ(model) -> bool:
    """Whether a token that was generated is computed otherwise than one that was given."""
    return getattr(model.session, "classes_differ", False)


def same(model, a, b) -> None:
    np.testing.assert_allclose(a, b, atol=0 if model.backend.name == "native" else 2e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 96])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(model, rows):
    same(model, score(engine(model, rows), ids(0, 96)), score(engine(model, wanted=96), ids(0, 96)))


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 63, 64, 65, 130])
def test_tokens_one_by_one_give_the_logits_of_the_prompt_at_every_edge_of_window_and_page(model, length):
    """As generated tokens, or where that makes a difference as short prompts."""
    whole = score(engine(model, wanted=200), ids(1, length + 3))
    generated = not classes_differ(model)
    session = engine(model)
    history = session.cache.open(np.array([0]))
    for start, count in ((0, length), (length, 1), (length + 1, 1), (length + 2, 1)):
        history.extend(count)
        tokens = ids(1, length + 3)[start : start + count]
        want = int(RowFlag.WANT_LOGITS)
        session.batch.fill(
            [Step(tokens, start, *history.tables(start + count), generated=generated and start > 0, want=want)]
        )
        result = session.session.run(session.batch)
        history.commit(np.array(tokens))
        same(model, result.logits[0], whole[start + count - 1])


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 60, 64, 70])
def test_positions_taken_back_leave_no_trace(model, length):
    whole = score(engine(model, wanted=200), ids(1, length + 1))
    session = engine(model)
    history = session.cache.open(np.array([0]))

    def step(tokens):
        history.extend(len(tokens))
        end = history.length + len(tokens)
        session.batch.fill([Step(tokens, history.length, *history.tables(end), want=int(RowFlag.WANT_LOGITS))])
        result = session.session.run(session.batch)
        history.commit(np.array(tokens))
        return result.logits[0]

    step(ids(1, length))
    step(ids(9, 17))
    history.rollback(17)
    same(model, step(ids(1, length + 1)[-1:]), whole[-1])


def test_sequences_together_say_what_each_says_alone(model):
    prompts = [ids(seed, length) for seed, length in enumerate((5, 70, 33, 64, 1))]
    options = [
        GREEDY,
        SamplingOptions(seed=1),
        SamplingOptions(seed=2, top_k=0, min_p=0.01),
        GREEDY,
        SamplingOptions(seed=3),
    ]
    requests = list(zip(prompts, options, strict=True))
    alone = [run(engine(model), answer(model, p, 12, o))[0] for p, o in requests]
    together = run(engine(model, rows=24, sequences=3), *(answer(model, p, 12, o) for p, o in requests))
    assert together == alone


def test_a_step_holds_the_next_token_of_an_answer_and_as_much_of_a_prompt_as_there_is_room_for(model):
    runner = engine(model, rows=40, sequences=3)
    first, second = answer(model, ids(0, 20), 10), answer(model, ids(1, 90), 2)
    runner.submit(first)
    runner.step()
    runner.submit(second)
    runner.step()
    header = runner.batch.header
    assert (len(first.tokens), header["sequences"], header["rows"], header["prompt_rows"]) == (2, 2, 40, 39)


def test_a_resumed_prefix_gives_the_answer_of_a_fresh_start(model):
    runner = engine(model, sequences=2)
    run(runner, answer(model, ids(0, 90), 9))
    for common in (89, 90, 50):
        prompt = ids(0, 90)[:common] + ids(5, 20)[1:]
        again = answer(model, prompt, 9)
        assert run(runner, again) == run(engine(model), answer(model, prompt, 9))
        assert again.stats.reused_tokens == common or common == 50


def test_an_answer_is_part_of_the_prefix_that_later_turns_resume(model):
    runner = engine(model)
    first = answer(model, ids(0, 30), 9)
    run(runner, first)
    later = answer(model, [*ids(0, 30), *first.tokens, *ids(3, 9)], 5)
    run(runner, later)
    reused = 30 if classes_differ(model) else 30 + 8
    assert later.stats.reused_tokens == reused, "the last token of an answer was never computed"
    assert run(engine(model), answer(model, later.prompt.ids, 5)) == [later.tokens]


def test_a_turn_resumes_where_the_last_answer_began_however_long_that_was(model):
    """Far more than the sliding pages there are lie between the two places."""
    if model.backend.name != "native":
        pytest.skip("a thousand steps: for the fast one")
    runner = engine(model, rows=17, context=1024)
    first = answer(model, ids(0, 300), 500, SamplingOptions(seed=1, temperature=3, ignore_eos=True))
    run(runner, first)
    assert runner.limits.local_pages * 64 < len(first.tokens)
    again = answer(model, [*ids(0, 300), 3, 4, 5], 5)
    assert run(runner, again) == run(engine(model, context=1024), answer(model, [*ids(0, 300), 3, 4, 5], 5))
    assert again.stats.reused_tokens == 300


def image(start, count, whole, seed=0) -> Soft:
    vectors = np.random.default_rng(seed).normal(0, 1, (count, 64)).astype(np.float32)
    return Soft(start, vectors, whole)


@pytest.mark.parametrize("rows", [17, 30, 96])
def test_an_image_is_never_cut_and_its_rows_see_its_end(model, rows):
    prompt = Prompt(ids(0, 60), [image(10, 17, whole=True), image(40, 12, whole=True, seed=1)])
    whole = score(engine(model, wanted=60), prompt)
    same(model, score(engine(model, rows=rows, wanted=rows), prompt), whole)
    causal = Prompt(ids(0, 60), [replace(block, whole=False) for block in prompt.soft])
    assert np.abs(score(engine(model, wanted=60), causal)[10] - whole[10]).max() > 1e-3


def test_an_image_does_not_wait_until_others_have_finished(model):
    """It is longer than what a prompt gets of a step that an answer is waiting for."""
    runner = engine(model, rows=BUSY_ROWS + 100, sequences=2, context=640)
    talking = answer(model, ids(0, 20), 100, SamplingOptions(seed=1, temperature=3, ignore_eos=True))
    seeing = answer(model, ids(1, 400), 1)
    seeing.prompt = Prompt(ids(1, 400), [image(20, BUSY_ROWS + 50, whole=True)])
    runner.submit(talking)
    runner.step()
    run(runner, seeing)
    assert not talking.over


def test_a_prefix_with_an_image_is_resumed_for_the_same_image_only(model):
    runner = engine(model)
    for seed, reused in ((0, 0), (0, 59), (1, 10)):
        request = Answer(
            Prompt(ids(0, 60), [image(10, 17, True, seed)]), model.tokenizer,
            OutputStream(model.tokenizer, plain=True), GREEDY, 1, None,
        )  # fmt: skip
        run(runner, request)
        assert request.stats.reused_tokens == reused


def test_an_image_larger_than_a_step_is_refused(model):
    with pytest.raises(Gemma4qError, match="too_big"):
        engine(model, rows=16).submit(Scoring(Prompt(ids(0, 60), [image(10, 17, True)]), np.array([59]), None))


def test_cancelling_one_request_in_the_middle_of_a_step_leaves_the_other_as_it_would_be_alone(model):
    if model.backend.name != "reference":
        pytest.skip("between which two layers C stops is for time to tell")
    runner = engine(model, rows=64, sequences=2)
    steady, doomed = answer(model, ids(0, 20), 10), answer(model, ids(1, 200), 10)
    runner.submit(steady)
    runner.step()
    runner.submit(doomed)
    compute = runner.session.embed

    def embed(op):
        runner.cancel(doomed)
        return compute(op)

    runner.session.embed = embed
    runner.step()
    runner.session.embed = compute
    assert len(steady.tokens) == 1, "the step was stopped between two layers"
    runner.finish(steady)
    assert (doomed.finish, doomed.tokens) == ("cancelled", [])
    assert [steady.tokens] == run(engine(model), answer(model, ids(0, 20), 10))


def test_a_waiting_request_can_be_cancelled(model):
    runner = engine(model)
    first, second = answer(model, ids(0, 20), 3), answer(model, ids(1, 20), 3)
    runner.submit(first)
    runner.submit(second)
    runner.cancel(second)
    runner.finish(first)
    assert (first.finish, second.finish) == ("length", "cancelled")


def test_a_full_context_ends_an_answer_after_its_last_place(model):
    request = answer(model, ids(0, 40), 1000, SamplingOptions(seed=5))
    run(engine(model, context=64), request)
    assert (request.finish, len(request.tokens)) == ("context", 64 - 40 + 1)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(model):
    with pytest.raises(Gemma4qError, match=r"context_length_exceeded: .*65.*64"):
        engine(model, context=64).submit(answer(model, ids(0, 65)))


def test_the_same_seed_says_the_same_and_another_does_not(model):
    def said(seed):
        return run(engine(model), answer(model, ids(0, 10), 20, SamplingOptions(seed=seed)))

    assert said(7) == said(7) != said(8)


def test_an_answer_given_back_as_a_prompt_goes_on_the_same(model):
    """What is drawn depends on seed and position, not on how often was drawn before."""
    if classes_differ(model):
        pytest.skip("a token that is given back is computed otherwise than one that was generated")
    options = SamplingOptions(seed=7)
    whole = run(engine(model), answer(model, ids(0, 10), 20, options))[0]
    assert run(engine(model), answer(model, [*ids(0, 10), *whole[:8]], 12, options)) == [whole[8:]]


def test_a_row_that_is_no_number_ends_its_own_request_only(model):
    """The prompt that fails comes after the answer in the engine's list, and before it in the batch."""
    runner = engine(model, sequences=2)
    good, bad = answer(model, ids(0, 20), 6), answer(model, ids(1, 20), 6)
    runner.submit(good)
    runner.step()
    runner.submit(bad)
    honest = runner.session.run

    def broken(batch):
        result = honest(batch)
        at = np.flatnonzero(batch.rows["position"][: batch.header["rows"]] == 3)
        return replace(result, status=Status.NON_FINITE, bad_row=int(at[0])) if len(at) else result

    runner.session.run = broken
    with pytest.raises(Gemma4qError, match=r"bad_numeric: .* token 3$"):
        runner.finish(bad)
    runner.finish(good)
    assert [good.tokens] == run(engine(model), answer(model, ids(0, 20), 6))


@pytest.mark.parametrize("how", ["the session says so", "the file says so"])
def test_a_changed_model_ends_all_requests_and_takes_no_more(model, how):
    runner = engine(model, sequences=2)
    request = answer(model, ids(0, 20), 6)
    runner.submit(request)
    if how == "the file says so":
        runner.finish(request)
        runner.changed = lambda: True
    else:
        honest = runner.session.run
        runner.session.run = lambda batch: replace(honest(batch), status=Status.MODEL_CHANGED)
        with pytest.raises(Gemma4qError, match="model_changed"):
            runner.finish(request)
    with pytest.raises(Gemma4qError, match="model_changed"):
        runner.submit(answer(model, ids(0, 20)))


def test_a_forked_process_is_refused_in_words(model):
    runner = engine(model)
    runner.process = os.getppid()
    with pytest.raises(Gemma4qError, match=r"unavailable: .*fork"):
        run(runner, answer(model, ids(0, 20)))


def test_biases_masks_and_penalties_reach_the_choice(model):
    free = run(engine(model), answer(model, ids(0, 20), 6))[0]
    forbidden = tuple((token, float("-inf")) for token in set(free))
    assert not set(free) & set(run(engine(model), answer(model, ids(0, 20), 6, GREEDY.but(logit_bias=forbidden)))[0])
    few = np.zeros(-(-VOCAB // 32), np.uint32)
    few[1] = 0b110
    masked = answer(model, ids(0, 20), 6)
    masked.mask = few
    assert set(run(engine(model), masked)[0]) <= {33, 34}
    penalised = run(engine(model), answer(model, ids(0, 20), 6, GREEDY.but(presence_penalty=100)))[0]
    assert len(set(penalised)) == 6


def test_choosing_from_all_logits_says_what_choosing_from_the_best_says(model):
    options = SamplingOptions(seed=4, presence_penalty=0.5)
    some = answer(model, ids(0, 20), 30, options)
    every = answer(model, ids(0, 20), 30, options.but(logprobs=3))
    assert run(engine(model), some) == run(engine(model), every)
    if classes_differ(model):
        pytest.skip("a token that is given is computed otherwise than one that was generated")
    logits = score(engine(model, wanted=100), [*ids(0, 20), *every.tokens])[19:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for row, token, (chosen, best) in zip(expected, every.tokens, every.logprobs, strict=True):
        assert abs(chosen - row[token]) < 1e-3
        assert [i for i, _ in best] == np.argsort(-row, kind="stable")[:3].tolist()


def test_interrupting_a_step_leaves_an_engine_that_goes_on(model):
    runner = engine(model)
    request = answer(model, ids(0, 20))
    honest = runner.session.run

    def interrupted(batch):
        raise KeyboardInterrupt

    runner.session.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(runner, request)
    runner.session.run = honest
    assert request.finish == "cancelled"
    assert run(runner, answer(model, ids(0, 20))) == run(engine(model), answer(model, ids(0, 20)))
