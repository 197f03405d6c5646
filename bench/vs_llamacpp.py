"""gemma4q against llama.cpp: the same file, prompt, depth and threads, in pairs A, B, A, B of one run.

    python bench/vs_llamacpp.py MODEL.gguf -p 512 -n 128 -d 0 -t 2 -r 9 --peer-python ~/peers/bin/python

Each side is a process that loads once and lives through the run (worker.py). A run whose CPU time is below 0.97 of
threads x wall (`--busy`) had company on its cores and is thrown away, with its partner. `--b none` measures one side
alone; `--a X --b X` shows what noise is. Prints medians, extremes and the median ratio of a pair; `--csv` appends runs.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
ENGINES = {"gemma4q": "gemma4q_worker.py", "llamacpp": "llamacpp_worker.py"}
COLUMNS = ("when", "machine", "model", "metric", "count", "depth", "threads", "pair", "engine", "version")
COLUMNS += ("tok_s", "busy", "kept")
TRIES = 4  # times as many pairs as asked for are started before the machine is called too noisy


class Worker:
    """A side in its own process."""

    def __init__(self, engine: str, python: str, given: argparse.Namespace):
        command = [python, str(HERE / ENGINES[engine]), str(given.model), "--threads", str(given.threads)]
        command += ["--longest", str(given.depth + given.prompt + given.decode + 64), "--prompt", str(given.prompt)]
        self.engine, self.threads, self.busy = engine, given.threads, given.busy
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
        )
        self.about = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.engine} worker ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, metric: str, count: int, depth: int) -> dict:
        print(json.dumps({"metric": metric, "count": count, "depth": depth}), file=self.process.stdin, flush=True)
        run = self.answer()
        busy = run["cpu_seconds"] / (self.threads * run["seconds"])
        return {"engine": self.engine, "rate": count / run["seconds"], "busy": busy, "kept": busy >= self.busy}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def pairs(workers: list[Worker], metric: str, count: int, given: argparse.Namespace) -> list[list[dict]]:
    """Every pair that was started, the kept and the discarded; ends when `runs` are kept."""
    for worker in workers:
        worker.measure(metric, count, given.depth)
    tried: list[list[dict]] = []
    while sum(map(clean, tried)) < given.runs and len(tried) < TRIES * given.runs:
        tried.append([worker.measure(metric, count, given.depth) for worker in workers])
    return tried


def clean(pair: list[dict]) -> bool:
    return all(run["kept"] for run in pair)


def report(metric: str, count: int, tried: list[list[dict]]) -> None:
    kept = [pair for pair in tried if clean(pair)]
    print(f"\n{metric} {count}: {len(kept)} pairs kept of {len(tried)}")
    if not kept:
        print("  every run had company on its cores: nothing to report")
        return
    for side in zip(*kept, strict=True):
        rates = [run["rate"] for run in side]
        print(f"  {side[0]['engine']:9} {median(rates):9.2f} tok/s   min {min(rates):.2f}  max {max(rates):.2f}")
    if len(kept[0]) == 2:
        ratios = [a["rate"] / b["rate"] for a, b in kept]
        print(f"  A / B     {median(ratios):9.3f} median of pairs   min {min(ratios):.3f}  max {max(ratios):.3f}")


def append(given: argparse.Namespace, workers: list[Worker], metric: str, count: int, tried: list[list[dict]]) -> None:
    given.csv.parent.mkdir(parents=True, exist_ok=True)
    fresh = not given.csv.exists()
    when, versions = datetime.now().isoformat(timespec="seconds"), {w.engine: w.about["version"] for w in workers}
    common = [when, platform.node(), given.model.name, metric, count, given.depth, given.threads]
    with given.csv.open("a", newline="") as file:
        out = csv.writer(file)
        if fresh:
            out.writerow(COLUMNS)
        for number, pair in enumerate(tried):
            for run in pair:
                row = [number, run["engine"], versions[run["engine"]], f"{run['rate']:.3f}", f"{run['busy']:.3f}"]
                out.writerow(common + row + [int(clean(pair))])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=512, help="prompt tokens; 0: do not measure")
    parser.add_argument("-n", "--decode", type=int, default=128, help="generated tokens; 0: do not measure")
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens already in the cache")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--runs", type=int, default=9, help="clean pairs")
    parser.add_argument("--busy", type=float, default=0.97, help="least CPU time of a run, by threads x wall")
    parser.add_argument("--a", choices=ENGINES, default="gemma4q")
    parser.add_argument("--b", choices=[*ENGINES, "none"], default="llamacpp")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    given = parse(sys.argv[1:])
    pythons = {"gemma4q": sys.executable, "llamacpp": given.peer_python}
    workers = [Worker(engine, pythons[engine], given) for engine in (given.a, given.b) if engine != "none"]
    for worker in workers:
        print(json.dumps(worker.about, indent=2))
    for metric, count in (("prompt", given.prompt), ("decode", given.decode)):
        if count:
            tried = pairs(workers, metric, count, given)
            report(metric, count, tried)
            if given.csv:
                append(given, workers, metric, count, tried)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
