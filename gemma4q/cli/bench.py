"""`bench`: speed of this build, alone, beside another, beside what was saved, beside llama.cpp; its history, drawn."""

import os
import sys
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import click

from ..errors import Gemma4qError
from . import options
from .bench_output import Screen, explain_gate, facts_below, show, sides_below
from .numbers import Names, Numbers, Pair

COPIES = 2  # of a model file, when llama.cpp has packed its weights anew and we read them from the file
OUTPUTS = ("table", "md", "csv", "json", "jsonl")
EXAMPLES = """
\b
Examples:
  gemma4q bench MODEL.gguf -p 512 -n 128 -r 5        # tokens a second
  gemma4q bench MODEL.gguf -d 0-8192*2 -o md         # lists and ranges as in llama-bench
  gemma4q bench MODEL.gguf -n 32 --ops               # where the time goes, and how near the roof
  gemma4q bench MODEL.gguf --against main            # the regression gate: exit status 0, 1 or 3
  gemma4q bench MODEL.gguf --save base.json          # and another day:
  gemma4q bench MODEL.gguf --compare base.json
  gemma4q bench MODEL.gguf --record                  # adds to bench/results
  gemma4q bench --plot speed.svg                     # draws what is there
  gemma4q bench MODEL.gguf --vs llama.cpp
"""

work = options.together(
    click.option("-p", "--n-prompt", "prompts", type=Numbers(), multiple=True, help="Tokens of a prompt; default 512."),
    click.option("-n", "--n-gen", "decodes", type=Numbers(), multiple=True, help="Tokens after it; default 128."),
    click.option("-pg", "both", type=Pair(), multiple=True, help="A prompt and the tokens after it, timed as one."),
    click.option("-d", "--n-depth", "depths", type=Numbers(), multiple=True, help="Tokens before; default 0."),
    click.option("-r", "--repetitions", "runs", type=click.IntRange(1, 1000), default=5, help="Runs; default 5."),
    click.option(
        "-b",
        "-ub",
        "--batch-size",
        "batches",
        type=Numbers(1),
        multiple=True,
        help="Prompt rows of a step; 512.",
    ),
)
engine = options.together(
    click.option("-t", "--threads", type=Numbers(1), multiple=True, help="Threads; default: the cores we may use."),
    click.option("--backend", "backends", type=Names(options.BACKENDS), multiple=True, help="Who computes."),
    click.option("--isa", "isas", type=Names(), multiple=True, help="Instruction sets (see `gemma4q doctor`)."),
    click.option("--kv", "-ctk", "kvs", type=Names(options.KV_TYPES), multiple=True, help=options.KV_HELP),
)
what = options.together(
    click.option(
        "-o",
        "--output",
        type=click.Choice(OUTPUTS),
        default="table",
        help="How to print.",
    ),
    click.option("--ops", is_flag=True, help="Time, bytes and share of the roof of each part of the model."),
    click.option("--no-latency", is_flag=True, help="Leave out first token and next turn."),
    click.option("--drop-file-cache", is_flag=True, help="Let the first load read the file from the disk."),
)
other = options.together(
    click.option(
        "--against", metavar="BUILD", help="Gate: beside another Python, environment, wheel or revision of this clone."
    ),
    click.option(
        "--threshold", type=click.FloatRange(0.1, 1000), default=3.0, help="Percent that is too slow; default 3."
    ),
    click.option("--seconds", type=click.FloatRange(1, 3600), default=85.0, help="Most that the gate takes; 85."),
    click.option(
        "--busy", type=click.FloatRange(0, 1), help="CPU time a run must have, of threads x wall; 0.97, --against 0.9."
    ),
    click.option("--cache", type=click.Path(), help="Where builds are kept; default: gemma4q in the user's cache."),
    click.option("--save", type=click.Path(), help="Write what was measured to a file."),
    click.option(
        "--compare", type=click.Path(), help="Compare with such a file, scaled by what the machine gives now."
    ),
    click.option("--vs", "versus", type=click.Choice(["llama.cpp"]), help="In pairs with a peer, if it is installed."),
    click.option("--peer-python", type=click.Path(), help="The Python that has llama-cpp-python; default: this one."),
    click.option("--record", is_flag=True, help="Add to the history of commits."),
    click.option("--results", type=click.Path(), default="bench/results", help="Where that is; default bench/results."),
    click.option("--plot", type=click.Path(), help="Draw the history to an .svg, .png or .pdf file."),
)


@options.command(epilog=EXAMPLES)
@options.maybe_model
@work
@engine
@what
@other
def bench(model: str | None, plot: str | None, results: str, **given) -> int:
    """Measure how fast a model runs here, and tell whether a change made it slower.

    The mean of the runs is printed with their standard deviation. Tests have the names and the work of llama-bench's.
    """
    if model is None and not plot:
        raise click.UsageError("Missing argument 'MODEL'.")
    modes = [name for name in ("against", "versus", "compare") if given[name]]
    if len(modes) > 1:
        raise click.UsageError("--against, --vs and --compare exclude each other")
    code = 0
    if model is not None:
        options.check_writable(given["save"])
        run = {"against": _gate, "versus": _versus}.get(modes[0] if modes else "", _measure)
        code = run(model, results=Path(results), **given)
        options.warn_of_kv(*(kv for kvs in given["kvs"] for kv in kvs))
    if plot:
        from ..measure import history
        from ..measure.plot import draw

        draw(history.read(Path(results)), Path(plot))
    return code


