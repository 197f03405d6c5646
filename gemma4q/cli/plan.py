"""`plan`: the memory a model will take, reckoned before any of it is taken."""

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
    from ..engine.model import Prepared

    found = Prepared(model, backend, threads=threads, context=context, kv=kv).memory
    options.warn_of_kv(kv)
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
