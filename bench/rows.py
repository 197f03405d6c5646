"""What more rows of a step cost: n tokens of one sequence (a draft verified), and a token each of n sequences at once.

    python bench/rows.py MODEL.gguf -t 2 --csv bench/results/rows.csv

Every round times one step of each size, one after the other, so that a slow moment hits them all; a size's cost is the
median over the rounds of its time by that round's one-row step. All rows are of the generated class, and what is wanted
is the best tokens of each. `gain` is how many times the tokens a second of one sequence that makes.
"""

import argparse
import csv
from pathlib import Path
from statistics import median

import numpy as np

import gemma4q
from gemma4q.abi import RowFlag, Status
from gemma4q.engine.prompt import token_keys
from gemma4q.measure.worker import Timed
from gemma4q.plan.batch import Batch, Step

SIZES = (1, 2, 4, 8, 16)
COLUMNS = ("model", "threads", "kind", "rows", "milliseconds", "cost", "gain", "busy")


class Rows:
    """A model, and as many sequences of `depth` random tokens as are asked for at once."""

    def __init__(self, path: str, threads: int, sizes: list[int], depth: int):
        most = max(sizes)
        self.model = gemma4q.load(path, threads=threads, sequences=most, context=depth + 64 * most)
        self.session, self.threads = self.model.session, threads
        self.batch = Batch(self.session.limits, self.model.plan.width, self.model.plan.vocab)
        self.random = np.random.default_rng(1)
        cache = self.model.engine.cache
        self.histories = [cache.open(token_keys(self.tokens(depth), False)) for _ in range(most)]
        for history in self.histories:
            while history.length < depth:
                self.step([(history, min(depth - history.length, self.session.limits.rows))], False)

    def tokens(self, count: int) -> np.ndarray:
        return self.random.integers(5, self.model.plan.vocab, count)

    def step(self, work: list[tuple], generated: bool = True) -> Timed:
        """The next tokens of some sequences, (history, how many) each."""
        steps, ids = [], [self.tokens(count) for _, count in work]
        for (history, count), tokens in zip(work, ids, strict=True):
            start = history.length
            history.extend(count)
            want = np.full(count, RowFlag.WANT_TOP) if generated else int(RowFlag.WANT_TOP)
            steps.append(Step(tokens, start, *history.tables(start + count), generated=generated, want=want))
        self.batch.fill(steps)
        with Timed() as timed:
            result = self.session.run(self.batch)
        if result.status != Status.OK:
            raise SystemExit(f"step failed: {result.status.name}")
        for (history, _), tokens in zip(work, ids, strict=True):
            history.commit(token_keys(tokens, generated))
        return timed

    def verify(self, size: int) -> Timed:
        """`size` tokens of one sequence, then taken back."""
        history = self.histories[0]
        timed = self.step([(history, size)])
        history.rollback(size)
        return timed

    def side_by_side(self, size: int) -> Timed:
        """One token each of `size` sequences, then taken back."""
        timed = self.step([(history, 1) for history in self.histories[:size]])
        for history in self.histories[:size]:
            history.rollback(1)
        return timed


def measure(rows: Rows, kind: str, sizes: list[int], rounds: int) -> list[dict]:
    run, times = {"verify": rows.verify, "sequences": rows.side_by_side}[kind], {size: [] for size in sizes}
    busy = {size: [] for size in sizes}
    for size in sizes:
        run(size)
    for _ in range(rounds):
        for size in sizes:
            timed = run(size)
            times[size].append(timed.seconds)
            busy[size].append(timed.cpu_seconds / (rows.threads * timed.seconds))
    costs = {size: median(np.divide(times[size], times[1])) for size in sizes}
    return [
        {
            "kind": kind,
            "rows": size,
            "milliseconds": 1000 * median(times[size]),
            "cost": costs[size],
            "gain": size / costs[size],
            "busy": median(busy[size]),
        }
        for size in sizes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="rows of a step; 1 is always among them")
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens before")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    sizes = sorted({1, *given.sizes})
    rows, results = Rows(given.model, given.threads, sizes, given.depth), []
    print(f"{'kind':10} {'rows':>4} {'ms':>8} {'cost':>6} {'gain':>6} {'busy':>5}")
    for kind in ("verify", "sequences"):
        for case in measure(rows, kind, sizes, given.rounds):
            print(f"{kind:10} {case['rows']:4} {case['milliseconds']:8.1f} {case['cost']:6.2f} {case['gain']:6.2f} "
                  f"{case['busy']:5.2f}", flush=True)  # fmt: skip
            results.append({"model": Path(given.model).name, "threads": given.threads} | case)
    if given.csv:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="") as file:
            out = csv.DictWriter(file, COLUMNS)
            out.writeheader()
            out.writerows({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in r.items()} for r in results)


if __name__ == "__main__":
    main()
