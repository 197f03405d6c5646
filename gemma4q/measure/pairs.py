"""Two sides in turns: short runs A, B, B, A, ... of the same work, and what each pair says of their ratio.

Memory speed wanders by half within minutes, so only runs that follow each other are compared. A run whose CPU time is
below `busy` of threads x wall had company on its cores and is thrown away with its partner. Processes are started anew
for each sitting: where a process's memory lies favours one side as long as it lives. What the differences mean is
verdict.py's to say.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property

from .client import Worker

BUSY = 0.97


@dataclass(frozen=True)
class Test:
    """Work to time: `prompt` tokens in steps of `batch`, then `decode` tokens one by one, behind `depth` others."""

    prompt: int = 0
    decode: int = 0
    depth: int = 0
    batch: int = 512

    @property
    def name(self) -> str:
        """As llama-bench spells it: `pp512`, `tg128 @ d4096`, `pp512+tg128`."""
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.decode}"] * (self.decode > 0)
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        return self.prompt + self.decode

    def run(self, worker: Worker) -> "Run":
        more = {"depth": self.depth, "batch": self.batch}
        if self.prompt and self.decode:
            answer = worker.ask("both", prompt=self.prompt, count=self.decode, **more)
        else:
            answer = worker.ask("prompt" if self.prompt else "decode", count=self.tokens, **more)
        busy = answer["cpu_seconds"] / (worker.threads * answer["seconds"])
        return Run(answer["seconds"], busy, worker.about["kernels"], answer["ops"])


@dataclass(frozen=True)
class Run:
    """Wall seconds, CPU time by threads x wall; kernel and nanoseconds of each op (both empty: not counted)."""

    seconds: float
    busy: float
    names: Sequence[str]
    ops: Sequence[int]

    @cached_property
    def kernels(self) -> dict[str, float]:
        """Seconds by kernel."""
        seconds = dict.fromkeys(self.names, 0.0)
        for name, nanoseconds in zip(self.names, self.ops, strict=True):
            seconds[name] += nanoseconds / 1e9
        return seconds


@dataclass
class Pairs:
    """Every pair of one test: `kept` and the number that had company; `sitting` of each kept one."""

    test: Test
    kept: list[tuple[Run, Run]] = field(default_factory=list)
    sitting: list[int] = field(default_factory=list)
    discarded: int = 0

    def add(self, runs: tuple[Run, Run], sitting: int, busy: float) -> None:
        """Kept, or thrown away together where one had company."""
        if all(run.busy >= busy for run in runs):
            self.kept.append(runs)
            self.sitting.append(sitting)
        else:
            self.discarded += 1


Start = Callable[[], Worker]


def take_turns(
    starts: Sequence[Start], tests: Sequence[Test], seconds: float, busy: float = BUSY
) -> Iterator[list[Pairs]]:
    """Sittings without end, each of `seconds`. `starts` [2]: how A and B are started. Yields all pairs so far."""
    all_pairs = [Pairs(test) for test in tests]
    sitting = 0
    while True:
        with ExitStack() as stack:
            order = (0, 1) if sitting % 2 == 0 else (1, 0)
            started = {i: stack.enter_context(starts[i]()) for i in order}
            sit(started, all_pairs, sitting, seconds, busy)
        sitting += 1
        yield all_pairs


def sit(workers: dict[int, Worker], all_pairs: Sequence[Pairs], sitting: int, seconds: float, busy: float) -> None:
    """One sitting: each test gets an equal share of the time, in rounds of a pair each way round."""
    for pairs in all_pairs:
        for worker in workers.values():
            pairs.test.run(worker)  # what is touched for the first time
    spent = [0.0] * len(all_pairs)
    while (least := min(spent)) < seconds / len(all_pairs):
        i = spent.index(least)
        start = time.perf_counter()
        for order in ((0, 1), (1, 0)):
            pair(workers, all_pairs[i], order, sitting, busy)
        spent[i] += time.perf_counter() - start


def pair(workers: dict[int, Worker], pairs: Pairs, order: tuple[int, int], sitting: int, busy: float) -> None:
    """One run of each side in this order."""
    runs = {side: pairs.test.run(workers[side]) for side in order}
    pairs.add((runs[0], runs[1]), sitting, busy)
