"""`doctor`: what this machine can do, what was chosen, and why. All of it is looked at now, nothing assumed."""

import json
import platform
import re
from pathlib import Path

import click

from ..errors import Gemma4qError
from .options import BACKENDS, as_json, command
from .terminal import Waiting, columns, human_bytes

FEATURES = {
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm",
}  # fmt: skip


@command()
@as_json
def doctor(as_json: bool) -> None:
    """Print what this machine can do and what gemma4q makes of it: instruction sets, threads, memory, backends."""
    from importlib.metadata import version

    facts = {"gemma4q": version("gemma4q"), "python": platform.python_version(), "system": platform.platform()}
    facts |= _processor() | _computing() | _memory()
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo(columns(row for name, value in facts.items() for row in _rows(name.replace("_", " "), value)))


def _processor() -> dict:
    """The processor and those of its features that matter here, as far as /proc/cpuinfo tells."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    found = [flag for flag in flags[1].split() if flag in FEATURES] if flags else []
    return {"processor": name[1] if name else platform.machine(), "features": " ".join(found) or "unknown"}


def _computing() -> dict:
    """Backends and why not, instruction sets, threads and why, and how fast that many read memory."""
    from .. import backends
    from ..engine.threads import choose_threads

    chosen = backends.get("auto").name
    facts = {"backend": chosen, "backends": {}, "threads": str(threads := choose_threads())}
    for name in BACKENDS[1:]:
        try:
            backends.get(name)
            facts["backends"][name] = "chosen: the first that works" if name == chosen else "works"
        except Gemma4qError as error:
            facts["backends"][name] = error.message
    if chosen == "native":
        from ..backends import native

        with Waiting("reading memory"):
            speed = native.bandwidth(threads.count)
        facts["instruction_sets"] = ", ".join(native.isas()) + " (best first; the first is used)"
        facts["memory_bandwidth"] = f"{speed / 1e9:.1f} GB/s with {threads.count} threads"
    return facts


def _memory() -> dict:
    from ..engine.cgroup import memory_left

    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    facts = {"memory": human_bytes(int(sizes["MemTotal"]) << 10)} if "MemTotal" in sizes else {}
    if "MemAvailable" in sizes:
        facts["memory_free"] = human_bytes(int(sizes["MemAvailable"]) << 10)
    if (left := memory_left()) is not None:
        facts["memory_limit"] = f"{human_bytes(left)} left in our control group"
    return facts


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _rows(name: str, value: object) -> list[tuple[str, str]]:
    return [("", f"{key}: {text}") for key, text in value.items()] if isinstance(value, dict) else [(name, str(value))]
