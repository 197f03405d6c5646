"""The quality card: what `quantize --card` asks, and how a card is shown."""

from contextlib import ExitStack
from pathlib import Path

import click

from ..errors import printable
from ..shipped import EVALUATION
from . import options
from .eval import SHIPPED
from .terminal import columns, progress, warn

DIGITS = 12  # of a digest that is shown

cards = options.together(
    click.option("--card", is_flag=True, help="Measure the file beside MODEL, and say in it what that came to."),
    click.option(
        "--card-texts", type=click.Path(path_type=Path), metavar="FILE",
        help="Measure it on these conversations, as `eval -f` takes them; default: those that `eval` takes.",
    ),
)  # fmt: skip


def texts(card: bool, file: Path | None) -> Path | None:
    """The conversations to measure on, if any."""
    if file and not card:
        raise click.UsageError("--card-texts says what a card is measured on: say --card too")
    return (file or EVALUATION) if card else None


def recipe(mixture: str, size: str | None, recipe: str | None, overrides) -> str:
    """How types are chosen, in words."""
    words = [f"gemma, {size}"] if size else [f"{recipe}, no larger than {mixture}"] if recipe else [mixture]
    words += ["pure"] * overrides.pure
    given = (overrides.leave_output, overrides.output, overrides.embedding, overrides.patterns)
    return ", ".join(words + ["some types by hand"] * any(given))


def prepared(plan, texts: Path, recipe: str, imatrix: str | None, chosen: bool, dry_run: bool, threads: int | None):
    """The plan with room for a card, and the `Quality` that is to be measured; `chosen`: by some of the imatrix."""
    from ..measure.quality import Named, Quality

    on = Named(SHIPPED, texts) if texts == EVALUATION else Named.after(texts)
    by = Named(Path(imatrix).name + ", for some tensors" * chosen, Path(imatrix)) if imatrix else None
    with progress("SHA-256 of the model") as advance:
        quality = Quality(plan, on, recipe, by, threads, None if dry_run else advance)
    if quality.left_out:
        most = f"{quality.source.config.context_length:,} tokens"
        warn(f"the card leaves {quality.left_out} turns out, as they end behind more than {most}")
    return quality.carded(plan), quality


def write(plan, quality, threads: int | None):
    """Writes what is planned, with a card where there is a `Quality`; returns the `Card`."""
    from ..engine.threads import choose_threads

    found = []
    with ExitStack() as bar:
        advance = bar.enter_context(progress("quantizing"))

        def late(path: Path) -> dict:
            bar.close()  # a terminal shows one bar at a time
            with progress("measuring") as told:
                found.append(quality.measure(path, told))
            return found[0].keys()

        if quality:
            quality.check(plan)
        plan.write(advance, choose_threads(threads).count, late if quality else None)
    return found[0] if found else None


def section(card) -> str:
    """A few lines for people."""
    from ..measure import eval_report as shown

    table = [*shown.distance("kind")[:4], shown.choice("kind")[1]]
    rows = shown.kind_rows({"all": card.all, "kinds": card.kinds})
    cells = [[column.title for column in table], *([column.show(row) for column in table] for row in rows)]
    by = f"weighed by {_file(card.imatrix, card.imatrix_sha256)}" if card.imatrix else "without importance"
    return "\n".join((
        f"quality of {printable(card.recipe)}, {by}, beside {_file(card.base, card.base_sha256, card.base_type)}",
        columns(cells, right=range(1, len(table))),
        f"on the model's turns of {_file(card.conversations, card.conversations_sha256)}; by {printable(card.tool)}",
        "KL divergence in nats a token; ±: half of a 95 % interval over texts",
    ))  # fmt: skip


def _file(name: str, digest: str | None, type: str = "") -> str:
    facts = [*([printable(type)] if type else []), f"sha256 {printable(digest or '?')[:DIGITS]}…"]
    return f"{printable(name)} ({', '.join(facts)})"
