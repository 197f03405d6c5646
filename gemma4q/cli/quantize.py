"""`quantize`: a model file in other tensor types."""

import json
import os
from collections import Counter
from pathlib import Path

import click

from ..errors import Gemma4qError
from . import card as judging
from . import options
from . import recipe as choosing
from .terminal import columns, human_bytes, note, warn

EXAMPLES = """
\b
Examples:
  gemma4q quantize gemma-4-E2B-it-BF16.gguf Q4_K_M              # writes gemma-4-E2B-it-Q4_K_M.gguf beside it
  gemma4q quantize gemma-4-E2B-it-BF16.gguf small.gguf IQ4_XS --imatrix imatrix.gguf
  gemma4q quantize gemma-4-E2B-it-BF16.gguf Q4_K_M --dry-run    # every tensor, its type and size
  gemma4q quantize gemma-4-E2B-it-BF16.gguf Q4_0 --token-embedding-type q8_0 --tensor-type 'blk\\.[0-3]\\.attn=q6_k'
  gemma4q quantize gemma-4-31B-it-BF16-00001-of-00004.gguf out.gguf Q8_0 --keep-split
  gemma4q quantize gemma-4-E2B-it-BF16.gguf Q4_K_M --recipe gemma --imatrix imatrix.gguf   # as large, and better
  gemma4q quantize gemma-4-26B-A4B-it-BF16.gguf small.gguf --target-size 12GB --imatrix imatrix.gguf
  gemma4q quantize gemma-4-E2B-it-BF16.gguf Q4_K_M --card       # measured beside BF16; `gemma4q show` prints it
  gemma4q quantize MODEL.gguf renamed.gguf COPY --override-kv general.name=str:Mine

\b
Types, as llama.cpp names its mixtures:
  Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L IQ4_XS IQ4_NL Q4_0 Q4_1 Q4_K_S Q4_K_M MXFP4_MOE
  Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0 F16 BF16 F32; COPY changes no tensor
"""

types = options.together(
    click.option("--pure", is_flag=True, help="Give all matrices the same type."),
    click.option("--output-tensor-type", "output", metavar="TYPE", help="Type of the head, which may be token_embd."),
    click.option("--token-embedding-type", "embedding", metavar="TYPE", help="Type of the token embedding tables."),
    click.option(
        "--leave-output-tensor", "leave_output", is_flag=True, help="Leave output.weight as it is, if there is one."
    ),
    click.option(
        "--tensor-type", "patterns", multiple=True, metavar="REGEX=TYPE",
        help="Type of tensors whose name matches; may be given often, the first that matches counts.",
    ),
    click.option(
        "--tensor-type-file", "pattern_file", type=click.Path(path_type=Path), help="A file of such, a word each."
    ),
)  # fmt: skip
weights = options.together(
    click.option("--imatrix", type=click.Path(), help="Importance of columns, from `gemma4q imatrix` or llama.cpp's."),
    click.option("--include-weights", multiple=True, metavar="NAME", help="Use it for these tensors only."),
    click.option("--exclude-weights", multiple=True, metavar="NAME", help="Do not use it for these tensors."),
)
files = options.together(
    click.option("--allow-requantize", is_flag=True, help="Round tensors that are quantised already: they get worse."),
    click.option(
        "--override-kv", "settings", multiple=True, metavar="KEY=TYPE:VALUE",
        help="Set a key of the metadata; TYPE is int, float, bool or str.",
    ),
    click.option("--keep-split", is_flag=True, help="Write parts as the model is in; default: one file."),
    click.option("--dry-run", is_flag=True, help="Print every tensor's type and size; write nothing."),
)  # fmt: skip


