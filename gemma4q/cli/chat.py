"""A conversation at a terminal: reading lines, the commands that begin with a slash, and what is kept between turns.

An answer's way to the screen is `answer`'s; what of a conversation is computed again is the engine's. Nothing is ever
dropped from a conversation but by a command.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from ..errors import Gemma4qError
from ..text import normalise
from ..text.calls import Call
from .answer import Display, give
from .options import SAMPLING
from .terminal import columns, harmless, note

PROMPT, MORE, RESULT, BLOCK = ">>> ", "... ", "result of {}> ", '"""'
OTHER_SETTINGS = {"system": "what the model is told to be", "reasoning": "on or off"}
LARGEST_FILE_BYTES = 64 << 20


NAMES = {setting.name: setting for setting in SAMPLING}


@dataclass
class Conversation:
    """Messages and settings; `tools` are declared functions, `sampling` the options set, by the engine's names."""

    messages: list[dict] = field(default_factory=list)
    system: str | None = None
    reasoning: bool = True
    tools: list[dict] | None = None
    sampling: dict = field(default_factory=dict)

    def options(self) -> dict:
        """What the engine is told besides the messages."""
        return self.sampling | {"system": self.system, "thinking": self.reasoning, "tools": self.tools}

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, path: str) -> "Conversation":
        """Raises bad_file when `text` is not what `to_json` writes; what it asks for is checked when it is used."""
        try:
            found = cls(**json.loads(text))
            found.messages, found.tools = normalise.messages(found.messages), normalise.tools(found.tools)
            if not (isinstance(found.system, str | None) and isinstance(found.reasoning, bool)):
                raise TypeError
            for name, value in found.sampling.items():  # JSON knows lists only
                found.sampling[name] = tuple(map(tuple, value)) if name == "logit_bias" else _tuple(value)
        except (ValueError, TypeError, AttributeError, RecursionError, Gemma4qError):
            raise Gemma4qError("bad_file", f"{path} is not a conversation saved by /save") from None
        return found


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Chat:
    """The loop of a conversation over a loaded model."""

    def __init__(self, model, conversation: Conversation, hide_thinking: bool, quiet: bool):
        self.model, self.conversation = model, conversation
        self.hide_thinking, self.quiet, self.open = hide_thinking, quiet, True
        self.used = 0  # tokens of the context that the last answer and what came before it took
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self.help, "list these"),
            "/clear": (self.clear, "forget the conversation (also /reset)"),
            "/set": (self.set, "NAME VALUE: change a setting; alone: list them"),
            "/show": (self.show, "settings, and how full the context is"),
            "/regen": (self.regen, "answer the last question again"),
            "/save": (self.save, "FILE: keep the conversation"),
            "/load": (self.load, "FILE: take up a kept conversation"),
            "/bye": (self.bye, "leave (also Ctrl-D)"),
        }
        self.aliases = {"/reset": "/clear", "/exit": "/bye", "/quit": "/bye", "/?": "/help"}

    def run(self) -> None:
        """Reads and answers until /bye, Ctrl-D, or Ctrl-C twice at the prompt."""
        if not self.quiet:
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        interrupted = False
        while self.open:
            try:
                text = read_message()
                interrupted = False
                self.take(text)
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                note("\npress Ctrl-C again, or Ctrl-D, to leave")
            except Gemma4qError as error:
                note(f"error: {error}")
            except OSError as error:
                note(f"error: io: {error.filename}: {error.strerror}")

    def take(self, text: str) -> None:
        """A command, or a message to answer."""
        word, _, rest = text.strip().partition(" ")
        if text.startswith("/"):
            name = self.aliases.get(word, word)
            if name not in self.commands:
                raise Gemma4qError("bad_command", f"{word} is no command: /help lists them")
            self.commands[name][0](rest.strip())
        elif text.strip():
            self.ask([*self.conversation.messages, {"role": "user", "content": text}])

    def ask(self, messages: list[dict]) -> None:
        """Answers `messages`; where functions are called, the person gives their results, and the answer goes on."""
        while calls := self.answer(messages):
            messages = [*self.conversation.messages, *map(read_result, calls)]

    def answer(self, messages: list[dict]) -> list[Call]:
        """Answers `messages`, which become the conversation once there is an answer, be it the start of one.

        Returns the calls that wait for results: of declared functions, in an answer that came to its end.
        """
        talk, display = self.conversation, Display(thoughts=not self.hide_thinking)
        generation = self.model.chat(messages, **talk.options())
        try:
            give(generation, display, self.quiet)
        finally:
            self.used = generation.stats.prompt_tokens + generation.stats.generated_tokens
            if display.begun:
                talk.messages = [*messages, display.message()]
        return display.calls if talk.tools and generation.finish == "stop" else []

    def help(self, _: str) -> None:
        for name, (_, purpose) in self.commands.items():
            note(f"{name:<8} {purpose}")
        note(f"{BLOCK:<8} begins and ends a message of several lines")

    def clear(self, _: str) -> None:
        self.conversation.messages, self.used = [], 0
        note("the conversation is forgotten")

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if not name:
            for setting in SAMPLING:
                note(f"{setting.name:<20} {setting.help}")
            for other, purpose in OTHER_SETTINGS.items():
                note(f"{other:<20} {purpose}")
        elif name == "system":
            self.conversation.system = value or None
        elif name == "reasoning" and value in ("on", "off"):
            self.conversation.reasoning = value == "on"
        elif name in NAMES:
            self.set_sampling(name, value)
        else:
            raise Gemma4qError("bad_option", f"{rest[:80]!r} is no setting: /set alone lists them")
        if name and not self.quiet:
            note(f"{name} is set" if value else f"{name} is as the model has it")

    def set_sampling(self, name: str, value: str) -> None:
        """Without a value the setting is the model's again; those that may be given often grow."""
        sampling, setting = self.conversation.sampling, NAMES[name]
        if not value:
            sampling.pop(name, None)
            return
        try:
            parsed = setting.type.convert(value, None, None)
        except click.UsageError as error:
            raise Gemma4qError("bad_option", f"{name}: {error.message}") from None
        sampling[name] = (*sampling.get(name, ()), parsed) if setting.multiple else parsed

    def show(self, _: str) -> None:
        talk = self.conversation
        rows = [
            ("messages", len(talk.messages)),
            ("context", f"{self.used:,} of {self.model.context:,} tokens"),
            ("system", talk.system or "-"),
            ("reasoning", "on" if talk.reasoning else "off"),
            ("tools", ", ".join(tool["function"]["name"] for tool in talk.tools or ()) or "-"),
        ]
        note(columns([*rows, *talk.sampling.items()]))

    def regen(self, _: str) -> None:
        before = self.conversation.messages
        if not any(message["role"] == "user" for message in before):
            raise Gemma4qError("bad_command", "/regen: nothing was asked yet")
        last = max(i for i, message in enumerate(before) if message["role"] == "user")
        self.ask(before[: last + 1])

    def save(self, path: str) -> None:
        Path(_named(path, "/save")).write_text(self.conversation.to_json(), encoding="utf-8")
        note(f"saved {len(self.conversation.messages)} messages in {path}")

    def load(self, path: str) -> None:
        file = Path(_named(path, "/load"))
        if file.is_file() and file.stat().st_size > LARGEST_FILE_BYTES:
            raise Gemma4qError("too_big", f"{path} is no conversation: it has {file.stat().st_size:,} bytes")
        if file.exists() and not file.is_file():
            raise Gemma4qError("not_a_file", f"{path} is not a regular file")
        self.conversation = Conversation.from_json(file.read_text(encoding="utf-8", errors="replace"), path)
        note(f"loaded {len(self.conversation.messages)} messages from {path}")

    def bye(self, _: str) -> None:
        self.open = False


def read_message() -> str:
    '''A line, or the lines between two `"""`. Raises EOFError at the end of input.'''
    text = _line(PROMPT)
    if not text.lstrip().startswith(BLOCK):
        return text
    text = text.lstrip().removeprefix(BLOCK)
    while not text.rstrip().endswith(BLOCK):
        text += "\n" + _line(MORE)
    return text.rstrip().removesuffix(BLOCK).strip("\n")


def read_result(call: Call) -> dict:
    """What a function returned, as the person has it."""
    return {"role": "tool", "name": call.name, "content": _line(RESULT.format(harmless(call.name)))}


def _line(prompt: str) -> str:
    import readline  # noqa: F401  input() edits lines with it

    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, err=True, nl=False)
    return input()


def _named(path: str, command: str) -> str:
    if not path:
        raise Gemma4qError("bad_command", f"{command} needs a file name")
    return os.path.expanduser(path)