def _document(model: str, screen: Screen, hashed: bool = True) -> dict:
    from ..measure import machine

    about = machine.model(model, screen.digesting() if hashed else None)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"when": when, "machine": machine.machine(), "build": machine.build(), "model": about}


def _tests(given: dict, prompts: tuple[int, ...] = (512,), decodes: tuple[int, ...] = (128,), depth: int = 0) -> list:
    """Every combination of what was given, in llama-bench's order; 0 tokens are no test."""
    from ..measure.pairs import Test

    def flat(name: str, default: tuple[int, ...]) -> list[int]:
        return [number for numbers in given[name] for number in numbers] or list(default)

    work = [(count, 0) for count in flat("prompts", () if given["both"] else prompts) if count]
    work += [(0, count) for count in flat("decodes", () if given["both"] else decodes) if count]
    work += given["both"]
    if not work:
        raise click.UsageError("-p 0 and -n 0 leave nothing to measure")
    settings = product(flat("depths", (depth,)), flat("batches", (512,)))
    return list(dict.fromkeys(Test(p, n, d, b if p else 512) for d, b in settings for p, n in work))


def _setups(given: dict) -> list:
    from ..engine.threads import choose_threads
    from ..measure.runs import Setup

    def flat(name: str, default: object) -> list:
        return [value for values in given[name] for value in values] or [default]

    threads = [choose_threads(count).count for count in flat("threads", None)]
    choices = product(flat("backends", "auto"), flat("isas", None), threads, flat("kvs", "auto"))
    return [Setup(*choice) for choice in choices]


def _measure(model: str, *, results: Path, **given) -> int:
    """The table, and what is done with it."""
    from ..measure import base, history, runs

    screen = Screen()
    document = _document(model, screen)
    about = document["model"]
    saved = base.load(Path(given["compare"]), about) if given["compare"] else None
    tests, found, rest = _tests(given), [], []
    for setup in _setups(given):
        measured = runs.measure(
            sys.executable, model, setup, tests, given["runs"], about["context"], latency=not given["no_latency"],
            drop_file_cache=given["drop_file_cache"], progress=screen.doing,
        )  # fmt: skip
        for part in measured:
            (found if "test" in part else rest).append(part)
    screen.done()
    document |= {"results": found, "processes": rest}
    code, limit = 0, given["threshold"] / 100
    if saved is None:
        show.results(document, given["output"], given["ops"])
        facts_below(document, given["output"])
    else:
        changes = base.compare(saved, found, Path(given["compare"]))
        show.changes(document, saved, changes, limit, given["output"])
        code = int(any(change.beyond(limit) for change in changes))
    if given["save"]:
        base.save(Path(given["save"]), document)
    if given["record"]:
        screen.note(f"added to {history.add(results, document)}")
    return code


def _busy(given: dict, usual: float) -> float:
    return usual if given["busy"] is None else given["busy"]


def _gate(model: str, *, results: Path, **given) -> int:
    """This build beside another."""
    from ..measure import builds, gate
    from ..measure.client import Worker

    (setup,) = _one(_setups(given), "--against measures one configuration")
    screen = Screen()
    document = _document(model, screen, hashed=False)
    cache = Path(given["cache"]) if given["cache"] else _cache()
    other = builds.interpreter(given["against"], cache, screen.note)
    tests = _tests(given, (32,), (1,), 256)
    words = setup.given(tests, document["model"]["context"])
    starts = [lambda python=python: Worker(python, "gemma4q", model, words) for python in (sys.executable, other)]
    with screen.counting("sittings") as progress:
        outcome = gate.compare(
            starts, given["threshold"] / 100, tests, _busy(given, gate.BUSY), given["seconds"], progress=progress
        )
    show.gate(document | {"against": given["against"]}, outcome.rows, given["output"])
    explain_gate(outcome, given["threshold"], given["against"])
    return outcome.exit


def _versus(model: str, *, results: Path, **given) -> int:
    """This build beside llama.cpp."""
    from ..engine.memory import available_memory
    from ..measure.client import Worker
    from ..measure.pairs import BUSY
    from ..measure.versus import apart, beside

    (setup,) = _one(_setups(given), "--vs measures one configuration")
    screen = Screen()
    document = _document(model, screen)
    tests = _tests(given)
    words = setup.given(tests, document["model"]["context"])
    peer = given["peer_python"] or sys.executable
    starts = [
        lambda: Worker(sys.executable, "gemma4q", model, words),
        lambda: Worker(peer, "llama.cpp", model, words),
    ]
    together = COPIES * document["model"]["bytes"] < available_memory()[0]
    if not together:
        screen.note("note: memory does not hold the model for both at once: each run is a process of its own")
    how = beside if together else partial(apart, files=document["model"]["files"])
    rows, about = how(starts, tests, given["runs"], _busy(given, BUSY), screen.doing)
    screen.done()
    document["sides"] = [{key: value for key, value in side.items() if key != "kernels"} for side in about]
    show.versus(document, rows, given["output"])
    sides_below(document, given["output"])
    short = [row["test"] for row in rows if row["pairs"] < given["runs"]]
    if short:
        screen.note(f"note: too noisy for {given['runs']} clean pairs of {', '.join(short)}")
    return 0 if all(row["pairs"] for row in rows) else 3


def _one(setups: list, why: str) -> list:
    if len(setups) != 1:
        raise click.UsageError(why)
    return setups


def _cache() -> Path:
    """Where this user's programs keep what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "gemma4q" / "builds"
    except RuntimeError:
        raise Gemma4qError("bad_option", "there is no home for builds: say --cache FOLDER") from None
