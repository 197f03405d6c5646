"""What a figure belongs to: the machine, the build and the model file, as far as they can be told."""

import hashlib
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..errors import printable
from ..gguf.types import type_name
from ..model import open_model
from .builds import commit_of

CHUNK = 1 << 24


def machine() -> dict:
    """Processor, cores we may use, memory in bytes, system and host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": cores,
        "memory": memory,
        "system": platform.platform(),
        "host": platform.node(),
    }


def processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def build() -> dict:
    """Version, commit where the package runs from a clone, and what it runs on."""
    return {
        "gemma4q": version("gemma4q"),
        "commit": commit_of(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }


def model(path: str, progress: Callable[[int, int], None] | None = None) -> dict:
    """A checked model file: name, size, parameters, longest context, type of most matrices; with `progress` SHA-256.

    Raises whatever `open_model` does.
    """
    gguf, config, weights = open_model(path)
    types = Counter(type_name(tensor.type) for tensor in weights.tensors.values() if len(tensor.shape) > 1)
    name = gguf.metadata.get("general.name")
    return {
        "path": str(gguf.path),
        "files": [str(file.path) for file in gguf.files],
        "name": printable(name if isinstance(name, str) and name else gguf.path.stem, 60),
        "type": types.most_common(1)[0][0],
        "bytes": sum(len(file.bytes) for file in gguf.files),
        "parameters": sum(math.prod(tensor.shape) for tensor in weights.tensors.values()),
        "context": config.context_length,
        "sha256": digest([file.path for file in gguf.files], progress) if progress else None,
    }


def digest(paths: list[Path], progress: Callable[[int, int], None]) -> str:
    """SHA-256 of the files behind each other."""
    total, done, found = sum(os.path.getsize(path) for path in paths), 0, hashlib.sha256()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
                done += len(chunk)
                progress(done, total)
    return found.hexdigest()
