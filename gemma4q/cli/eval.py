"""`eval`: how far a model lies from another, or from what a file kept of one; by itself its perplexity."""

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click

from ..errors import Gemma4qError
from ..shipped import EVALUATION
from . import options, terminal
from .numbers import Names
from .terminal import Waiting, human_bytes, note, progress, warn

SHIPPED = "gemma4q/evaluation.jsonl"
CHUNK = 512  # tokens, with --raw
CUT_OFF = "llama-perplexity cuts off 16 nats below the likeliest token: the base's perplexity is read too low"
RAW_MEANS_LITTLE = "this is plain text: its perplexity says little of a model that was tuned on conversations"
EXAMPLES = """
\b
Examples:
  gemma4q eval Q4_0.gguf --against BF16.gguf                     # KL divergence, by kind of text and by depth
  gemma4q eval Q4_0.gguf --against BF16.gguf --kinds code,tools --plot q4_0.svg
  gemma4q eval BF16.gguf --save-logits bf16.logits               # where memory does not hold both
  gemma4q eval Q4_0.gguf --base-file bf16.logits --json
  gemma4q eval MODEL.gguf                                        # perplexity alone
  gemma4q eval MODEL.gguf -f my-conversations.jsonl --texts 20
  gemma4q eval MODEL.gguf --raw -f wiki.test.raw --chunks 10     # plain text, as llama-perplexity does
  gemma4q eval MODEL.gguf --kl-divergence-base llama.kld         # what llama-perplexity has saved
"""

beside = options.together(
    click.option("--against", metavar="BASE", type=options.ModelFile(), help="The model to compare with."),
    click.option(
        "--base-file", "--kl-divergence-base", "base_file", type=click.Path(),
        help="What was saved of that model, by --save-logits or by llama-perplexity; it says what is scored.",
    ),
    click.option("--save-logits", type=click.Path(), help="Keep what MODEL says, for --base-file."),
)  # fmt: skip
what = options.together(
    click.option(
        "-f", "--file", "files", type=click.Path(), multiple=True,
        help="Score these conversations, JSON lines of {kind, messages, tools}; default: ours.",
    ),
    click.option("--kinds", type=Names(), help="Only these kinds of them, as chat,code."),
    click.option("--texts", "--chunks", "texts", type=click.IntRange(min=1), help="So many of each kind at most."),
    click.option("--all-tokens", is_flag=True, help="Score every token, not the model's turns alone."),
    click.option("--raw", is_flag=True, help="The files are plain text; says little of a model that is tuned to chat."),
    click.option(
        "-c", "--ctx-size", "context", type=click.IntRange(min=0),
        help="Leave out longer texts; with --raw the tokens of a chunk, 512.",
    ),
)  # fmt: skip
machine = options.together(options.threads, options.backend, options.isa, options.kv)


@options.command(epilog=EXAMPLES)
@options.model
@beside
@what
@click.option("--plot", type=click.Path(), help="Draw the comparison to an .svg, .png or .pdf file.")
@machine
@options.as_json
def eval(model: str, plot: str | None, as_json: bool, **given) -> None:
    """Measure how far a model's choice of each token lies from another's, or its perplexity.

    Both read the same conversations and are compared at each token of the model's turns. The other is a model that runs
    beside it (--against) or what a file kept of one (--base-file).
    """
    _check_usage(plot, **given)
    if plot:
        from ..measure.plot import canvas

        canvas(Path(plot), 1, 1)
        options.check_writable(plot)
    scores, document = _measured(model, as_json, **given)
    if as_json:
        click.echo(json.dumps(document))
    else:
        _tables(document)
    if plot:
        from ..measure.plot_eval import draw

        draw(scores, document, _title(document), Path(plot))
    options.warn_of_kv(given["kv"])


def _check_usage(plot, against, base_file, save_logits, files, raw, all_tokens, **_) -> None:
    if sum(map(bool, (against, base_file, save_logits))) > 1:
        raise click.UsageError("--against, --base-file and --save-logits exclude each other")
    if base_file and (files or raw or all_tokens):
        raise click.UsageError("--base-file says itself what is scored: no -f, --raw or --all-tokens beside it")
    if raw and not files:
        raise click.UsageError("--raw reads text from files: say which with -f")
    if raw and all_tokens:
        raise click.UsageError("--all-tokens is for conversations: with --raw half of each chunk is scored")
    if plot and not (against or base_file):
        raise click.UsageError("--plot draws a comparison: say --against or --base-file")


