"""What was measured of each commit: one file of JSON lines for a machine, added to and never rewritten."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from ..errors import Gemma4qError

KEPT = ("backend", "isa", "threads", "kv", "batch", "test", "samples_ts")


def file_of(folder: Path, machine: Mapping) -> Path:
    """`amd-epyc-2.jsonl` for a machine with two cores of an AMD EPYC."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['cores']}".lower()).strip("-")
    return folder / f"{name}.jsonl"


def add(folder: Path, document: Mapping) -> Path:
    """Appends a measurement; the file. Raises OSError, and `no_commit` for a build that is of no commit."""
    commit = document["build"]["commit"]
    if not commit:
        raise Gemma4qError("no_commit", "this build does not run from a clone: its figures belong to no commit")
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": document["machine"]["processor"],
        "model": document["model"]["name"],
        "sha256": document["model"]["sha256"],
        "probes": {
            name: median(values) if (values := [v for r in document["results"] for v in r["probes"][name]]) else None
            for name in ("read", "gemm")
        },
        "results": [{key: result[key] for key in KEPT} for result in document["results"]],
    }
    path = file_of(folder, document["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return path


def read(folder: Path) -> list[dict]:
    """All records below `folder`, oldest first. Raises `bad_history`, naming file and line, and `not_found`."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise Gemma4qError("not_found", f"{folder}: no history there; `gemma4q bench MODEL --record` begins one")
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                record["when"], record["commit"], record["machine"], record["model"], record["probes"]
                for result in record["results"]:
                    median(result["samples_ts"]), result["test"], result["threads"]
            except (ValueError, KeyError, TypeError) as error:
                raise Gemma4qError("bad_history", f"{path}, line {number}: {type(error).__name__} {error}") from None
            records.append(record)
    return sorted(records, key=lambda record: record["when"])
