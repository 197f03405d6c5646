"""One build on its own: tests repeated, each run between two looks at what the machine gives, latency and memory.

A configuration is a process; what it answers becomes plain dictionaries here, which report.py prints and base.py keeps.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

from ..errors import Gemma4qError
from .client import Worker
from .cost import Costs
from .pairs import Run, Test

TURN_TOKENS, ANSWER_TOKENS, LATENCY_TOKENS = 32, 16, 64
ROOM = 64  # positions beyond the longest test


@dataclass(frozen=True)
class Setup:
    """How the engine is started: `load`'s words."""

    backend: str = "auto"
    isa: str | None = None
    threads: int = 1
    kv: str = "auto"

    def given(self, tests: Sequence[Test], trained: int) -> dict[str, object]:
        """With a context for the tests, as far as the model was trained for one. Raises `context_length_exceeded`."""
        longest = max(test.depth + test.tokens for test in tests)
        if longest > trained:
            fault = f"a test of {longest:,} tokens; this model was trained for a context of {trained:,}"
            raise Gemma4qError("context_length_exceeded", fault)
        context = min(max(longest, LATENCY_TOKENS + ANSWER_TOKENS + TURN_TOKENS) + ROOM, trained)
        return {"context": context, "backend": self.backend, "isa": self.isa, "threads": self.threads, "kv": self.kv}


def measure(
    python: str, path: str, setup: Setup, tests: Sequence[Test], runs: int, trained: int, *, latency: bool = True,
    drop_file_cache: bool = False, progress: Callable[[str], None] = lambda what: None,
) -> Iterator[dict]:  # fmt: skip
    """Yields a result (see `result`) for each test, then {"latency", "memory"} of the process that ran them."""
    given = setup.given(tests, trained) | ({"drop_file_cache": True} if drop_file_cache else {})
    with Worker(python, "probe", path, {"threads": setup.threads}) as probe:
        progress("loading")
        with Worker(python, "gemma4q", path, given) as worker:
            times = first_tokens(worker) if latency and given["context"] > LATENCY_TOKENS + TURN_TOKENS + ROOM else {}
            costs = Costs(path, worker.about["kv"]) if worker.about["kernels"] else None
            for test in tests:
                progress(test.name)
                yield result(worker, probe, test, runs, costs)
            yield {"latency": times, "memory": worker.ask("memory")}


def first_tokens(worker: Worker) -> dict[str, float]:
    """Seconds from the start of the process to its first token, of a new prompt later, and of the next turn.

    host: the share of an answer's time in which no op ran; barriers: of a step of one token. None: not counted.
    """
    worker.ask("first_token", prompt=LATENCY_TOKENS)
    cold = time.perf_counter() - worker.started
    warm = min(worker.ask("first_token", prompt=LATENCY_TOKENS)["seconds"] for _ in range(3))
    turn = worker.ask("next_turn", answer=ANSWER_TOKENS, turn=TURN_TOKENS)
    times = {"first_token_cold": cold, "first_token_warm": warm, "next_turn": turn["seconds"], "reused": turn["reused"]}
    return times | worker.ask("between", count=ANSWER_TOKENS)


def result(worker: Worker, probe: Worker, test: Test, runs: int, costs: Costs | None) -> dict:
    """Samples of one test, each with the probes around it, and what its ops took on the average."""
    test.run(worker)
    looks, samples = [probe.ask("probe")], []
    for _ in range(runs):
        samples.append(test.run(worker))
        looks.append(probe.ask("probe"))
    rates = [test.tokens / run.seconds for run in samples]
    about = worker.about
    return {
        "backend": about["backend"],
        "isa": about["isa"],
        "threads": about["threads"],
        "kv": about["kv"],
        "batch": test.batch,
        "n_prompt": test.prompt,
        "n_gen": test.decode,
        "n_depth": test.depth,
        "test": test.name,
        "avg_ts": mean(rates),
        "stddev_ts": stdev(rates) if runs > 1 else 0.0,
        "avg_ns": round(mean(run.seconds for run in samples) * 1e9),
        "samples_ts": rates,
        "samples_ns": [round(run.seconds * 1e9) for run in samples],
        "busy": mean(run.busy for run in samples),
        "probes": {name: between(looks, name) for name in ("read", "gemm")},
        "kernels": {name: [run.kernels[name] for run in samples] for name in samples[0].kernels},
        "ops": ops(samples, test, costs) if costs else [],
    }


def between(looks: Sequence[Mapping[str, float | None]], name: str) -> list[float]:
    """For each run the mean of the looks before and after it; empty where the machine was not asked."""
    values = [look[name] for look in looks]
    return [] if None in values else [mean(pair) for pair in pairwise(values)]


def ops(samples: Sequence[Run], test: Test, costs: Costs) -> list[dict]:
    """Parts of the model by time: seconds, share, bytes, operations of one run, and the percents of what there is."""
    parts: dict[str, dict] = {}
    for number, (kind, cost) in enumerate(zip(costs.kinds, costs.of(test), strict=True)):
        part = parts.setdefault(kind, {"op": kind, "count": 0, "seconds": 0.0, "bytes": 0.0, "operations": 0.0})
        part["count"] += 1
        part["seconds"] += mean(run.ops[number] for run in samples) / 1e9
        part["bytes"] += cost.bytes
        part["operations"] += cost.operations
    total = sum(part["seconds"] for part in parts.values()) or 1.0
    for part in parts.values():
        part["share"] = part["seconds"] / total
    return sorted(parts.values(), key=lambda part: -part["seconds"])
