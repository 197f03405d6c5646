"""What `bench` prints: its table to stdout in the form asked for; what it is doing, and what follows, to stderr."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median

import click

from . import terminal
from .terminal import human_bytes, note

BUSY = 0.97  # CPU time of a run that had its cores to itself, of threads x wall


class Screen:
    """Says what is going on while nothing else is printed; on a terminal only."""

    def __init__(self):
        self.waiting: terminal.Waiting | None = None

    def doing(self, what: str) -> None:
        self.done()
        self.waiting = terminal.Waiting(what)

    def done(self) -> None:
        if self.waiting:
            self.waiting.done()
            self.waiting = None

    def note(self, text: str) -> None:
        self.done()
        note(text)

    def digesting(self) -> Callable[[int, int], None]:
        self.doing("SHA-256 of the model")
        return lambda done, total: self.done() if done == total else None

    @contextmanager
    def counting(self, label: str) -> Iterator[Callable[[int, int], None]]:
        self.done()
        with terminal.progress(label) as advance:
            yield advance


class show:
    """One function for each kind of table."""

    @staticmethod
    def results(document: Mapping, form: str, with_ops: bool) -> None:
        from ..measure.report import op_columns, result_columns

        rows = document["results"]
        _print(form, document, rows, result_columns(document["model"], rows))
        if not with_ops or form not in ("table", "md"):
            return
        for row in rows:
            read, gemm = (median(values) if (values := row["probes"][name]) else None for name in ("read", "gemm"))
            click.echo(f"\n{row['test']}, {row['isa'] or row['backend']}, {row['threads']} threads:\n")
            if row["ops"]:
                _print(form, document, row["ops"], op_columns(read, gemm))
            else:
                click.echo("this backend does not count the time of its ops")

    @staticmethod
    def gate(document: Mapping, rows: Sequence, form: str) -> None:
        from ..measure.report import GATE_COLUMNS, row_of

        found = [row_of(row) for row in rows]
        _print(form, dict(document) | {"rows": found}, found, GATE_COLUMNS)

    @staticmethod
    def versus(document: Mapping, rows: Sequence[Mapping], form: str) -> None:
        from ..measure.report import VS_COLUMNS

        _print(form, dict(document) | {"rows": rows}, rows, VS_COLUMNS)

    @staticmethod
    def changes(document: Mapping, base: Mapping, changes: Sequence, threshold: float, form: str) -> None:
        from ..measure.report import COMPARE_COLUMNS

        rows = [
            asdict(change) | {"verdict": "slower" if change.beyond(threshold) else "same or in doubt"}
            for change in changes
        ]
        then = {key: base.get(key) for key in ("when", "build", "machine")}
        _print(form, dict(document) | {"then": then, "rows": rows}, rows, COMPARE_COLUMNS)
        before, now = ((of.get("machine") or {}).get("processor") for of in (base, document))
        if before != now:
            note(f"note: the base was measured on another machine, {before}: probes scale speed, not caches")


def _print(form: str, document: Mapping, rows: Sequence[Mapping], columns: Sequence) -> None:
    from ..measure.report import write

    if form != "table":
        click.echo(write(form, document, rows, columns))
        return
    terminal.table([(column.title, column.right) for column in columns], [[c.show(r) for c in columns] for r in rows])


def facts_below(document: Mapping, form: str) -> None:
    """Machine, memory and latency under a table that people read."""
    if form not in ("table", "md"):
        return
    lines = _where(document)
    for name, unit in (("read", "GB/s of memory"), ("gemm", "Gop/s of float32 products")):
        values = [value for row in document["results"] for value in row["probes"][name]]
        if values:
            spread = f"{min(values) / 1e9:.1f} … {max(values) / 1e9:.1f}"
            lines.append(f"roof:    {median(values) / 1e9:.1f} {unit} meanwhile ({spread})")
    for process in document["processes"]:
        lines += _process(process)
    company = [row["test"] for row in document["results"] if row["busy"] < BUSY]
    if company:
        lines.append(f"company: others had the cores in part during {', '.join(dict.fromkeys(company))}")
    _below(lines, form)


def sides_below(document: Mapping, form: str) -> None:
    """The machine, and what both sides are, under a table that people read."""
    if form not in ("table", "md"):
        return
    from ..measure.versus import described

    _below([*_where(document), *(f"{side['engine'] + ':':<11}{described(side)}" for side in document["sides"])], form)


def _where(document: Mapping) -> list[str]:
    """Machine, build and file, a line each or so."""
    machine, build, model = document["machine"], document["build"], document["model"]
    commit = f", commit {build['commit']}" if build["commit"] else ""
    return [
        f"machine: {machine['processor']}, {machine['cores']} cores, {human_bytes(machine['memory'])}",
        f"build:   gemma4q {build['gemma4q']}{commit}; SHA-256 of the file {model['sha256'][:16]}…",
    ]


def _below(lines: Sequence[str], form: str) -> None:
    click.echo("\n" + ("\n" if form == "table" else "  \n").join(lines))


def _process(process: Mapping) -> list[str]:
    memory, times = process["memory"], process["latency"]
    names = ("RssAnon", "RssFile")
    lines = ["memory:  " + ", ".join(f"{name} {human_bytes(memory[name])}" for name in names if name in memory)]
    if "read_bytes" in memory:
        lines[0] += f"; read from the disk {human_bytes(memory['read_bytes'])}"
    if times:
        lines.append(
            f"first token of 64: {times['first_token_cold']:.3f} s from the start of the process, "
            f"{times['first_token_warm']:.3f} s warm; next turn of 32: {times['next_turn']:.3f} s"
        )
    if times.get("host") is not None:
        lines.append(f"a token: {times['barriers']} barriers; {100 * times['host']:.1f} % of its time outside the ops")
    return lines


def explain_gate(outcome, threshold: float, other: str) -> None:
    """What the rows come to, in a line or two."""
    moved = [row for row in outcome.rows if row.verdict in ("slower", "faster")]
    for row in moved:
        note(
            f"{row.verdict}: {row.name} takes {100 * row.change:+.1f} % ({100 * row.low:+.1f} … {100 * row.high:+.1f})"
        )
    unclear = [row.name for row in outcome.rows if row.verdict == "unclear"]
    pairs = sum(len(pairs.kept) for pairs in outcome.pairs)
    how = f"{pairs} pairs in {outcome.seconds:.0f} s, {100 * outcome.discarded:.0f} % had company and were thrown away"
    match outcome.exit:
        case 0:
            note(f"no row is {threshold:g} % slower than {other}: {how}")
        case 1:
            note(f"slower than {other} by more than {threshold:g} %: {how}")
        case _:
            note(f"too noisy to tell ({', '.join(unclear)}): {how}")
