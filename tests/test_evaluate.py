"""`gemma4q eval`: numbers are those of transformers' logits, worked out apart; and the command as people meet it."""

import json
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, quantized
from click.testing import CliRunner
from terminal import GEMMA4Q, chatty

from gemma4q.abi import TensorType
from gemma4q.cli import cli
from gemma4q.convert.convert import planned
from gemma4q.engine.memory import MB, WEIGHTS, Entry, MemoryPlan, limits_for
from gemma4q.errors import Gemma4qError
from gemma4q.measure import evaluate, logits_file, texts
from gemma4q.measure.texts import Passage

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from random import Random

from tiny_tasks import TASKS, draw
from tiny_texts import conversation

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "tests/data/trained"
E2B, E4B = (str(GOLDEN / f"{name}-like.gguf") for name in ("e2b", "e4b"))
ERROR_LINE = re.compile(r"error: [a-z_0-9]+: .+\n")
KINDS = ("copy", "sums", "tools", "story")
NUMBERS = re.compile(r"\d")


def run(*arguments: object):
    threads = (
        () if "-t" in arguments else ("-t", "1")
    )  # such small models have no use for more, and do not wait for them
    return CliRunner().invoke(cli, ["eval", *map(str, arguments), *threads])


def measured(*arguments: object) -> dict:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """tiny in F32, Q8_0 and Q4_0; conversations of tasks it was not trained on; a file of what F32 says of them."""
    room = tmp_path_factory.mktemp("eval")
    with planned(TRAINED / "tiny", room / "f32.gguf", "f32") as conversion:
        conversion.write()
    for kind in (TensorType.Q8_0, TensorType.Q4_0):
        quantized(room / "f32.gguf", room / f"{kind.name.lower()}.gguf", kind)
    random = Random(1)
    talks = [conversation(draw(random, task, held=True)) for task in KINDS for _ in range(5)]
    (room / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    assert set(KINDS) <= set(TASKS)
    done = run(room / "f32.gguf", "-f", room / "talks.jsonl", "--save-logits", room / "f32.logits")
    assert done.exit_code == 0, done.stderr
    return room


# -- Against transformers --------------------------------------------------------------------------------------


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids that transformers was given, and log-probabilities of what it said, float64 [tokens, vocab]."""
    with np.load(GOLDEN / f"{name}-like.npz") as numbers:
        ids, logits = numbers["ids"], numbers["logits"].astype("f8")
    return ids, logits - np.log(np.exp(logits).sum(1, keepdims=True))


def worked_out(model: str, base: str, first: int) -> dict[str, float]:
    """From transformers' logits alone: what scoring the tokens from `first` on comes to."""
    (ids, q), (_, p) = golden(model), golden(base)
    rows, right = np.arange(first - 1, len(ids) - 1), ids[first:]
    log_p, log_q = p[rows, right], q[rows, right]
    return {
        "perplexity": float(np.exp(-log_q.mean())),
        "base_perplexity": float(np.exp(-log_p.mean())),
        "divergence": float((np.exp(p) * (p - q)).sum(1)[rows].mean()),
        "same_top": float((p.argmax(1) == q.argmax(1))[rows].mean()),
        "delta_p": float((np.exp(log_q) - np.exp(log_p)).mean()),
        "rms": float(np.sqrt(((np.exp(log_q) - np.exp(log_p)) ** 2).mean())),
    }


def check(found: dict, wanted: dict[str, float], rel: float) -> None:
    rms = wanted.pop("rms")
    assert found["delta_p"]["rms"]["value"] == pytest.approx(rms, rel=rel)
    assert {name: found[name]["value"] for name in wanted} == pytest.approx(wanted, rel=rel)


def test_two_golden_models_lie_as_far_apart_as_transformers_says():
    """E4B-like beside E2B-like on the ids of the goldens, whose tokens they share."""
    (ids, _), wanted = golden("e2b"), worked_out("e4b", "e2b", 1)
    found = evaluate.run(E4B, [Passage(ids, 1, "golden", 0)], [0], E2B, context=128)
    assert wanted["divergence"] > 0.01 and 0 <= wanted["same_top"] < 1 and len(found) == len(ids) - 1
    check(evaluate.report(found)["all"], wanted, rel=1e-4)


def test_what_llama_perplexity_would_have_kept_of_a_golden_gives_the_same(tmp_path):
    """transformers' logits in the form that llama.cpp's log_softmax writes, of the second half of a chunk.

    It cuts log-probabilities off 16 nats below the likeliest, which these random models' perplexity feels.
    """
    ids, log_p = golden("e2b")
    rows = log_p[len(ids) // 2 : -1].astype("f4")
    least = np.maximum(rows.min(1), rows.max(1) - 16)
    scale = (rows.max(1) - least) / 65535
    codes = np.rint((np.maximum(rows, least[:, None]) - least[:, None]) / scale[:, None]).astype("<u2")
    parts = [struct.pack("<ff", *pair) + row.tobytes() for *pair, row in zip(scale, least, codes, strict=True)]
    head = b"_logits_" + struct.pack("<iii", len(ids), log_p.shape[1], 1) + ids.astype("<i4").tobytes()
    (tmp_path / "golden.kld").write_bytes(head + b"".join(parts))
    document = measured(E4B, "--kl-divergence-base", tmp_path / "golden.kld")
    wanted = worked_out("e4b", "e2b", len(ids) // 2 + 1)
    cut = np.maximum(rows, least[:, None])[np.arange(len(rows)), ids[len(ids) // 2 + 1 :]]
    wanted["base_perplexity"] = float(np.exp(-cut.astype("f8").mean()))
    check(document["all"], wanted, rel=2e-3)
    assert document["all"]["tokens"] == len(ids) - 1 - len(ids) // 2 and document["scored"] == texts.RAW
    assert document["all"]["divergence"]["low"] is None  # of one text


def test_blocks_of_rows_do_not_change_a_bit(monkeypatch):
    ids, _ = golden("e2b")
    passages = [Passage(ids, 1, "golden", 0), Passage(ids[:50], 30, "golden", 1)]
    whole = evaluate.run(E4B, passages, [0, 1], E2B, context=128, threads=2)
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    parts = evaluate.run(E4B, passages, [0, 1], E2B, context=128, threads=1)
    for name in ("text", "position", "surprise", "base_surprise", "divergence", "same"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.position.tolist() == [*range(1, 72), *range(30, 50)]


# -- Trained models --------------------------------------------------------------------------------------------


def test_a_model_beside_itself_is_exactly_0_and_100_percent(room):
    found = measured(room / "q4_0.gguf", "--against", room / "q4_0.gguf", "-f", room / "talks.jsonl")
    for part in (found["all"], *found["kinds"].values(), *found["depths"]):
        assert set(part["divergence"].values()) <= {0.0, None} and part["same_top"]["value"] == 1.0
        assert part["perplexity_ratio"]["value"] == 1.0 and part["delta_p"]["rms"]["value"] == 0.0


def test_fewer_bits_lie_farther_off(room):
    far = {
        kind: measured(room / f"{kind}.gguf", "--against", room / "f32.gguf", "-f", room / "talks.jsonl")["all"]
        for kind in ("q8_0", "q4_0")
    }
    assert 0 < 10 * far["q8_0"]["divergence"]["value"] < far["q4_0"]["divergence"]["value"]
    assert far["q4_0"]["divergence"]["low"] > far["q8_0"]["divergence"]["high"]
    assert far["q4_0"]["same_top"]["value"] <= far["q8_0"]["same_top"]["value"] <= 1
    assert far["q4_0"]["base_perplexity"] == far["q8_0"]["base_perplexity"]


def test_kinds_and_depths_share_all_tokens_out_among_them(room):
    found = measured(room / "q4_0.gguf", "--against", room / "f32.gguf", "-f", room / "talks.jsonl")
    assert set(found["kinds"]) >= {"copy", "sums", "story"} and found["all"]["texts"] == 20
    for parts in (found["kinds"].values(), found["depths"]):
        assert sum(part["tokens"] for part in parts) == found["all"]["tokens"]
        total = sum(part["tokens"] * part["divergence"]["value"] for part in parts)
        assert total / found["all"]["tokens"] == pytest.approx(found["all"]["divergence"]["value"])
    assert [(part["from"], part["to"]) for part in found["depths"]][:2] == [(0, 127), (128, 255)]
    assert evaluate.depths(1000) == [(0, 127), (128, 255), (256, 511), (512, 1023)]


def test_a_file_says_what_the_model_said_it_was_written_of(room):
    beside = measured(room / "q4_0.gguf", "--against", room / "f32.gguf", "-f", room / "talks.jsonl")
    stored = measured(room / "q4_0.gguf", "--base-file", room / "f32.logits")
    assert stored["scored"] == beside["scored"] == "the model's turns"
    assert stored["base"]["sha256"] == beside["base"]["sha256"] and stored["kinds"].keys() == beside["kinds"].keys()
    for name in ("divergence", "base_perplexity", "delta_p"):
        assert stored["all"][name]["value"] == pytest.approx(beside["all"][name]["value"], rel=1e-2)
    assert stored["all"]["same_top"] == beside["all"]["same_top"]
    assert stored["all"]["perplexity"] == beside["all"]["perplexity"]
    itself = measured(room / "f32.gguf", "--base-file", room / "f32.logits")["all"]
    assert itself["divergence"]["most"] < 1e-6 and itself["same_top"]["value"] == 1


def test_kinds_and_numbers_are_chosen_from_texts_and_from_files_alike(room):
    choice = ("--kinds", "story,copy", "--texts", "2")
    beside = measured(room / "q4_0.gguf", "--against", room / "f32.gguf", "-f", room / "talks.jsonl", *choice)
    stored = measured(room / "q4_0.gguf", "--base-file", room / "f32.logits", *choice)
    assert list(beside["kinds"]) == list(stored["kinds"]) == ["copy", "story"]
    assert [part["texts"] for part in beside["kinds"].values()] == [2, 2]
    assert stored["all"]["perplexity"] == beside["all"]["perplexity"]


def test_all_tokens_are_more_than_the_models_turns(room):
    few = measured(room / "q8_0.gguf", "-f", room / "talks.jsonl", "--kinds", "copy")["all"]
    all_of_them = measured(room / "q8_0.gguf", "-f", room / "talks.jsonl", "--kinds", "copy", "--all-tokens")
    assert all_of_them["all"]["tokens"] > 1.5 * few["tokens"] and all_of_them["scored"] == texts.ALL
    assert all_of_them["all"]["perplexity"]["value"] > few["perplexity"]["value"]


def test_what_ships_is_scored_without_a_file_and_perplexity_is_another_name():
    done = CliRunner().invoke(cli, ["perplexity", "tiny", "--texts", "1", "--kinds", "chat,json"])
    assert done.exit_code == 0 and "gemma4q/evaluation.jsonl" in done.stdout and "perplexity" in done.stdout
    assert "Usage: gemma4q perplexity" in CliRunner().invoke(cli, ["perplexity", "--help"], prog_name="gemma4q").stdout
    assert "perplexity " not in CliRunner().invoke(cli, ["--help"]).stdout


# -- Output ----------------------------------------------------------------------------------------------------


def test_tables_say_what_json_says(room):
    asked = (room / "q4_0.gguf", "--against", room / "f32.gguf", "-f", room / "talks.jsonl")
    text, document = run(*asked).stdout, measured(*asked)
    for kind, found in document["kinds"].items():
        assert re.search(rf"^ {kind} .* {found['divergence']['value']:.6f} ± ", text, re.MULTILINE)
        assert re.search(rf"^ {kind} .* {100 * found['same_top']['value']:.2f} ± ", text, re.MULTILINE)
    assert re.search(r"^ all +20 ", text, re.MULTILINE) and re.search(r"^ 128 … 255 ", text, re.MULTILINE)
    assert "\nmodel:  gemma4q tiny Q4_0 beside gemma4q tiny F32\nscored: the model's turns, of " in text
    assert "95 % interval over texts" in text
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) < 100


def test_json_tells_models_machine_and_how_intervals_were_made(room):
    found = measured(room / "q4_0.gguf", "--base-file", room / "f32.logits")
    assert found["model"]["type"] == "Q4_0" and found["base"]["type"] == "F32" and found["build"]["gemma4q"]
    assert re.fullmatch(r"[0-9a-f]{64}", found["model"]["sha256"]) and "Cochran" in found["interval"]
    assert found["model"]["vocabulary"] == found["base"]["vocabulary"]


def test_memory_is_said_before_anything_runs_and_the_size_of_a_file_too(room, tmp_path):
    out = tmp_path / "x.logits"
    done = run(room / "q4_0.gguf", "-f", room / "talks.jsonl", "--save-logits", out, "--texts", "1")
    assert re.search(
        r"^memory: [\d,]+ MB of memory, beside \d+ MB of weights in files; [\d,]+ MB are there", done.stderr
    )
    size, tokens = re.search(r"will take ([\d.]+) KiB: ([\d,]+) tokens x 1,024 in 16 bits", done.stderr).groups()
    assert out.stat().st_size / 1024 == pytest.approx(float(size), abs=0.01) and NUMBERS.search(tokens)
    with logits_file.open_base(out, 2) as base:
        assert base.header.rows == int(tokens.replace(",", ""))


@pytest.mark.parametrize("name, start", [("far.svg", b"<?xml"), ("far.png", b"\x89PNG"), ("far.pdf", b"%PDF")])
def test_a_comparison_is_drawn(room, tmp_path, name, start):
    pytest.importorskip("matplotlib")
    base = ("--base-file", room / "f32.logits")
    for model in ("q4_0", "f32"):  # the second has next to nothing to show
        done = run(room / f"{model}.gguf", *base, "--plot", tmp_path / name)
        assert done.exit_code == 0 and (tmp_path / name).read_bytes().startswith(start), done.stderr
    if name.endswith("svg"):
        drawn = (tmp_path / name).read_text()
        assert all(f"<!-- {kind} (" in drawn for kind in ("copy", "sums", "story", "all"))


def test_texts_that_do_not_fit_are_left_out_and_said(room):
    done = run(room / "q8_0.gguf", "-f", room / "talks.jsonl", "-c", "60")
    assert done.exit_code == 0 and re.search(r"note: \d+ left out, as they have more than 60 tokens", done.stderr)


def test_plain_text_is_scored_only_on_request_and_with_a_word_about_it(room, tmp_path):
    (tmp_path / "book.txt").write_text("Once there was a fox who lived in a forest. " * 30)
    done = run(room / "q8_0.gguf", "--raw", "-f", tmp_path / "book.txt", "-c", "64", "--chunks", "3")
    assert done.exit_code == 0 and "says little of a model that was tuned on conversations" in done.stderr
    assert re.search(r"^ book +3 +93 ", done.stdout, re.MULTILINE) and "plain text" in done.stdout
    assert "says little" not in run(room / "q8_0.gguf", "-f", room / "talks.jsonl").stderr


def test_four_bits_of_keys_and_values_are_warned_of(room):
    assert "warning: keys and values" in run(room / "q8_0.gguf", "-f", room / "talks.jsonl", "--kv", "q4_0").stderr


# -- Faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (("nowhere.gguf",), "not_found"),
        (("{f32}", "--against", "nowhere.gguf"), "not_found"),
        (("{f32}", "--against", "{readme}"), "not_gguf"),
        (("{f32}", "--base-file", "nowhere"), "io"),
        (("{f32}", "--base-file", "{readme}"), "bad_base"),
        (("{f32}", "--base-file", "{f32}"), "bad_base"),
        (("{f32}", "--against", E2B, "-f", "{talks}"), "bad_base"),
        ((E2B, "--base-file", "{logits}"), "bad_base"),
        (("{mute}",), "missing_key"),
        (("{f32}", "-f", "nowhere.jsonl"), "io"),
        (("{f32}", "-f", "{readme}"), "bad_text"),
        (("{f32}", "-f", "{room}"), "bad_text"),
        (("{f32}", "--raw", "-f", "{short}"), "bad_text"),
        (("{f32}", "--raw", "-f", "{talks}", "-c", "4097"), "bad_option"),
        (("{f32}", "--raw", "-f", "{talks}", "-c", "7"), "bad_option"),
        (("{f32}", "-f", "{talks}", "--kinds", "prose"), "bad_option"),
        (("{f32}", "--base-file", "{logits}", "--kinds", "prose"), "bad_option"),
        (("{f32}", "-f", "{talks}", "-c", "5"), "bad_option"),
        (("{f32}", "-f", "{talks}", "--isa", "nonsense"), "unavailable"),
        (("{f32}", "-f", "{talks}", "-t", "99999"), "bad_option"),
        (("{f32}", "--base-file", "{logits}", "--plot", "x.jpg"), "bad_option"),
        (("{f32}", "--base-file", "{logits}", "--plot", "/no/x.svg"), "io"),
        (("{f32}", "-f", "{talks}", "--save-logits", "/no/x.logits"), "not_found"),
        (("{f32}", "-f", "{talks}", "--save-logits", "{f32}"), "not_logits"),
        (("{f32}", "-f", "{talks}", "--save-logits", "/dev/full"), "not_a_file"),
    ],
)
def test_bad_input_is_one_line(room, arguments, kind):
    names = {"f32": room / "f32.gguf", "logits": room / "f32.logits", "talks": room / "talks.jsonl"}
    names |= {"mute": room / "mute.gguf", "short": room / "short.txt"}
    names["mute"].write_bytes(chatty().replace(b"<|turn>", b"<|tern>"))
    names["short"].write_text("Once there was a fox.")
    done = run(*(a.format(**names, room=room, readme=ROOT / "README.md") for a in arguments))
    lines = [line + "\n" for line in done.stderr.splitlines() if not line.startswith(("memory: ", "note: "))]
    assert done.exit_code == 1 and not done.stdout and ERROR_LINE.fullmatch(lines[-1]), done.stderr
    assert lines[-1].startswith(f"error: {kind}: ")
    assert [line for line in lines if not re.match(r"error: |.* will take ", line)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("m", "--against", "a", "--base-file", "b"),
        ("m", "--against", "a", "--save-logits", "b"),
        ("m", "--base-file", "a", "-f", "b"),
        ("m", "--base-file", "a", "--raw"),
        ("m", "--base-file", "a", "--all-tokens"),
        ("m", "--raw"),
        ("m", "--raw", "-f", "x", "--all-tokens"),
        ("m", "--plot", "x.svg"),
        ("m", "--texts", "0"),
        ("m", "--kinds", ""),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments):
    done = run(*arguments)
    assert done.exit_code == 2 and "Usage:" in done.stderr and not done.stdout


def test_a_damaged_row_ends_the_run_and_names_itself(room, tmp_path):
    damaged = bytearray((room / "f32.logits").read_bytes())
    damaged[-5000] ^= 4
    (tmp_path / "damaged").write_bytes(damaged)
    done = run(room / "q4_0.gguf", "--base-file", tmp_path / "damaged")
    assert done.exit_code == 1 and re.search(r"error: bad_base: .* the checksum of row \d+ differs\n$", done.stderr)


def test_an_interrupt_leaves_no_file(room, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    done = run(room / "q4_0.gguf", "-f", room / "talks.jsonl", "--save-logits", tmp_path / "x.logits")
    assert done.exit_code == 130 and not list(tmp_path.iterdir())


def test_a_file_without_a_template_is_noted(tmp_path):
    (tmp_path / "m.gguf").write_bytes(chatty().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi hi"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}))
    done = run(tmp_path / "m.gguf", "-f", tmp_path / "talk.jsonl")
    assert done.exit_code == 0 and "note: this file has no chat template" in done.stderr


def plan(needed: int, weights: int, have: int) -> MemoryPlan:
    entries = (Entry(WEIGHTS, weights * MB, True, 0), Entry("activations", needed * MB, False, 0))
    return MemoryPlan(limits_for(64, 1, 32), entries, (have * MB, "a test's"))


def test_two_models_that_memory_does_not_hold_are_refused_with_a_remedy():
    """100 MB of memory and 500 MB of weights each; a block of 32 rows of 1,024 tokens takes less than 1 MB."""
    both = ["a", "b"], [plan(100, 500, 1201), plan(100, 500, 1201)], 1024
    assert evaluate.check_memory(*both) == (
        "201 MB of memory, beside 1,000 MB of weights in files; 1,201 MB are there (a test's)"
    )
    with pytest.raises(Gemma4qError, match=r"too_big: both models take .* 1,000 MB of weights.*--save-logits FILE"):
        evaluate.check_memory(["a", "b"], [plan(100, 500, 1200), plan(100, 500, 1200)], 1024)
    evaluate.check_memory(["a", "a"], [plan(100, 500, 701), plan(100, 500, 701)], 1024)  # one file, mapped once
    evaluate.check_memory(["a"], [plan(100, 500, 101)], 1024)  # slow, but possible
    with pytest.raises(Gemma4qError, match=r"too_big: 101 MB of memory.* are needed; 99 MB are there"):
        evaluate.check_memory(["a"], [plan(100, 500, 99)], 1024)


def test_the_program_draws_and_prints_nothing_else(room):
    import subprocess

    command = [*GEMMA4Q, "eval", str(room / "q4_0.gguf"), "--base-file", str(room / "f32.logits"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=os.environ)
    assert done.returncode == 0 and json.loads(done.stdout)["all"]["texts"] == 20
    assert done.stderr.startswith("memory: ") and done.stderr.count("\n") == 1
