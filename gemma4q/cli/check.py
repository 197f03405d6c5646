"""`check`: every fault of a model file, one line each."""

import json
from dataclasses import asdict

import click

from .options import as_json, command, model
from .terminal import progress


@command()
@model
@as_json
def check(model: str, as_json: bool) -> None:
    """Look for every fault of a model file, in its header and in every weight; exit status 1 when there is one."""
    from ..model.check import check as findings

    with progress("checking") as advance:
        found = list(findings(model, advance))
    faults = sum(finding.level == "error" for finding in found)
    if as_json:
        click.echo(json.dumps({"file": model, "faults": faults, "findings": list(map(asdict, found))}))
    else:
        click.echo("\n".join(map(str, found)) if found else "no faults")
    click.get_current_context().exit(1 if faults else 0)
