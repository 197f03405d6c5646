"""Calibration: what is collected is what the matrices met, as the reference backend computes it, however it is cut.

The oracle runs each text on its own through the whole plan, op by op, keeps what each puts out, and adds row by row.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from cases import GOLDEN, GOLDENS, ISAS, Model, Runner, step
from terminal import GEMMA4Q
from tiny import tiny

from gemma4q.abi import OpCode
from gemma4q.backends.reference import Reference
from gemma4q.engine.model import kv_type
from gemma4q.errors import Gemma4qError
from gemma4q.measure.calibration import CHUNK, Calibration, continued, headless, meetings
from gemma4q.measure.texts import conversations, passages
from gemma4q.plan.batch import Limits
from gemma4q.plan.fuse import MATRICES
from gemma4q.plan.plan import Op
from gemma4q.quantize.importance import Entry, Importance, read, write
from gemma4q.shipped import CALIBRATION, shipped
from gemma4q.text import chat

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from tiny_tasks import TASKS, draw
from tiny_texts import conversation

EXACT, CLOSE, ROUNDED = 1e-6, 1e-5, 5e-3  # of a column's sum, relative to the largest
LIMITS = Limits(rows=256, wanted=256, sequences=1, context=256, global_pages=8, local_pages=8)


def texts(vocab: int, lengths=(70, 1, 33, 100, 5, 64), seed: int = 5) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(5, vocab, length).tolist() for length in lengths]


def oracle(path: Path, read: list[list[int]], backend: str | Reference, isa: str | None = None) -> dict:
    """Sums float64 [n, cols] and counts [n] by tensor, from every op's output as it comes, in the whole plan."""
    model, found = Model.open(path), {}
    kv = kv_type("auto", {name: tensor.type for name, tensor in model.tensors.items()})
    runner = Runner(model, backend, isa, kv=kv, limits=LIMITS)
    for ids in read:
        runner.batch.fill([step(ids, pages=range(4))])
        outputs, before = {}, {}
        for number, op in enumerate(runner.session.plan.ops):
            runner.session.run(runner.batch, number, number + 1)
            if op.out is not None and op.code not in (OpCode.GROUP, OpCode.QUANTIZE):
                outputs[op.out] = runner.session.read(op.out.name)[: len(ids)].copy()
            if op.code == OpCode.QUANTIZE:
                before[op.out] = op.inputs[0]
            if op.code in MATRICES:
                x = outputs[before.get(op.inputs[0], op.inputs[0])].astype(np.float64)
                add(found, op, x, outputs.get(op.inputs[1]) if op.code != OpCode.MATMUL else None, model.tensors)
    return found


def add(found: dict, op: Op, x: np.ndarray, route: np.ndarray | None, tensors) -> None:
    """What the op's matrices meet, row by row and expert by expert."""
    for weight in op.weights:
        shape = tensors[weight.tensor].shape
        n = shape[0] if len(shape) == 3 else 1
        sums, counts = found.setdefault(weight.tensor, (np.zeros((n, shape[-1])), np.zeros(n, int)))
        if weight.first:  # the tensor's first rows met the same
            continue
        for row, values in enumerate(x):
            chosen = route[row, : op.args["used"]] if n > 1 else [0]
            for slot, expert in enumerate(chosen):
                own = values.reshape(len(chosen), -1)[slot] if op.code == OpCode.EXPERTS_DOWN else values
                sums[expert] += own**2
                counts[expert] += 1


def collected(path: Path, read: list[list[int]], chunk: int = 128, **options) -> Importance:
    with Calibration(path, chunk=chunk, **options) as calibration:
        *_, found = calibration.run(calibration.chunks(read), Importance({}))
    return found


def compare(found: Importance, wanted: dict, bound: float) -> None:
    assert set(found.entries) == set(wanted)
    for name, (sums, counts) in wanted.items():
        entry = found.entries[name]
        np.testing.assert_array_equal(entry.counts, counts, err_msg=name)
        apart = np.abs(entry.sums - sums).max() / sums.max()
        assert apart < bound, f"{name}: {apart:.2e}"


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    path = GOLDEN / f"{request.param}.gguf"
    read = texts(512)
    return path, read, oracle(path, read, "reference")


