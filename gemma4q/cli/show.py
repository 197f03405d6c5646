"""`show`: what a model file holds. Reads the header only; strings from the file are escaped before they are printed."""

import json
import math
from collections import Counter

import click

from ..errors import Gemma4qError, printable
from . import card as judging
from .options import as_json, command, model
from .terminal import columns, human_bytes, warn

SHOWN = 3  # first values of an array


@command()
@model
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template alone.")
@as_json
def show(model: str, tensors: bool, template: bool, as_json: bool) -> None:
    """Print what a model file holds: metadata, tensor types, what `quantize --card` measured of it.

    On request every tensor, or the chat template alone.
    """
    from ..gguf.reader import open_gguf

    file = open_gguf(model)
    if template:
        click.echo(_template(file))
    elif as_json:
        click.echo(json.dumps(_everything(file)))
    else:
        click.echo(_summary(file))
        if tensors:
            rows = [(t["name"], t["type"], " x ".join(map(str, t["shape"])), t["bytes"]) for t in _tensors(file)]
            click.echo("\n" + columns([(*row, human_bytes(size)) for *row, size in rows], right=(3,)))


def _template(file) -> str:
    text = file.metadata.get("tokenizer.chat_template")
    if not isinstance(text, str):
        raise Gemma4qError("missing_key", f"{file.path} carries no tokenizer.chat_template")
    return "\n".join(printable(line, len(line) * 10 + 1) for line in text.split("\n"))


def _which_template(file) -> str | None:
    """Which of the published templates a file carries, `custom`, or None."""
    from ..text.template import known_as

    text = file.metadata.get("tokenizer.chat_template")
    return known_as(text) or "custom" if isinstance(text, str) else None


def _card(file):
    """The file's quality card, if any, and what is wrong with one that cannot be read."""
    from ..measure.card import read

    try:
        return read(file.metadata), None
    except Gemma4qError as error:
        return None, error.message


def _tensors(file) -> list[dict]:
    from ..gguf.types import type_name

    every = file.tensors.values()
    return [{"name": t.name, "type": type_name(t.type), "shape": list(t.shape), "bytes": t.nbytes} for t in every]


def _everything(file) -> dict:
    tensors, (card, fault) = _tensors(file), _card(file)
    if fault:
        warn(f"quality: {fault}: this card cannot be read")
    return {
        "files": [str(part.path) for part in file.files],
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "template": _which_template(file),
        "quality": card.described() if card else None,
        "types": _bytes_by_type(tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "tensors": tensors,
    }


def _summary(file) -> str:
    tensors, (card, fault) = _tensors(file), _card(file)
    sizes, counts = _bytes_by_type(tensors), Counter(tensor["type"] for tensor in tensors)
    parts = f", {len(file.files)} files" if len(file.files) > 1 else ""
    types = [(name, f"{counts[name]} tensors", human_bytes(size)) for name, size in sizes.items()]
    shown_below = card.keys() if card else ()
    listed = [(printable(key), _short(value)) for key, value in file.metadata.items() if key not in shown_below]
    sections = (
        f"{printable(str(file.path))}: {len(tensors)} tensors, {human_bytes(sum(sizes.values()))}{parts}",
        columns(listed),
        f"chat template: {_which_template(file) or 'none'}",
        columns(types, right=(1, 2)),
        judging.section(card) if card else f"quality: {fault}: this card cannot be read" if fault else "",
    )
    return "\n\n".join(filter(None, sections))


def _bytes_by_type(tensors: list[dict]) -> dict[str, int]:
    """The type that takes most first."""
    sizes = Counter[str]()
    for tensor in tensors:
        sizes[tensor["type"]] += tensor["bytes"]
    return dict(sizes.most_common())


def _plain(value: object) -> object:
    """A metadata value for JSON; an array is its length and its first values."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    if isinstance(value, bool | int | float | str):
        return value
    return {"count": len(value), "first": [_plain(_item(value[i])) for i in range(min(SHOWN, len(value)))]}


def _item(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value.item()


def _short(value: object) -> str:
    """A metadata value in one escaped line of at most 80 characters."""
    if isinstance(value, bool | int | float | str):
        return printable(str(value), 80)
    first = ", ".join(str(_item(value[i])) for i in range(min(SHOWN, len(value))))
    return printable(f"{len(value):,} values: {first}{', …' if len(value) > SHOWN else ''}", 80)
