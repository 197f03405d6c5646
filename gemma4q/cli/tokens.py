"""`tokenize`, `detokenize`, `template`: what the model is given, made visible. No weights are read."""

import json
import sys

import click

from ..errors import Gemma4qError, printable
from . import prompt
from .options import as_json, command, model, talk
from .terminal import columns, harmless


@command()
@model
@prompt.words
@prompt.file
@click.option("--ids", is_flag=True, help="Print the ids alone, on one line.")
@click.option("--special", is_flag=True, help="The spelling of a special token counts as that token.")
@click.option("--bos", is_flag=True, help="Begin with the beginning-of-text token.")
@as_json
def tokenize(model: str, words: tuple[str, ...], file: str | None, ids: bool, special: bool, bos: bool, as_json: bool):
    """Print the tokens of a text: one line each, or only their ids."""
    tokenizer, _ = _tokenizer(model)
    found = tokenizer.encode(prompt.read_text(words, file) or "", bos=bos, special=special or None)
    if as_json:
        pieces = [tokenizer.piece(token, special=True).decode("utf-8", "replace") for token in found]
        click.echo(json.dumps({"ids": found, "pieces": pieces}))
    elif ids:
        click.echo(" ".join(map(str, found)))
    elif found:
        pieces = (tokenizer.piece(token, special=True).decode("utf-8", "backslashreplace") for token in found)
        click.echo(
            columns(((token, f"'{printable(piece)}'") for token, piece in zip(found, pieces, strict=True)), right=(0,))
        )


@command()
@model
@prompt.words
@prompt.file
@click.option("--special", is_flag=True, help="Print control tokens too.")
def detokenize(model: str, words: tuple[str, ...], file: str | None, special: bool) -> None:
    """Print the text of token ids, given as numbers with spaces or commas between them."""
    tokenizer, _ = _tokenizer(model)
    given = (prompt.read_text(words, file) or "").replace(",", " ").strip(" []\n").split()
    try:
        ids = [int(word) for word in given]
    except ValueError:
        wrong = next(word for word in given if not word.removeprefix("-").isdigit())
        raise Gemma4qError("bad_token", f"{wrong[:40]!r} is not a token id") from None
    if wrong := [token for token in ids if not 0 <= token < tokenizer.size]:
        raise Gemma4qError("bad_token", f"token {str(wrong[0])[:40]}: ids go from 0 to {tokenizer.size - 1}")
    text = tokenizer.decode(ids, special=special)
    click.echo(harmless(text) if sys.stdout.isatty() else text)


@command()
@model
@prompt.words
@prompt.file
@click.option("--messages", is_flag=True, help="The text is a conversation: a JSON list of messages.")
@talk
@click.option("--ids", is_flag=True, help="Print token ids instead.")
def template(
    model: str, words: tuple[str, ...], file: str | None, system: str | None, messages: bool, ids: bool, **how
) -> None:
    """Print a conversation as the model reads it, control tokens spelled out."""
    from ..text.chat import flavour_of, render
    from ..text.normalise import messages as normalised
    from ..text.segments import encode, text_of

    text = prompt.read_text(words, file, trim=True) or ""
    tokenizer, metadata = _tokenizer(model)
    given = _conversation(text) if messages else [{"role": "user", "content": text}]
    turns = normalised(([{"role": "system", "content": system}] if system else []) + given)
    thinking, custom = how["reasoning"] == "on", prompt.chat_template(how["chat_template"], metadata)
    flavour = how["template_size"] or flavour_of(metadata, file_name=model)
    declared = prompt.tools(how["tools"])
    if custom:
        segments = custom.render(turns, declared, thinking=thinking)
    else:
        segments = render(turns, declared, flavour=flavour, thinking=thinking)
    click.echo(" ".join(map(str, encode(segments, tokenizer))) if ids else text_of(segments))


def _tokenizer(model: str):
    """A file's tokenizer, and its metadata."""
    from ..gguf.reader import open_gguf
    from ..text.tokenizer import Tokenizer

    metadata = open_gguf(model).metadata
    return Tokenizer(metadata), metadata


def _conversation(text: str) -> list:
    found = prompt.parsed(text, "bad_message", "the conversation")
    if not isinstance(found, list):
        raise Gemma4qError("bad_message", "a conversation is a JSON list of messages")
    return found