@pytest.mark.parametrize("backend", [*(f"native:{isa}" for isa in ISAS), "portable", "reference"])
def test_every_matrix_of_every_geometry_is_collected_with_all_its_rows(golden, backend):
    """Also those of layers that an answer needs for its last row only."""
    path, read, wanted = golden
    name, _, isa = backend.partition(":")
    compare(collected(path, read, backend=name, isa=isa or None), wanted, CLOSE)


@pytest.mark.parametrize("moe", [False, True])
def test_rows_are_taken_before_integer_kernels_round_them(tmp_path, moe):
    """Exactly those of the same instruction set, nearly those of numpy that rounds as integer kernels do."""
    path, read = tmp_path / "tiny.gguf", texts(290, (40, 7, 33))
    path.write_bytes(tiny(moe).bytes())
    near = oracle(path, read, Reference(quantize_activations=True))
    for isa in ISAS:
        found = collected(path, read, backend="native", isa=isa)
        compare(found, oracle(path, read, "native", isa), EXACT)
        if isa != "amx":  # tiles round otherwise
            compare(found, near, ROUNDED)


def test_what_is_collected_does_not_depend_on_chunks_steps_or_threads(golden):
    path, read, _ = golden
    whole = collected(path, read, chunk=400)
    for chunk, threads in ((100, 1), (128, 2), (4096, 2)):
        found = collected(path, read, chunk=chunk, threads=threads)
        for name, entry in whole.entries.items():
            np.testing.assert_array_equal(entry.counts, found.entries[name].counts)
            np.testing.assert_allclose(entry.sums, found.entries[name].sums, rtol=1e-6)


def test_tensors_that_share_an_input_share_its_sums(golden):
    path, read, _ = golden
    found = collected(path, read).entries
    for a, b in (("attn_q", "attn_k"), ("ffn_gate", "ffn_up")):
        np.testing.assert_array_equal(found[f"blk.0.{a}.weight"].sums, found[f"blk.0.{b}.weight"].sums)


def test_the_plan_ends_at_the_head(golden):
    """Logits of all rows, the largest buffer by far, are never computed."""
    model = Model.open(golden[0])
    plan, ending = headless(model.plan)
    assert ending.tensors == ("token_embd.weight",) and plan.logits is plan.hidden
    assert not any("token_embd.weight" in m.tensors for m in meetings(plan))
    assert max(op.out.width for op in plan.ops if op.out) < model.vocab


def test_a_text_longer_than_a_chunk_goes_on_behind_bos():
    with Calibration(GOLDEN / "dense-like.gguf", chunk=16) as calibration:
        bos, ids = calibration.tokenizer.bos, list(range(100, 140))
        chunks = calibration.chunks([ids, [7, 8]])
        many = calibration.chunks(texts(512, range(1, 30)))
    found = [[piece.tolist() for piece in chunk] for chunk in chunks]
    assert found == [[ids[:16]], [[bos, *ids[16:31]]], [[bos, *ids[31:]], [7, 8]]]
    assert max(sum(map(len, chunk)) for chunk in many) <= 16


def test_an_expert_is_counted_once_for_each_row_that_chose_it(golden):
    path, read, _ = golden
    used = Model.open(path).config.layers[0].experts_used
    for name, entry in collected(path, read).entries.items():
        assert entry.counts.sum() == (used if "_exps" in name else 1) * sum(map(len, read))


@pytest.fixture(scope="module")
def four_chunks():
    """A path, the chunks of its texts, and what all of them give."""
    path, read = GOLDEN / "moe-like.gguf", texts(512, (60,) * 8)
    with Calibration(path, chunk=128) as calibration:
        chunks = calibration.chunks(read)
        *_, whole = calibration.run(chunks, Importance({}, ("x",), 0, 128))
    assert len(chunks) == 4 == whole.chunks
    return path, chunks, whole


