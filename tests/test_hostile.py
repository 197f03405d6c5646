"""No file, however wrong, does more than raise one error that names what is wrong, quickly and in little memory."""

import os
import stat
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hostile import CASES, Case
from terminal import GEMMA4Q
from tiny import tiny

from gemma4q.errors import Gemma4qError
from gemma4q.gguf.reader import open_gguf
from gemma4q.model import open_model
from gemma4q.model.check import check
from gemma4q.text.tokenizer import Tokenizer

BAD = [case for case in CASES if case.kinds]
SOUND = [case for case in CASES if not case.kinds]
SECONDS, BYTES = 2, 200 << 20
SOME = 20  # every how many-th file goes through the command line outside of the long run


def write(case: Case, folder: Path) -> Path:
    path = folder / f"{case.name[:60]}.gguf"
    path.write_bytes(case.make())
    return path


def faults(case: Case, path: Path) -> set[str]:
    """The kinds of error that reading the file ends in."""
    if case.found_by == "check":
        return {finding.kind for finding in check(path) if finding.level == "error"}
    try:
        gguf, _, _ = open_model(path)
        if case.found_by == "tokenizer":
            Tokenizer(gguf.metadata)
    except Gemma4qError as error:
        assert "\n" not in str(error) and len(error.message) <= 300
        return {error.kind}
    return set()


def test_there_are_enough_of_them():
    assert len(BAD) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:60])
def test_a_file_is_refused_for_what_is_wrong_with_it_or_loads(case, tmp_path):
    path = write(case, tmp_path)
    start = time.perf_counter()
    found = faults(case, path)
    assert time.perf_counter() - start < SECONDS
    assert found & case.kinds if case.kinds else not found, found
    tracemalloc.start()
    faults(case, path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < BYTES


CHECKED = [case for case in BAD if case.found_by != "tokenizer"]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name[:60])
def test_check_finds_in_one_go_what_loading_refuses(case, tmp_path):
    findings = list(check(write(case, tmp_path)))
    assert {finding.kind for finding in findings if finding.level == "error"} & case.kinds
    assert all("\n" not in str(finding) for finding in findings)


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_check_says_nothing_against_a_sound_file(case, tmp_path):
    assert not [str(finding) for finding in check(write(case, tmp_path)) if finding.level != "note"]


def test_a_file_cut_anywhere_in_its_header_is_refused(tmp_path):
    whole, path = tiny().bytes(), tmp_path / "cut.gguf"
    header = len(tiny().header()[0])
    for end in [*range(200), *range(200, header, 97), header]:
        path.write_bytes(whole[:end])
        with pytest.raises(Gemma4qError):
            open_gguf(path)


def test_a_flipped_bit_in_the_header_raises_nothing_but_our_error(tmp_path):
    whole, path = bytearray(tiny().bytes()), tmp_path / "flipped.gguf"
    random = np.random.default_rng(7)
    for at in random.choice(len(tiny().header()[0]), 400, replace=False):
        bit = 1 << int(random.integers(8))
        whole[at] ^= bit
        path.write_bytes(whole)
        whole[at] ^= bit
        try:
            open_model(path)
        except Gemma4qError as error:
            assert error.kind and "\n" not in str(error)


class TestWhatIsNoFile:
    def test_a_directory_a_pipe_and_a_device_are_refused_at_once(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe", "/dev/zero", "/dev/null"):
            with pytest.raises(Gemma4qError, match="not_a_file"):
                open_gguf(path)

    def test_a_missing_file_and_a_dangling_link_are_not_found(self, tmp_path):
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for name in ("nowhere", "dangling"):
            with pytest.raises(Gemma4qError, match="not_found"):
                open_gguf(tmp_path / name)

    def test_a_link_to_itself_and_a_path_with_nul_are_not_readable(self, tmp_path):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name in ("loop", "nul\0"):
            with pytest.raises(Gemma4qError, match="not_readable"):
                open_gguf(tmp_path / name)

    def test_a_file_without_read_permission_is_not_readable(self, tmp_path):
        path = tmp_path / "secret.gguf"
        path.write_bytes(b"GGUF")
        path.chmod(0)
        if os.access(path, os.R_OK):
            assert os.geteuid() == 0  # whom no mode keeps out
            path.chmod(stat.S_IRUSR)
        with pytest.raises(Gemma4qError, match=r"not_readable|truncated"):
            open_gguf(path)


class TestWhatChangesUnderneath:
    def test_a_file_replaced_by_renaming_is_served_as_it_was(self, tmp_path):
        path, other = tmp_path / "model.gguf", tmp_path / "other"
        path.write_bytes(tiny().bytes())
        gguf = open_gguf(path)
        before = gguf.tensors["output_norm.weight"].data.tobytes()
        other.write_bytes(bytes(path.stat().st_size))
        other.replace(path)
        assert not gguf.changed()
        assert gguf.tensors["output_norm.weight"].data.tobytes() == before

    def test_a_file_written_to_or_cut_is_noticed(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(tiny().bytes())
        gguf = open_gguf(path)
        assert not gguf.changed()
        os.utime(path, ns=(0, 0))
        assert gguf.changed()

    def test_check_survives_a_file_that_shrinks(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(tiny().bytes())
        cut = path.stat().st_size // 2
        found = list(check(path, progress=lambda done, total: done or os.truncate(path, cut)))
        assert "model_changed" in {finding.kind for finding in found}


def fate(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [*GEMMA4Q, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def run_says_it_in_one_line(case: Case, folder: Path) -> None:
    done = fate("run", write(case, folder), "-n", "1", "hi")
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    if case.found_by == "load":
        assert lines[0].split(": ")[1] in case.kinds


def check_says_it(case: Case, folder: Path) -> None:
    done = fate("check", write(case, folder))
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert all(line.split(": ")[0] in ("error", "warning", "note") for line in lines), lines
    assert {line.split(": ")[1] for line in lines if line.startswith("error")} & case.kinds


@pytest.mark.parametrize("case", BAD[::SOME], ids=lambda case: case.name[:60])
def test_run_says_in_one_line_what_is_wrong_with_a_file(case, tmp_path):
    run_says_it_in_one_line(case, tmp_path)


@pytest.mark.parametrize("case", CHECKED[:: 2 * SOME], ids=lambda case: case.name[:60])
def test_the_check_command_says_what_is_wrong_with_a_file(case, tmp_path):
    check_says_it(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name[:60])
def test_run_says_in_one_line_what_is_wrong_with_any_file(case, tmp_path):
    run_says_it_in_one_line(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name[:60])
def test_the_check_command_says_what_is_wrong_with_any_file(case, tmp_path):
    check_says_it(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name[:60])
def test_run_runs_a_sound_file(case, tmp_path):
    done = fate("run", write(case, tmp_path), "-n", "1", "hi")
    assert done.returncode == 0, done.stderr