def _measured(model: str, hashed: bool, **given) -> tuple:
    """`Scores`, and the document of them: what was measured, on what, and what it came to."""
    from ..engine.model import Prepared
    from ..measure import evaluate, logits_file, texts

    load = {name: given[name] for name in ("backend", "isa", "threads", "kv")}
    paths = [model, given["against"]] if given["against"] else [model]
    with ExitStack() as stack:
        with Waiting("opening"):
            opened = [Prepared(path, **load) for path in paths]
            one, base, kept = opened[0], None, None
            if given["base_file"]:
                base = stack.enter_context(logits_file.open_base(Path(given["base_file"]), one.tokenizer.bos))
            passages, scored = (base.passages, base.header.scored) if base else _passages(one, **given)
        most = min(one.config.context_length, (not given["raw"] and given["context"]) or one.config.context_length)
        numbers, left_out = texts.selected(passages, given["kinds"] or (), given["texts"], most)
        hashed = hashed or bool(given["save_logits"])
        sides = [_about(path, prepared, hashed) for path, prepared in zip(paths, opened, strict=True)]
        if base:
            sides.append(dict(base.header.model))
        if len(sides) > 1:
            evaluate.check_vocabulary(*sides)
        context = max(len(passages[number].ids) for number in numbers)
        memory = evaluate.check_memory(paths, [each.memory_plan(context) for each in opened], one.plan.vocab)
        _say(scored, left_out, most, memory)
        if base and base.known_above is not None:
            warn(CUT_OFF)
        if given["save_logits"]:
            header = logits_file.Header(scored, sides[0], [passages[number] for number in numbers])
            size = f"{header.rows:,} tokens x {header.vocab:,} in 16 bits"
            note(f"{given['save_logits']} will take {human_bytes(header.nbytes)}: {size}")
            kept = stack.enter_context(logits_file.writing(Path(given["save_logits"]), header))
        told = stack.enter_context(progress("reading"))
        scores = evaluate.run(model, passages, numbers, base or given["against"], kept, told, context=context, **load)
    source = list(given["files"]) or [given["base_file"] or SHIPPED]
    return scores, _document(sides, scored, source, left_out) | evaluate.report(scores)


def _passages(one, files, raw: bool, all_tokens: bool, context: int | None, **_) -> tuple:
    """What to score, and in words which tokens of it."""
    from ..measure import texts

    if raw:
        size, trained = context or CHUNK, one.config.context_length
        if not texts.LEAST_CHUNK <= size <= trained:
            limits = f"a chunk has {texts.LEAST_CHUNK} to {trained:,}, as many as this model was trained for"
            raise Gemma4qError("bad_option", f"context: {size:,} tokens; {limits}")
        return texts.plain([Path(file) for file in files], one.tokenizer, size), texts.RAW
    found = [talk for file in files or (EVALUATION,) for talk in texts.conversations(Path(file))]
    try:
        passages = texts.passages(found, one.tokenizer, one.flavour, all_tokens)
    except Gemma4qError as error:
        if error.kind != "bad_tokenizer":
            raise
        fault = f"this model cannot chat ({error.message}): --raw -f FILE scores plain text"
        raise Gemma4qError("missing_key", fault) from None
    if "tokenizer.chat_template" not in one.gguf.metadata:
        warn("this file has no chat template, so it may know no conversations: --raw -f FILE scores plain text")
    return passages, texts.ALL if all_tokens else texts.TURNS


def _about(path: str, prepared, hashed: bool) -> dict:
    """The model file, and its vocabulary."""
    from ..measure import machine
    from ..measure.evaluate import vocabulary_of

    with progress("SHA-256 of the model") as advance:
        about = machine.model(path, advance if hashed else None)
    return about | {"vocab": prepared.plan.vocab, "vocabulary": vocabulary_of(prepared.gguf)}


def _say(scored: str, left_out: int, most: int, memory: str) -> None:
    """What there is to know before it begins."""
    from ..measure.texts import RAW

    note(f"memory: {memory}")
    if left_out:
        warn(f"{left_out} left out, as they have more than {most:,} tokens")
    if scored == RAW:
        warn(RAW_MEANS_LITTLE)


def _document(sides: list[dict], scored: str, source: list[str], left_out: int) -> dict:
    from ..measure import machine
    from ..measure.divergence import INTERVAL

    found = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.machine()}
    found |= {"build": machine.build(), "model": sides[0], "base": sides[1] if len(sides) > 1 else None}
    return found | {"scored": scored, "files": source, "left_out": left_out, "interval": INTERVAL}


def _title(document: dict) -> str:
    sides = [document["model"], document["base"]] if document["base"] else [document["model"]]
    return " beside ".join(f"{side['name']} {side['type']}".strip() for side in sides)


def _tables(document: dict) -> None:
    """By kind and by depth, and what the figures are."""
    from ..measure import eval_report as shown

    kinds, depths, compared = shown.kind_rows(document), shown.depth_rows(document), document["base"] is not None
    _table(shown.distance("kind") if compared else shown.alone("kind"), kinds)
    if compared:
        _table(shown.choice("kind"), kinds)
    _table(shown.brief("position") if compared else shown.alone("position"), depths)
    click.echo(f"model:  {_title(document)}")
    click.echo(f"scored: {document['scored']}, of {', '.join(document['files'])}")
    if compared:
        click.echo("KL divergence from base to model, nats a token; Δp: change of the right token's probability")
    click.echo("±: half of a 95 % interval over texts, as the tokens of one text depend on each other")


def _table(shown: list, rows: list[dict]) -> None:
    terminal.table([(column.title, column.right) for column in shown], [[c.show(row) for c in shown] for row in rows])
