"""tools/aarch64.py does what it says: on 64-bit Arm, played by qemu, the kernels give the bits that they give here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "aarch64.py"
# Processors with both levels of NEON, with dot products alone, and with neither.
LEVELS = {"max": "neon_i8mm neon scalar", "neoverse-n1": "neon scalar", "cortex-a72": "scalar"}


def run(*given: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOL), *given]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.aarch64
def test_kernels_on_arm_are_the_twin():
    done = run()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.aarch64
@pytest.mark.parametrize("cpu", LEVELS)
def test_a_processor_is_asked_what_it_can_do(cpu, tmp_path):
    test = tmp_path / "test_levels.py"
    test.write_text(
        "from gemma4q.backends.native import isas\n"
        f"def test_levels(): assert ' '.join(isas()) == {LEVELS[cpu]!r}\n"
    )  # fmt: skip
    done = run("--cpu", cpu, str(test))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_program_that_is_missing_is_named_in_one_line(tmp_path):
    done = run(PATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: qemu-aarch64 is not here (see --help)\n"
