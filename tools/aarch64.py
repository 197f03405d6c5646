"""Builds gemma4q for 64-bit Arm and runs tests of it under qemu: NEON without a NEON machine.

    python tools/aarch64.py                                     kernels, encoders, whole plans: some twenty minutes
    python tools/aarch64.py tests/test_forward.py -k native     other tests, or a part of them
    python tools/aarch64.py --cpu neoverse-n1                   a processor with dot products but no I8MM

Needs `pip install '.[test]'`, and a Debian or Ubuntu whose Python is 3.11 or newer that was once told, as root:

    dpkg --add-architecture arm64 && apt-get update && apt-get install gcc-aarch64-linux-gnu qemu-user

An Arm Python and wheels are fetched into --room, once. Exit status: pytest's.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-gcc"
USUAL = ["tests/test_kernels.py", "tests/test_attend.py", "tests/test_native.py", "tests/test_encode.py"]
NOT_TO_RUN = {"ruff", "clang-format", "cmake", "ninja", "scikit-build-core"}  # of the extra `test`
DEPENDS = ["apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests", "--no-enhances", "--no-conflicts",
           "--no-breaks", "--no-replaces", "python3:arm64", "libstdc++6:arm64"]  # fmt: skip


def pip(*given: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *given]
    subprocess.run(command, check=True, env=os.environ | {"GEMMA4Q_REQUIRE_NATIVE": "1"})


def system(room: Path) -> Path:
    """Where Debian's Python for Arm is unpacked, with the libraries it loads."""
    root, parcels = room / "system", room / "parcels"
    if root.exists():
        return root
    known = subprocess.run(DEPENDS, capture_output=True, text=True).stdout
    names = re.findall(r"^((?:python3|z?lib)\S*:arm64)$", known, re.MULTILINE)
    if not names:
        raise SystemExit("error: apt knows no python3:arm64 (see --help)")
    shutil.rmtree(parcels, ignore_errors=True)
    parcels.mkdir()
    subprocess.run(["apt-get", "download", "-qq", *names], check=True, cwd=parcels)
    for parcel in parcels.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", parcel, parcels / "system"], check=True)
    if not (parcels / "system/lib").exists():
        (parcels / "system/lib").symlink_to("usr/lib")
    (parcels / "system").rename(root)
    shutil.rmtree(parcels)
    return root


def interpreter(room: Path, root: Path, cpu: str) -> tuple[str, Path]:
    """Arm's version of Python, and a program that runs it here and is its `sys.executable`, for those it starts."""
    binary = next(path for path in (root / "usr/bin").glob("python3.*") if re.fullmatch(r"python3\.\d+", path.name))
    python = room / "python"
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -cpu {cpu} -L "{root}" -0 "$0" "{binary}" "$@"\n')
    python.chmod(0o755)
    return binary.name.removeprefix("python"), python


def wheels(room: Path, python: str) -> Path:
    """Where the package's dependencies for Arm are, and those of its tests."""
    site = room / "wheels"
    if not site.exists():
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = project["dependencies"] + project["optional-dependencies"]["test"]
        wanted = [line for line in wanted if re.match(r"[\w-]+", line)[0] not in NOT_TO_RUN]
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
        fresh = room / "fetched"
        pip("--upgrade", "--only-binary=:all:", f"--python-version={python}", *platforms, "--target", fresh, *wanted)
        fresh.rename(site)
    return site


def package(room: Path) -> Path:
    """Where gemma4q is, its library compiled for Arm."""
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": COMPILER,
        "CMAKE_C_FLAGS": "-Werror",
    }
    given = [f"-Ccmake.define.{name}={value}" for name, value in settings.items()]
    shutil.rmtree(room / "package", ignore_errors=True)
    pip("--no-deps", "--no-build-isolation", *given, f"-Cbuild-dir={room}/build", "--target", room / "package", ROOT)
    return room / "package"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    room = Path.home() / ".cache/gemma4q/aarch64"
    parser.add_argument("--room", type=Path, default=room, help="a directory to work in (%(default)s)")
    parser.add_argument("--cpu", default="max", help="the processor that qemu plays (%(default)s)")
    given, tests = parser.parse_known_args()
    for program in ("qemu-aarch64", COMPILER, "apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise SystemExit(f"error: {program} is not here (see --help)")
    room = given.room.resolve()
    room.mkdir(parents=True, exist_ok=True)
    root = system(room)
    version, python = interpreter(room, root, given.cpu)
    path = f"{package(room)}:{wheels(room, version)}"
    command = [python, "-P", "-m", "pytest", "-p", "no:cacheprovider", *(tests or USUAL)]
    surroundings = {"PYTHONPATH": path, "PYTHONHOME": f"{root}/usr", "OPENBLAS_NUM_THREADS": "1"}
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | surroundings).returncode)


if __name__ == "__main__":
    main()
