"""A model file that changes under a mapped model: cut short, it is noticed and all lives on; replaced, nothing happens.

Everything runs in a process of its own, since what is tested is that it does not die.
"""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import GOLDEN, ISAS

TESTS = Path(__file__).parent
START = """
import os, sys
import numpy as np
from cases import Model, Runner, step
from gemma4q.abi import Status, lib

path, isa = sys.argv[1:]
model = Model.open(path)
runner = Runner(model, isa=isa, threads=2)
ids = np.arange(40) % model.vocab
before = runner.run(step(ids))
assert before.status == Status.OK
"""


def lives(path: Path, isa: str, code: str) -> None:
    """The code runs to its end in a process that has `runner`, `ids` and `before`, the result of a first step."""
    given = [sys.executable, "-c", START + code + "\nprint('lived')", path, isa]
    done = subprocess.run(given, cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "lived\n", f"{done.returncode}: {done.stderr}"


@pytest.fixture
def path(tmp_path) -> Path:
    return Path(shutil.copy(GOLDEN / "e2b-like.gguf", tmp_path / "model.gguf"))


@pytest.mark.parametrize("isa", ISAS)
def test_a_file_cut_to_nothing_is_a_changed_model_and_stays_one(path, isa):
    lives(path, isa, """
os.truncate(path, 0)
for _ in range(3):
    assert runner.run(step(ids)).status == Status.MODEL_CHANGED
""")  # fmt: skip


def test_a_file_cut_in_the_middle_of_a_tensor_is_a_changed_model(path):
    """What is left is still read where it lies; generated tokens notice as prompts do."""
    lives(path, ISAS[0], """
tensor = model.tensors["blk.1.ffn_up.weight"]
os.truncate(path, tensor.offset + 100)
assert runner.run(step(ids[:1], 40, generated=True)).status == Status.MODEL_CHANGED
""")  # fmt: skip


def test_another_model_in_the_same_process_goes_on(path):
    other = Path(shutil.copy(GOLDEN / "moe-like.gguf", path.with_name("other.gguf")))
    lives(path, ISAS[0], f"""
other = Runner(Model.open({str(other)!r}), threads=2)
sound = other.run(step(ids))
os.truncate(path, 4096)
assert runner.run(step(ids)).status == Status.MODEL_CHANGED
again = other.run(step(ids))
assert again.status == Status.OK and (again.logits == sound.logits).all()
""")  # fmt: skip


def test_a_file_replaced_by_another_of_its_name_changes_nothing(path):
    """As a download or an editor does it: written beside, then renamed; or removed."""
    other = Path(shutil.copy(GOLDEN / "moe-like.gguf", path.with_name("other.gguf")))
    lives(path, ISAS[0], f"""
os.replace({str(other)!r}, path)
again = runner.run(step(ids))
assert again.status == Status.OK and (again.logits == before.logits).all()
os.unlink(path)
again = runner.run(step(ids))
assert again.status == Status.OK and (again.logits == before.logits).all()
""")  # fmt: skip


def test_a_fault_that_is_not_ours_meets_whoever_was_here_before(path):
    """Python's faulthandler, here; it reports and the process dies of SIGBUS, as it would without us."""
    code = (
        START.replace("import os, sys", "import faulthandler, os, sys; faulthandler.enable()")
        + """
import ctypes, mmap
with open(path + ".other", "wb+") as file:
    file.truncate(8192)
    mapped = np.frombuffer(mmap.mmap(file.fileno(), 8192), np.uint8)
    file.truncate(0)
    print("now", flush=True)
    mapped.sum()
"""
    )
    given = [sys.executable, "-c", code, path, ISAS[0]]
    done = subprocess.run(given, cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGBUS and done.stdout == "now\n" and "Bus error" in done.stderr


def test_without_a_model_a_fault_is_nobodys(path):
    """A session that is closed guards nothing any more; its slot is free for the next model."""
    lives(path, ISAS[0], """
for _ in range(300):
    Runner(model, isa=isa).session.close()
slots = Runner(model, isa=isa).session.slots
assert len(slots) == 1 and 0 <= slots[0] < 2
assert lib.mapping_poisoned(-1) == lib.mapping_poisoned(10_000) == 0
""")  # fmt: skip
