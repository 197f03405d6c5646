"""Draws the log of a tiny model's training: the loss of each task by tokens seen.

python tools/plot_training.py tests/data/trained/tiny/log.csv curve.svg
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

TASKS = ("copy", "reverse", "sums", "lookup", "tools", "answers", "json")


def main() -> None:
    log, out = map(Path, sys.argv[1:3])
    lines = list(csv.DictReader(log.open()))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for task in TASKS:
        points = [(int(line["tokens"]) / 1e6, float(line[task])) for line in lines if line[task]]
        axes.plot(*zip(*points, strict=True), label=task, linewidth=1.2)
    axes.set(yscale="log", xlabel="tokens seen, millions", ylabel="loss of what is to be written, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    speed = sorted(int(line["tokens_s"]) for line in lines)[len(lines) // 2]
    axes.set_title(f"{log.parent.name}: {len(lines)} points, {speed:,} tokens a second (median)")
    figure.savefig(out)


if __name__ == "__main__":
    main()
