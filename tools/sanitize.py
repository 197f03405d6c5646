"""Builds the C library with sanitizers and runs tests on it: what reads too far, overflows or races is named.

Tiles (AMX) are emulated, since sanitizers do not see what the CPU's own read.

    python tools/sanitize.py                                    address + undefined behaviour, the kernels' tests
    python tools/sanitize.py tests/test_native.py -k cache      other tests, or a part of them
    python tools/sanitize.py --threads                          data races instead, whole plans on three threads

Needs gcc with its sanitizer runtimes, and `pip install '.[test]'`. The package is the one that
is installed, all but its library. Exit status: pytest's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL = {
    "address,undefined": [f"tests/test_{name}.py" for name in ("kernels", "attend", "native", "amx", "encode")],
    "thread": ["tests/test_native.py", "-k", "twins_bits or cancelled or share_a_process"],
}
# Python itself leaks; a fence or a cut file is meant to fault; races are looked for in our library alone.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:handle_sigbus=0:allow_user_segv_handler=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
}
RUN = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("gemma4q._native", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
sys.exit(pytest.main(["-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", *sys.argv[2:]]))
"""


def build(room: Path, *options: str) -> Path:
    """The library, compiled with these of CMake's options and put somewhere below `room`."""
    given = ["--quiet", "--upgrade", "--no-deps", "--no-build-isolation", f"-Cbuild-dir={room}/build"]
    given += [f"-Ccmake.define.{option}" for option in options]
    command = [sys.executable, "-m", "pip", "install", *given, "--target", room / "package", ROOT]
    subprocess.run(command, check=True, env=os.environ | {"GEMMA4Q_REQUIRE_NATIVE": "1"})
    return next((room / "package").rglob("_native*.so"))


def runtimes(library: Path) -> str:
    """The sanitizers' own libraries, which must be loaded before all others."""
    needed = subprocess.run(["ldd", library], check=True, capture_output=True, text=True).stdout.split("\n")
    return ":".join(line.split("=>")[1].split()[0] for line in needed if "san.so" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", action="store_true", help="look for data races instead")
    parser.add_argument(
        "--room", type=Path, help="a directory to build in, so that the next time only changes are built"
    )
    given, tests = parser.parse_known_args()
    sanitizers = "thread" if given.threads else "address,undefined"
    option = "CMAKE_C_FLAGS=-g -fsanitize=thread" if given.threads else "SANITIZE=ON"
    with tempfile.TemporaryDirectory() as fresh:
        library = build(given.room or Path(fresh), option, "AMX_EMULATED=ON")
        environment = os.environ | OPTIONS | {"LD_PRELOAD": runtimes(library)}
        command = [sys.executable, "-c", RUN, library, *(tests or USUAL[sanitizers])]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
