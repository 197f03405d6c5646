"""`convert`: a Hugging Face directory as a GGUF file."""

import json
from collections import Counter

import click

from .options import as_json, command
from .split import part_bytes
from .terminal import columns, human_bytes, note, progress

EXAMPLES = """
\b
Examples:
  gemma4q convert gemma-4-E2B-it
  gemma4q convert gemma-4-E2B-it -o e2b-q8_0.gguf --outtype q8_0
  gemma4q convert gemma-4-E2B-it -o mmproj-e2b.gguf --mmproj
  gemma4q convert gemma-4-31B-it --max-part-size 20G --dry-run
"""


@command(epilog=EXAMPLES)
@click.argument("folder", metavar="HF_DIR", type=click.Path())
@click.option(
    "-o",
    "--outfile",
    type=click.Path(),
    help="File to write, or a directory for it; {ftype} becomes the type. Default: in HF_DIR.",
)
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f32", "bf16", "f16", "q8_0"]),
    default="auto",
    help="Type of matrices; auto: the checkpoint's own 16-bit type.",
)
@click.option("--mmproj", is_flag=True, help="Write the vision and audio encoders, not the text model.")
@part_bytes()
@click.option("--no-centroids", is_flag=True, help="Leave out an assistant's clustered head, for llama.cpp to load it.")
@click.option("--dry-run", is_flag=True, help="Check names and shapes and say what would be written; write nothing.")
@as_json
def convert(
    folder: str,
    outfile: str | None,
    outtype: str,
    mmproj: bool,
    part_bytes: int | None,
    no_centroids: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a Hugging Face model directory (safetensors) as a GGUF file.

    Reads all five text models, their assistants (drafters) and, with --mmproj, their encoders. The file appears when it
    is whole; one of the same name is then replaced.
    """
    from ..convert.convert import planned

    with planned(folder, outfile, outtype, mmproj, part_bytes, not no_centroids) as conversion:
        if not dry_run:
            with progress("converting") as advance:
                conversion.write(advance)
        if as_json:
            click.echo(json.dumps(_described(conversion, dry_run)))
        else:
            click.echo(_summary(conversion))
            if conversion.has_centroids:
                note("llama.cpp loads no file with centroids; --no-centroids leaves them out")
            if dry_run:
                note("nothing was written (--dry-run)")


def _described(conversion, dry_run: bool) -> dict:
    files = [{"path": str(f.path), "tensors": len(f.tensors), "bytes": f.nbytes} for f in conversion.files]
    return {"files": files, "bytes": conversion.nbytes, "outtype": conversion.outtype, "written": not dry_run}


def _summary(conversion) -> str:
    from ..gguf.types import type_name

    sizes, counts = Counter[str](), Counter[str]()
    for tensor in conversion.tensors:
        sizes[type_name(tensor.type)] += tensor.nbytes
        counts[type_name(tensor.type)] += 1
    rows = [(name, f"{counts[name]} tensors", human_bytes(size)) for name, size in sizes.most_common()]
    files = [(str(file.path), f"{len(file.tensors)} tensors", human_bytes(file.nbytes)) for file in conversion.files]
    return columns(files, right=(1, 2)) + "\n\n" + columns(rows, right=(1, 2))
