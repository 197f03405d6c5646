"""Conversations as Gemma 4 reads them: the canonical template (9 July 2026) in Python (spec: chat 3.4).

Owns the order of turns, thoughts, calls and results, for the large (12B and up) and the small flavour (E2B, E4B), which
differ in one thing: without thinking, a large model's prompt ends in an empty thought. How functions are spelled is
`tools.py`'s, what clients may send `normalise.py`'s, a file's own template `template.py`'s part.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gemma4q.errors import Gemma4qError
from gemma4q.text.segments import (
    AUDIO,
    BOS,
    CHANNEL,
    CHANNEL_END,
    IMAGE,
    RESPONSE,
    THINK,
    TURN,
    TURN_END,
    VIDEO,
    Segment,
    Writer,
    text_of,
)
from gemma4q.text.tools import write_call, write_declaration, write_result

Message = Mapping[str, Any]
Flavour = Literal["large", "small"]

MEDIA = {
    "image": IMAGE, "image_url": IMAGE, "audio": AUDIO, "input_audio": AUDIO, "video": VIDEO,
}  # fmt: skip
REASONING = ("reasoning", "reasoning_content", "thinking")
LARGE_PARAMETERS = 10_000_000_000  # E4B has 7.5e9, 12B 11.9e9
THOUGHT = CHANNEL + "thought\n"
END = TURN_END + "\n"


def flavour_of(metadata: Mapping[str, Any], *, file_name: str = "", parameters: int = 0) -> Flavour:
    """Which template a model was trained with: by its names, else by per-layer embeddings, else by size (spec: 3.2).

    `metadata` are the GGUF's keys; `parameters` counts the weights, 0 if unknown.
    """
    names = (metadata.get("general.basename"), metadata.get("general.name"), file_name)
    for name in names:
        if isinstance(name, str):
            if re.search(r"e[24]b", name.lower()):
                return "small"
            if re.search(r"12b|26b|31b", name.lower()):
                return "large"
    if metadata.get("gemma4.embedding_length_per_layer_input"):
        return "small"
    return "large" if parameters >= LARGE_PARAMETERS else "small"


def strip_thoughts(text: str) -> str:
    """A model's text without its thoughts, an unclosed one to the end; trimmed."""
    return "".join(part.split(CHANNEL, 1)[0] for part in text.split(CHANNEL_END)).strip()


def reasoning_of(message: Message) -> str:
    """The thought that came with a message, under any of its usual names."""
    return next((message[key] for key in REASONING if message.get(key)), "")


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    flavour: Flavour,
    thinking: bool = False,
    preserve_thinking: bool = False,
    generation_prompt: bool = True,
    strict_template: bool = False,
) -> list[Segment]:
    """The prompt of a conversation, as `normalise.messages` and `normalise.tools` return it.

    `thinking` lets the model think; `preserve_thinking` keeps thoughts that led to calls in earlier turns.
    `strict_template` keeps a defect of the original: no model header after results with text. Raises `bad_message`.
    """
    out = Writer()
    out.literal(BOS)
    messages = write_system(out, list(messages), tools, thinking)
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    turns = [i for i, message in enumerate(messages) if message["role"] != "tool"]
    state = "none"
    for place, index in enumerate(turns):
        before = messages[turns[place - 1]]["role"] if place else None
        after = messages[turns[place + 1]]["role"] if place + 1 < len(turns) else None
        message = messages[index]
        keep_thought = index > last_user or (preserve_thinking and bool(message.get("tool_calls")))
        state = write_message(out, message, results_of(messages, index), before, after, keep_thought)
    if generation_prompt:
        write_generation_prompt(out, state, flavour, thinking, strict_template)
    return out.segments


