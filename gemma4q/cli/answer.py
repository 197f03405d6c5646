"""One answer on its way to a person or a pipe: streamed, thoughts apart, stoppable, with a closing line of figures.

Text goes to stdout as it is produced, thoughts to stderr, dim. What comes before and after is `run`'s and `chat`'s.
"""

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from .terminal import Waiting, coloured, harmless, note, style, warn

THOUGHT, CONTENT = "thought", "content"
ENDINGS = {  # how an answer may end that a person should know about
    "length": "the answer was cut at {count} tokens (-n)",
    "context": "the context is full: the answer ends here; start with a larger -c, or /clear a conversation",
    "loop": "the model repeats itself: the answer ends here",
    "cancelled": "stopped",
}
ONLY_THOUGHTS = "all of it were thoughts: allow more with -n, or none with --reasoning off"


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

    @property
    def begun(self) -> bool:
        return any(self.pieces.values())

    def end_thought(self) -> None:
        if self.thinking:
            self.thinking = False
            note("\n" if coloured(sys.stderr) else "")

    def close(self) -> None:
        """Leaves the cursor at the start of a line, and nothing unwritten."""
        self.end_thought()
        text = self.text(CONTENT)
        if self.stream and text and not text.endswith("\n"):
            click.echo()
        sys.stdout.flush()

    def text(self, kind: str) -> str:
        return "".join(self.pieces[kind])


def give(generation, display: Display, quiet: bool) -> None:
    """Shows a generation until its end or Ctrl-C, then says how it ended; raises what ended it otherwise."""
    waiting = Waiting("reading the prompt", quiet)
    try:
        with waiting, stopped_by_ctrl_c(generation.cancel):
            for event in generation.events():
                waiting.done()
                display.add(event.kind, event.text)
    finally:
        display.close()
    if quiet:
        return
    if ending := ENDINGS.get(generation.finish):
        warn(ending.format(count=generation.stats.generated_tokens))
        if display.begun and not display.text(CONTENT):
            warn(ONLY_THOUGHTS)
    note(style(figures(generation.stats, generation.seed), sys.stderr, "2"))


def figures(stats, seed: int) -> str:
    """How fast it went, in one line."""
    reused = f", {stats.reused_tokens:,} of them reused" if stats.reused_tokens else ""
    return (
        f"[prompt {stats.prompt_tokens:,} tokens{reused}, {stats.prompt_tokens_per_second:,.1f} tokens/s; "
        f"first token after {stats.first_token_seconds:.2f} s; "
        f"answer {stats.generated_tokens:,} tokens, {stats.tokens_per_second:,.1f} tokens/s; seed {seed}]"
    )
