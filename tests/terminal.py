"""What tests of the command line share: a model that can chat, the program, and a person at a terminal."""

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time

from tiny import STR, U32, tiny

GEMMA4Q = [sys.executable, "-P", "-m", "gemma4q"]  # -P: the installed package, not the folder we stand in
SURE = ("--backend", "reference", "-s", "7", "--reasoning", "off")


def chatty() -> bytes:
    """A tiny model that can chat, on and on: it has the tokens of a turn, a template and a long context."""
    file = tiny()
    file.set("gemma4.context_length", U32, 8192)
    file.set("tokenizer.chat_template", STR, "{{ messages }}")
    file.set("general.name", STR, "evil \x1b[31m name")
    return file.bytes()


class Person:
    """Sits at a terminal of its own, in front of `gemma4q run MODEL`."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb"}
        self.program = subprocess.Popen(
            [*GEMMA4Q, "run", *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def reads(self, wanted: str, seconds: float = 30) -> str:
        """All output up to `wanted`, which is waited for."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            assert select.select([self.master], [], [], max(0, end - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:  # the program left
                assert wanted in self.seen, self.seen
        before, self.seen = self.seen.split(wanted, 1)
        return before

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def says(self, text: str) -> str:
        """Types a line and returns what is printed until the next prompt."""
        self.types(text + "\n")
        return self.reads(">>> ")

    def presses_ctrl_c(self) -> None:
        """At a prompt, a moment after it came: until it listens, the interpreter only notes a signal."""
        time.sleep(0.2)
        self.types("\x03")

    def leaves(self) -> int:
        code = self.program.wait(timeout=30)
        os.close(self.master)
        return code
