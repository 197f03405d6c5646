"""The command line: which commands there are, loaded when called, and how every failure ends.

Each command lives in its own module and is a thin shell over a library function. What was asked for goes to stdout,
all else to stderr. Exit status: 0 done, 1 bad input or a machine that cannot do it, 2 wrong usage, 130 Ctrl-C.
"""

import contextlib
import os
import signal
import sys
from importlib import import_module

import click

from ..errors import Gemma4qError, printable

COMMANDS = {  # name: (module, what it does)
    "run": ("run", "Answer a prompt, or chat."),
    "show": ("show", "Print what a model file holds."),
    "plan": ("plan", "Print how much memory a model takes, without loading it."),
    "check": ("check", "Look for every fault of a model file."),
    "tokenize": ("tokens", "Print the tokens of a text."),
    "detokenize": ("tokens", "Print the text of token ids."),
    "template": ("tokens", "Print a conversation as the model reads it."),
    "convert": ("convert", "Write a Hugging Face model directory as a GGUF file."),
    "split": ("split", "Cut a model file into parts."),
    "merge": ("split", "Join the parts of a model file."),
    "quantize": ("quantize", "Write a model file in smaller tensor types."),
    "imatrix": ("imatrix", "Measure how much each column of a model's matrices matters."),
    "doctor": ("doctor", "Print what this machine can do, and why."),
    "eval": ("eval", "Measure how far a model lies from another, or its perplexity."),
    "bench": ("bench", "Measure speed, and tell whether a change made it slower."),
}
ALIASES = {"perplexity": "eval"}  # not listed
INTERRUPTED = 130


class Commands(click.Group):
    """The commands by name; a command's module is imported when it is called, none for `--help`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        return getattr(import_module(f".{COMMANDS[name][0]}", __name__), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, purpose) for name, (_, purpose) in COMMANDS.items()])

    def main(self, args=None, prog_name="gemma4q", **extra) -> None:
        """Runs a command line and exits the process; what goes wrong becomes one line on stderr."""
        settings = {"debug": False}
        try:
            code = super().main(args, prog_name, **extra | {"standalone_mode": False, "obj": settings}) or 0
            sys.stdout.flush()
        except click.Abort:
            code = INTERRUPTED
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except Exception as error:
            if settings["debug"]:
                raise
            click.echo(f"error: {explain(error)}", err=True)
            _abandon_stdout()
            code = 1
        sys.exit(code)


def explain(error: Exception) -> str:
    """`kind: message` in one line for any exception."""
    match error:
        case Gemma4qError():
            return str(error)
        case MemoryError():
            return "out_of_memory: this machine has no memory left for it; try a smaller --ctx-size"
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"io: {printable(f'{where}{error.strerror or error}')}"
    return f"internal: {printable(f'{type(error).__name__}: {error}', 200)} (--debug shows where)"


def _abandon_stdout() -> None:
    """Drops what a full disk or a closed terminal did not take, so that it fails once and not again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group("gemma4q", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma4q", message="%(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_obj
def cli(settings: dict, debug: bool) -> None:
    """Google's Gemma 4 on your own machine: a GGUF file in, text out."""
    settings["debug"] = debug


def main() -> None:
    """The entry point: quiet when the reader of a pipe leaves, UTF-8 whatever the locale says."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed before we started
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
        getattr(sys, name).reconfigure(encoding="utf-8", errors="backslashreplace" if number == 2 else "replace")
    cli()
