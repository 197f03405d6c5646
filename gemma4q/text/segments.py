"""The pieces of a prompt: control tokens that a template wrote, and text that may come from anyone.

Text never becomes a control token, whatever it spells: `encode` looks up control segments by id and encodes all between
them with special-token matching off (spec: chat 3.6). What is written where is `chat.py`'s and `template.py`'s to know.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

BOS, THINK, QUOTE = "<bos>", "<|think|>", '<|"|>'
TURN, TURN_END = "<|turn>", "<turn|>"
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
TOOL, TOOL_END = "<|tool>", "<tool|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESPONSE, RESPONSE_END = "<|tool_response>", "<tool_response|>"
IMAGE, AUDIO, VIDEO = "<|image|>", "<|audio|>", "<|video|>"
CONTROLS = (
    BOS, THINK, QUOTE, TURN, TURN_END, CHANNEL, CHANNEL_END, TOOL, TOOL_END,
    CALL, CALL_END, RESPONSE, RESPONSE_END, IMAGE, AUDIO, VIDEO,
)  # fmt: skip


class Segment(NamedTuple):
    """A control token by its text, or text that is only text."""

    text: str
    control: bool


class Encoder(Protocol):
    """What `encode` needs of a tokenizer."""

    def encode(self, text: str, bos: bool = False, special: bool | None = None) -> list[int]: ...
    def id(self, text: str) -> int: ...


class Writer:
    """Collects segments; knows literals (ours: their control tokens count) from text (anyone's: it does not)."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def text(self, text: str) -> None:
        if text:
            self.segments.append(Segment(text, False))

    def literal(self, text: str) -> None:
        self.segments += split_controls(text)

    def quoted(self, text: str) -> None:
        self.literal(QUOTE)
        self.text(text)
        self.literal(QUOTE)


def spelling(controls: Iterable[str]) -> re.Pattern[str]:
    """Splits text at every spelling of a control token: odd parts are the tokens."""
    return re.compile("(" + "|".join(map(re.escape, sorted(controls, key=len, reverse=True))) + ")")


SPELLING = spelling(CONTROLS)


def split_controls(text: str) -> list[Segment]:
    """Trusted text as segments: every spelling of a control token is that token."""
    return [Segment(part, i % 2 == 1) for i, part in enumerate(SPELLING.split(text)) if part]


def text_of(segments: Iterable[Segment]) -> str:
    """The prompt as one string, control tokens spelled out."""
    return "".join(segment.text for segment in segments)


def encode(segments: Iterable[Segment], tokenizer: Encoder) -> list[int]:
    """Token ids of a prompt. Text between two control tokens is one stretch, as merges may cross a segment's border.

    Raises `bad_tokenizer` where the vocabulary lacks a control token that the prompt needs.
    """
    ids: list[int] = []
    run: list[str] = []
    for text, control in segments:
        if not control:
            run.append(text)
            continue
        ids += tokenizer.encode("".join(run), special=None)
        ids.append(tokenizer.id(text))
        run.clear()
    ids += tokenizer.encode("".join(run), special=None)
    return ids
