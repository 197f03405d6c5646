"""One answer on its way to a person or a pipe: streamed, thoughts apart, stoppable, with a closing line of figures.

Text goes to stdout as it is produced, thoughts to stderr, dim. What comes before and after is `run`'s and `chat`'s.
"""

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from .terminal import Waiting, coloured, harmless, note, style

THOUGHT, CONTENT = "thought", "content"
ENDINGS = {  # how an answer may end that a person should know about
    "length": "the answer was cut at {max_tokens} tokens (-n)",
    "context": "the context of {context:,} tokens is full: the answer ends here (start with a larger --ctx-size)",
    "loop": "the model repeats itself: the answer ends here",
}


@dataclass
class Answer:
    """A finished answer. `finish` is the engine's word; `cancelled` after Ctrl-C."""

    text: str
    thoughts: str
    finish: str
    stats: object


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
    """Writes an answer as it comes: text to stdout; thoughts, dim, to stderr."""

    def __init__(self, stream: bool = True, thoughts: bool = True):
        self.stream, self.thoughts = stream, thoughts
        self.on_terminal = sys.stdout.isatty()
        self.pieces: dict[str, list[str]] = {CONTENT: [], THOUGHT: []}
        self.thinking = False

    def add(self, kind: str, text: str) -> None:
        kind = THOUGHT if kind == THOUGHT else CONTENT
        self.pieces[kind].append(text)
        if kind == THOUGHT:
            if self.stream and self.thoughts:
                self.thinking = True
                click.echo(style(harmless(text), sys.stderr, "2"), err=True, nl=False)
        elif self.stream:
            self.end_thought()
            click.echo(harmless(text) if self.on_terminal else text, nl=False)

    def end_thought(self) -> None:
        if self.thinking:
            self.thinking = False
            note("\n" if coloured(sys.stderr) else "")

    def close(self) -> None:
        """Leaves the cursor at the start of a line."""
        self.end_thought()
        text = self.text(CONTENT)
        if self.stream and text and not text.endswith("\n"):
            click.echo()

    def text(self, kind: str) -> str:
        return "".join(self.pieces[kind])


def give(generation, display: Display, quiet: bool) -> Answer:
    """Shows a generation until its end or Ctrl-C; what was produced until an error or Ctrl-C is kept."""
    waiting = Waiting("reading the prompt", quiet)
    try:
        with waiting, stopped_by_ctrl_c(generation.cancel):
            for event in generation.events():
                waiting.done()
                display.add(event.kind, event.text)
    finally:
        display.close()
        sys.stdout.flush()
    answer = Answer(display.text(CONTENT), display.text(THOUGHT), generation.finish, generation.stats)
    if not quiet:
        note(style(figures(generation.stats), sys.stderr, "2"))
    return answer


def figures(stats) -> str:
    """How fast it went, in one line."""
    raise NotImplementedError
