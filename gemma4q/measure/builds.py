"""Another build of gemma4q to measure against: whatever names it, an interpreter that has it.

A wheel or a revision is installed into an environment of its own below a cache folder, never in the clone, and is found
there the next time. What to measure with it is not known here.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import Gemma4qError

HERE = Path(__file__).parents[2]
BUILD_SECONDS = 1800
Note = Callable[[str], None]


def interpreter(
    build: str, cache: Path, note: Note = lambda text: None, settings: Mapping[str, str] | None = None
) -> str:
    """The Python that has `build`: an interpreter, an environment's folder, a wheel, or a revision of this clone.

    settings: CMake definitions, for builds from source. Raises `unknown_build`, `build_failed`, and OSError for a cache
    that cannot be written.
    """
    path = Path(build).absolute()  # not resolved: an environment's Python is a link
    if path.is_dir() and (path / "bin/python").exists():
        path = path / "bin/python"
    if path.is_file():
        if path.suffix == ".whl":
            key = f"wheel-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
            return _environment(cache, key, note, lambda room: [str(path)])
        return _checked(path)
    clone, commit = find_commit(build)
    options = [f"-Ccmake.define.{name}={value}" for name, value in (settings or {}).items()]
    more = hashlib.sha256("".join(options).encode()).hexdigest()[:8] if options else "plain"
    return _environment(cache, f"{commit}-{more}", note, lambda room: [*options, str(_export(clone, commit, room))])


def find_commit(revision: str) -> tuple[Path, str]:
    """The clone that knows `revision`, where we stand or where this package lies, and the commit it means."""
    for clone in (Path.cwd(), HERE):
        done = _git(clone, "rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
        commit = done.stdout.strip()
        if commit and not _git(clone, "cat-file", "-e", f"{commit}:./gemma4q/abi.h").returncode:
            return clone, commit
    raise Gemma4qError(
        "unknown_build", f"{revision}: neither a Python, nor an environment, nor a wheel, nor a revision of this clone"
    )


def commit_of(python_package: Path = HERE) -> str | None:
    """The commit that a package runs from, `+` behind it when files were changed since; None: not from a clone."""
    if not (python_package / "pyproject.toml").exists():
        return None
    commit = _git(python_package, "rev-parse", "--short=12", "HEAD").stdout.strip()
    changed = _git(python_package, "status", "--porcelain", "--untracked-files=no", "--", "gemma4q", "csrc").stdout
    return commit + "+" * bool(changed) if commit else None


def _git(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
    except OSError:
        return subprocess.CompletedProcess(arguments, 1, "", "git is not installed")


def _checked(path: Path) -> str:
    """`path` as an interpreter in which gemma4q can be imported."""
    find = "import gemma4q, gemma4q.engine.model; print('here')"
    try:
        done = subprocess.run([str(path), "-P", "-c", find], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise Gemma4qError("unknown_build", f"{path}: cannot be run as a Python ({error})") from None
    if done.stdout.strip() != "here":
        last = (done.stderr.strip().splitlines() or ["it is no Python"])[-1]
        raise Gemma4qError("unknown_build", f"{path}: no gemma4q can be imported there: {last}")
    return str(path)


def _environment(cache: Path, key: str, note: Note, what: Callable[[Path], list[str]]) -> str:
    """The interpreter of the environment `key`, into which pip installs `what(empty folder)` the first time."""
    version = sysconfig.get_python_version()
    home = cache / f"{key}-py{version}"
    python = home / "bin/python"
    if python.exists():
        return str(python)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as name:
        room, log = Path(name), cache / f"{key}.log"
        note(f"building {key} in {home} (once; {log} tells how it goes)")
        steps = (
            [sys.executable, "-m", "venv", str(room / "venv")],
            [str(room / "venv/bin/python"), "-m", "pip", "install", "--disable-pip-version-check", *what(room)],
        )
        with log.open("w") as out:
            for step in steps:
                if subprocess.run(step, stdout=out, stderr=out, cwd=room, timeout=BUILD_SECONDS).returncode:
                    raise Gemma4qError("build_failed", f"{key}: {_why(log)} (all of it: {log})")
        _checked(room / "venv/bin/python")
        shutil.rmtree(home, ignore_errors=True)
        (room / "venv").rename(home)  # complete, or not there
    return str(python)


def _why(log: Path) -> str:
    """The line of a build's output that says most: the first of a compiler or of CMake, else the last of all."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r":\d+: error: |CMake Error", line)]
    return [*telling, *lines[-1:], "it failed without a word"][0]


def _export(clone: Path, commit: str, room: Path) -> Path:
    """The files of a commit in a folder of their own."""
    source, archive = room / "source", room / "source.tar"
    top = _git(clone, "rev-parse", "--show-toplevel").stdout.strip()
    done = _git(Path(top), "archive", "--format=tar", f"--output={archive}", commit)
    if done.returncode:
        raise Gemma4qError("build_failed", f"{commit[:12]}: git archive: {done.stderr.strip() or 'it failed'}")
    shutil.unpack_archive(archive, source, filter="data")
    archive.unlink()
    return source
