"""Builds the C library with tiles (AMX) emulated and runs tests on it, on any CPU that has AVX-512 and AVX512-BF16.

    python tools/emulate_amx.py                                 all that computes with tiles
    python tools/emulate_amx.py tests/test_engine.py -k cache   other tests, or a part of them

Needs `pip install '.[test]'`. The package is the one that is installed, all but its library. Exit status: pytest's.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from sanitize import ROOT, RUN, build

USUAL = ["tests/test_amx.py", "tests/test_native.py", "tests/test_forward.py", "tests/test_kernels.py"]


def main() -> None:
    with tempfile.TemporaryDirectory() as room:
        command = [sys.executable, "-c", RUN, build(Path(room), "AMX_EMULATED=ON"), *(sys.argv[1:] or USUAL)]
        sys.exit(subprocess.run(command, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
