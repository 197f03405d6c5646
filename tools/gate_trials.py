"""Tries the regression gate: is a kernel that is made slower named each time, and are equals never called slower?

    python tools/gate_trials.py e2b-q4_0.gguf --tries 20 --kernel matmul_q4_0 --percent 5.5

Two builds of one commit, one with -DLENGTHEN of a kernel, and `gemma4q bench --against` in turns: the slow one against
the good one must exit with 1 and name the kernel, the good one against itself must not exit with 1. A kernel
made 5.5 % longer makes its row 5 % slower: the other thread has the memory for itself meanwhile. A try that finds the
machine too noisy (exit status 3) is counted by itself. Wants a quiet machine; nothing else should run. Options that
are not its own, as `--busy 0.95`, go to the gate.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from gemma4q.measure.builds import interpreter

TRIES = 20


def trial(python: str, other: str, model: str, more: list[str]) -> tuple[int, list[dict], float]:
    """Exit status, rows and seconds of one run of the gate; `python` has the build under suspicion."""
    start = time.perf_counter()
    command = [python, "-P", "-m", "gemma4q", "bench", model, "--against", other, "-o", "json", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1, 3) or not done.stdout:
        raise SystemExit(f"the gate failed: {done.stderr.strip()}")
    return done.returncode, json.loads(done.stdout)["rows"], time.perf_counter() - start


def report(what: str, number: int, status: int, rows: list[dict], seconds: float) -> None:
    slower = [f"{row['name']} {100 * row['change']:+.1f} %" for row in rows if row["verdict"] == "slower"]
    unclear = [row["name"] for row in rows if row["verdict"] == "unclear"]
    more = f"; unclear: {', '.join(unclear)}" if unclear else ""
    print(
        f"{what} {number}: exit {status} in {seconds:.0f} s: {', '.join(slower) or 'nothing slower'}{more}", flush=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tries", type=int, default=TRIES, help="of each kind")
    parser.add_argument("--kernel", default="matmul_q4_0")
    parser.add_argument("--percent", type=float, default=5.5)
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/gemma4q/builds")
    given, more = parser.parse_known_args()
    settings = {"LENGTHEN": given.kernel, "LENGTHEN_PERCENT": f"{given.percent:g}"}
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    good = interpreter(given.revision, given.cache, say)
    slow = interpreter(given.revision, given.cache, say, settings)
    seen = alarms = noisy = 0
    longest = 0.0
    for number in range(1, given.tries + 1):
        for what, python in ((f"{given.kernel} +{given.percent:g} %", slow), ("equals", good)):
            status, rows, seconds = trial(python, good, given.model, more)
            report(what, number, status, rows, seconds)
            named = any(row["verdict"] == "slower" and row["kernel"] == given.kernel for row in rows)
            seen += python == slow and status == 1 and named
            alarms += python == good and status == 1
            noisy += status == 3
            longest = max(longest, seconds)
    print(f"named in {seen} of {given.tries}, {alarms} alarms in {given.tries} tries of equals, "
          f"{noisy} too noisy, {longest:.0f} s the longest try")  # fmt: skip
    return int(seen < given.tries or alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