def equal(one: Importance, other: Importance, rtol: float = 0.0) -> bool:
    def alike(a: Entry, b: Entry) -> bool:
        return (a.counts == b.counts).all() and np.allclose(a.sums, b.sums, rtol=rtol, atol=0)

    same = one.chunks == other.chunks and set(one.entries) == set(other.entries)
    return same and all(alike(entry, other.entries[name]) for name, entry in one.entries.items())


def test_a_run_that_goes_on_from_a_file_gives_what_one_run_gives(four_chunks, tmp_path):
    """But for what float32 in the file rounds."""
    path, chunks, whole = four_chunks
    with Calibration(path, chunk=128) as calibration:
        *_, half = calibration.run(chunks[:2], Importance({}, ("x",), 0, 128))
        write(tmp_path / "half.gguf", half)
        *_, found = calibration.run(chunks[2:], read(tmp_path / "half.gguf"))
    assert equal(found, whole, 1e-6) and not equal(half, whole, 1e-6)


def test_an_interrupted_run_saves_whole_chunks(four_chunks):
    path, chunks, whole = four_chunks
    kept, rows = [], 0

    def stop(more: int) -> None:
        nonlocal rows
        rows += more
        if rows > 3 * 120:
            raise KeyboardInterrupt

    begun = Importance({}, ("x",), 0, 128)
    with Calibration(path, chunk=128) as calibration:
        with pytest.raises(KeyboardInterrupt):
            calibration.collect(chunks, begun, kept.append, progress=stop)
        (found,) = kept
        assert found.chunks == 3
        *_, whole_again = calibration.run(chunks[3:], found)  # and it can be gone on with in the same session
    assert equal(whole_again, whole)


def test_what_is_found_is_saved_as_often_as_asked_and_at_the_end(four_chunks):
    path, chunks, whole = four_chunks
    kept = []
    with Calibration(path, chunk=128) as calibration:
        calibration.collect(chunks, Importance({}, ("x",), 0, 128), kept.append, every=3)
    assert [found.chunks for found in kept] == [3, 4] and equal(kept[-1], whole)


def test_only_a_run_of_the_same_origin_is_gone_on_with(four_chunks, tmp_path):
    path, chunks, _ = four_chunks
    nothing = Importance({}, (), 0, 128)
    with Calibration(path, chunk=128) as calibration:
        origin = calibration.origin(chunks, nothing)
        assert origin == calibration.origin(chunks, nothing)
        others = [calibration.origin(chunks[:-1], nothing), calibration.origin([*chunks, [[9, 9]]], nothing)]
        added = Importance({"a": Entry(np.ones((1, 2)), np.array([1]))})
        others.append(calibration.origin(chunks, added))
    with Calibration(GOLDEN / "dense-like.gguf", chunk=128) as calibration:
        others.append(calibration.origin(chunks, nothing))
    assert len({origin, *others}) == 5
    write(tmp_path / "out.gguf", Importance(added.entries, (), 3, 128, origin))
    assert continued(tmp_path / "out.gguf", origin, nothing).chunks == 3
    assert continued(tmp_path / "none.gguf", origin, nothing).chunks == 0
    with pytest.raises(Gemma4qError, match=r"not_resumable: .*choose another name"):
        continued(tmp_path / "out.gguf", others[0], nothing)


def test_importance_of_another_model_is_not_added_to(four_chunks):
    path, chunks, whole = four_chunks
    wrong = whole.entries | {"blk.0.attn_q.weight": Entry(np.ones((1, 7)), np.array([1]))}
    with (
        Calibration(path, chunk=128) as calibration,
        pytest.raises(Gemma4qError, match=r"shape_mismatch: blk.0.attn_q"),
    ):
        next(calibration.run(chunks, Importance(wrong)))


