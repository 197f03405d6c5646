"""What is read from the disk, and when: the weights beside the load, chosen experts alone where memory is short."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, Model, Runner, same, step
from terminal import GEMMA4Q
from vocab import gemma_vocabulary

from gemma4q.abi import lib
from gemma4q.engine.memory import MB, WEIGHTS
from gemma4q.engine.model import Prepared
from gemma4q.plan.fuse import MATRICES

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import synth

SIZE = 64 << 20
_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p


def resident(mapped: np.ndarray) -> np.ndarray:
    """bool [pages]: which pages of a mapped file are in memory."""
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    if _mincore(mapped.ctypes.data, len(mapped), pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore")
    return (pages & 1).astype(bool)


def whole(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)


def drop(path: Path) -> None:
    """Out of memory with it, where the file system can."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(whole(path)).any():
        pytest.skip("this file system keeps its files in memory")


def settled(pages, seconds: float = 10) -> np.ndarray:
    """What `pages()` gives once nothing more comes."""
    end, before = time.monotonic() + seconds, pages()
    while time.monotonic() < end:
        time.sleep(0.1)
        if (now := pages()).sum() == before.sum() and now.any():
            break
        before = now
    return before


@pytest.fixture
def file(tmp_path) -> Path:
    """64 MiB of noise, not in memory."""
    path = tmp_path / "noise"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    drop(path)
    return path


def test_what_is_fetched_is_read_without_being_touched(file):
    mapped, page = whole(file), mmap.PAGESIZE
    first, end = 10 * page + 100, SIZE // 2 + 5
    lib.mapping_fetch(mapped.ctypes.data + first, end - first)
    pages = settled(lambda: resident(mapped))
    assert pages[first // page : -(-end // page)].all()
    assert pages.sum() * page < end - first + 4 * MB


def test_where_reading_is_scattered_a_page_comes_without_its_neighbours(file):
    mapped = whole(file)
    lib.mapping_scattered(mapped.ctypes.data, SIZE)
    assert mapped[SIZE // 2] == mapped[SIZE // 2]
    assert settled(lambda: resident(mapped)).sum() < 16


def test_weights_are_fetched_beside_the_load_before_a_step_asks(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes((GOLDEN / "moe-like.gguf").read_bytes())
    drop(path)
    model = Model.open(path)
    session = Runner(model).session
    session.fetch(fits=True)
    read = {w.tensor for op in model.plan.ops if op.code in MATRICES for w in op.weights}
    mapped, page = whole(path), mmap.PAGESIZE
    pages = settled(lambda: resident(mapped))
    for t in (model.tensors[name] for name in read):
        assert pages[t.offset // page : -(-(t.offset + t.nbytes) // page)].all(), t.name
    session.close()


def test_experts_fetched_as_they_are_chosen_give_the_same_bits():
    ids = np.arange(48) % 100
    model = Model.open(GOLDEN / "moe-like.gguf")
    runners = [Runner(model, threads=2) for _ in range(2)]
    runners[1].session.fetch(fits=False)
    same(*(runner.logits(step(ids)) for runner in runners))
    same(*(runner.logits(step(ids[:1], 48, generated=True)) for runner in runners))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e2b", "e4b"])
def test_a_cold_start_reads_the_weights_of_its_plan_once_and_little_else(tmp_path, name):
    """With the real shapes (3.3 and 5.2 GB): what the disk gave a process that says one token."""
    path = tmp_path / f"{name}-q4_0.gguf"
    synth.synthesize(synth.SHAPES[name], "q4_0", path, gemma_vocabulary())
    planned = sum(entry.bytes for entry in Prepared(path).memory.entries if entry.name == WEIGHTS)
    drop(path)
    given = [*GEMMA4Q, "run", path, "-n", "1", "Hi"]
    child = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    io = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
    assert child.wait() == 0
    print(f"{int(io['read_bytes']) / MB:.1f} MiB read, {planned / MB:.1f} MiB planned")
    assert int(io["read_bytes"]) <= 1.1 * planned + 32 * MB
