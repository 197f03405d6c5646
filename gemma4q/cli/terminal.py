"""How the commands talk to a person: notes and bars on stderr, colour and width only where a terminal shows them.

Everything written here is for people; what programs read goes to stdout by the commands themselves.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import click

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
WIDEST = 1000
PATIENCE_SECONDS = 1.0  # what takes longer shows that it is alive
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def note(text: str) -> None:
    """One line for the person, beside the output."""
    click.echo(text, err=True)


def warn(text: str, word: str = "note") -> None:
    note(style(f"{word}: {text}", sys.stderr, "33"))


def style(text: str, stream: TextIO, code: str) -> str:
    """`text` in a colour or weight (an ANSI code), where `stream` shows it and NO_COLOR does not forbid it."""
    return f"\x1b[{code}m{text}\x1b[0m" if coloured(stream) else text


def coloured(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: str) -> str:
    """`text` without the control characters that could drive a terminal; newlines and tabs stay."""
    return _CONTROLS.sub("", text)


def human_bytes(count: int) -> str:
    """A size people can compare: `3.21 GiB`, `812 bytes`."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count:,} bytes" if unit == 0 else f"{size:.2f} {UNITS[unit]}"


def columns(rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Rows as aligned columns, two spaces apart; the columns numbered in `right` are aligned right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)] if texts else []
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in texts
    )
    return "\n".join(line.rstrip() for line in lines)


def table(titles: Iterable[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table to stdout; of each column its title, and whether it is aligned right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, right in titles:
        found.add_column(title, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        found.add_row(*row)
    needed = Console(width=WIDEST).measure(found).maximum  # a cut table cannot be read; a terminal wraps lines itself
    Console(width=needed, highlight=False, markup=False).print(found)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that says how much is done of how much; after a second a bar appears on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(label, visible=False)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=time.monotonic() - started > PATIENCE_SECONDS)

        yield advance


class Waiting:
    """`label` and a spinner on a terminal from the second second on, until `done` is called."""

    def __init__(self, label: str, quiet: bool = False):
        self.label, self.status = label, None
        self.lock, self.over = threading.Lock(), quiet or not sys.stderr.isatty()
        self.timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self.timer.daemon = True
        if not self.over:
            self.timer.start()

    def _show(self) -> None:
        from rich.console import Console

        with self.lock:
            if not self.over:
                self.status = Console(stderr=True).status(self.label)
                self.status.start()

    def done(self) -> None:
        if self.over:
            return
        with self.lock:
            self.over = True
            self.timer.cancel()
            if self.status:
                self.status.stop()

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_) -> None:
        self.done()
