"""What is scored: conversations as the model meets them, turn by turn, or plain text in chunks.

Each turn of the model is a passage of its own: the very prompt that `run` would give it, and then the turn, spelled as
the model would spell it, to its last token. Owns which tokens are scored; what is made of them is `evaluate`'s part.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Gemma4qError, printable
from ..text import chat, normalise
from ..text.segments import CHANNEL, CHANNEL_END, Segment, encode, text_of
from ..text.tokenizer import Tokenizer

MOST_BYTES = 256 << 20
LEAST_CHUNK = 8  # tokens
KIND = re.compile(r"\w[\w .+-]{0,39}")
NO_THOUGHT = f"{CHANNEL}thought\n{CHANNEL_END}"  # what a large model's prompt ends in when it is not to think
TURNS, ALL, RAW = "the model's turns", "every token of a conversation", "plain text"


@dataclass(frozen=True, eq=False)
class Passage:
    """Tokens a model reads, int32 [tokens], of which those from `first` on are scored; `text`: which text it is of."""

    ids: np.ndarray
    first: int
    kind: str
    text: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as `normalise` returns them; `where` names it in an error."""

    kind: str
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    where: str


def conversations(path: Path) -> list[Conversation]:
    """One from each line `{"kind": ..., "messages": [...], "tools": [...]}` of a file, in the form of OpenAI's API.

    Raises `bad_text` naming file and line, and OSError.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                found.append(_conversation(json.loads(line), where))
            except (ValueError, RecursionError) as error:
                others = "plain text is for --raw of `eval` and `imatrix`"
                fault = f"is no JSON ({error}); conversations are JSON lines, and {others}"
                raise Gemma4qError("bad_text", f"{where} {fault}") from None
            except Gemma4qError as error:
                raise Gemma4qError("bad_text", f"{where}: {error.message}") from None
    if not found:
        raise Gemma4qError("bad_text", f"{path} holds no conversation")
    return found


def _conversation(line: Any, where: str) -> Conversation:
    if not isinstance(line, dict) or "messages" not in line:
        raise Gemma4qError("bad_text", 'it must be an object {"kind": ..., "messages": [...]}')
    kind = line.get("kind", "chat")
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
        raise Gemma4qError("bad_text", f"kind: {kind!r} is no short name")
    messages, tools = normalise.messages(line["messages"]), normalise.tools(line.get("tools"))
    if not messages or messages[-1]["role"] != "assistant":
        raise Gemma4qError("bad_text", "it must end with a message of the assistant, which is what is scored")
    if any(message["role"] == "system" for message in messages[1:]):
        raise Gemma4qError("bad_text", "only the first message may be the system's")
    if any(not isinstance(m["content"], str) and any(p["type"] != "text" for p in m["content"]) for m in messages):
        raise Gemma4qError("bad_text", "images and sounds cannot be scored")
    if any("tool_responses" in message for message in messages):
        raise Gemma4qError("bad_text", "tool_responses: results must be messages of their own, with the role tool")
    return Conversation(kind, messages, tools, where)


def read_text(path: Path) -> str:
    """Raises `bad_text` and OSError."""
    if not path.is_file() and path.exists():
        raise Gemma4qError("bad_text", f"{path} is not a regular file")
    if path.stat().st_size > MOST_BYTES:
        raise Gemma4qError("bad_text", f"{path} is larger than {MOST_BYTES >> 20} MiB")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Gemma4qError("bad_text", f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from None


def passages(
    found: Sequence[Conversation], tokenizer: Tokenizer, flavour: chat.Flavour, everything: bool = False
) -> list[Passage]:
    """A passage for each turn of the model or, with `everything`, one for each conversation, scored from its start.

    Raises `bad_text` for a turn that no model could have written where it stands, `bad_tokenizer` for a vocabulary
    without the tokens of a conversation.
    """
    out = []
    for number, one in enumerate(found):
        turns = [i for i, message in enumerate(one.messages) if message["role"] == "assistant"]
        for last in turns[-1:] if everything else turns:
            prompt, answer = (encode(part, tokenizer) for part in turn(one, last, flavour))
            first = 1 if everything else len(prompt)
            out.append(Passage(np.array(prompt + answer, np.int32), first, one.kind, number))
    return out


def turn(one: Conversation, last: int, flavour: chat.Flavour) -> tuple[list[Segment], list[Segment]]:
    """What the model has read when it comes to write message `last`, and what it then writes."""
    messages = one.messages[: last + 1]
    how = {"flavour": flavour, "thinking": bool(chat.reasoning_of(messages[last]))}
    prompt = chat.render(messages[:last], one.tools, **how)
    whole = chat.render(messages, one.tools, **how, generation_prompt=False)
    before = text_of(prompt)
    if not text_of(whole).startswith(before):
        before = before.removesuffix(NO_THOUGHT)  # which a conversation that is over does not show
    if not text_of(whole).startswith(before):
        fault = f"messages[{last}]: the template writes it otherwise than the model could"
        raise Gemma4qError("bad_text", f"{one.where}: {fault}")
    answer = behind(whole, len(before))
    return prompt, answer[:-1] if text_of(answer[-2:]) == chat.END else answer  # the model ends with <turn|>


def behind(segments: Iterable[Segment], characters: int) -> list[Segment]:
    """What follows after so many characters; they end where a control token does, or in text."""
    out = []
    for segment in segments:
        if characters < len(segment.text):
            out.append(Segment(segment.text[max(0, characters) :], segment.control))
        characters -= len(segment.text)
    return out


def plain(paths: Sequence[Path], tokenizer: Tokenizer, size: int) -> list[Passage]:
    """Plain text in chunks of `size` tokens, what is left at the end of a file dropped; a kind for each file.

    Raises `bad_text` for a file shorter than a chunk, and OSError.
    """
    found: list[Passage] = []
    for path in paths:
        ids = np.array(tokenizer.encode(read_text(path), bos=True, special=False), np.int32)
        if len(ids) < size:
            fault = f"{path} has {len(ids):,} tokens, less than a chunk of {size:,}: -c takes fewer"
            raise Gemma4qError("bad_text", fault)
        kind = re.sub(r"^\W|[^\w .+-]", "_", path.stem)[:40]
        parts = ids[: len(ids) // size * size].reshape(-1, size)
        found += [chunk(part, tokenizer.bos, kind, number) for number, part in enumerate(parts, len(found))]
    return found


def chunk(ids: np.ndarray, bos: int, kind: str, text: int) -> Passage:
    """A chunk as llama-perplexity scores it: begun with <bos>, its second half, each row for the token after it."""
    return Passage(np.concatenate([[bos], ids[1:]]).astype(np.int32), len(ids) // 2 + 1, kind, text)


def selected(
    passages: Sequence[Passage], kinds: Sequence[str], texts: int | None, longest: int
) -> tuple[list[int], int]:
    """Which passages to score, and how many of those are left out because they have more than `longest` tokens.

    kinds: of these only, where there are any. texts: the first so many of each kind; None: all.
    Raises `bad_option` for a kind that none has, and where nothing is left.
    """
    there = dict.fromkeys(passage.kind for passage in passages)
    unknown = next((kind for kind in kinds if kind not in there), None)
    if unknown is not None:
        raise Gemma4qError("bad_option", f"kinds: there is no {printable(unknown, 40)!r}; there are {', '.join(there)}")
    counted = {kind: dict.fromkeys(p.text for p in passages if p.kind == kind) for kind in kinds or there}
    kept = {kind: set(list(numbers)[:texts]) for kind, numbers in counted.items()}
    found = [i for i, passage in enumerate(passages) if passage.text in kept.get(passage.kind, ())]
    fitting = [i for i in found if len(passages[i].ids) <= longest]
    if not fitting:
        raise Gemma4qError("bad_option", f"no text has as few as {longest:,} tokens: use more context")
    return fitting, len(found) - len(fitting)
