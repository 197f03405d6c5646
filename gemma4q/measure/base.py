"""Yesterday's figures beside today's: a saved measurement, scaled by what the machine gave then and gives now.

How far a test follows a probe (a plain read for generated tokens, a float32 product for prompts) lies somewhere between
not at all and wholly: by half of what the probe moved it is scaled, and the other half is doubt. With it goes how far
the means of samples and probes may lie from the truth, at 99 %. An alarm has to be beyond all that.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, median, stdev

from ..errors import Gemma4qError

FORMAT = "gemma4q bench 1"
FOLLOWED = 0.5  # of what a probe moved, give or take as much
LEAST_SHARE = 0.05
# Student's t of 99 %, two-sided, for this many samples; beyond: the last.
STUDENT = {2: 63.66, 3: 9.92, 4: 5.84, 5: 4.60, 6: 4.03, 7: 3.71, 8: 3.50, 9: 3.36, 10: 3.25, 15: 2.98, 30: 2.76}
KEYS = ("backend", "isa", "threads", "kv", "batch", "test")


@dataclass(frozen=True)
class Change:
    """How much more time a row takes than then, 0.05 for 5 %, and how far that may be wrong. probe: what scaled it."""

    name: str
    probe: str
    change: float
    doubt: float
    machine: float  # how much faster the machine is now, by the probe

    def beyond(self, threshold: float) -> bool:
        return self.change > threshold + self.doubt


def save(path: Path, document: Mapping) -> None:
    """Raises OSError."""
    path.write_text(json.dumps({"format": FORMAT} | document, indent=1) + "\n")


def load(path: Path, model: Mapping) -> dict:
    """What `save` wrote of the same `model`. Raises `bad_base` and OSError."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise bad_base(path, f"is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise bad_base(path, "was not written by `gemma4q bench --save`")
    saved = document.get("model")
    if not isinstance(saved, dict) or not isinstance(document.get("results"), list):
        raise bad_base(path, "has no model or no results")
    if saved.get("sha256") != model["sha256"]:
        raise bad_base(path, f"is of another model file: {saved.get('name')}, SHA-256 {str(saved.get('sha256'))[:12]}…")
    return document


def bad_base(path: Path, what: str) -> Gemma4qError:
    return Gemma4qError("bad_base", f"{path} {what}")


def compare(base: Mapping, results: list[dict], path: Path) -> list[Change]:
    """Of each row that both have. Raises `bad_base`."""
    try:
        then = {tuple(result[key] for key in KEYS): result for result in base["results"]}
        pairs = [(then[key], now) for now in results if (key := tuple(now[k] for k in KEYS)) in then]
        changes = [change for before, now in pairs for change in rows(before, now)]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise bad_base(path, f"is damaged: {type(error).__name__} {error}") from None
    if not changes:
        raise bad_base(path, "has no row in common: measure with its -p, -n, -d, -t, --isa, --backend and --kv")
    return changes


def rows(then: Mapping, now: Mapping) -> Iterator[Change]:
    """A test, and those of its kernels that matter to it."""
    probe = "gemm" if now["n_prompt"] else "read"
    if not then["probes"][probe] or not now["probes"][probe]:
        return
    samples = [[ns / 1e9 for ns in side["samples_ns"]] for side in (then, now)]
    yield change(now["test"], probe, then, now, samples)
    for kernel, seconds in now["kernels"].items():
        if kernel in then["kernels"] and median(seconds) > LEAST_SHARE * median(samples[1]):
            yield change(f"{now['test']}: {kernel}", probe, then, now, [then["kernels"][kernel], seconds])


def change(name: str, probe: str, then: Mapping, now: Mapping, samples: list[list[float]]) -> Change:
    times = [[log(seconds) for seconds in side] for side in samples]
    given = [[log(rate) for rate in side["probes"][probe]] for side in (then, now)]
    moved = mean(given[1]) - mean(given[0])
    doubt = sum(map(spread, times)) + FOLLOWED * (abs(moved) + sum(map(spread, given)))
    by = mean(times[1]) - mean(times[0]) + FOLLOWED * moved
    return Change(name, probe, exp(by) - 1, exp(doubt) - 1, exp(moved) - 1)


def spread(values: list[float]) -> float:
    """How far the mean of these may be from the truth; one sample says nothing of that."""
    if len(values) < 2:
        raise Gemma4qError("bad_option", "-r 1 does not tell a change from noise: save and compare take 2 runs or more")
    student = next(t for n, t in sorted(STUDENT.items(), reverse=True) if n <= len(values))
    return student * stdev(values) / sqrt(len(values))
