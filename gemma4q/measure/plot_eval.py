"""Draws an evaluation: divergence by kind of text, how it is spread over tokens, and how it goes with depth."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .divergence import Scores
from .plot import BLUE, GREY, ORANGE, canvas

LEAST = 1e-9  # nats; what is less is drawn there


def draw(scores: Scores, report: Mapping, title: str, path: Path) -> None:
    """Writes an SVG, PNG or PDF file. Raises `unavailable`, `bad_option`, OSError."""
    figure = canvas(path, 9, 7)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2))
    spread, kinds, below = (figure.add_subplot(grid[at]) for at in (np.s_[0, 0], np.s_[0, 1], np.s_[1, :]))
    by_kind(kinds, report)
    by_share(spread, scores)
    by_depth(below, report)
    for panel in (spread, kinds, below):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def by_kind(panel, report: Mapping) -> None:
    """Means with their intervals, all of them below."""
    rows = [*report["kinds"].items(), *([("all", report["all"])] if len(report["kinds"]) > 1 else [])][::-1]
    for at, (name, found) in enumerate(rows):
        interval(panel, found["divergence"], at, ORANGE if name == "all" else BLUE, across=True)
    panel.set_yticks(range(len(rows)), [f"{name} ({found['tokens']:,})" for name, found in rows])
    panel.set_xlim(left=0)
    panel.set_xlabel("KL divergence, nats a token")
    panel.set_title("by kind of text (tokens)", loc="left", fontsize=10)


def by_share(panel, scores: Scores) -> None:
    """What share of the tokens lies farther off than x, a line for each kind: 0.1 % is read where the line has 10⁻³."""
    for kind in dict.fromkeys(scores.kind.tolist()):
        far = np.sort(np.maximum(scores.divergence[scores.kind == kind], LEAST))[::-1]
        panel.plot(far, np.arange(1, len(far) + 1) / len(far), linewidth=1.3, label=kind)
    for share in (0.5, 0.01, 0.001):
        panel.axhline(share, color=GREY, linewidth=0.7, linestyle=":")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("KL divergence of a token, nats")
    panel.set_ylabel("share of tokens beyond")
    panel.set_title("how it is spread", loc="left", fontsize=10)
    panel.legend(fontsize=8, frameon=False)


def by_depth(panel, report: Mapping) -> None:
    """Means with their intervals, and the 99th percentile, over the ranges of positions."""
    rows = report["depths"]
    for at, found in enumerate(rows):
        interval(panel, found["divergence"], at, BLUE, across=False)
    panel.plot([found["divergence"]["p99"] for found in rows], "--", color=GREY, linewidth=1, label="99 % lie below")
    panel.set_xticks(range(len(rows)), [f"{found['from']:,} …\n({found['tokens']:,})" for found in rows])
    panel.set_yscale("symlog", linthresh=1e-4)
    panel.margins(y=0.1)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("position in the text (tokens)")
    panel.set_ylabel("KL divergence, nats")
    panel.set_title("by depth", loc="left", fontsize=10)
    panel.legend(fontsize=8, frameon=False)


def interval(panel, mean: Mapping, at: float, colour: str, across: bool) -> None:
    """A dot, with a bar where the interval is known."""
    value, low, high = (mean[name] for name in ("value", "low", "high"))
    if value is None:  # infinite
        return
    bar = None if low is None or high is None else [[value - low], [high - value]]
    how = {"marker": "o", "markersize": 5, "capsize": 3, "color": colour, "linestyle": "none"}
    if across:
        panel.errorbar(value, at, xerr=bar, **how)
    else:
        panel.errorbar(at, value, yerr=bar, **how)