@options.command(epilog=EXAMPLES)
@options.model
@click.argument("words", nargs=-1, metavar="[OUT] TYPE")
@choosing.recipes
@types
@weights
@judging.cards
@files
@options.threads
@options.as_json
def quantize(
    model: str, words: tuple[str, ...], imatrix: str | None, include_weights: tuple[str, ...],
    exclude_weights: tuple[str, ...], allow_requantize: bool, settings: tuple[str, ...], keep_split: bool,
    dry_run: bool, threads: int | None, as_json: bool, recipe: str | None, target_size: str | None, budget: float,
    recipe_texts: Path | None, card: bool, card_texts: Path | None, **wishes,
) -> None:  # fmt: skip
    """Write a model file in smaller tensor types: a type for all, or a mixture under llama.cpp's name.

    OUT appears when it is whole; a GGUF file of the same name is then replaced. Without OUT the file is written beside
    MODEL, called after its type.
    """
    from ..quantize.mixtures import mixture
    from ..quantize.overrides import importance_keys, setting
    from ..quantize.quantize import planned

    texts = judging.texts(card, card_texts)
    (out, name), target = _words(words, target_size), _target(target_size, wishes["pure"], recipe, recipe_texts)
    chosen, overrides = mixture(name), _overrides(**wishes)
    if chosen.base is None and (imatrix or recipe or card or any(value for value in wishes.values())):
        raise click.UsageError("COPY changes no tensor: it takes no types, no --recipe, no --imatrix and no --card")
    importance = _importance(imatrix, include_weights, exclude_weights)
    label = target_size or (f"{chosen.name}-{recipe}" if recipe else None)
    plan = planned(
        model, out, chosen, overrides, map(setting, settings), importance,
        importance_keys(importance, imatrix) if importance else (), keep_split, allow_requantize, label,
    )  # fmt: skip
    _check_imatrix(imatrix, plan)
    found = quality = measured = None
    if texts:
        how, some = judging.recipe(chosen.name, target_size, recipe, overrides), bool(include_weights + exclude_weights)
        plan, quality = judging.prepared(plan, texts, how, imatrix, some, dry_run, threads)
    if recipe or target_size:
        plan, found = choosing.choose(plan, overrides, target, budget, recipe_texts, allow_requantize, dry_run, threads)
    if not dry_run:
        measured = judging.write(plan, quality, threads)
    if as_json:
        facts = _described(plan, label or chosen.name, dry_run)
        facts |= choosing.described(found) if found else {}
        click.echo(json.dumps(facts | ({"quality": measured.described()} if measured else {})))
    else:
        click.echo((_table(plan) + "\n\n" if dry_run else "") + _summary(plan))
        if measured:
            click.echo("\n" + judging.section(measured))
    if found:
        choosing.say(found)
    _notes(plan, overrides, dry_run)


def _target(size: str | None, pure: bool, recipe: str | None, texts: Path | None) -> int | None:
    from ..quantize.recipe import size as read

    if texts and not (size or recipe):
        raise click.UsageError("--recipe-texts says what a recipe measures with: say --recipe or --target-size too")
    if pure and (size or recipe):
        raise click.UsageError("--pure gives all matrices one type: a recipe chooses one for each")
    return None if size is None else read(size)


def _words(words: tuple[str, ...], target_size: str | None) -> tuple[str | None, str]:
    """OUT and TYPE; any type of blocks will do to plan with where a size is given."""
    if target_size and len(words) < 2:
        return (words[0] if words else None), "Q8_0"
    if target_size:
        raise click.UsageError("--target-size says how large: no TYPE beside it")
    if not words:
        raise click.UsageError("Missing argument '[OUT] TYPE'.")
    if len(words) == 3 and words[2].isdigit():
        raise click.UsageError(f"Threads are an option here: -t {words[2]}")
    if len(words) > 2:
        raise click.UsageError(f"Got unexpected extra argument ({words[2]})")
    return (None, words[0]) if len(words) == 1 else (words[0], words[1])


def _overrides(patterns: tuple[str, ...], pattern_file: Path | None, **wishes):
    from ..quantize.overrides import Overrides, pattern, tensor_type
    from ..quantize.overrides import pattern_file as read

    for name in ("output", "embedding"):
        wishes[name] = None if wishes[name] is None else tensor_type(wishes[name])
    every = [*map(pattern, patterns), *(read(pattern_file) if pattern_file else ())]
    return Overrides(**wishes, patterns=tuple(every))


