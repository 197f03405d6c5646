"""`gemma4q quantize` as a command: options, slips, interruptions, memory; and whole files beside llama.cpp's."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from peer import PYTHON, needs_llama_cpp
from quantized import measured, written
from terminal import GEMMA4Q

from gemma4q.abi import TensorType as T
from gemma4q.cli import cli
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.types import type_name
from gemma4q.quantize.importance import write as write_importance
from gemma4q.quantize.mixtures import MIXTURES, mixture
from gemma4q.quantize.quantize import planned

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import mixtures_oracle as oracle
import shapes
import tiny_hf
from llama_quantize import theirs

pytestmark = pytest.mark.usefixtures("quick_disk")


# -- The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Runs a command line: (exit status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli(["quantize", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_writes_the_file_and_says_what_is_in_it(halves, tmp_path, run):
    code, out, said = run(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "q8_0", "-t", 2)
    assert (code, said) == (0, "")
    assert out.startswith(f"{tmp_path / 'q.gguf'}  71 tensors  2.") and "8.55 bits a weight; 4.96 MiB before" in out
    code, out, _ = run(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q8_0", "--json")
    found = json.loads(out)
    assert code == 0 and found["written"] and found["type"] == "Q8_0" and len(found["tensors"]) == 71
    size = (tmp_path / "q.gguf").stat().st_size
    assert found["files"] == [{"path": str(tmp_path / "q.gguf"), "tensors": 71, "bytes": size}]
    assert 8.5 < found["bits_per_weight"] < 9


def test_a_dry_run_lists_every_tensor_and_writes_nothing(halves, tmp_path, run):
    code, out, said = run(halves / "tiny-moe-F16.gguf", tmp_path / "q.gguf", "Q4_K_M", "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    lines = [line.split() for line in out.splitlines()[:89]]
    assert ["blk.0.ffn_gate_up_exps.weight", "8", "x", "128", "x", "256", "F16", "Q4_K", "144.00", "KiB"] in lines
    assert said.splitlines() == [
        "note: rows of 64 or 128 values are no whole blocks: 8 tensors got Q5_0 for Q4_K, Q8_0 for Q6_K",
        "nothing was written (--dry-run)",
    ]
    described = json.loads(run(halves / "tiny-moe-F16.gguf", tmp_path / "q.gguf", "Q4_K_M", "--dry-run", "--json")[1])
    assert not described["written"] and described["fell_back_from"]["blk.1.ffn_down_exps.weight"] == "Q4_K"


def test_every_option_reaches_the_tensors(halves, tmp_path, run):
    (tmp_path / "types.txt").write_text("ffn_up=q5_1\nffn_gate=f32")
    write_importance(tmp_path / "i.gguf", measured(open_gguf(halves / "tiny-F16.gguf")))
    arguments = [halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", "--pure", "--token-embedding-type", "q8_0"]
    arguments += ["--tensor-type", r"blk\.0\.attn_q=BF16", "--tensor-type", "attn_q=Q5_0"]
    arguments += ["--tensor-type-file", tmp_path / "types.txt", "--imatrix", tmp_path / "i.gguf"]
    arguments += ["--override-kv", "general.name=str:Mine", "--override-kv", "general.quantization_version=int:9"]
    code, _, said = run(*arguments, "--exclude-weights", "attn_output")
    assert (code, said.count("\n")) == (0, 1) and "says nothing of 4 tensors" in said and "attn_output" in said
    after = open_gguf(tmp_path / "q.gguf")
    types = {name: after.tensors[f"blk.{name}.weight"].type.name for name in ("0.attn_q", "1.attn_q", "0.ffn_up")}
    assert types == {"0.attn_q": "BF16", "1.attn_q": "Q5_0", "0.ffn_up": "Q5_1"}
    assert after.tensors["blk.2.ffn_gate.weight"].type == T.F32
    assert after.tensors["token_embd.weight"].type == after.tensors["per_layer_token_embd.weight"].type == T.Q8_0
    assert (after.metadata["general.name"], after.metadata["general.quantization_version"]) == ("Mine", 9)
    assert after.metadata["quantize.imatrix.file"] == str(tmp_path / "i.gguf")
    more = ("--output-tensor-type", "q8_0", "--leave-output-tensor", "--tensor-type", "typo=f16")
    code, _, said = run(*arguments[:3], *more)
    assert open_gguf(tmp_path / "q.gguf").tensors["token_embd.weight"].type == T.Q8_0
    assert said.splitlines() == [
        "note: --tensor-type typo: no tensor that is quantised has such a name",
        "note: --leave-output-tensor: there is no output.weight; the head is token_embd.weight",
    ]


def test_slips_on_the_command_line_are_one_line(halves, tmp_path, run):
    model, out = halves / "tiny-F16.gguf", tmp_path / "q.gguf"
    for arguments, wanted in (
        ((out, "IQ3_M"), "bad_quant_type: IQ3_M: gemma4q neither reads nor writes its blocks; Q3_K_M comes nearest"),
        ((out, "Q4"), "bad_quant_type: 'Q4' is no type: choose Q2_K, "),
        ((out,), f"bad_quant_type: '{out}' is no type: choose Q2_K, "),
        ((out, "Q8_0", "--output-tensor-type", "IQ1_S"), "bad_quant_type: IQ1_S: gemma4q does not write this type: "),
        ((out, "Q8_0", "--tensor-type", "attn"), "bad_option: 'attn' is not of the form REGEX=TYPE"),
        ((out, "Q8_0", "--tensor-type-file", tmp_path / "none"), "not_readable: "),
        ((out, "Q8_0", "--override-kv", "a=b"), "bad_option: 'a=b' is not of the form KEY=TYPE:VALUE"),
        ((out, "Q8_0", "--override-kv", "gemma4.block_count=int:0"), "bad_hparam: gemma4.block_count is 0"),
        ((out, "Q8_0", "--imatrix", tmp_path / "none"), "not_found: "),
        ((out, "Q8_0", "--imatrix", model), "not_imatrix: "),
        ((model, "Q8_0"), "same_file: "),
    ):
        code, stdout, said = run(model, *arguments)
        assert (code, stdout, said.count("\n")) == (1, "", 1) and said.startswith(f"error: {wanted}"), arguments
    for arguments, wanted in (
        ((), "Missing argument '[OUT] TYPE'"),
        ((out, "Q8_0", 4), "Threads are an option here: -t 4"),
        ((out, "Q8_0", "x"), "Got unexpected extra argument (x)"),
        ((out, "Q8_0", "-t", 0), "Invalid value for '-t'"),
        ((out, "COPY", "--pure"), "COPY changes no tensor: it takes no types, no --recipe, no --imatrix and no --card"),
        ((out, "Q8_0", "--include-weights", "a"), "choose from an --imatrix"),
        ((out, "Q8_0", "--include-weights", "a", "--exclude-weights", "b"), "exclude each other"),
    ):
        code, stdout, said = run(model, *arguments)
        assert (code, stdout) == (2, "") and wanted in said, arguments
    assert not list(tmp_path.iterdir())


def test_the_importance_is_not_written_over(halves, tmp_path, run):
    write_importance(tmp_path / "i.gguf", measured(open_gguf(halves / "tiny-F16.gguf")))
    code, _, said = run(halves / "tiny-F16.gguf", tmp_path / "i.gguf", "Q8_0", "--imatrix", tmp_path / "i.gguf")
    assert code == 1 and said == f"error: same_file: {tmp_path / 'i.gguf'} is what is read: choose another name\n"


def test_the_help_lists_every_type():
    from gemma4q.cli.quantize import EXAMPLES

    listed = EXAMPLES.split("mixtures:\n")[1].replace(";", "").split()
    assert set(listed) - {"changes", "no", "tensor"} == set(MIXTURES)


# -- Whole runs ------------------------------------------------------------------------------------------------


def sparse(path: Path, shape: shapes.Shape, matrices: T) -> Path:
    """A model file whose tensors are zeros that take no disk."""
    oracle.write_sparse(path, shape, shapes.checkpoint(shape, matrices))
    return path


def command(*arguments: object, limit: int | None = None) -> subprocess.Popen:
    bound = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    line = [*GEMMA4Q, "quantize", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=bound)


LARGE = replace(shapes.SHAPES["e2b"], layers=10, shared=5, vocab=512)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_file(tmp_path, number):
    process = command(sparse(tmp_path / "m.gguf", LARGE, T.BF16), tmp_path / "q.gguf", "Q8_0", "-t", 1)
    part, deadline = tmp_path / "q.gguf.part", time.monotonic() + 60
    while (
        process.poll() is None and time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 1 << 20)
    ):
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not (tmp_path / "q.gguf").exists() and said.strip() == ""
    assert part.exists() == (number == signal.SIGKILL)


def test_a_disk_that_fills_up_is_said_and_leaves_nothing(halves, tmp_path):
    process = command(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q8_0", limit=50_000)
    _, said = process.communicate()
    assert process.returncode == 1 and said.startswith("error: no_space: ") and not list(tmp_path.iterdir())


MEMORY = """
import re, sys
from pathlib import Path
from gemma4q.quantize.quantize import planned
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.stream import Stream

