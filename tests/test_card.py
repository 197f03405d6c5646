"""The quality card: a file says of itself what `eval` says of it, and is else the file it would be without."""

import json
import os
import re
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from quantized import contents, measured
from terminal import chatty
from tiny import tiny

from gemma4q import Gemma4qError
from gemma4q.abi import TensorType as T
from gemma4q.cli import cli
from gemma4q.convert.convert import planned as converted
from gemma4q.convert.output import Planned, write_files
from gemma4q.convert.split import split
from gemma4q.engine.memory import RUNTIME
from gemma4q.engine.model import Prepared
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.measure import card, quality
from gemma4q.quantize.importance import write as write_importance
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.quantize import planned
from gemma4q.shipped import EVALUATION

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from random import Random

import tiny_hf
from tiny_tasks import draw
from tiny_texts import conversation

pytestmark = pytest.mark.usefixtures("quick_disk")
PREFIX = "gemma4q.quality."
KINDS = ("story", "sums", "tools")


def run(*arguments: object):
    return CliRunner().invoke(cli, [*map(str, arguments)])


def quantized(*arguments: object):
    return run("quantize", *arguments, "-t", 1)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def room(tmp_path_factory, halves) -> Path:
    """Conversations, and both models in Q4_0: with a card, and without."""
    room = tmp_path_factory.mktemp("card")
    random = Random(5)
    talks = [conversation(draw(random, kind, held=True)) for kind in KINDS for _ in range(3)]
    (room / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    for model in ("tiny", "tiny-moe"):
        source, on = halves / f"{model}-F16.gguf", ("--card", "--card-texts", room / "talks.jsonl")
        for name, more in (("plain", ()), ("card", on)):
            done = quantized(source, room / f"{model}-{name}.gguf", "Q4_0", *more)
            assert (done.exit_code, done.stderr.count("Error")) == (0, 0), done.output
    return room


# -- What it says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_a_card_says_what_eval_says_of_the_two_files(room, halves, model):
    path, base = room / f"{model}-card.gguf", halves / f"{model}-F16.gguf"
    done = run("eval", path, "--against", base, "-f", room / "talks.jsonl", "--json", "-t", 1)
    found = json.loads(done.stdout)
    keys = {k.removeprefix(PREFIX): v for k, v in open_gguf(path).metadata.items() if k.startswith(PREFIX)}
    kinds = [kind.decode() for kind in keys["kinds"]]
    assert kinds == list(found["kinds"]) == list(KINDS)
    for prefix, rows in (("", [found["all"]]), ("kinds.", [found["kinds"][kind] for kind in kinds])):
        for count in ("texts", "tokens"):
            assert np.ravel(keys[prefix + count]).tolist() == [row[count] for row in rows]
        for key, name in (("kl_divergence", "divergence"), ("same_top_1", "same_top")):
            for edge, place in (("", "value"), (".low", "low"), (".high", "high")):
                wanted = [row[name][place] for row in rows]
                assert np.ravel(keys[prefix + key + edge]) == pytest.approx(wanted, rel=1e-6), key
    assert 0 < keys["kl_divergence.low"] < keys["kl_divergence"] < keys["kl_divergence.high"] < 1
    assert keys["base_sha256"] == found["base"]["sha256"] == digest(base)
    assert keys["conversations_sha256"] == digest(room / "talks.jsonl")
    assert [keys[name] for name in ("recipe", "base", "base_type", "conversations")] == [
        "Q4_0", base.name, "F16", "talks.jsonl",
    ]  # fmt: skip
    assert keys["tool"].startswith(f"gemma4q {found['build']['gemma4q']}") and "imatrix" not in keys


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_without_its_card_a_file_is_byte_for_byte_the_plain_one(room, tmp_path, model):
    plain, carded = (open_gguf(room / f"{model}-{name}.gguf") for name in ("plain", "card"))
    assert contents(plain) == contents(carded)
    rest = {key: value for key, value in carded.metadata.items() if not key.startswith(PREFIX)}
    assert len(rest) == len(carded.metadata) - 24
    write_gguf(tmp_path / "m.gguf", rest, [TensorData.copy(t) for t in carded.tensors.values()], carded.types)
    assert (tmp_path / "m.gguf").read_bytes() == plain.path.read_bytes()


def test_show_prints_the_card_and_not_its_keys(room):
    text = run("show", room / "tiny-card.gguf").stdout
    found = json.loads(run("show", room / "tiny-card.gguf", "--json").stdout)["quality"]
    value, low, high = found["all"]["divergence"].values()
    line = rf"^all +9 +{found['all']['tokens']} +{value:.6f} ± {(high - low) / 2:.6f} +\d+\.\d\d ± \d+\.\d\d$"
    assert re.search(line, text, re.MULTILINE) and PREFIX not in text
    assert "quality of Q4_0, without importance, beside tiny-F16.gguf (F16, sha256 " in text
    assert list(found["kinds"]) == list(KINDS) and found["imatrix"] is None
    plain = run("show", room / "tiny-plain.gguf")
    assert "quality" not in plain.stdout and json.loads(run("show", room / "tiny-plain.gguf", "--json").stdout)[
        "quality"
    ] is None  # fmt: skip


def test_the_command_says_what_it_wrote(room, halves, tmp_path):
    arguments = (halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", "--card", "--card-texts", room / "talks.jsonl")
    done = quantized(*arguments)
    shown = run("show", tmp_path / "q.gguf").stdout
    assert done.exit_code == 0 and done.stdout.endswith(shown[shown.index("quality of") :])
    found = json.loads(quantized(*arguments, "--json").stdout)
    kept = json.loads(run("show", tmp_path / "q.gguf", "--json").stdout)["quality"]
    assert found["quality"]["all"]["divergence"] == pytest.approx(kept["all"]["divergence"], rel=1e-6)
    assert found["files"][0]["bytes"] == (tmp_path / "q.gguf").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_conversations_that_ship_are_what_is_measured_on(halves, tmp_path, model):
    done = quantized(halves / f"{model}-F16.gguf", tmp_path / "q.gguf", "Q4_K_M", "--card")
    found = card.read(open_gguf(tmp_path / "q.gguf").metadata)
    assert done.exit_code == 0 and len(found.kinds) == 7 and 0 < found.all["divergence"]["value"] < 1
    assert (found.conversations, found.conversations_sha256) == ("gemma4q/evaluation.jsonl", digest(EVALUATION))


def test_recipe_importance_and_types_by_hand_are_named(room, halves, tmp_path, monkeypatch):
    old = (T.Q4_0, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0)
    monkeypatch.setattr("gemma4q.quantize.recipe.Recipe.errors.__defaults__", (lambda done, total: None, old))
    monkeypatch.setattr("gemma4q.quantize.allocate.MOST_MEASURED", 2)
    source, out, on = halves / "tiny-F16.gguf", tmp_path / "q.gguf", ("--card", "--card-texts", room / "talks.jsonl")
    write_importance(tmp_path / "i.gguf", measured(open_gguf(source)))
    by = ("--imatrix", tmp_path / "i.gguf", "--exclude-weights", "attn_q")
    done = quantized(source, out, "Q5_K_M", "--recipe", "gemma", *on, *by)
    found = card.read(open_gguf(out).metadata)
    assert done.exit_code == 0 and found.recipe == "gemma, no larger than Q5_K_M" and "KL divergence" in done.stderr
    assert (found.imatrix, found.imatrix_sha256) == ("i.gguf, for some tensors", digest(tmp_path / "i.gguf"))
    assert open_gguf(out).metadata["gemma4q.recipe"] == "gemma" and "weighed by i.gguf, for some" in done.stdout
    done = quantized(source, out, "--target-size", "2MB", "--budget", 0, "--tensor-type", "attn_k=q8_0", *on)
    assert done.exit_code == 0 and card.read(open_gguf(out).metadata).recipe == "gemma, 2MB, some types by hand"
    assert 1_940_000 < out.stat().st_size <= 2_000_000, "the card is part of the file"


def test_a_kind_of_one_text_has_no_interval(room, halves, tmp_path):
    (tmp_path / "one.jsonl").write_text((room / "talks.jsonl").read_text().splitlines()[0])
    done = quantized(
        halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", "--card", "--card-texts", tmp_path / "one.jsonl"
    )
    assert done.exit_code == 0 and re.search(
        r"^story +1 +\d+ +0\.\d{6} ± \? +\d+\.\d\d ± \?$", done.stdout, re.MULTILINE
    )
    metadata = open_gguf(tmp_path / "q.gguf").metadata
    assert np.isnan(metadata[PREFIX + "kl_divergence.low"]) and metadata[PREFIX + "kl_divergence"] > 0
    json.loads(run("show", tmp_path / "q.gguf", "--json").stdout, parse_constant=pytest.fail)


# -- Which file has it -----------------------------------------------------------------------------------------


def test_a_file_that_is_quantised_again_has_no_old_card(room, tmp_path):
    for source, name, keys in ((room / "tiny-card.gguf", "Q8_0", 0), (room / "tiny-card.gguf", "COPY", 24)):
        done = quantized(source, tmp_path / "q.gguf", name, "--allow-requantize")
        assert done.exit_code == 0
        assert sum(key.startswith(PREFIX) for key in open_gguf(tmp_path / "q.gguf").metadata) == keys
    model = open_gguf(room / "tiny-card.gguf")
    tensors = [TensorData.copy(tensor) for tensor in model.tensors.values()]
    write_gguf(tmp_path / "m.gguf", model.metadata | {"gemma4q.recipe": "gemma"}, tensors, model.types)
    quantized(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q5_0", "--allow-requantize")
    assert "gemma4q.recipe" not in open_gguf(tmp_path / "q.gguf").metadata


def test_a_card_is_measured_and_not_set_by_hand(room, halves, tmp_path):
    lie = ("--override-kv", f"{PREFIX}kl_divergence=str:none", "--override-kv", f"{PREFIX}praise=str:best")
    on = ("--card", "--card-texts", room / "talks.jsonl")
    quantized(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", *lie, *on)
    assert (tmp_path / "q.gguf").read_bytes() == (room / "tiny-card.gguf").read_bytes()


def test_parts_of_a_file_keep_its_card(room, tmp_path):
    split(room / "tiny-card.gguf", tmp_path / "m.gguf", 500_000)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 2 and run("show", parts[0]).stdout.count("quality of Q4_0") == 1


# -- While it is made ------------------------------------------------------------------------------------------


def test_an_interrupt_while_measuring_leaves_the_file_that_was_there(room, halves, tmp_path, monkeypatch):
    out, seen = tmp_path / "q.gguf", []
    out.write_bytes((room / "tiny-plain.gguf").read_bytes())

    def interrupted(*_: object, **__: object) -> None:
        part = tmp_path / "q.gguf.part"
        seen.append((card.read(open_gguf(part).metadata), part.stat().st_size))
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "evaluate", interrupted)
    done = quantized(halves / "tiny-F16.gguf", out, "Q4_0", "--card", "--card-texts", room / "talks.jsonl")
    assert done.exit_code == 130 and os.listdir(tmp_path) == ["q.gguf"]
    assert out.read_bytes() == (room / "tiny-plain.gguf").read_bytes()
    ((unfinished, size),) = seen
    assert unfinished.all["divergence"] == {"value": None, "low": None, "high": None}
    assert size == (room / "tiny-card.gguf").stat().st_size


def test_a_source_that_was_replaced_meanwhile_is_not_what_it_is_compared_with(room, halves, tmp_path):
    source = tmp_path / "m.gguf"
    source.write_bytes((halves / "tiny-F16.gguf").read_bytes())
    plan = planned(source, tmp_path / "q.gguf", mixture("Q4_0"))
    found = quality.Quality(plan, quality.Named.after(room / "talks.jsonl"), "Q4_0", threads=1)
    (tmp_path / "other").write_bytes(source.read_bytes())
    os.replace(tmp_path / "other", source)
    with pytest.raises(Gemma4qError, match=r"^model_changed: .*m\.gguf is no longer what was quantised"):
        found.carded(plan).write(late=lambda path: found.measure(path).keys())
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(
    "late, length", [({"a": 1.0}, True), ({"a": 7}, True), ({"a": "text" * 9}, False), ({"b" * 40: 1.0}, False)]
)
def test_keys_known_late_take_the_place_of_others_as_long(tmp_path, late, length):
    data = [TensorData.of("t", T.F32, (2,), np.arange(2, dtype="f4"))]
    file = Planned(tmp_path / "m.gguf", {"a": 0.0, "z": "end"}, {}, data)
    if length:
        write_files([file], [], late=lambda path: late)
        found = open_gguf(tmp_path / "m.gguf")
        assert found.metadata == {"a": late["a"], "z": "end"} and found.tensors["t"].data.nbytes == 8
    else:
        with pytest.raises(ValueError, match="as many bytes"):
            write_files([file], [], late=lambda path: late)
        assert not list(tmp_path.iterdir())


# -- Memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "F32"])
def test_memory_that_a_file_will_take_is_known_before_it_is_there(halves, tmp_path, name):
    plan = planned(halves / "tiny-moe-F16.gguf", tmp_path / "q.gguf", mixture(name))
    before = quality.memory_of(Prepared(plan.gguf.path, threads=2), plan, 300)
    plan.write()
    after = Prepared(tmp_path / "q.gguf", threads=2).memory_plan(300)
    assert before.entries == tuple(entry for entry in after.entries if entry.name != RUNTIME)
    assert before.limits == after.limits


def test_memory_for_one_model_only_is_refused_before_the_work(room, halves, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "available_memory", lambda threads: (2 << 20, "a test's"))
    monkeypatch.setattr("gemma4q.quantize.quantize.Quantization.write", pytest.fail)
    for more in ((), ("--dry-run",), ("--recipe", "gemma")):
        done = quantized(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", "--card", *more)
        assert done.exit_code == 1 and done.stderr.startswith("error: too_big: both models take ")
        assert "leave out --card" in done.stderr and not list(tmp_path.iterdir())


# -- What cannot have one --------------------------------------------------------------------------------------


def test_what_cannot_have_a_card_is_said_before_the_work(room, halves, tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4q.quantize.quantize.Quantization.write", pytest.fail)
    source, out, texts = halves / "tiny-F16.gguf", tmp_path / "q.gguf", room / "talks.jsonl"
    (tmp_path / "in").mkdir()
    parts = split(source, tmp_path / "in/m.gguf", 2_000_000)
    (tmp_path / "in/mute.gguf").write_bytes(chatty().replace(b"<|turn>", b"<|tern>"))
    (tmp_path / "in/bare.gguf").write_bytes(chatty().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"))
    (tmp_path / "in/void.gguf").write_bytes(chatty().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenX"))
    with converted(
        tiny_hf.make("e2b-assistant", tmp_path / "in/hf"), tmp_path / "in/drafter.gguf", "bf16"
    ) as conversion:
        conversion.write()
    talk = json.loads(texts.read_text().splitlines()[0])
    (tmp_path / "in/many.jsonl").write_text("".join(json.dumps(talk | {"kind": f"k{i}"}) + "\n" for i in range(101)))
    for arguments, wanted in (
        ((parts[0], out, "Q8_0", "--keep-split", "--card"), "bad_option: a card is measured of one file, not of "),
        ((tmp_path / "in/mute.gguf", out, "Q8_0", "--card"), "missing_key: this model cannot chat ("),
        (
            (tmp_path / "in/bare.gguf", out, "Q8_0", "--card"),
            "missing_key: this model cannot chat (it has no tokenizer.",
        ),
        (
            (tmp_path / "in/drafter.gguf", out, "Q8_0", "--card"),
            f"bad_arch: {tmp_path / 'in/drafter.gguf'} is an assist",
        ),
        ((tmp_path / "in/void.gguf", out, "Q8_0", "--card"), "missing_key: tokenizer.ggml.tokens"),
        ((source, out, "Q8_0", "--card", "--card-texts", source), "bad_text: "),
        ((source, out, "Q8_0", "--card", "--card-texts", tmp_path / "none"), "io: "),
        ((source, out, "Q8_0", "--card", "--card-texts", tmp_path / "in/many.jsonl"), "bad_text: there are 101 kinds"),
    ):
        for more in ((), ("--dry-run",)):
            done = quantized(*arguments, "--allow-requantize", *more)
            assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.output
            assert done.stderr.startswith(f"error: {wanted}")
    for arguments, wanted in (
        (
            (source, out, "COPY", "--card"),
            "COPY changes no tensor: it takes no types, no --recipe, no --imatrix and no",
        ),
        ((source, out, "Q8_0", "--card-texts", texts), "--card-texts says what a card is measured on: say --card too"),
    ):
        done = quantized(*arguments)
        assert (done.exit_code, done.stdout) == (2, "") and wanted in done.stderr
    assert os.listdir(tmp_path) == ["in"]


def test_a_dry_run_has_room_for_the_card_and_writes_nothing(room, halves, tmp_path):
    on = ("--card", "--card-texts", room / "talks.jsonl", "--dry-run", "--json")
    found = json.loads(quantized(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", *on).stdout)
    assert found["bytes"] == (room / "tiny-card.gguf").stat().st_size and "quality" not in found
    assert not list(tmp_path.iterdir())


# -- Cards of others -------------------------------------------------------------------------------------------

UNKNOWN = {"value": 0.5, "low": None, "high": float("inf")}
ROW = {"texts": 3, "tokens": 40, "divergence": UNKNOWN, "same_top": {"value": 0.5, "low": 0.25, "high": 1.0}}
SOUND = card.Card("t", "Q4_0", "b", "F16", "0" * 64, "c", "0" * 64, "i", "0" * 64, ROW, {"chat": ROW, "long": ROW})


def model_with(path: Path, keys: dict[str, object]) -> Path:
    path.write_bytes(tiny().bytes())
    model = open_gguf(path)
    data = [TensorData.copy(tensor) for tensor in model.tensors.values()]
    write_gguf(path, model.metadata | {PREFIX + key: value for key, value in keys.items()}, data, model.types)
    return path


def test_a_card_is_read_as_it_was_written(tmp_path):
    keys = {key.removeprefix(PREFIX): value for key, value in SOUND.keys().items()}
    found = card.read(open_gguf(model_with(tmp_path / "m.gguf", keys)).metadata)
    known = ROW | {"divergence": UNKNOWN | {"high": None}}
    assert found == replace(SOUND, all=known, kinds={"chat": known, "long": known})
    assert card.read({"general.name": "gemma4q.quality."}) is None
    empty = replace(SOUND, all=quality._counted([]), kinds=dict.fromkeys(SOUND.kinds, quality._counted([])))
    assert [np.array(v).nbytes for v in empty.keys().values()] == [np.array(v).nbytes for v in SOUND.keys().values()]


@pytest.mark.parametrize(
    "key, value",
    [
        *(("tool", value) for value in (None, 7, 1.5, True, ["a"], "x" * 5000, "\x1b[31mred\n\u202e\x00")),
        *(
            ("kinds", value)
            for value in (None, 3, "chat", [], ["a"] * 200, ["a", "a"], [b"\xff\x1b", "b"], ["a b\n", "c"])
        ),
        *(("kinds", value) for value in (np.zeros(2, "f4"), ["chat"], ["x" * 5000, "y"], ["chat", "long", "more"])),
        *(("kl_divergence", value) for value in (None, float("nan"), float("inf"), -1.0, True, 3, "no", ["a"], 3e38)),
        *(("same_top_1.high", value) for value in (2.0, float("-inf"), np.ones(1, "f4"), "\x1b")),
        *(("texts", value) for value in (None, 0, 1.5, True, "\x1b[2J", np.ones(2, "u4"), 4294967295)),
        *(("kinds.kl_divergence", value) for value in (None, "\x1b", 1.0, np.zeros(1 << 20, "f4"), np.ones(2, "u4"))),
        *(("kinds.tokens", value) for value in (np.ones(2, "f4"), np.zeros(2, "i4"), np.ones(2, "?"), ["a", "b"])),
        ("unknown.\x7e", "\x1b"),
        ("imatrix", 5),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_no_card_makes_show_fail_or_drives_a_terminal(tmp_path, key, value):
    keys = {key.removeprefix(PREFIX): value for key, value in SOUND.keys().items()} | {key: value}
    path = model_with(tmp_path / "m.gguf", {key: value for key, value in keys.items() if value is not None})
    done, found = run("show", path), run("show", path, "--json")
    assert (done.exit_code, found.exit_code) == (0, 0), done.stderr + found.stderr
    for text in (done.stdout, done.stderr, found.stdout, found.stderr):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text) and len(text) < 100_000
    shown = json.loads(found.stdout, parse_constant=pytest.fail)["quality"]
    assert ("quality of " in done.stdout) == bool(shown) != ("this card cannot be read" in done.stdout)
    assert found.stderr.count("this card cannot be read") == (not shown)


def test_a_file_with_a_hostile_card_can_be_quantised(room, tmp_path):
    path = model_with(tmp_path / "m.gguf", {"kl_divergence": "\x1b", "kinds": 5})
    assert quantized(path, tmp_path / "q.gguf", "Q8_0", "--allow-requantize").exit_code == 0
    assert not [key for key in open_gguf(tmp_path / "q.gguf").metadata if key.startswith(PREFIX)]
