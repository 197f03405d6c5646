"""Whole conversations to measure a model with: read from a file, one JSON object a line, and written as token ids.

A line is {"kind": "code", "messages": [...], "tools": [...]}, messages and tools as OpenAI's API has them, the last
message an answer; `kind` and `tools` may be missing. What is done with the ids is not known here.
"""

import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Gemma4qError
from ..text import chat, normalise, segments
from ..text.chat import Flavour
from ..text.tokenizer import Tokenizer

LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Conversation:
    """Checked messages and tools; `thinking`: the model was let think, as its thoughts among the messages say."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]

    @property
    def thinking(self) -> bool:
        return any(map(chat.reasoning_of, self.messages))

    def segments(self, flavour: Flavour) -> list[segments.Segment]:
        """What the model would have read and then written, to its last token."""
        *before, last = self.messages
        how = {"flavour": flavour, "thinking": self.thinking}
        if last["role"] != "assistant":
            return chat.render(self.messages, self.tools, **how)
        out = segments.Writer()
        out.segments = chat.render(before, self.tools, **how)
        if segments.text_of(out.segments[-2:]) == chat.THOUGHT:  # opened for an answer to results: the answer has it
            del out.segments[-2:]
        chat.write_message(out, last, [], "assistant", None, keep_thought=True)
        return out.segments

    def ids(self, tokenizer: Tokenizer, flavour: Flavour) -> list[int]:
        """Token ids of all of it. Raises `bad_tokenizer` where a control token is missing."""
        return segments.encode(self.segments(flavour), tokenizer)


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 text file. Raises not_a_file, too_big, bad_string, and OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Gemma4qError("not_a_file", f"{path} is not a regular file")
    if status.st_size > LARGEST_BYTES:
        raise Gemma4qError("too_big", f"{path} is larger than {LARGEST_BYTES >> 20} MiB")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Gemma4qError("bad_string", f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def read_conversations(path: str | os.PathLike) -> list[Conversation]:
    """The conversations in a file. Raises `bad_json`, `bad_message` and `bad_tools` naming the line, and as above."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(line))
        except Gemma4qError as error:
            raise Gemma4qError(error.kind, f"{path}, line {number}: {error.message}") from None
    if not found:
        raise Gemma4qError("bad_json", f"{path} holds no conversation")
    return found


def _conversation(line: str) -> Conversation:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise Gemma4qError("bad_json", 'not {"messages": [...]}: a line is a conversation; --raw reads plain text')
    messages = normalise.messages(given.get("messages"))
    if not messages:
        raise Gemma4qError("bad_message", "messages are none")
    if any(message["role"] == "system" for message in messages[1:]):
        raise Gemma4qError("bad_message", "only the first message may be the system's")
    kind = given.get("kind", "text")
    return Conversation(kind if isinstance(kind, str) else "text", messages, normalise.tools(given.get("tools")))


def cut(texts: Iterable[Sequence[int]], size: int, bos: int) -> list[list[int]]:
    """Texts of at most `size` tokens: what is longer goes on in further texts, each of which begins with `bos`."""
    pieces: list[list[int]] = []
    for text in texts:
        first, rest = text[:size], text[size:]
        pieces.append(list(first))
        pieces += [[bos, *rest[at : at + size - 1]] for at in range(0, len(rest), size - 1)]
    return [piece for piece in pieces if piece]


def packed(pieces: Iterable[list[int]], size: int, most: int) -> list[list[list[int]]]:
    """Chunks of whole pieces, in order: at most `size` tokens and `most` pieces in each."""
    chunks: list[list[list[int]]] = []
    room = 0
    for piece in pieces:
        if not chunks or len(piece) > room or len(chunks[-1]) == most:
            chunks.append([])
            room = size
        chunks[-1].append(piece)
        room -= len(piece)
    return chunks
