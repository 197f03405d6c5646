"""The one error a user meets: a stable kind, and what is wrong and where, in one printable line."""

LONGEST = 300


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` on one line, control characters escaped, cut to `longest` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= longest else line[: longest - 1] + "…"


class Gemma4qError(Exception):
    """Bad input, or a machine that cannot do what was asked; never a defect of the program.

    `kind` is a stable word for programs and tests (`truncated`, `bad_hparam`, `too_big`, ...), the message for people.
    Prints as `kind: message`.
    """

    def __init__(self, kind: str, message: str):
        self.kind = kind
        self.message = printable(message)
        super().__init__(f"{kind}: {self.message}")
