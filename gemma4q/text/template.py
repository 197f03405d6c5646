"""A chat template that came with a file, or from the user: rendered in the sandbox, and only on request.

By default prompts are `chat.py`'s, as most published files carry outdated templates. Owns what a template is given,
which of its output are control tokens, and which templates are known. What code may do is `sandbox.py`'s.
"""

import hashlib
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma4q.errors import Gemma4qError
from gemma4q.text.segments import BOS, CHANNEL, CHANNEL_END, CONTROLS, Segment, spelling

# SHA-256 of templates that were published with Gemma 4.
KNOWN = {
    "ae53464bf3be25802b3a5b37def7fd89667067d7577049b3b2d74c4d8de4c6d4": "July 2026, large",
    "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5": "July 2026, small",
    "94899c0f917d93f6fe81c95744d1e8ddab2d21d39228d2e4aec1fb2a25bff413": "30 April 2026, large",
    "85a08664d16d8f3be4416c92427b3ac10df1024ac566cc0b4bc3bab409393f98": "10 April 2026",
    "65f93a25708c952457106a30e185ba7beffddd726121c8d7e3f3e08b23c16c67": "llama.cpp, interleaved",
    "2dfbfc7d538912f4ea11d29d85b4e25d7bc26386e53f57529f1d707c28b5828c": "launch",
}
OUTDATED = "<start_of_turn>"
PLAIN_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}")
SYMBOLS = [chr(code) for code in range(0x2190, 0x2C00) if chr(code).isprintable()]  # arrows to braille, mostly


def known_as(source: str) -> str | None:
    """Which of the published Gemma 4 templates this is; None: a custom one."""
    return KNOWN.get(hashlib.sha256(source.encode(errors="replace")).hexdigest())


class ChatTemplate:
    """A Jinja chat template, compiled and tried out. Raises `bad_template` with what is wrong, within about a second.

    `controls`: the spellings that are control tokens where the template itself writes them.
    """

    def __init__(self, source: str, controls: Iterable[str] = CONTROLS):
        from gemma4q.text.sandbox import Sandbox

        if OUTDATED in source:
            raise Gemma4qError("bad_template", f"the chat template writes {OUTDATED}: it is for Gemma 1 to 3")
        self.spelling = spelling(controls)
        self._lock = threading.Lock()
        self._sandbox = Sandbox({"raise_exception": raise_exception, "strftime_now": strftime_now})
        self._template = self._guarded(lambda: self._sandbox.load(source))
        self.render([{"role": "user", "content": "Hi"}])

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool = False,
        preserve_thinking: bool = False,
        generation_prompt: bool = True,
    ) -> list[Segment]:
        """The prompt of a conversation in `normalise.messages`'s form. Raises `bad_template`.

        No character of messages and tools ever spells a control token: brackets and bars go in disguised.
        """
        disguise = Disguise([messages, tools])
        variables = {
            "messages": [disguise.message(message) for message in messages],
            "tools": disguise.put_on(tools) if tools else None,
            "bos_token": BOS,
            "eos_token": "<eos>",
            "add_generation_prompt": generation_prompt,
            "enable_thinking": thinking,
            "preserve_thinking": preserve_thinking,
        }
        with self._lock:
            text = self._guarded(lambda: self._sandbox.rendered(self._template, variables))
        parts = enumerate(self.spelling.split(text))
        return [Segment(part if i % 2 else disguise.take_off(part), i % 2 == 1) for i, part in parts if part]

    def _guarded(self, work: Any) -> Any:
        """Whatever a template makes go wrong is the template's fault, and said in one line."""
        try:
            return work()
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise Gemma4qError("bad_template", f"the chat template {reason}") from None


class Disguise:
    """Swaps `<`, `|` and `>` for symbols that the conversation does not contain, and back.

    Symbols, as they are printed, folded and split as brackets and bars are.
    """

    def __init__(self, values: Any):
        used = set().union(*map(set, texts(values)))
        free = [symbol for symbol in SYMBOLS if symbol not in used]
        if len(free) < 3:
            raise Gemma4qError("bad_message", "the conversation uses every symbol there is: no template can render it")
        self._on = str.maketrans(dict(zip("<|>", free, strict=False)))
        self._off = str.maketrans(dict(zip(free[:3], "<|>", strict=True)))

    def put_on(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(self._on)
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put_on(item) for item in value]
        return value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message; thoughts spelled out in a model's text are dropped here, where their tags can still be read."""
        if message["role"] == "assistant":
            message = {**message, "content": without_thoughts(message.get("content"))}
        return self.put_on(message)

    def take_off(self, text: str) -> str:
        return text.translate(self._off)


def texts(value: Any) -> Iterable[str]:
    """Every text in a JSON-like value, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item


def without_thoughts(content: Any) -> Any:
    if isinstance(content, str) and (CHANNEL in content or CHANNEL_END in content):
        return "".join(part.split(CHANNEL, 1)[0] for part in content.split(CHANNEL_END))
    if isinstance(content, list):
        return [
            {**part, "text": without_thoughts(part["text"])} if isinstance(part.get("text"), str) else part
            for part in content
        ]
    return content


def raise_exception(message: Any = "") -> None:
    """What templates call to refuse a conversation."""
    from jinja2 import TemplateError

    raise TemplateError(f"refuses this conversation: {str(message)[:300]}")


def strftime_now(form: str) -> str:
    """The local time in a format of plain letters: a width could ask for gigabytes."""
    if not isinstance(form, str) or not PLAIN_DATE.fullmatch(form):
        raise ValueError("asks for a date in a form that is not allowed")
    return time.strftime(form)
