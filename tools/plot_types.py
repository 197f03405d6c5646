"""Draws size against KL divergence for every type that tools/type_trials.py has looked at, ours and llama.cpp's.

    python tools/plot_types.py bench/results/types.csv bench/results/types-NAME.svg

NAME becomes that of each model.
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import cos, pi, sin
from pathlib import Path

from gemma4q.measure.plot import BLUE, GREEN, GREY, ORANGE, canvas

FONT, DOT = 7, 5  # points
# Where a label may stand, from its dot: nearest first, to the right before above and below.
ANGLES = [pi * part / 8 for part in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8)]
PLACES = [(far * cos(angle), far * sin(angle)) for far, angle in product((8, 14, 21, 29, 38, 48, 60), ANGLES)]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Writes a picture for each model. Raises `unavailable`, `bad_option`, OSError."""
    for model in dict.fromkeys(row["model"] for row in rows):
        figure = canvas(path, 12, 10)
        fill(figure, [row for row in rows if row["model"] == model])
        figure.savefig(path.with_name(path.name.replace("NAME", model)), dpi=110)


def fill(figure, rows: Sequence[Mapping]) -> None:
    """Four panels of one model: mixtures above, --pure below; with importance on the left."""
    texts = f"{rows[0]['tokens']:,.0f} tokens of {rows[0]['texts']:.0f} texts that training never drew"
    figure.suptitle(f"{rows[0]['model']}: KL divergence from BF16 on {texts}", x=0.01, ha="left")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    kinds = list(product((False, True), (True, False)))
    shown = [[row for row in rows if (row["pure"], row["importance"]) == kind] for kind in kinds]
    for panel, (pure, weighed), found in zip(panels.flat, kinds, shown, strict=True):
        dots(panel, found, f"{'--pure' if pure else 'mixtures'}, {'with' if weighed else 'without'} importance")
    for panel in panels[1]:
        panel.set_xlabel("bits a weight")
    for panel in panels[:, 0]:
        panel.set_ylabel("KL divergence, nats a token")
    panels.flat[0].legend(fontsize=8, frameon=False)
    figure.draw_without_rendering()  # which settles where the panels are
    for panel, found in zip(panels.flat, shown, strict=True):
        label(panel, found)


def dots(panel, rows: Sequence[Mapping], name: str) -> None:
    """Ours are filled, llama.cpp's are rings around where they lie."""
    how = {"linestyle": "none", "markersize": DOT}
    recipes = [row for row in rows if row["type"].startswith("gemma")]
    types = [row for row in rows if row not in recipes]
    beside = [row for row in types if row["theirs divergence"] is not None]
    for of, key, found, style in (
        ("gemma4q", "divergence", types, {"marker": "o", "color": BLUE}),
        ("llama.cpp", "theirs divergence", beside, {"marker": "o", "color": ORANGE, "fillstyle": "none"}),
        ("recipe gemma", "divergence", recipes, {"marker": "D", "color": GREEN}),
    ):
        size = {"markersize": DOT + 3} if of == "llama.cpp" else {}
        if found:
            panel.plot([r["bits"] for r in found], [r[key] for r in found], label=of, **how | style | size)
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.margins(0.08)
    panel.set_title(name, loc="left", fontsize=10)


def label(panel, rows: Sequence[Mapping]) -> None:
    """Writes each type's name where it covers neither a dot nor another name."""
    scale = 72 / panel.figure.dpi
    ends = scale * panel.transAxes.transform([(0, 0), (1, 1)])
    marks = [scale * panel.transData.transform(point) for line in panel.lines for point in line.get_xydata()]
    taken = [(x - DOT / 2, y - DOT / 2, x + DOT / 2, y + DOT / 2) for x, y in marks]
    for bits, divergence, name in sorted((row["bits"], row["divergence"], row["type"]) for row in rows):
        x, y = scale * panel.transData.transform((bits, divergence))
        box, (right, up) = next(free(x, y, name, taken, (*ends[0], *ends[1])), (None, PLACES[0]))
        taken += [box] if box else []
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": DOT / 2}
        where = {"xytext": (right, up), "textcoords": "offset points", "arrowprops": line}
        panel.annotate(
            name, (bits, divergence), fontsize=FONT, ha="left" if right >= 0 else "right", va="center", **where
        )


def free(x: float, y: float, name: str, taken: Sequence[Box], panel: Box) -> Iterator[tuple[Box, tuple[float, float]]]:
    """Boxes of a name around a dot that lie in the panel and on nothing else, nearest first, and how far they are."""
    wide, high = 0.62 * FONT * len(name), 1.2 * FONT
    for right, up in PLACES:
        left = x + right if right >= 0 else x + right - wide
        box = left, y + up - high / 2, left + wide, y + up + high / 2
        inside = panel[0] <= box[0] and panel[1] <= box[1] and box[2] <= panel[2] and box[3] <= panel[3]
        if inside and not any(a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in taken):
            yield box, (right, up)


def read(path: Path) -> list[dict]:
    """Rows as type_trials.py has them."""
    words = {"True": True, "False": False, "": None}
    with path.open(newline="") as file:
        return [
            {key: words[v] if v in words else v if key in ("model", "type") else float(v) for key, v in row.items()}
            for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    draw(read(Path(sys.argv[1])), Path(sys.argv[2]))
