"""`imatrix`: how much each column of each matrix matters, from texts that a model reads."""

import json
import os
import time
from pathlib import Path

import click

from ..errors import printable
from ..shipped import CALIBRATION
from . import options
from .terminal import Waiting, columns, human_bytes, note, progress, warn

EXAMPLES = """
\b
Examples:
  gemma4q imatrix gemma-4-E2B-it-BF16.gguf                      # our own texts; writes imatrix.gguf
  gemma4q imatrix MODEL.gguf -f talks.jsonl -f more.jsonl -o my.imatrix.gguf
  gemma4q imatrix MODEL.gguf --raw -f book.txt --chunks 50
  gemma4q imatrix --in-file a.gguf --in-file old.dat -o both.gguf
  gemma4q imatrix --in-file imatrix.gguf --show-statistics
"""
SHIPPED = "gemma4q/calibration.jsonl"

texts = options.together(
    click.option(
        "-f", "--file", "files", multiple=True, type=click.Path(),
        help="Conversations, one a line: {\"messages\": [...]}, also \"tools\", as in OpenAI's API. Default: ours.",
    ),
    click.option("--raw", is_flag=True, help="The files are plain text: no chat template."),
    click.option("--parse-special", is_flag=True, help="With --raw: spelled-out special tokens become tokens."),
    click.option(
        "-c", "--ctx-size", "chunk", type=click.IntRange(min=16),
        help="Tokens of a chunk: whole conversations as they fit, a longer one cut. Default 2048.",
    ),
    click.option("--chunks", "most", type=click.IntRange(min=-1), default=-1, help="Read this many chunks; -1: all."),
)  # fmt: skip
output = options.together(
    click.option(
        "-o", "--output", "--output-file", "out", type=click.Path(path_type=Path), default="imatrix.gguf",
        help="File to write; default imatrix.gguf. One that the same command left unfinished is gone on with.",
    ),
    click.option("--no-resume", is_flag=True, help="Begin anew, and replace what is there."),
    click.option(
        "-ofreq", "--output-frequency", "every", type=click.IntRange(min=1),
        help="Save after so many chunks; default: every minute.",
    ),
    click.option(
        "--in-file", "before", multiple=True, type=click.Path(),
        help="Add these, GGUF or .dat; without MODEL do nothing else.",
    ),
    click.option(
        "--process-output", is_flag=True, expose_value=False,
        help="As for llama-imatrix, but of no effect: the head is always among the tensors.",
    ),
    click.option("--show-statistics", is_flag=True, help="Print a row for each part of the model."),
)  # fmt: skip