plan, most, size = planned(sys.argv[1], "unused.gguf", mixture(sys.argv[2]), allow_requantize=True), 0, 0
types = {change.tensor.name: change.type for change in plan.changes}
stream = Stream(plan.gguf, list(plan.gguf.tensors.values()), types, None, 2)
for tensor in stream.data():
    for number, chunk in enumerate(tensor.chunks()):
        size += memoryview(chunk).nbytes
        if number % 100 == 0:
            most = max(most, int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
stream.close()
print(most * 1024, size, plan.nbytes)
"""


def memory(path: Path, name: str) -> tuple[int, int, int]:
    """Most bytes of RssAnon while a file is quantised to nowhere, bytes of tensors, and of the file to be."""
    done = subprocess.run([sys.executable, "-P", "-c", MEMORY, path, name], capture_output=True, text=True, check=True)
    most, size, total = map(int, done.stdout.split())
    return most, size, total


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    shape = replace(shapes.SHAPES["e2b"], layers=2, shared=0)
    most, size, total = memory(sparse(tmp_path / "m.gguf", shape, T.BF16), "Q8_0")
    assert 0.6e9 < size < total < 1e9
    assert most < 200e6


@pytest.mark.slow
def test_26b_of_q8_0_needs_less_than_2_5_gigabytes(tmp_path):
    most, size, total = memory(sparse(tmp_path / "m.gguf", shapes.SHAPES["26b"], T.Q8_0), "Q4_K_M")
    assert 15e9 < size < total
    assert most < 2.5e9


# -- Against llama.cpp -----------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("kind", tiny_hf.KINDS)
def test_types_of_real_files_assistants_too_are_llama_cpps(tmp_path, kind):
    needs_llama_cpp()
    from gemma4q.convert.convert import planned as converted

    with converted(tiny_hf.make(kind, tmp_path / "hf"), tmp_path / "m.gguf", "auto") as conversion:
        conversion.write()
    job = {"path": str(tmp_path / "m.gguf"), "importance": False, "patterns": []}
    numbers = {name: m.file_type for name, m in MIXTURES.items() if m.file_type is not None}
    found = oracle.ask(PYTHON, [job | {"file_type": n, "options": {}} for n in numbers.values()])
    for name, types in zip(numbers, found, strict=True):
        plan = planned(tmp_path / "m.gguf", None, mixture(name))
        assert {c.tensor.name: type_name(c.type) for c in plan.changes} == types, name


@pytest.mark.peers
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_whole_file_has_llama_cpps_bytes_and_keys(halves, tmp_path, name):
    needs_llama_cpp()
    for model in ("tiny", "tiny-moe"):
        source = halves / f"{model}-F16.gguf"
        peer = open_gguf(theirs(PYTHON, source, tmp_path / "peer.gguf", name))
        ours = written(source, tmp_path / "ours.gguf", name)
        assert {k: str(v) for k, v in ours.metadata.items()} == {k: str(v) for k, v in peer.metadata.items()}
        assert ours.types == peer.types
        assert ours.tensors.keys() == peer.tensors.keys()
        for tensor in peer.tensors.values():
            mine = ours.tensors[tensor.name]
            assert mine.type == tensor.type
            if tensor.type in (T[name], T.F32):  # Q6_K is held to its errors elsewhere
                assert (mine.data == tensor.data).all(), tensor.name
