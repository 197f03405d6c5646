"""`run`: one answer to a prompt, or a conversation when there is none."""

import json
import sys
from dataclasses import asdict

import click

from ..errors import Gemma4qError
from ..shipped import DEFAULT, shipped
from . import INTERRUPTED, options, prompt
from .answer import CONTENT, THOUGHT, Display, give
from .terminal import Waiting, note, warn

EXAMPLES = """\b
Examples:
  gemma4q run                                      a conversation with tiny
  gemma4q run "What is 27 + 58?"                   one answer of tiny
  gemma4q run model.gguf "Why is the sky blue?"    one answer of a model of your own
  git diff | gemma4q run model.gguf "Review this:"
  gemma4q run model.gguf --tools tools.json "Is it raining in Oslo?"
"""
NO_TEMPLATE = "this file has no chat template or no turn tokens"


@options.command(epilog=EXAMPLES)
@options.maybe_model
@prompt.words
@prompt.file
@options.talk
@options.sampling
@options.machine
@click.option("--raw", is_flag=True, help="Complete the text as it is, without a chat template.")
@click.option("-e", "--escape", is_flag=True, help=r"Read \n, \t and so on in the prompt as the characters they name.")
@click.option("-st", "--single-turn", is_flag=True, help="One answer, no conversation.")
@click.option("--hide-thinking", is_flag=True, help="Do not print thoughts.")
@click.option("--quiet", is_flag=True, help="No notes and figures on stderr.")
@options.as_json
def run(model: str | None, words: tuple[str, ...], file: str | None, raw: bool, escape: bool, **values) -> None:
    """Answer a prompt (given here, in a file, or piped in), or chat when there is none.

    MODEL is a GGUF file, or one of two small ones that come with gemma4q: `tiny`, which answers when there is none, and
    `tiny-moe`.
    """
    quiet, alone = values["quiet"], raw or values["single_turn"] or values["as_json"]
    if raw and values["tools"]:
        raise click.UsageError("--raw is without a template, so without --tools")
    values["tools"] = prompt.tools(values["tools"])
    if model is None or (not words and prompt.is_text(model)):
        words, model = (model,) if model else (), str(shipped(DEFAULT))
        if not quiet:
            note(f"no model given: {DEFAULT} answers, a very small one that comes with gemma4q")
    text = prompt.read_text(words, file, trim=True)
    if text is None and (alone or not sys.stdin.isatty()):
        raise click.UsageError("there is no prompt: give one here, with -f, or on stdin")
    how = options.given(values)
    with _load(model, values, quiet) as loaded:
        if not quiet and values["backend"] == "auto" and (slow := why_slow(loaded.backend.name)):
            warn(slow)
        if not quiet:
            options.warn_of_kv(values["kv"])
        mute = not raw and not _can_chat(loaded, values["chat_template"])
        if mute and (text is None or values["tools"]):
            raise Gemma4qError("missing_key", f"{model} cannot chat: {NO_TEMPLATE}; --raw completes a text")
        if text is None:
            _chat(loaded, how, values)
            return
        text = prompt.unescape(text) if escape else text
        display = Display(stream=not values["as_json"], thoughts=not values["hide_thinking"])
        generation = loaded.generate(text, **how) if raw or mute else _ask(loaded, text, how, values)
        give(generation, display, quiet)
        if mute and not quiet:  # after the answer: a failure is to be one line
            warn(f"{NO_TEMPLATE}: it completed the text, as with --raw")
        if values["as_json"]:
            click.echo(_json(generation, display))
    if generation.finish == "cancelled":
        click.get_current_context().exit(INTERRUPTED)


def why_slow(backend: str) -> str | None:
    """What to say when `auto` did not find the compiled backend; None when it did."""
    from .. import backends

    try:
        backends.get("native")
    except Gemma4qError as error:
        return f"{backend} computes, many times slower: {error.message}"
    return None


def _load(model: str, values: dict, quiet: bool):
    machine = {name: values[name] for name in ("backend", "isa", "threads", "context", "kv")}
    with Waiting("loading", quiet):
        if values["chat_template"]:
            from .templated import TemplatedModel

            return TemplatedModel(values["chat_template"], model, **machine)
        from ..engine.model import load

        loaded = load(model, **machine)
    loaded.flavour = values["template_size"] or loaded.flavour
    return loaded


def _can_chat(loaded, template: str | None) -> bool:
    has_turns = {"<|turn>", "<turn|>"} <= loaded.tokenizer.special_ids.keys()
    return bool(template) or (has_turns and "tokenizer.chat_template" in loaded.gguf.metadata)


def _ask(loaded, text: str, how: dict, values: dict):
    messages = [{"role": "user", "content": text}]
    thinking = values["reasoning"] == "on"
    return loaded.chat(messages, system=values["system"], thinking=thinking, tools=values["tools"], **how)


def _chat(loaded, how: dict, values: dict) -> None:
    from .chat import Chat, Conversation

    reasoning = values["reasoning"] == "on"
    talk = Conversation(system=values["system"], reasoning=reasoning, tools=values["tools"], sampling=how)
    Chat(loaded, talk, values["hide_thinking"], values["quiet"]).run()


def _json(generation, display: Display) -> str:
    stats = asdict(generation.stats) | {"tokens_per_second": generation.stats.tokens_per_second}
    found = {"text": display.text(CONTENT), "thoughts": display.text(THOUGHT), "tool_calls": display.tool_calls()}
    return json.dumps(found | {"finish": generation.finish, "seed": generation.seed, "stats": stats})
