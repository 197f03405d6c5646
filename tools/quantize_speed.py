"""Seconds that whole files take: `gemma4q quantize` and llama.cpp's quantiser, in turns.

    python tools/synth.py e2b bf16 e2b.gguf --vocab some-gemma-4.gguf
    python tools/quantize_speed.py e2b.gguf --peer-python ~/peers/bin/python
    python tools/quantize_speed.py e2b.gguf --peer-python ~/peers/bin/python --types Q4_K_M --no-pure --pairs 9

Ours is the whole command with Python's start, theirs llama_model_quantize alone; both until the disk has the file,
which is then removed. Pairs begin with either in turn. Above a ratio of 1 ours is faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llama_quantize import timed


def on_disk(path: Path) -> float:
    """Seconds until the disk has a file."""
    started = time.monotonic()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return time.monotonic() - started


def ours(model: Path, out: Path, mixture: str, pure: bool, threads: int) -> float:
    command = [sys.executable, "-P", "-m", "gemma4q", "quantize", model, out, mixture, "-t", str(threads)]
    started = time.monotonic()
    done = subprocess.run([*command, *["--pure"] * pure], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - started


def pairs(model: Path, folder: Path, mixture: str, given: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of ours and of theirs."""
    out, found = folder / "out.gguf", []
    for number in range(given.pairs):
        pair = {}
        for side in ("ours", "theirs")[:: -1 if number % 2 else 1]:
            os.sync()  # what was written before is not waited for now
            if side == "ours":
                pair[side] = ours(model, out, mixture, given.pure, given.threads)
            else:
                took = timed(given.peer_python, model, out, mixture, pure=given.pure, threads=given.threads)
                pair[side] = took + on_disk(out)
            size = out.stat().st_size
            out.unlink()
        found.append((pair["ours"], pair["theirs"]))
        print(f"{mixture:8} {size / 1e9:5.2f} GB  {found[-1][0]:7.2f} s  llama.cpp {found[-1][1]:7.2f} s", flush=True)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with llama-cpp-python")
    parser.add_argument("--types", default="Q4_0,Q8_0,Q4_K_S")
    parser.add_argument("--no-pure", dest="pure", action="store_false", help="the mixtures, not one type for all")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where files are written; default: beside the model")
    given = parser.parse_args()
    print(f"{given.model.name} in {given.threads} threads, {'one type for all' if given.pure else 'mixtures'}")
    with TemporaryDirectory(dir=given.folder or given.model.parent) as folder:
        for mixture in given.types.split(","):
            ours, theirs = zip(*pairs(given.model, Path(folder), mixture, given), strict=True)
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            print(
                f"{mixture}: {spread(ours, 1)} s, llama.cpp {spread(theirs, 1)} s, ratio {spread(ratios, 2)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
