"""The public interface: the numbers of transformers, and text in and text out the way a program uses it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gemma4q
from gemma4q import abi
from gemma4q.engine.memory import available_memory
from gemma4q.engine.prompt import Prompt, Soft
from gemma4q.engine.sequence import Scoring
from gemma4q.errors import Gemma4qError

GOLDEN = Path(__file__).parent / "data" / "golden"
VARIANTS = ["e2b-like", "e4b-like", "moe-like", "dense-like", "unified-like"]
TWO_WAY = VARIANTS[2:]
BACKENDS = ["reference", "native"]
HELLO = [{"role": "user", "content": "hello"}]


def load(variant, backend="reference", **asked):
    if backend == "native" and abi.lib is None:
        pytest.skip(str(abi.missing))
    return gemma4q.load(GOLDEN / f"{variant}.gguf", backend=backend, **{"threads": 1, "context": 512} | asked)


@pytest.fixture(scope="module")
def model():
    with load("e2b-like", sequences=2) as loaded:
        yield loaded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(variant, backend):
    golden = np.load(GOLDEN / f"{variant}.npz")
    with load(variant, backend) as model:
        assert np.abs(model.logits(golden["ids"]) - golden["logits"]).max() < 1e-3
        some = model.logits(golden["ids"], wanted=[70, 3])
        assert np.abs(some - golden["logits"][[3, 70]]).max() < 1e-3
        answer = model.generate(golden["ids"], max_tokens=24, temperature=0, token_mask=False, ignore_eos=True)
        answer.text()
        assert answer.tokens == golden["greedy"].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", TWO_WAY)
def test_images_are_seen_as_transformers_sees_them(variant, backend):
    golden = np.load(GOLDEN / f"{variant}.npz")
    edges = np.flatnonzero(np.diff(golden["vision_type"], prepend=0, append=0)).reshape(-1, 2)
    counts = np.cumsum([0, *(edges[:, 1] - edges[:, 0])])
    soft = [
        Soft(int(a), golden["vision_soft"][i:j], whole=True)
        for (a, _), i, j in zip(edges, counts, counts[1:], strict=False)
    ]
    with load(variant, backend) as model:
        prompt = Prompt(golden["vision_ids"], soft)
        scoring = Scoring(prompt, np.arange(len(prompt)), np.empty((len(prompt), model.plan.vocab), np.float32))
        model.engine.submit(scoring)
        model.engine.finish(scoring)
    assert np.abs(scoring.logits - golden["vision_logits"]).max() < 1e-3


def test_an_iterator_gives_the_text_in_pieces_and_text_gives_it_whole(model):
    pieces = list(model.generate("hello", max_tokens=12, seed=3))
    whole = model.generate("hello", max_tokens=12, seed=3)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text() == whole.text()
    assert whole.finish == "length" and len(whole.tokens) == 12 == whole.stats.generated_tokens
    assert whole.text() == model.detokenize(whole.tokens)


def test_a_text_begins_with_bos_and_ids_are_taken_as_they_are(model):
    ids = model.tokenize("hello", bos=True)
    assert ids[0] == 2 and model.generate("hello", max_tokens=1).stats.prompt_tokens == len(ids)
    a, b = (model.generate(prompt, max_tokens=5, temperature=0) for prompt in ("hello", ids))
    assert a.text() == b.text()


def test_a_stop_string_is_cut_off_and_named(model):
    whole = model.generate("hello", max_tokens=12, seed=3).text()
    cut = model.generate("hello", max_tokens=12, seed=3, stop=["never", whole[4:6]])
    assert cut.text() == whole[: whole.index(whole[4:6])]
    assert (cut.finish, cut.stop) == ("stop", whole[4:6])


def test_an_end_token_ends_the_answer_and_prints_nothing(model):
    answer = model.generate("hello", max_tokens=5, logit_bias={"106": 100})
    assert (answer.text(), answer.finish, answer.tokens) == ("", "stop", [106])


def test_ignoring_the_end_goes_on(model):
    answer = model.generate("hello", max_tokens=5, logit_bias={"106": 100}, ignore_eos=True)
    answer.text()
    assert (answer.finish, len(answer.tokens)) == ("length", 5)


def test_an_answer_that_repeats_itself_is_ended(model):
    answer = model.generate("hello", logit_bias={"75": 100})
    answer.text()
    assert (answer.finish, len(answer.tokens)) == ("loop", 256)


def test_masked_tokens_are_no_answer_unless_asked_for(model):
    bias = {"0": 100, "75": 50}
    assert model.generate("hello", max_tokens=1, logit_bias=bias).text() == model.detokenize([75])
    unmasked = model.generate("hello", max_tokens=1, logit_bias=bias, token_mask=False)
    unmasked.text()
    assert unmasked.tokens == [0]


def test_thoughts_and_answer_come_apart(model):
    """<|channel>thought, newline, one token, <channel|>, one token, then the end: all forced, one after the other."""
    wanted = [100, *model.tokenize("thought\n"), 75, 101, 72, 106]
    answer = model.chat(HELLO, thinking=True, max_tokens=20)
    forced = iter(wanted)
    take = answer._answer.take

    def steer(result, row, position):
        result.top_ids[row, 0], result.top_values[row, 0] = next(forced), 100
        take(result, row, position)

    answer._answer.take = steer
    events = list(answer.events())
    assert answer.tokens == wanted
    assert "".join(e.text for e in events if e.kind == "thought") == model.detokenize([75])
    assert answer.text() == model.detokenize([72]) and answer.thoughts() == model.detokenize([75])


def test_a_second_turn_computes_only_what_is_new(model):
    first = model.chat(HELLO, max_tokens=30, seed=1)
    turns = [*HELLO, {"role": "assistant", "content": first.text()}, {"role": "user", "content": "hello again"}]
    second = model.chat(turns, max_tokens=10, seed=2)
    text = second.text()
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    with load("e2b-like") as fresh:
        assert fresh.chat(turns, max_tokens=10, seed=2).text() == text


def test_a_system_text_is_the_first_message(model):
    spelled = [{"role": "system", "content": "be"}, *HELLO]
    assert model.render(HELLO, system="be") == model.render(spelled)
    with pytest.raises(Gemma4qError, match="bad_message"):
        model.chat(spelled, system="also")


def test_answers_take_turns_also_where_only_one_may_run():
    with load("e2b-like") as model:
        together = zip(
            model.generate("hello", max_tokens=6, seed=1), model.generate("user", max_tokens=6, seed=2), strict=False
        )
        a, b = zip(*together, strict=True)
        assert "".join(a) == model.generate("hello", max_tokens=6, seed=1).text()[: len("".join(a))]
        assert "".join(b) == model.generate("user", max_tokens=6, seed=2).text()[: len("".join(b))]


def test_threads_share_a_model(model):
    def ask(seed):
        return model.generate(f"hello {seed % 3}", max_tokens=10, seed=seed).text()

    expected = [ask(seed) for seed in range(6)]
    found = [""] * 6

    def work(seed):
        found[seed] = ask(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_cancelling_keeps_what_was_said(model):
    answer = model.generate("hello", seed=3)
    events = answer.events()
    first = next(events).text
    answer.cancel()
    assert answer.text().startswith(first) and answer.finish == "cancelled"


def test_an_answer_nobody_reads_any_more_makes_room(model):
    for _ in range(5):
        next(iter(model.generate("hello", seed=3)))
    model.generate("hello", max_tokens=1).text()
    assert not model.engine.running and not model.engine.waiting


@pytest.mark.parametrize(
    "kind, ask",
    [
        ("bad_token", lambda m: m.generate([2, 512])),
        ("bad_token", lambda m: m.logits([-1])),
        ("bad_option", lambda m: m.generate([])),
        ("bad_option", lambda m: m.generate("a", max_tokens=0)),
        ("bad_option", lambda m: m.generate("a", max_tokens=1.5)),
        ("bad_option", lambda m: m.generate("a", temprature=1)),
        ("bad_option", lambda m: m.generate("a", temperature=-1)),
        ("bad_option", lambda m: m.generate("a", stop=[""])),
        ("bad_option", lambda m: m.logits([2, 3], wanted=[2])),
        ("bad_message", lambda m: m.chat([{"role": "nobody", "content": ""}])),
        ("bad_tools", lambda m: m.chat(HELLO, tools=[{"type": "function"}])),
        ("context_length_exceeded", lambda m: m.generate([2] * 513)),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(model, kind, ask):
    with pytest.raises(Gemma4qError, match=kind):
        ask(model)


def test_logits_that_do_not_fit_are_refused_before_they_are_allocated(model, monkeypatch):
    monkeypatch.setattr("gemma4q.engine.model.available_memory", lambda: (72 * 512 * 4 - 1, "a test's"))
    with pytest.raises(Gemma4qError, match=r"too_big.*72 rows"):
        model.logits([2] * 72)
    assert model.logits([2] * 72, wanted=[]).shape == (0, 512)
    assert available_memory()[0] > 0


def test_a_file_that_was_written_to_is_not_asked_any_more(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes((GOLDEN / "e2b-like.gguf").read_bytes())
    with gemma4q.load(path, backend="reference", threads=1) as model:
        model.generate("hello", max_tokens=2).text()
        os.utime(path, ns=(1, 1))
        with pytest.raises(Gemma4qError, match="model_changed"):
            model.generate("hello", max_tokens=2)


def test_a_closed_model_says_so():
    model = load("e2b-like")
    waiting = model.generate("hello")
    model.close()
    model.close()
    assert waiting.finish == "cancelled"
    with pytest.raises(Gemma4qError, match="closed"):
        model.generate("hello")


def test_importing_costs_nothing_until_it_is_used():
    code = "import sys, gemma4q; sys.exit('numpy' in sys.modules or not callable(gemma4q.load))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
