"""Files are whole or not there: killed at every step, interrupted, written twice, and what is left is taken away."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import GEMMA4Q

from gemma4q import Gemma4qError
from gemma4q.convert.convert import planned
from gemma4q.gguf.reader import open_gguf

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import shapes
import tiny_hf

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_hf.make("12b", tmp_path_factory.mktemp("hf") / "12b")


def killed(folder: Path, out: Path, *part_bytes: int) -> list[dict]:
    program = Path(__file__).with_name("kill_points.py")
    command = [sys.executable, program, folder, out, *map(str, part_bytes)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_run_killed_at_any_step_leaves_no_file_or_a_whole_one(folder, tmp_path):
    runs = killed(folder, tmp_path / "out.gguf")
    size = (tmp_path / "out.gguf").stat().st_size
    assert len(runs) > 40
    for run in runs:
        assert run["files"].get("out.gguf", size) == size
    assert list(runs[-1]["files"]) == ["out.gguf"], "what killed runs left is gone"
    assert any("out.gguf.part" in run["files"] for run in runs)


def test_a_run_killed_at_any_step_leaves_no_part_or_all(folder, tmp_path):
    runs = killed(folder, tmp_path / "out.gguf", 40_000)
    parts = runs[-1]["files"]
    assert len(parts) > 3 and not any(name.endswith(".part") for name in parts)
    first = min(parts)
    for run in runs:
        there = {name: size for name, size in run["files"].items() if not name.endswith(".part")}
        if first in there:
            assert there == parts, "the first part comes when all others are there"
        assert there.items() <= parts.items(), "no part is ever half written"
    assert len(open_gguf(tmp_path / first).tensors) == 44


def test_files_are_on_the_disk_before_they_have_their_names(folder, tmp_path, monkeypatch):
    done: list[str] = []
    replace_file = os.replace
    monkeypatch.setattr(os, "fsync", lambda fileno: done.append("flush"))
    monkeypatch.setattr(os, "replace", lambda part, path: done.append("rename") or replace_file(part, path))
    with planned(folder, tmp_path / "out.gguf", "q8_0", part_bytes=60_000) as conversion:
        conversion.write()
    count = len(conversion.files)
    assert count > 2 and done == ["flush"] * count + ["rename"] * count + ["flush"]


def test_parts_without_the_first_are_no_model(folder, tmp_path):
    with planned(folder, tmp_path / "out.gguf", "q8_0", part_bytes=40_000) as conversion:
        conversion.write()
    first, second = sorted(tmp_path.glob("out-*"))[:2]
    first.unlink()
    with pytest.raises(Gemma4qError, match=r"part 1 of \d is missing"):
        open_gguf(second)


def test_a_file_of_the_same_name_is_replaced_when_the_new_one_is_whole(folder, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("GGUF old")
    with planned(folder, out, "f32") as conversion:
        assert out.read_text() == "GGUF old"
        conversion.write()
    assert open_gguf(out).tensors
    before = out.read_bytes()
    with planned(folder, out, "q8_0") as conversion:
        object.__setattr__(conversion.files[0].tensors[5], "chunks", lambda: (b"short",))
        with pytest.raises(Gemma4qError, match="bad_tensor_data"):
            conversion.write()
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_what_a_killed_run_left_is_swept_away_whatever_its_parts(folder, tmp_path):
    stale = ["out.gguf.part", "out-00001-of-00009.gguf.part", "out-00002-of-00009.gguf.part"]
    kept = ["other.gguf.part", "out2.gguf.part", "out-1-of-2.gguf.part", "out.gguf.part.txt"]
    for name in stale + kept:
        (tmp_path / name).write_text("stale")
    with planned(folder, tmp_path / "out.gguf", part_bytes=40_000) as conversion:
        conversion.write()
    assert sorted(p.name for p in tmp_path.iterdir() if ".part" in p.name) == sorted(kept)


def test_two_runs_at_once_do_not_write_into_each_other(folder, tmp_path):
    with open(tmp_path / "out.gguf.part", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            planned(folder, tmp_path / "out.gguf") as conversion,
            pytest.raises(Gemma4qError, match=r"busy: .*out\.gguf\.part is being written by another process"),
        ):
            conversion.write()
    assert (tmp_path / "out.gguf.part").exists(), "it is the other's"


def test_a_link_in_the_place_of_the_part_is_not_followed(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out.gguf.part").symlink_to(precious)
    with planned(folder, tmp_path / "out.gguf") as conversion, pytest.raises(Gemma4qError, match="not_writable"):
        conversion.write()
    assert precious.read_text() == "mine"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A directory that takes a second or more to convert, and no disk."""
    shape = replace(shapes.SHAPES["e2b"], layers=10, shared=5, vocab=512)
    return tiny_hf.sparse(shape, tmp_path_factory.mktemp("large") / "hf")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_leaves_no_file(large, tmp_path, number):
    out = tmp_path / "out.gguf"
    command = [*GEMMA4Q, "convert", str(large), "-o", str(out), "--outtype", "q8_0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part, deadline = out.with_name("out.gguf.part"), time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 1 << 20):
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists() and said.strip() == ""
    assert part.exists() == (number == signal.SIGKILL)
