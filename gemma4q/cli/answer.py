"""One answer on its way to a person or a pipe: streamed, thoughts apart, stoppable, with a closing line of figures.

Text goes to stdout as it is produced, each call of a function on a line there, thoughts to stderr, dim. What comes
before and after is `run`'s and `chat`'s.
"""

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from ..errors import printable
from ..text.calls import Call
from ..text.stream import Event
from .terminal import Waiting, coloured, harmless, note, style, warn

THOUGHT, CONTENT = "thought", "content"
ENDINGS = {  # how an answer may end that a person should know about
    "length": "the answer was cut at {count} tokens (-n)",
    "context": "the context is full: the answer ends here; start with a larger -c, or /clear a conversation",
    "loop": "the model repeats itself: the answer ends here",
    "cancelled": "stopped",
}
ONLY_THOUGHTS = "all of it were thoughts: allow more with -n, or none with --reasoning off"
UNREADABLE = "a call that cannot be read stands in the answer as the model wrote it"


@contextmanager
def stopped_by_ctrl_c(cancel: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `cancel`, also while the kernels run; a second one raises KeyboardInterrupt."""
    pressed = False

    def handle(*_) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def watch() -> None:
        if receiver.recv(1) == bytes([signal.SIGINT]):
            cancel()

    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=watch, daemon=True).start()
    handler, wakeup = signal.signal(signal.SIGINT, handle), signal.set_wakeup_fd(sender.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        sender.close()


class Display:
    """Writes an answer as it comes: text and calls to stdout; thoughts, dim, to stderr.

    A call is a line of its own: the function's name, and its arguments as JSON.
    """

    def __init__(self, stream: bool = True, thoughts: bool = True):
        self.stream, self.thoughts = stream, thoughts
        self.on_terminal = sys.stdout.isatty()
        self.pieces: dict[str, list[str]] = {CONTENT: [], THOUGHT: []}
        self.calls: list[Call] = []
        self.unreadable = self.thinking = self.within_line = False

    def add(self, event: Event) -> None:
        if event.kind == THOUGHT:
            self.pieces[THOUGHT].append(event.text)
            self._think(event.text)
        elif event.call:
            self.calls.append(event.call)
            self._write_line(one_line(event.call))
        elif event.kind == CONTENT:
            self.pieces[CONTENT].append(event.text)
            self._write(event.text)
        else:
            self.unreadable = True
            before = self.text(CONTENT)
            self.pieces[CONTENT].append("\n" * bool(before and not before.endswith("\n")) + event.text)
            self._write_line(event.text)

    @property
    def begun(self) -> bool:
        return any(self.pieces.values()) or bool(self.calls)

    def message(self) -> dict:
        """The answer as the conversation goes on with it: without thoughts, but for those that led to a call."""
        message = {"role": "assistant", "content": self.text(CONTENT)}
        if self.calls:
            message |= {"reasoning_content": self.text(THOUGHT), "tool_calls": self.tool_calls()}
        return message

    def tool_calls(self) -> list[dict]:
        return [{"type": "function", "function": asdict(call)} for call in self.calls]

    def _think(self, text: str) -> None:
        if self.stream and self.thoughts:
            self.thinking = True
            click.echo(style(harmless(text), sys.stderr, "2"), err=True, nl=False)

    def _write(self, text: str) -> None:
        if self.stream and text:
            self.end_thought()
            self.within_line = not text.endswith("\n")
            click.echo(harmless(text) if self.on_terminal else text, nl=False)

    def _write_line(self, text: str) -> None:
        self._write("\n" * self.within_line + text + "\n")

    def end_thought(self) -> None:
        if self.thinking:
            self.thinking = False
            note("\n" if coloured(sys.stderr) else "")

    def close(self) -> None:
        """Leaves the cursor at the start of a line, and nothing unwritten."""
        self.end_thought()
        self._write("\n" * self.within_line)
        sys.stdout.flush()

    def text(self, kind: str) -> str:
        return "".join(self.pieces[kind])


def one_line(call: Call) -> str:
    """A function's name and its arguments as JSON."""
    return f"{printable(call.name)} {json.dumps(call.arguments, ensure_ascii=False)}"


def give(generation, display: Display, quiet: bool) -> None:
    """Shows a generation until its end or Ctrl-C, then says how it ended; raises what ended it otherwise."""
    waiting = Waiting("reading the prompt", quiet)
    try:
        with waiting, stopped_by_ctrl_c(generation.cancel):
            for event in generation.events():
                waiting.done()
                display.add(event)
    finally:
        display.close()
    if quiet:
        return
    if ending := ENDINGS.get(generation.finish):
        warn(ending.format(count=generation.stats.generated_tokens))
        if display.text(THOUGHT) and not display.text(CONTENT) and not display.calls:
            warn(ONLY_THOUGHTS)
    if display.unreadable:
        warn(UNREADABLE)
    note(style(figures(generation.stats, generation.seed), sys.stderr, "2"))


def figures(stats, seed: int) -> str:
    """How fast it went, in one line."""
    reused = f", {stats.reused_tokens:,} of them reused" if stats.reused_tokens else ""
    return (
        f"[prompt {stats.prompt_tokens:,} tokens{reused}, {stats.prompt_tokens_per_second:,.1f} tokens/s; "
        f"first token after {stats.first_token_seconds:.2f} s; "
        f"answer {stats.generated_tokens:,} tokens, {stats.tokens_per_second:,.1f} tokens/s; seed {seed}]"
    )
