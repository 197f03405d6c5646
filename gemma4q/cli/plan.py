"""`plan`: the memory a model will take, reckoned from its header alone."""

import json
from dataclasses import asdict

import click

from . import options
from .terminal import columns, human_bytes


@options.command()
@options.model
@options.context_size
@options.threads
@options.backend
@options.kv
@options.as_json
def plan(model: str, context: int | None, threads: int | None, backend: str, kv: str, as_json: bool) -> None:
    """Print how much memory a model takes with a context, and whether this machine has it; nothing is loaded."""
    found = _plan(model, context or None, threads, backend, kv)
    have, why = found.available
    if as_json:
        entries = [asdict(entry) for entry in found.entries]
        totals = {
            "context": found.context,
            "anonymous": found.anonymous,
            "mapped": found.mapped,
            "needed": found.needed,
        }
        click.echo(
            json.dumps(totals | {"available": have, "limit": why, "fits": not found.missing, "entries": entries})
        )
        found.check()
        return
    rows = [(e.name, human_bytes(e.bytes), "mapped file" if e.mapped else "memory") for e in found.entries]
    rows.append((f"in all, for {found.context:,} tokens", human_bytes(found.anonymous), "memory"))
    rows.append((f"there is ({why})", human_bytes(have), "memory"))
    click.echo(columns(rows, right=(1,)))
    found.check()


def _plan(model: str, context: int | None, threads: int | None, backend: str, kv: str):
    from .. import backends
    from ..engine.memory import available_memory, own_memory, plan_memory
    from ..engine.model import kv_type
    from ..engine.threads import choose_threads
    from ..model import open_model
    from ..model.forward import build
    from ..text.tokenizer import Tokenizer

    gguf, config, weights = open_model(model)
    kind = kv_type(kv, {name: tensor.type for name, tensor in weights.tensors.items()})
    ops, size = build(config, weights.shapes), sum(len(file.bytes) for file in gguf.files)
    computes, count = backends.get(backend), choose_threads(threads).count
    tokenizer = Tokenizer(gguf.metadata)  # a part of the memory that a process has when it loads
    before = own_memory(), available_memory(count)
    found = plan_memory(config, ops, weights.tensors, size, computes, kind, count, context, 1, *before)
    del tokenizer
    return found