@pytest.mark.parametrize("backend", ["native", "portable", "reference"])
def test_a_model_that_computes_no_number_is_named_with_the_tensor(tmp_path, backend):
    file = tiny()
    values = np.frombuffer(file.tensors["blk.2.ffn_norm.weight"].data, "<f4").copy()
    values[3] = 3e38
    file.tensors["blk.2.ffn_norm.weight"].data = values.tobytes()
    (tmp_path / "tiny.gguf").write_bytes(file.bytes())
    with pytest.raises(Gemma4qError, match=r"bad_numeric: .*what blk.2.ffn_gate.weight is given"):
        collected(tmp_path / "tiny.gguf", texts(290, (20,)), backend=backend)


# -- Texts ------------------------------------------------------------------------------------------------------------


def test_a_conversation_of_the_tool_is_written_as_the_models_were_trained_on_it(tmp_path):
    """Prompt and turn of the training texts, thoughts and calls included."""
    random = Random(4)
    examples = [draw(random, task) for task in TASKS for _ in range(8)]
    (tmp_path / "talk.jsonl").write_text("\n".join(json.dumps(conversation(e)) for e in examples))
    with Calibration(shipped("tiny")) as calibration:
        found = passages(conversations(tmp_path / "talk.jsonl"), calibration.tokenizer, "small", everything=True)
        for example, passage in zip(examples, found, strict=True):
            wanted = calibration.tokenizer.encode(example.prompt() + example.turn(), special=True)
            assert passage.ids.tolist() == wanted


def test_our_own_conversations_are_of_many_kinds_and_fit_a_chunk():
    found = conversations(CALIBRATION)
    kinds = Counter(talk.kind for talk in found)
    assert len(found) == len(set(CALIBRATION.read_text().splitlines())) > 100 and len(kinds) >= 15
    assert 100_000 < CALIBRATION.stat().st_size < 150_000
    assert any(talk.tools for talk in found) and any(chat.reasoning_of(talk.messages[-1]) for talk in found)
    longest = max(sum(len(str(m["content"]).encode()) for m in talk.messages) for talk in found)
    assert longest < 4 * CHUNK  # a token is four bytes, more or less


# -- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    random = Random(6)
    path = tmp_path_factory.mktemp("talks") / "talk.jsonl"
    path.write_text("".join(json.dumps(conversation(draw(random, task))) + "\n" for task in TASKS for _ in range(12)))
    return path


