"""tools/sanitize.py does what it says: kernels and whole plans are clean of overruns, undefined behaviour and races."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "sanitize.py"


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--threads"]], ids=["address-undefined", "thread"])
def test_sanitizers_find_nothing(given):
    done = subprocess.run([sys.executable, TOOL, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
