"""`split` and `merge`: a model in parts, and in one file again."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from .options import as_json, command, model
from .terminal import human_bytes, progress


class PartSize(click.ParamType):
    """`2G`, `500M`, `100K` or bytes, in powers of ten as llama.cpp counts."""

    name = "N[K|M|G]"

    def convert(self, value, param, ctx) -> int:
        from ..convert.split import part_size

        try:
            return value if isinstance(value, int) else part_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def part_bytes(required: bool = False) -> Callable:
    """The option that says how big parts may be."""
    help = "Most bytes of tensors in one file; what is more goes to NAME-00002-of-00003.gguf and so on."
    return click.option(
        "--max-part-size", "--split-max-size", "part_bytes", type=PartSize(), required=required, help=help
    )


@command(epilog="\b\nExample:\n  gemma4q split gemma-4-31B-it-BF16.gguf --max-part-size 20G")
@model
@click.argument("out", required=False, type=click.Path(path_type=Path))
@part_bytes(required=True)
@as_json
def split(model: str, out: Path | None, part_bytes: int, as_json: bool) -> None:
    """Cut a model file into parts, which appear together; parts of the same names are replaced.

    OUT is the name that parts are called after, OUT-00001-of-00003.gguf and so on; by default the model's own.
    """
    from ..convert.split import split as cut

    with progress("splitting") as advance:
        paths = cut(model, out, part_bytes, advance)
    _report(paths, as_json)


@command(epilog="\b\nExample:\n  gemma4q merge gemma-4-31B-it-BF16-00001-of-00004.gguf gemma-4-31B-it-BF16.gguf")
@model
@click.argument("out", required=False, type=click.Path(path_type=Path))
@as_json
def merge(model: str, out: Path | None, as_json: bool) -> None:
    """Join the parts of a model, of which any is given, into one file; one of the same name is replaced.

    OUT is the file to write; by default the parts' name without their number.
    """
    from ..convert.split import merge as join

    with progress("merging") as advance:
        path = join(model, out, advance)
    _report([path], as_json)


def _report(paths: list[Path], as_json: bool) -> None:
    sizes = [(str(path), path.stat().st_size) for path in paths]
    if as_json:
        click.echo(json.dumps({"files": [{"path": path, "bytes": size} for path, size in sizes]}))
    else:
        click.echo("\n".join(f"{path}  {human_bytes(size)}" for path, size in sizes))
