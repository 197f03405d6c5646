"""What tests of bad checkpoints share: tiny directories' files read, changed and written back, and refusals caught."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma4q import Gemma4qError
from gemma4q.convert.convert import planned

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
UP = "model.language_model.layers.1.mlp.up_proj.weight"


def refused(folder: Path, out: Path | None = None, **options) -> str:
    """What converting says, having written nothing."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(Gemma4qError) as caught, planned(folder, out or folder.parent / "out.gguf", **options) as found:
        found.write()
    assert sorted(folder.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def header_of(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: dict | str, data: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    header, data = header_of(path)
    change(header)
    write_header(path, header, data)
