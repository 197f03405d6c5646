"""How near the roof each part of a model is: a picture of operations a second by operations per byte, and its CSV file.

    python bench/roofline.py MODEL.gguf ... --csv bench/results/roofline.csv --plot bench/results/roofline-NAME.svg

The roof is timed around each run: what a plain read of memory allows, and numpy's float32 product, which products of
8-bit numbers may pass up to the dotted line, four times as high (tiles, as of AMX, beyond it). A dot is a part of the
model, as `gemma4q bench --ops` lists them, in a prompt or in generating; its area is its share of the time. Parts that
read no matrix, key or value are in the CSV file only. NAME in a picture's name becomes the model's.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from harness import named, said_plainly, save, write_csv

from gemma4q.abi import missing
from gemma4q.measure import machine, runs
from gemma4q.measure.pairs import BUSY, Test
from gemma4q.measure.plot import BLUE, ORANGE, canvas

COLUMNS = ("machine", "model", "threads", "kind", "op", "count", "milliseconds", "share", "bytes", "operations",
           "read_gb_s", "gemm_gop_s", "busy")  # fmt: skip
KINDS = {"decode": (BLUE, "o", "generating"), "prompt": (ORANGE, "D", "prompt")}
EIGHT_BIT = 4  # multiply-adds of 8 bits that a vector holds in the place of one of 32
DOT = 2500  # points² of a part that takes all the time
NEAR = 1.3  # times: dots that share a label
LEAST, NAMED = 0.03, 0.01  # share of time of a label, and of a part named in it
MOST_LABELS, MOST_NAMES = 6, 4  # of a kind; in a label
WIDEST, LINE = 24, 0.036  # characters of a label's line; its part of the panel's height


def measure(path: str, threads: int, prompt: int, decode: int, count: int) -> list[dict]:
    """A row of each part of the model, in a prompt and in generating, the longest first."""
    tests = {"decode": Test(decode=decode), "prompt": Test(prompt=prompt)}
    setup, trained = runs.Setup(threads=threads), machine.model(path)["context"]
    found = runs.measure(sys.executable, path, setup, list(tests.values()), count, trained, latency=False)
    rows = []
    for kind, result in zip(tests, found, strict=False):
        roofs = {"read_gb_s": median(result["probes"]["read"]) / 1e9}
        roofs |= {"gemm_gop_s": median(result["probes"]["gemm"]) / 1e9}
        roofs["busy"] = result["busy"]
        about = {"machine": machine.processor(), "model": Path(path).name, "threads": threads, "kind": kind}
        for part in result["ops"]:
            parts = {name: part[name] for name in ("op", "count", "share")}
            parts |= {name: round(part[name]) for name in ("bytes", "operations")}
            rows.append(about | parts | {"milliseconds": 1e3 * part["seconds"]} | roofs)
    return rows


def place(row: dict) -> tuple[float, float]:
    """Operations per byte; 10^9 operations a second."""
    return row["operations"] / row["bytes"], row["operations"] / row["milliseconds"] / 1e6


def draw(figure, rows: Sequence[dict]) -> None:
    panel, first = figure.subplots(), rows[0]
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop / s")
    company = ": others had the cores in part" if min(row["busy"] for row in rows) < BUSY else ""
    title = f"{first['model']}, {first['threads']} threads, {first['machine']}{company}"
    panel.set_title(title, loc="left", fontsize=11)
    placed = [row for row in rows if row["bytes"] and row["milliseconds"]]
    x, y = np.array([place(row) for row in placed]).T
    read, gemm = (max(row[name] for row in rows) for name in ("read_gb_s", "gemm_gop_s"))  # what there can be
    left, right = min(x) / 2, max(x) * 25  # room for labels
    panel.set(xlim=(left, right), ylim=(min(y) / 2, 2 * max(*y, EIGHT_BIT * gemm)))
    roofs = {"-": (gemm, f"read {read:.1f} GB/s, float32 product {gemm:.0f} Gop/s")}
    roofs[":"] = EIGHT_BIT * gemm, f"{EIGHT_BIT} x that: 8-bit products in vectors as wide"
    for style, (top, what) in roofs.items():
        panel.plot([left, top / read, right], [left * read, top, top], style, color="black", linewidth=1.2, label=what)
    for kind, (colour, marker, what) in KINDS.items():
        own = [row for row in placed if row["kind"] == kind]
        areas = [DOT * row["share"] for row in own]
        panel.scatter(*zip(*map(place, own), strict=True), areas, color=colour, marker=marker, alpha=0.65,
                      edgecolors="white", label=f"{what}: area is the share of its time")  # fmt: skip
        label(panel, own, colour)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower left", ncols=2, fontsize=9, frameon=False)
    for handle in legend.legend_handles[len(roofs) :]:
        handle.set_sizes([60])


def label(panel, rows: Sequence[dict], colour: str) -> None:
    """Names of the biggest parts, in a column right of the dots; those that lie on each other share one."""
    big = [group for group in groups(rows) if sum(row["share"] for row in group) >= LEAST][:MOST_LABELS]
    big.sort(key=lambda group: -place(group[0])[1])
    low, high = np.log(panel.get_ylim())
    texts = [described(group) for group in big]
    wanted = [float((np.log(place(group[0])[1]) - low) / (high - low)) for group in big]
    column = 2 * max(place(row)[0] for row in rows)
    for group, text, height in zip(big, texts, apart(wanted, [1 + text.count("\n") for text in texts]), strict=True):
        at = column, np.exp(low + height * (high - low))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        panel.annotate(text, place(group[0]), at, fontsize=9, va="center", color=colour, arrowprops=line,
                       bbox={"color": "white", "pad": 0.5, "alpha": 0.8})  # fmt: skip


def groups(rows: Sequence[dict]) -> list[list[dict]]:
    """Parts that lie within NEAR of a larger one, with it; the groups of most time first."""
    found: list[list[dict]] = []
    for row in sorted(rows, key=lambda row: -row["share"]):
        near = (group for group in found if np.abs(np.log(np.divide(place(row), place(group[0])))).max() < np.log(NEAR))
        group = next(near, None)
        if group is None:
            found.append([row])
        elif row["share"] >= NAMED:
            group.append(row)
    return sorted(found, key=lambda group: -sum(row["share"] for row in group))


def described(group: Sequence[dict]) -> str:
    names = [name(row["op"]) for row in group]
    if len(names) > MOST_NAMES:
        names[MOST_NAMES - 1 :] = [f"{len(names) - MOST_NAMES + 1} more"]
    share = 100 * sum(row["share"] for row in group)
    return textwrap.fill(f"{', '.join(names)} {share:.0f} %", WIDEST)


def apart(wanted: Sequence[float], lines: Sequence[int]) -> list[float]:
    """Middles of texts of so many lines, near those wanted, which descend: below each other, and within the panel."""
    heights: list[float] = []
    for i, height in enumerate(wanted):
        below = heights[-1] - LINE * ((lines[i - 1] + lines[i]) / 2 + 0.4) if heights else height
        heights.append(min(height, below))
    shift = (sum(wanted) - sum(heights)) / max(1, len(heights))
    room = 1 - LINE * max(lines, default=0) / 2 - max(heights, default=0)
    return [height + min(shift, room) for height in heights]


def name(op: str) -> str:
    """`ffn_up` of `matmul blk.*.ffn_up.weight`."""
    return op.split()[-1].removeprefix("blk.*.").removesuffix(".weight")


@said_plainly()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="model")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="tokens generated")
    parser.add_argument("-r", "--runs", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG, PNG or PDF; with NAME for more than one model")
    given = parser.parse_args()
    if min(given.prompt, given.tokens, given.runs, given.threads) < 1:
        parser.error("there must be a prompt, tokens, runs and threads")
    if missing:
        raise SystemExit(missing)
    plots = [named(given.plot, model) for model in given.models] if given.plot else []
    if len(set(plots)) < len(plots):
        parser.error("--plot: one picture a model: put NAME into the file's name")
    figures = [canvas(plot, 9, 6.5) for plot in plots]  # before minutes of measuring
    found = [measure(model, given.threads, given.prompt, given.tokens, given.runs) for model in given.models]
    if given.csv:
        write_csv(given.csv, COLUMNS, (row for rows in found for row in rows))
    for figure, plot, rows in zip(figures, plots, found, strict=False):
        draw(figure, rows)
        save(figure, plot)


if __name__ == "__main__":
    main()