@options.command(epilog=EXAMPLES)
@options.maybe_model
@texts
@output
@options.threads
@options.backend
@options.isa
@options.as_json
def imatrix(
    model: str | None, files: tuple[str, ...], raw: bool, parse_special: bool, chunk: int | None, most: int, out: Path,
    no_resume: bool, every: int | None, before: tuple[str, ...], show_statistics: bool, threads: int | None,
    backend: str, isa: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure how much each column of a model's matrices matters, for `quantize` and llama-quantize.

    The model reads conversations, and the squares of what every matrix meets are summed, for each expert by itself.
    Ctrl-C saves what there is; the same command goes on from there.
    """
    from ..quantize.importance import CHUNK, Importance, merge, read, write

    if model is None and not before:
        raise click.UsageError("Missing argument 'MODEL'.")
    if model is None and files:
        raise click.UsageError("-f needs a MODEL that reads it")
    if raw and not files:
        raise click.UsageError("--raw reads files: say which with -f")
    started = time.monotonic()
    found = merge([read(path, chunk or CHUNK) for path in before]) if before else Importance({})
    if model is not None:
        with _loaded(model, backend, isa, threads, chunk) as calibration:
            chunks = calibration.chunks(_texts(calibration, files, raw, parse_special))
            names = tuple(os.fsencode(file).decode("utf-8", "replace") for file in files) or (SHIPPED,)
            found = merge([Importance({}, chunk_size=calibration.chunk), found, Importance({}, names)])
            found = _read_on(calibration, chunks, most, found, out, not no_resume, every)
    elif len(before) > 1 or not show_statistics:
        write(out, found)
    else:
        out = None
    _report(found, out, show_statistics, as_json, time.monotonic() - started)


def _loaded(model: str, backend: str, isa: str | None, threads: int | None, chunk: int | None):
    from ..measure.calibration import Calibration

    with Waiting("loading"):
        return Calibration(model, backend, isa, threads, chunk)


def _texts(calibration, files, raw: bool, parse_special: bool) -> list:
    """Token ids of every text."""
    from ..measure.texts import conversations, passages, read_text

    tokenizer = calibration.tokenizer
    if raw:
        return [tokenizer.encode(read_text(Path(file)), bos=True, special=parse_special) for file in files]
    talks = [talk for file in files or (CALIBRATION,) for talk in conversations(Path(file))]
    return [passage.ids for passage in passages(talks, tokenizer, calibration.flavour, everything=True)]


def _read_on(calibration, chunks: list, most: int, before, out: Path, resume: bool, every: int | None):
    """What the model finds in chunks that it has not read yet, with what was there before; saved in `out`."""
    from ..measure.calibration import continued
    from ..quantize.importance import check_target, write

    check_target(out, calibration.inputs)
    begun = continued(out if resume else None, calibration.origin(chunks, before), before)
    done, wanted = begun.chunks - before.chunks, chunks[: most if most > 0 else None]
    if done:
        note(f"{out} holds {done} of {len(wanted)} chunks: " + ("going on" if done < len(wanted) else "that is all"))
    sizes = [sum(map(len, chunk)) for chunk in wanted]
    read, total = sum(sizes[:done]), sum(sizes)
    with progress("reading") as advance:

        def tell(rows: int) -> None:
            nonlocal read
            read += rows
            advance(read, total)

        try:
            return calibration.collect(wanted[done:], begun, lambda found: write(out, found), every, tell)
        except KeyboardInterrupt:
            note(f"stopped: the same command goes on from what {out} holds" if out.exists() else "stopped")
            raise


def _report(found, out: Path | None, statistics: bool, as_json: bool, seconds: float) -> None:
    """`out`: where it was written, if it was."""
    tokens = max((int(entry.counts.max()) for entry in found.entries.values()), default=0)
    missing = found.never_chosen()
    if as_json:
        facts = {
            "path": str(out) if out else None, "tensors": len(found.entries), "datasets": found.datasets,
            "chunks": found.chunks, "chunk_size": found.chunk_size, "tokens": tokens, "never_chosen": missing,
            "seconds": round(seconds, 3),
        }  # fmt: skip
        click.echo(json.dumps(facts | ({"parts": found.summary()} if statistics else {})))
        return
    if statistics:
        click.echo(_table(found) + "\n")
    facts = f"{len(found.entries)} tensors  {found.chunks:,} chunks of {found.chunk_size:,}  {tokens:,} tokens"
    click.echo(f"{out}  {human_bytes(out.stat().st_size)}  {facts}" if out else facts)
    if missing:
        count = sum(missing.values())
        warn(f"{count} experts of {len(missing)} tensors met no token: they count as the others on the average")


def _table(found) -> str:
    rows = [("part", "tensors", "experts", "columns", "rows", "mean square", "evenness", "heaviest 1 %")]
    for row in found.summary():
        sizes = row["tensors"], row["experts"], row["cols"], f"{row['rows']:,}"
        shares = f"{row['mean']:.4g}", f"{row['evenness']:.1%}", f"{row['heaviest']:.1%}"
        rows.append((printable(row["part"]), *sizes, *shares))
    return columns(rows, right=range(1, 8))
