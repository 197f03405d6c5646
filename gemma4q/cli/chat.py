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
from .answer import Display, give
from .options import SAMPLING
from .terminal import note

PROMPT, MORE, BLOCK = ">>> ", "... ", '"""'
OTHER_SETTINGS = {"system": "what the model is told to be", "reasoning": "on or off"}
LARGEST_FILE_BYTES = 64 << 20


@dataclass
class Conversation:
    """Messages and settings; `sampling` are the options that were set, by the engine's names."""

    messages: list[dict] = field(default_factory=list)
    system: str | None = None
    reasoning: bool = True
    sampling: dict = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, path: str) -> "Conversation":
        """Raises bad_file when `text` is not what `to_json` writes; the messages' own content is checked when used."""
        try:
            values = json.loads(text)
            found = cls(**values)
            shaped = isinstance(found.messages, list) and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in found.messages
            )
            if not (shaped and isinstance(found.system, str | None) and isinstance(found.reasoning, bool)):
                raise TypeError
            found.sampling = {name: value for name, value in dict(found.sampling).items() if name in NAMES}
        except (ValueError, TypeError, RecursionError):
            raise Gemma4qError("bad_file", f"{path} is not a conversation saved by /save") from None
        return found


NAMES = {setting.name: setting for setting in SAMPLING}


class Chat:
    """The loop of a conversation over a loaded model."""

    def __init__(self, model, conversation: Conversation, fixed: dict, hide_thinking: bool, quiet: bool):
        self.model, self.conversation, self.fixed = model, conversation, fixed
        self.hide_thinking, self.quiet, self.open = hide_thinking, quiet, True
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
            self.conversation.messages.append({"role": "user", "content": text})
            self.answer()

    def answer(self) -> None:
        """Answers the last message; when that cannot be begun, the message is taken back."""
        talk, display = self.conversation, Display(thoughts=not self.hide_thinking)
        try:
            options = self.fixed | talk.sampling
            generation = self.model.chat(talk.messages, system=talk.system, thinking=talk.reasoning, **options)
            answer = give(generation, display, self.quiet)
        except Gemma4qError as error:
            if display.text("content"):
                talk.messages.append({"role": "assistant", "content": display.text("content")})
            else:
                talk.messages.pop()
            raise
        talk.messages.append({"role": "assistant", "content": answer.text})

    def help(self, _: str) -> None:
        for name, (_, purpose) in self.commands.items():
            note(f"{name:<8} {purpose}")
        note(f"{BLOCK:<8} begins and ends a message of several lines")

    def clear(self, _: str) -> None:
        self.conversation.messages.clear()
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
        setting = NAMES[name]
        if not value:
            self.conversation.sampling.pop(name, None)
            return
        try:
            kind = setting.type if isinstance(setting.type, click.ParamType) else click.types.convert_type(setting.type)
            parsed = kind.convert(value, None, None)
        except click.UsageError as error:
            raise Gemma4qError("bad_option", f"{name}: {error.message}") from None
        if name == "logit_bias":
            parsed = self.conversation.sampling.get(name, {}) | dict([parsed])
        elif setting.multiple:
            parsed = [*self.conversation.sampling.get(name, ()), parsed]
        self.conversation.sampling[name] = parsed

    def show(self, _: str) -> None:
        talk = self.conversation
        note(f"messages   {len(talk.messages)}")
        note(f"system     {talk.system or '-'}")
        note(f"reasoning  {'on' if talk.reasoning else 'off'}")
        for name, value in talk.sampling.items():
            note(f"{name}  {value}")

    def regen(self, _: str) -> None:
        messages = self.conversation.messages
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise Gemma4qError("bad_command", "/regen: nothing was asked yet")
        self.answer()

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