def write_system(out: Writer, messages: list[Message], tools: Any, thinking: bool) -> list[Message]:
    """The first turn: thinking switch, system text, tools. Returns the messages that follow it."""
    system = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
    if system is None and not tools and not thinking:
        return messages
    out.literal(f"{TURN}system\n")
    if thinking:
        out.literal(f"{THINK}\n")
    if system is not None:
        content = system.get("content") or ""
        if isinstance(content, str):
            out.text(content.strip())
        else:
            out.text("".join((part.get("text") or "").strip() + " " for part in content))
    for tool in tools or ():
        write_declaration(out, tool)
    out.literal(END)
    return messages if system is None else messages[1:]


def results_of(messages: Sequence[Message], index: int) -> list[tuple[str, Any, list[str]]]:
    """What the calls of a message returned: (function, result, media), from the `tool` messages right behind it."""
    message = messages[index]
    if message.get("tool_responses"):
        return [(answer.get("name") or "unknown", answer.get("response"), []) for answer in message["tool_responses"]]
    results: list[tuple[str, Any, list[str]]] = []
    if not message.get("tool_calls"):
        return results
    for follow in messages[index + 1 :]:
        if follow["role"] != "tool":
            break
        content = follow.get("content")
        media: list[str] = []
        if isinstance(content, (list, tuple)):
            media = [MEDIA[part["type"]] for part in content if part.get("type") in MEDIA]
            content = "".join(part.get("text") or "" for part in content if part.get("type") == "text")
        elif isinstance(content, Mapping):
            raise Gemma4qError("bad_message", "a tool's result must be text or parts")
        results.append((function_of(message["tool_calls"], follow), content, media))
    return results


def function_of(calls: Sequence[Mapping[str, Any]], result: Message) -> str:
    """The name of the function that a `tool` message answers: by call id, else as it says itself."""
    named = result.get("name") or result.get("tool_name")
    wanted = result.get("tool_call_id")
    if wanted is None and named:
        return named
    matching = [call["function"]["name"] for call in calls if call.get("id") == wanted]
    return matching[-1] if matching else named or "unknown"


def write_message(
    out: Writer, message: Message, results: list, before: str | None, after: str | None, keep_thought: bool
) -> str:
    """One message: thought, calls, results, text, and the end of its turn. Returns the state: call, result, none."""
    model = message["role"] == "assistant"
    if not (model and before == "assistant"):
        out.literal(TURN)
        out.text("model" if model else message["role"])
        out.literal("\n")
    thought = reasoning_of(message)
    if thought and keep_thought:
        out.literal(THOUGHT)
        out.text(thought)
        out.literal(f"\n{CHANNEL_END}")
    calls = message.get("tool_calls") or ()
    for call in calls:
        write_call(out, call)
    for name, result, media in results:
        write_result(out, name, result)
        for placeholder in media:
            out.literal(placeholder)
    written = len(out.segments)
    write_content(out, message.get("content"), model)
    empty = not text_of(out.segments[written:]).strip()
    if calls and not results:
        out.literal(RESPONSE)
    elif not (model and after == "assistant") and not (results and empty and after is None):
        out.literal(END)
    return "result" if results else "call" if calls else "none"


def write_content(out: Writer, content: Any, model: bool) -> None:
    """Text, each part of it trimmed, and placeholders of media where they stand."""
    clean = strip_thoughts if model else str.strip
    if isinstance(content, str):
        out.text(clean(content))
        return
    for part in content or ():
        if part["type"] == "text":
            out.text(clean(part.get("text") or ""))
        elif part["type"] in MEDIA:
            out.literal(MEDIA[part["type"]])


def write_generation_prompt(out: Writer, state: str, flavour: Flavour, thinking: bool, strict_template: bool) -> None:
    """The header of the model's turn, or nothing where its turn goes on after calls or results."""
    ended = text_of(out.segments[-2:]) == END
    if state == "none" or (ended and not strict_template):
        out.literal(f"{TURN}model\n")
        if flavour == "large" and not thinking:
            out.literal(THOUGHT + CHANNEL_END)
    elif state == "result" and thinking:
        out.literal(THOUGHT)