def _importance(path: str | None, include: tuple[str, ...], exclude: tuple[str, ...]):
    if include and exclude:
        raise click.UsageError("--include-weights and --exclude-weights exclude each other")
    if path is None and (include or exclude):
        raise click.UsageError("--include-weights and --exclude-weights choose from an --imatrix")
    if path is None:
        return None
    from ..quantize.importance import read
    from ..quantize.overrides import selected

    return selected(read(path), include, exclude)


def _check_imatrix(path: str | None, plan) -> None:
    """Refuses to write over what was read."""
    for file in plan.files:
        if path is not None and os.path.exists(file.path) and os.path.samefile(path, file.path):
            raise Gemma4qError("same_file", f"{file.path} is what is read: choose another name")


def _described(plan, name: str, dry_run: bool) -> dict:
    from ..gguf.types import type_name

    files = [{"path": str(f.path), "tensors": len(f.tensors), "bytes": f.nbytes} for f in plan.files]
    tensors = [
        {"name": c.tensor.name, "shape": list(c.tensor.shape), "from": type_name(c.tensor.type),
         "to": type_name(c.type), "bytes": c.data.nbytes}
        for c in plan.changes
    ]  # fmt: skip
    facts = {"files": files, "bytes": plan.nbytes, "type": name, "bits_per_weight": plan.bits_per_weight}
    fell = {c.tensor.name: type_name(c.wish) for c in plan.fallbacks}
    facts |= {"on_q4_0_grid": sorted(plan.on_grid), "kept_exactly": plan.kept}
    return facts | {"written": not dry_run, "tensors": tensors, "fell_back_from": fell}


def _table(plan) -> str:
    from ..gguf.types import type_name

    rows = [
        (c.tensor.name, " x ".join(map(str, c.tensor.shape)), type_name(c.tensor.type), type_name(c.type),
         human_bytes(c.data.nbytes))
        for c in plan.changes
    ]  # fmt: skip
    return columns(rows, right=(4,))


def _summary(plan) -> str:
    from ..gguf.types import type_name

    sizes, counts = Counter[str](), Counter[str]()
    for change in plan.changes:
        sizes[type_name(change.type)] += change.data.nbytes
        counts[type_name(change.type)] += 1
    before = sum(change.tensor.nbytes for change in plan.changes)
    rows = [(name, f"{counts[name]} tensors", human_bytes(size)) for name, size in sizes.most_common()]
    names = [(str(file.path), f"{len(file.tensors)} tensors", human_bytes(file.nbytes)) for file in plan.files]
    total = f"{plan.bits_per_weight:.2f} bits a weight; {human_bytes(before)} before"
    return "\n\n".join((columns(names, right=(1, 2)), columns(rows, right=(1, 2)), total))


def _notes(plan, overrides, dry_run: bool) -> None:
    """What a person should know and did not ask."""
    from ..gguf.types import type_name
    from ..quantize.mixtures import HEAD, is_rounded

    shapes = {c.tensor.name: c.tensor.shape for c in plan.changes}
    if fallbacks := plan.fallbacks:
        widths = sorted({c.tensor.shape[-1] for c in fallbacks})
        swaps = dict.fromkeys(f"{type_name(c.type)} for {type_name(c.wish)}" for c in fallbacks)
        rows = " or ".join(f"{width:,}" for width in widths)
        warn(f"rows of {rows} values are no whole blocks: {len(fallbacks)} tensors got {', '.join(swaps)}")
    if kept := plan.kept:
        warn(f"{len(kept)} tensors were trained on Q4_0's grid: they keep their scales and codes, exactly")
    if other := plan.on_grid - set(kept):
        warn(f"{len(other)} tensors were trained on Q4_0's grid: the type Q4_0 would keep them exactly")
    if missing := plan.unweighed:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        warn(f"the importance says nothing of {len(missing)} tensors, whose columns count alike: {shown}")
    for pattern in overrides.idle(name for name, shape in shapes.items() if is_rounded(name, shape)):
        warn(f"--tensor-type {pattern}: no tensor that is quantised has such a name")
    if overrides.leave_output and HEAD not in shapes:
        warn(f"--leave-output-tensor: there is no {HEAD}; the head is token_embd.weight")
    if dry_run:
        note("nothing was written (--dry-run)")
