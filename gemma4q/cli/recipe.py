"""What `quantize --recipe` and `--target-size` ask, and what they say of what was chosen."""

import time
from pathlib import Path

import click

from ..errors import Gemma4qError
from ..shipped import CALIBRATION
from . import options
from .terminal import columns, note, progress

BUDGET = 20.0  # minutes
MOST_SHOWN = 20  # trial models

recipes = options.together(
    click.option(
        "--recipe", type=click.Choice(["gemma"]), help="Choose types by what rounding does; TYPE says how large."
    ),
    click.option("--target-size", metavar="SIZE", help="The same for a file of this size, as 12GB; then without TYPE."),
    click.option(
        "--budget", type=click.FloatRange(min=0), metavar="MINUTES", default=BUDGET, show_default=True,
        help="Time to measure trial models in; 0: go by the sums of errors alone.",
    ),
    click.option(
        "--recipe-texts", type=click.Path(path_type=Path), metavar="FILE",
        help="Conversations to measure them with, a JSON object a line; default: those that ship.",
    ),
)  # fmt: skip


def choose(
    plan,
    overrides,
    target: int | None,
    budget: float,
    texts: Path | None,
    again: bool,
    dry_run: bool,
    threads: int | None,
):
    """The plan with types of the recipe's choice, and the `Allocation`.

    A dry run measures nothing, and uses what was measured before.
    """
    from ..engine.threads import choose_threads
    from ..measure.sensitivity import Divergence
    from ..quantize.recipe import recipe

    wanted, count = recipe(plan, overrides, target, again), choose_threads(threads).count
    with progress("summing errors") as advance:
        lost = wanted.errors(count, advance)
    seconds, started = 0.0 if dry_run else 60 * budget, time.monotonic()
    with progress("measuring") as advance:

        def told(measured: int) -> None:
            advance(min(time.monotonic() - started, seconds), seconds)

        with Divergence(plan, texts or CALIBRATION, seconds, count, told) as measure:
            try:
                return wanted.choose(lost, measure)
            except Gemma4qError as error:
                if error.kind not in ("too_big", "no_space"):
                    raise
                remedy = "--budget 0 chooses without measuring"
                raise Gemma4qError(error.kind, f"to measure trial models: {error.message}; {remedy}") from None


def described(found) -> dict:
    """For JSON."""
    points = [
        {"rounded": p.name, "tensors": len(p.types), "noise": p.noise, "foretold": p.foretold,
         "divergence": p.divergence}
        for p in found.points
    ]  # fmt: skip
    ranks = {"noise": found.of_noise, "foretold": found.of_foretold}
    return {"recipe": "gemma", "harm": found.harm, "measured": points, "rank_correlation": ranks}


def say(found) -> None:
    """What the choice stands on, on stderr."""
    if not found.points:
        note("types were chosen by the sums of errors alone: no trial model was measured")
        return
    rows = [("rounded", "tensors", "noise / energy", "foretold", "KL divergence")]
    most = sorted(found.points, key=lambda point: (-len(point.types), -point.divergence))
    rows += [(p.name, len(p.types), *map(_short, (p.noise, p.foretold, p.divergence))) for p in most[:MOST_SHOWN]]
    note(columns(rows, right=(1, 2, 3, 4)))
    if len(most) > MOST_SHOWN:
        note(f"and {len(most) - MOST_SHOWN} trial models more, which --json lists")
    for what, rank in (("noise", found.of_noise), ("what was foretold", found.of_foretold)):
        if rank is not None:
            note(f"rank correlation of {what} with KL divergence: {rank:.2f}")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