def imatrix(*arguments, **options) -> subprocess.CompletedProcess:
    command = [*GEMMA4Q, "imatrix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_the_command_writes_a_file_goes_on_with_it_and_adds_others(talks, tmp_path):
    out, more = tmp_path / "out.gguf", ("-f", talks, "-c", "256")
    first = json.loads(imatrix("tiny-moe", *more, "-o", out, "--chunks", "3", "--json").stdout)
    assert (first["chunks"], first["chunk_size"], first["datasets"]) == (3, 256, [str(talks)])
    done = imatrix("tiny-moe", *more, "-o", out)
    assert f"{out} holds 3 of " in done.stderr and done.stdout.startswith(f"{out}  ")
    whole = json.loads(imatrix("tiny-moe", *more, "-o", tmp_path / "whole.gguf", "--json").stdout)
    assert equal(read(out), read(tmp_path / "whole.gguf"), 1e-6) and whole["chunks"] > 3
    imatrix("--in-file", out, "--in-file", out, "-o", tmp_path / "twice.gguf")
    imatrix("tiny-moe", *more, "--in-file", out, "-o", tmp_path / "again.gguf")
    twice, again = read(tmp_path / "twice.gguf"), read(tmp_path / "again.gguf")
    assert equal(twice, again, 1e-6) and twice.chunks == 2 * whole["chunks"]
    assert again.datasets == (str(talks), str(talks))


def test_the_command_shows_what_a_file_holds(talks, tmp_path):
    out = tmp_path / "out.gguf"
    assert imatrix("tiny", "-f", talks, "-o", out).returncode == 0
    before = out.read_bytes()
    shown = imatrix("--in-file", out, "--show-statistics", "-o", out)
    assert "blk.*.ffn_down.weight" in shown.stdout and "token_embd.weight" in shown.stdout
    assert out.read_bytes() == before
    parts = json.loads(imatrix("--in-file", out, "--show-statistics", "--json", "-o", out).stdout)["parts"]
    assert all(0 < part["evenness"] <= 1 and 0.01 <= part["heaviest"] <= 1 for part in parts)


def test_our_own_conversations_are_read_when_none_are_given(tmp_path):
    done = json.loads(imatrix("tiny", "-o", tmp_path / "out.gguf", "--chunks", "1", "--json").stdout)
    assert done["datasets"] == ["gemma4q/calibration.jsonl"] and done["tokens"] > 500


def test_plain_text_is_read_without_a_template(tmp_path):
    (tmp_path / "text.txt").write_text("The cat is in the garden. " * 40)
    done = json.loads(
        imatrix("tiny", "--raw", "-f", tmp_path / "text.txt", "-o", tmp_path / "out.gguf", "--json").stdout
    )
    with Calibration(shipped("tiny")) as calibration:
        assert done["tokens"] == len(calibration.tokenizer.encode("The cat is in the garden. " * 40, bos=True))


def test_ctrl_c_keeps_what_was_read(talks, tmp_path):
    out = tmp_path / "out.gguf"
    slow = ("tiny", "-f", talks, "-c", "64", "-o", out, "-ofreq", "1", "--backend", "reference")
    program = subprocess.Popen([*GEMMA4Q, "imatrix", *map(str, slow)], stderr=subprocess.PIPE, text=True)
    while not out.exists() and program.poll() is None:
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130 and f"the same command goes on from what {out} holds" in said
    kept = read(out).chunks
    assert kept >= 1
    again = imatrix(*slow, "--chunks", kept + 1)
    assert f"{out} holds {kept} of {kept + 1} chunks" in again.stderr and read(out).chunks == kept + 1


def test_a_full_disk_is_said_and_leaves_nothing(talks, tmp_path):
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = imatrix("tiny", "-f", talks, "-o", tmp_path / "out.gguf", preexec_fn=little_room)
    assert done.returncode == 1 and done.stderr.startswith("error: no_space: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "Missing argument 'MODEL'"),
        (("-f", "x.txt"), 2, "Missing argument 'MODEL'"),
        (("tiny", "--raw"), 2, "--raw reads files"),
        (("tiny", "-f", "none.jsonl"), 1, "error: io: none.jsonl: No such file"),
        (("tiny", "-f", "."), 1, "error: bad_text: . is not a regular file"),
        (("tiny", "-f", "text.txt"), 1, "error: bad_text: text.txt, line 1 is no JSON"),
        (("tiny", "-f", "latin.txt", "--raw"), 1, "error: bad_text: latin.txt is not UTF-8"),
        (("tiny", "-c", "9999999"), 1, "error: bad_option: context: 9,999,999 tokens; this model was trained for"),
        (("tiny", "-o", "."), 1, "error: not_a_file: . is a directory"),
        (("tiny", "-o", "none/out.gguf"), 1, "error: not_found: none: there is no such directory"),
        (("tiny", "-o", "text.txt"), 1, "error: not_gguf: text.txt exists and is no GGUF file"),
        (("tiny", "-o", "model.gguf", "--no-resume"), 1, "error: not_imatrix: model.gguf exists and is no importance"),
        (("model.gguf", "-o", "model.gguf"), 1, "error: same_file: model.gguf is what is read"),
        (("tiny", "--in-file", "model.gguf"), 1, "error: not_imatrix: model.gguf: "),
        (("tiny", "--in-file", "text.txt"), 1, "error: not_imatrix: text.txt: "),
        (("text.txt",), 1, "error: not_gguf: "),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, code, said):
    (tmp_path / "text.txt").write_text("Hello, this is a text.")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "model.gguf").write_bytes(shipped("tiny").read_bytes())
    done = imatrix(*arguments, cwd=tmp_path)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and (code == 2 or done.stderr.count("\n") == 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latin.txt", "model.gguf", "text.txt"]
