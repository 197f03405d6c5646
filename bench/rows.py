"""What more rows of a step cost: n tokens of one sequence (a draft verified), and a token each of n sequences at once.

    python bench/rows.py MODEL.gguf -t 2 --csv bench/results/rows.csv

Every round times one step of each size, one after the other, so that a slow moment hits them all; a size's cost is the
median over the rounds of its time by that round's one-row step. All rows are of the generated class, and what is wanted
is the best tokens of each. `gain` is how many times the tokens a second of one sequence that makes.
"""

import argparse
from pathlib import Path
from statistics import median

import numpy as np
from harness import Driver, said_plainly, write_csv

from gemma4q.measure.worker import Timed

SIZES = (1, 2, 4, 8, 16)
COLUMNS = ("model", "threads", "kind", "rows", "milliseconds", "cost", "gain", "busy")


class Rows:
    """A model, and as many sequences of `depth` random tokens as are asked for at once."""

    def __init__(self, path: str, threads: int, sizes: list[int], depth: int):
        most = max(sizes)
        self.driver, self.threads = Driver(path, threads, depth + 64 * most, most), threads
        self.histories = [self.driver.open(depth) for _ in range(most)]

    def verify(self, size: int) -> Timed:
        """`size` tokens of one sequence, then taken back."""
        history = self.histories[0]
        timed = self.driver.step([(history, size)])
        history.rollback(size)
        return timed

    def side_by_side(self, size: int) -> Timed:
        """One token each of `size` sequences, then taken back."""
        timed = self.driver.step([(history, 1) for history in self.histories[:size]])
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


@said_plainly()
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
        write_csv(given.csv, COLUMNS, results)


if __name__ == "__main__":
    main()
