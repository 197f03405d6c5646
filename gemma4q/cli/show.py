"""`show`: what a model file holds. Reads the header only; strings from the file are escaped before they are printed."""

import json
import math
from collections import Counter

import click

from ..errors import Gemma4qError, printable
from .options import as_json, command, model
from .terminal import columns, human_bytes

SHOWN = 3  # first values of an array


@command()
@model
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Print the chat template alone.")
@as_json
def show(model: str, tensors: bool, template: bool, as_json: bool) -> None:
    """Print what a model file holds: metadata, tensor types, and on request every tensor or the chat template."""
    from ..gguf.reader import open_gguf
    from ..gguf.types import type_name

    file = open_gguf(model)
    if template:
        text = file.metadata.get("tokenizer.chat_template")
        if not isinstance(text, str):
            raise Gemma4qError("missing_key", f"{model} carries no tokenizer.chat_template")
        click.echo("\n".join(printable(line, len(line) * 10 + 1) for line in text.split("\n")))
        return
    rows = [
        {"name": t.name, "type": type_name(t.type), "shape": list(t.shape), "bytes": t.nbytes}
        for t in file.tensors.values()
    ]
    types = Counter[str]()
    for row in rows:
        types[row["type"]] += row["bytes"]
    total = sum(types.values())
    if as_json:
        metadata = {key: _plain(value) for key, value in file.metadata.items()}
        files = [str(source.path) for source in file.files]
        click.echo(json.dumps({"files": files, "metadata": metadata, "types": types, "bytes": total, "tensors": rows}))
        return
    parts = f", {len(file.files)} files" if len(file.files) > 1 else ""
    click.echo(f"{printable(str(file.path))}: {len(rows)} tensors, {human_bytes(total)}{parts}\n")
    click.echo(columns([(printable(key), _short(value)) for key, value in file.metadata.items()]) + "\n")
    counts = Counter(row["type"] for row in rows)
    click.echo(
        columns(
            [(name, f"{counts[name]} tensors", human_bytes(size)) for name, size in types.most_common()], right=(1, 2)
        )
    )
    if tensors:
        table = [
            (row["name"], row["type"], " x ".join(map(str, row["shape"])), human_bytes(row["bytes"])) for row in rows
        ]
        click.echo("\n" + columns(table, right=(3,)))


def _plain(value: object) -> object:
    """A metadata value for JSON; an array is its length and its first values."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    if isinstance(value, bool | int | float | str):
        return value
    return {"count": len(value), "first": [_item(value[i]) for i in range(min(SHOWN, len(value)))]}


def _item(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value.item()


def _short(value: object) -> str:
    """A metadata value in one escaped line of at most 80 characters."""
    if isinstance(value, str):
        return printable(value, 80)
    if isinstance(value, bool | int | float):
        return str(value)
    first = ", ".join(str(_item(value[i])) for i in range(min(SHOWN, len(value))))
    return printable(f"{len(value):,} values: {first}{', …' if len(value) > SHOWN else ''}", 80)
