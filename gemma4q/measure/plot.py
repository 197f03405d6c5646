"""Draws a history: tokens a second of each test by commit, as measured and with the machine's mood taken out.

Also the only place that knows matplotlib: other pictures begin with a `canvas` of here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from ..errors import Gemma4qError

FORMATS = (".svg", ".png", ".pdf")
MOST_LABELS = 24
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # Okabe and Ito's: told apart by all


def canvas(path: Path, width: float, height: float):
    """An empty figure of so many inches, to be saved as `path`. Raises `unavailable`, `bad_option`."""
    if path.suffix.lower() not in FORMATS:
        raise Gemma4qError("bad_option", f"{path}: the name must end in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Gemma4qError("unavailable", "plots need matplotlib: pip install 'gemma4q[bench]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw(records: Sequence[Mapping], path: Path) -> None:
    """Writes an SVG, PNG or PDF file: a panel a test, a colour a model. Raises `unavailable`, `bad_option`, OSError."""
    commits = list(dict.fromkeys(record["commit"] for record in records))
    series = lines(records)
    tests = list(dict.fromkeys(test for test, _ in series))
    width = max(8.0, min(20.0, 3 + 0.45 * len(commits)))
    figure = canvas(path, width, 0.8 + 2.7 * len(tests))
    panels = figure.subplots(len(tests), 1, sharex=True, squeeze=False)[:, 0]
    colours = {label: f"C{number}" for number, label in enumerate(dict.fromkeys(label for _, label in series))}
    shown: dict[str, object] = {}
    for panel, test in zip(panels, tests, strict=True):
        for (of, label), points in series.items():
            if of == test:
                shown[label] = curve(panel, commits, points, colours[label])
        panel.set_title(test, loc="left", fontsize=11)
        panel.set_ylabel("tokens / s")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    (dashed,) = panels[-1].plot([], [], "--", color="grey")
    shown["dashed: with memory and GEMM as in the first record"] = dashed
    figure.legend(shown.values(), shown.keys(), loc="outside upper left", fontsize=9, frameon=False)
    every = -(-len(commits) // MOST_LABELS)
    panels[-1].set_xticks(range(0, len(commits), every), commits[::every], rotation=45, ha="right", fontsize=8)
    panels[-1].set_xlim(-0.5, len(commits) - 0.5)
    figure.savefig(path, dpi=110)


def lines(records: Sequence[Mapping]) -> dict[tuple[str, str], list[tuple]]:
    """(test, label) to points (commit, samples, those samples on the first record's machine)."""
    series: dict[tuple[str, str], list[tuple]] = {}
    first: dict[str, Mapping] = {}
    for record in records:
        then = first.setdefault(record["machine"], record)["probes"]
        for result in record["results"]:
            probe = "gemm" if result["test"].startswith("pp") else "read"
            now = record["probes"].get(probe)
            scale = then[probe] / now if now and then.get(probe) else None
            how = f"{result.get('isa') or result.get('backend')}, {result['threads']} threads, {result.get('kv')}"
            label = f"{record['model']}, {how}, {record['machine']}"
            samples = result["samples_ts"]
            scaled = [sample * scale for sample in samples] if scale else None
            series.setdefault((result["test"], label), []).append((record["commit"], samples, scaled))
    return series


def curve(panel, commits: Sequence[str], points: Sequence[tuple], colour: str) -> object:
    """Medians of a commit's samples with bars from least to most; dashed: scaled by the probe. What a legend shows."""
    measured: dict[int, list[float]] = {}
    scaled: dict[int, list[float]] = {}
    for commit, samples, by_probe in points:
        measured.setdefault(commits.index(commit), []).extend(samples)
        scaled.setdefault(commits.index(commit), []).extend(by_probe or [])
    at = sorted(measured)
    middle = [median(measured[i]) for i in at]
    bars = [[m - min(measured[i]) for i, m in zip(at, middle, strict=True)]]
    bars.append([max(measured[i]) - m for i, m in zip(at, middle, strict=True)])
    drawn = panel.errorbar(at, middle, bars, marker="o", markersize=4, capsize=3, linewidth=1.5, color=colour)
    dashed = [i for i in at if scaled[i]]
    if dashed:
        panel.plot(dashed, [median(scaled[i]) for i in dashed], "--", linewidth=1.2, color=colour, alpha=0.7)
    return drawn
