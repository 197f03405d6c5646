"""`gemma4q bench` as people and scripts meet it, on a toy: forms of output, builds, and every error in one line."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import pytest
from peer import PYTHON, needs_llama_cpp
from terminal import GEMMA4Q
from test_bench import ERROR_LINE, GOLDEN, TOY, bench

from gemma4q.errors import Gemma4qError
from gemma4q.measure import builds

ROOT = Path(__file__).parent.parent
QUICK = ("-p", "16", "-n", "2", "-r", "2", "--no-latency")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, Path]:
    """One measurement with all there is to it, as JSON, and the file it was saved to."""
    path = tmp_path_factory.mktemp("bench") / "base.json"
    done = bench(TOY, "-p", "16", "-n", "2", "-pg", "8,2", "-d", "0,64", "-r", "3", "-o", "json", "--save", str(path))
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), path


def test_json_tells_machine_build_file_and_every_sample(measured):
    document, path = measured
    digest = subprocess.run(["sha256sum", TOY], capture_output=True, text=True).stdout.split()[0]
    assert document["model"]["sha256"] == digest and document["model"]["bytes"] == os.path.getsize(TOY)
    assert document["machine"]["cores"] >= 1 and document["build"]["python"] == sys.version.split()[0]
    tests = [result["test"] for result in document["results"]]
    assert tests == ["pp16", "tg2", "pp8+tg2", "pp16 @ d64", "tg2 @ d64", "pp8+tg2 @ d64"]
    for result in document["results"]:
        tokens = result["n_prompt"] + result["n_gen"]
        rates = [tokens / ns * 1e9 for ns in result["samples_ns"]]
        assert result["samples_ts"] == pytest.approx(rates, rel=1e-4) and len(rates) == 3
        assert result["avg_ts"] == pytest.approx(mean(rates), rel=1e-4)
        assert result["stddev_ts"] == pytest.approx(stdev(rates), rel=1e-3)
        assert len(result["probes"]["gemm"]) == 3
    assert json.loads(path.read_text())["results"] == document["results"]


def test_the_process_tells_its_memory_and_its_latencies(measured):
    (process,) = measured[0]["processes"]
    assert 1e6 < process["memory"]["RssAnon"] < 1e9 and process["memory"]["RssFile"] > 1e6
    times = process["latency"]
    assert 0 < times["next_turn"] < times["first_token_cold"] > times["first_token_warm"] > 0
    assert times["reused"] >= 64  # the next turn computes no more than itself
    assert 0 < times["host"] < 1 and times["barriers"] > 10


def test_ops_have_shares_of_the_whole_and_of_the_roof(measured):
    for result in measured[0]["results"]:
        assert sum(op["share"] for op in result["ops"]) == pytest.approx(1)
        (head,) = (op for op in result["ops"] if op["op"] == "matmul token_embd.weight")
        steps = (result["n_prompt"] > 0) + result["n_gen"]
        assert head["bytes"] / steps == next(
            op["bytes"] for op in measured[0]["results"][0]["ops"] if op["op"] == head["op"]
        )
    done = bench(TOY, *QUICK, "--ops", "-o", "md")
    assert re.search(r"\| matmul blk\.\*\.ffn_up\.weight +\| +6 \|.* % \|", done.stdout)


def test_markdown_and_table_have_llama_benchs_columns():
    for form in ("md", "table"):
        text = bench(TOY, *QUICK, "-o", form).stdout
        for title in ("model", "size", "params", "backend", "threads", "test", "t/s"):
            assert title in text
        assert re.search(r"pp16 .*\d\.\d\d ± \d+\.\d\d", text) and "RssAnon" in text and "GB/s of memory" in text


def test_csv_and_json_lines_have_a_row_for_each_combination():
    more = ("-ctk", "f16,q4_0", "-b", "8,16", "-r", "1")
    done = bench(TOY, *QUICK, *more, "-o", "csv")
    assert done.exit_code == 0 and done.stderr.count("warning: keys and values in q4_0") == 1
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["kv"], row["batch"], row["test"]) for row in rows] == [
        (kv, batch, test) for kv in ("f16", "q4_0") for batch, test in (("8", "pp16"), ("512", "tg2"), ("16", "pp16"))
    ]  # a batch size matters to prompts alone
    lines = [json.loads(line) for line in bench(TOY, *QUICK, "-o", "jsonl").stdout.splitlines()]
    assert [line["test"] for line in lines] == ["pp16", "tg2"]
    assert all(line["cpu_info"] and line["model_n_params"] > 1e5 and line["samples_ns"] for line in lines)


def test_a_backend_without_op_times_is_measured_all_the_same():
    done = bench(TOY, *QUICK, "--backend", "reference", "--ops", "-o", "md")
    assert done.exit_code == 0 and "reference" in done.stdout and "does not count" in done.stdout


def test_compare_prints_changes_with_their_doubt_and_their_probe(tmp_path):
    path = tmp_path / "base.json"
    same = (*QUICK, "-r", "8", "-o", "json")  # of three runs one beside other work leaves doubt without bounds
    assert bench(TOY, *same, "--save", str(path)).exit_code == 0
    for factor, status in ((1e3, 0), (1e-9, 1)):  # beside what anything is, and beside what nothing could be
        then = json.loads(path.read_text())
        for result in then["results"]:
            result["samples_ns"] = [ns * factor for ns in result["samples_ns"]]
        (tmp_path / "b.json").write_text(json.dumps(then))
        done = bench(TOY, *same, "--compare", str(tmp_path / "b.json"), "--threshold", "1000")
        assert done.exit_code == status, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert {row["probe"] for row in rows} == {"read", "gemm"} and all(row["doubt"] > 0 for row in rows)


def test_the_gate_runs_two_real_processes_and_tells_what_it_found():
    done = bench(TOY, "--against", sys.executable, "--seconds", "4", "--busy", "0", "-p", "8", "-n", "1", "-d", "8",
                 "--threshold", "1000", "-o", "json")  # fmt: skip
    assert done.exit_code in (0, 3), done.stderr
    document = json.loads(done.stdout)
    assert {row["test"] for row in document["rows"]} == {"pp8 @ d8", "tg1 @ d8"}
    assert all(row["pairs"] > 0 for row in document["rows"]) and "pairs in" in done.stderr


def test_company_on_all_cores_is_exit_status_3():
    done = bench(TOY, "--against", sys.executable, "--seconds", "2", "--busy", "1", "-p", "8", "-n", "1", "-d", "0")
    assert done.exit_code == 3 and "too noisy to tell" in done.stderr and "100 % had company" in done.stderr


# -- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (("nowhere.gguf",), "not_found"),
        ((str(ROOT / "README.md"),), "not_gguf"),
        ((TOY, "-p", "99999999"), "context_length_exceeded"),
        ((TOY, "--isa", "nonsense"), "unavailable"),
        ((TOY, "-t", "99999"), "bad_option"),
        ((TOY, "--against", "no-such-revision"), "unknown_build"),
        ((TOY, "--against", "--upload-pack=x"), "unknown_build"),
        ((TOY, "--against", str(ROOT / "README.md")), "unknown_build"),
        ((TOY, "--against", "/bin/true"), "unknown_build"),
        ((TOY, "--against", "/bin/false"), "unknown_build"),
        ((TOY, "--save", "/proc/no/base.json"), "io"),
        ((TOY, "--compare", str(ROOT / "README.md")), "bad_base"),
        ((TOY, "--compare", "nowhere.json"), "io"),
        ((TOY, "--vs", "llama.cpp", "--peer-python", "/no/python"), "unknown_build"),
        (("--plot", "x.jpg", "--results", "."), "not_found"),
        (("--plot", "x.png", "--results", "nowhere"), "not_found"),
    ],
)
def test_bad_input_is_one_line(arguments, kind):
    done = bench(*arguments)
    assert done.exit_code == 1 and ERROR_LINE.fullmatch(done.stderr), done.stderr
    assert done.stderr.startswith(f"error: {kind}: ")


def test_a_base_of_another_model_is_refused_before_anything_is_measured(measured):
    done = bench(str(GOLDEN / "moe-like.gguf"), "--compare", str(measured[1]))
    assert done.exit_code == 1 and "is of another model file" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    "arguments",
    [(), (TOY, "-p", "0", "-n", "0"), (TOY, "-o", "xml"), (TOY, "--kv", "q1"), (TOY, "--backend", ""),
     (TOY, "-pg", "8"), (TOY, "--against", "x", "--compare", "y"), (TOY, "--against", "x", "-t", "1,2")],
)  # fmt: skip
def test_wrong_usage_is_exit_status_2(arguments):
    done = bench(*arguments)
    assert done.exit_code == 2 and "Usage:" in done.stderr


def test_a_peer_that_is_not_installed_is_one_line():
    if find_spec("llama_cpp"):
        pytest.skip("it is installed")
    done = bench(TOY, "--vs", "llama.cpp")
    assert done.exit_code == 1 and ERROR_LINE.fullmatch(done.stderr) and "--peer-python" in done.stderr


@pytest.mark.peers
def test_llama_cpp_is_measured_in_pairs():
    needs_llama_cpp()
    peer = ("--vs", "llama.cpp", "--peer-python", PYTHON)
    done = bench(TOY, *peer, "-p", "32", "-n", "4", "-r", "2", "--busy", "0", "-o", "json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["test"] for row in rows] == ["pp32", "tg4"] and all(row["pairs"] == 2 for row in rows)
    assert all(row["least"] <= row["ratio"] <= row["most"] for row in rows)
    below = bench(TOY, *peer, "-p", "32", "-n", "0", "-r", "1", "--busy", "0").stdout
    assert re.search(r"^llama.cpp: llama-cpp-python [0-9.]+, [0-9]+ threads: CPU : .*AVX", below, re.MULTILINE)


def test_a_worker_that_is_killed_is_one_error():
    from gemma4q.measure.client import Worker

    with Worker(sys.executable, "gemma4q", TOY, {"threads": 1, "context": 64}) as worker:
        worker.process.kill()
        with pytest.raises(Gemma4qError, match="worker_died"):
            worker.ask("memory")


def test_the_program_ends_with_the_gates_exit_status():
    more = ["--against", sys.executable, "--seconds", "1", "--busy", "1", "-p", "8", "-n", "1", "-d", "0"]
    assert subprocess.run([*GEMMA4Q, "bench", TOY, *more], capture_output=True, timeout=60).returncode == 3


# -- Builds ------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_a_revision_that_cannot_be_built_is_one_error_and_leaves_nothing_half_built(tmp_path, monkeypatch):
    clone, cache = tmp_path / "clone", tmp_path / "cache"
    (clone / "gemma4q").mkdir(parents=True)
    (clone / "gemma4q/abi.h").write_text("")
    (clone / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'nothing'\n")
    git(clone, "init", "-q")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "broken")
    monkeypatch.chdir(clone)
    said: list[str] = []
    with pytest.raises(Gemma4qError) as caught:
        builds.interpreter("HEAD", cache, said.append)
    assert caught.value.kind == "build_failed" and "nothing" in caught.value.message and len(said) == 1
    assert [path.suffix for path in cache.iterdir()] == [".log"]
    assert subprocess.run(["git", "status", "--porcelain"], capture_output=True, cwd=clone).stdout == b""


def test_a_wheel_that_is_none_is_one_error(tmp_path):
    (tmp_path / "gemma4q-0.1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(Gemma4qError) as caught:
        builds.interpreter(str(tmp_path / "gemma4q-0.1.0-py3-none-any.whl"), tmp_path / "cache")
    assert caught.value.kind == "build_failed"


def test_what_is_built_is_found_again(tmp_path):
    _, commit = builds.find_commit("HEAD")
    home = tmp_path / f"{commit}-plain-py{sys.version_info.major}.{sys.version_info.minor}"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "bin/python").chmod(0o755)
    assert builds.interpreter("HEAD", tmp_path) == str(home / "bin/python")
    assert builds.interpreter(str(home), tmp_path) == str(home / "bin/python")


@pytest.mark.slow
def test_the_gate_names_a_kernel_made_slower_and_passes_equals():
    """All of it needs a quiet machine and a real model's file; tools/gate_trials.py does it twenty times."""
    model = os.environ.get("GEMMA4Q_BENCH_MODEL")
    if not model:
        pytest.skip("say GEMMA4Q_BENCH_MODEL=e2b-q4_0.gguf, a model whose steps take tens of milliseconds")
    tries = os.environ.get("GEMMA4Q_BENCH_TRIES", "3")
    command = [sys.executable, "-P", str(ROOT / "tools/gate_trials.py"), model, "--tries", tries]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
