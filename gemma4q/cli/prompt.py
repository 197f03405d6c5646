"""Where a text comes from: the words of the command line, a file, what is piped in, or all of them in that order.

And what a conversation is written with: the functions that are declared in it, and its template.
"""

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from ..errors import Gemma4qError

LONGEST_BYTES, LONGEST_TOOLS_BYTES = 256 << 20, 16 << 20
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}

words = click.argument("words", metavar="[TEXT]...", nargs=-1)
file = click.option("-f", "--file", "file", type=click.Path(), help="Read the text from this file.")


def is_text(argument: str) -> bool:
    """Whether what stands where a model may stand is a prompt: words, and no file's name."""
    return " " in argument.strip() and not os.path.exists(argument) and not argument.endswith(".gguf")


def read_text(words: Sequence[str], file: str | None, trim: bool = False) -> str | None:
    """The text given, its sources joined by a newline; None when there is none. Invalid UTF-8 becomes U+FFFD.

    `trim`: without the newline that ends a file, which editors and `echo` put there.
    """
    parts = [" ".join(os.fsencode(word).decode("utf-8", "replace") for word in words)] if words else []
    if file:
        parts.append(_read(file))
    if _piped() or not (parts or sys.stdin.isatty()):
        parts.append(sys.stdin.read(LONGEST_BYTES))
    parts = [part.removesuffix("\n") if trim else part for part in parts if part]
    return "\n".join(parts) if parts else None


def chat_template(choice: str | None, metadata: Mapping):
    """The template that --chat-template asks for, ready to render in the sandbox; None: the one built in."""
    if choice is None:
        return None
    from ..text.template import ChatTemplate

    if choice != "gguf":
        return ChatTemplate(_read(choice))
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        raise Gemma4qError("missing_key", "the file carries no tokenizer.chat_template")
    return ChatTemplate(source)


def tools(path: str | None) -> list[dict[str, Any]] | None:
    """The functions that a file declares, checked; raises `bad_tools` naming file and place."""
    if path is None:
        return None
    from ..text.normalise import tools as checked

    declared = parsed(_read(path, LONGEST_TOOLS_BYTES), "bad_tools", path)
    try:
        return checked(declared)
    except Gemma4qError as error:
        raise Gemma4qError(error.kind, f"{path}: {error.message}") from None


def parsed(text: str, kind: str, what: str) -> Any:
    """JSON as a value; raises `kind` when it is none."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Gemma4qError(kind, f"{what} is not JSON: {error}") from None


def unescape(text: str) -> str:
    r"""`\n`, `\t`, `\\` and so on as the characters they stand for; other backslashes stay."""
    pieces = text.split("\\")
    out, i = [pieces[0]], 1
    while i < len(pieces):
        piece = pieces[i]
        if not piece and i + 1 < len(pieces):  # two backslashes: the next piece is plain
            out += ["\\", pieces[i + 1]]
            i += 2
            continue
        out.append(ESCAPES[piece[0]] + piece[1:] if piece and piece[0] in ESCAPES else "\\" + piece)
        i += 1
    return "".join(out)


def _piped() -> bool:
    """Whether stdin is a pipe or a file: a service's closed or idle stdin is not waited for."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # not a real file: a test's
        return True
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read(path: str, most_bytes: int = LONGEST_BYTES) -> str:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Gemma4qError("not_a_file", f"{path} is not a regular file")
    if os.path.getsize(path) > most_bytes:
        raise Gemma4qError("too_big", f"{path} is larger than {most_bytes >> 20} MiB")
    return Path(path).read_text(encoding="utf-8", errors="replace")
