"""Results as text: markdown, CSV, JSON and JSON lines. A row is a dictionary; a column shows a part of it."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .verdict import Row

GB = 1e9
TEXT_FORMATS = ("md", "csv", "json", "jsonl")


class Column(NamedTuple):
    title: str
    show: Callable[[Mapping], str]
    right: bool = True


def markdown(columns: Sequence[Column], rows: Iterable[Mapping]) -> str:
    """A table whose source is aligned too."""
    cells = [[column.title for column in columns], *([column.show(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        placed = zip(texts, widths, columns, strict=True)
        return "| " + " | ".join(t.rjust(w) if c.right else t.ljust(w) for t, w, c in placed) + " |"

    rules = ["-" * (w - 1) + ":" if c.right else "-" * w for w, c in zip(widths, columns, strict=True)]
    return "\n".join([line(cells[0]), line(rules), *map(line, cells[1:])])


def write(form: str, document: Mapping, rows: Sequence[Mapping], columns: Sequence[Column]) -> str:
    """`document` as JSON, or `rows` in another form; what all rows share is in each CSV and JSON line."""
    if form == "md":
        return markdown(columns, rows)
    if form == "json":
        return json.dumps(document, indent=1)
    whole = [shared(document) | row for row in rows]
    if form == "jsonl":
        return "\n".join(map(json.dumps, whole))
    out = io.StringIO()
    flat = [{key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in whole]
    writer = csv.DictWriter(out, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


def shared(document: Mapping) -> dict:
    """Machine, build and model as llama-bench names them."""
    machine, build, model = document["machine"], document["build"], document["model"]
    return {
        "build_commit": build["commit"],
        "build_version": build["gemma4q"],
        "cpu_info": machine["processor"],
        "test_time": document["when"],
        "model_filename": model["path"],
        "model_type": f"{model['name']} {model['type']}",
        "model_size": model["bytes"],
        "model_n_params": model["parameters"],
        "model_sha256": model["sha256"],
    }


def result_columns(model: Mapping, rows: Sequence[Mapping]) -> list[Column]:
    """llama-bench's columns; of the settings only those that are not the same everywhere, and always the threads."""
    size = f"{model['bytes'] / 2**30:.2f} GiB" if model["bytes"] > 2**29 else f"{model['bytes'] / 2**20:.2f} MiB"
    count = model["parameters"]
    parameters = f"{count / 1e9:.2f} B" if count > 5e8 else f"{count / 1e6:.2f} M"
    found = [
        Column("model", lambda row: f"{model['name']} {model['type']}", False),
        Column("size", lambda row: size),
        Column("params", lambda row: parameters),
        Column("backend", lambda row: row["isa"] or row["backend"], False),
        Column("threads", lambda row: str(row["threads"])),
    ]
    for key in ("kv", "batch"):
        if len({row[key] for row in rows}) > 1:
            found.append(Column(key, lambda row, key=key: str(row[key])))
    return [
        *found,
        Column("test", lambda row: row["test"]),
        Column("t/s", lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    ]


def op_columns(read: float | None, gemm: float | None) -> list[Column]:
    """Parts of a model, with the share of what the probes say there is: bytes and operations a second."""
    return [
        Column("op", lambda row: row["op"], False),
        Column("count", lambda row: str(row["count"])),
        Column("ms", lambda row: f"{row['seconds'] * 1e3:.3f}"),
        Column("of time", lambda row: f"{100 * row['share']:.1f} %"),
        Column("MB", lambda row: f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""),
        Column("GB/s", lambda row: rate(row["bytes"], row["seconds"])),
        Column("of read", lambda row: percent(row["bytes"], row["seconds"], read)),
        Column("Gop/s", lambda row: rate(row["operations"], row["seconds"])),
        Column("of GEMM", lambda row: percent(row["operations"], row["seconds"], gemm)),
    ]


def rate(amount: float, seconds: float) -> str:
    return f"{amount / seconds / GB:.1f}" if amount and seconds else ""


def percent(amount: float, seconds: float, roof: float | None) -> str:
    return f"{100 * amount / seconds / roof:.0f} %" if amount and seconds and roof else ""


GATE_COLUMNS = [
    Column("row", lambda row: row["name"], False),
    Column("of time", lambda row: f"{100 * row['share']:.1f} %"),
    Column("ms", lambda row: f"{row['seconds'] * 1e3:.3f}"),
    Column("other", lambda row: f"{row['other_seconds'] * 1e3:.3f}"),
    Column("change", lambda row: f"{100 * row['change']:+.2f} %"),
    Column("between", lambda row: f"{limit(row['low'])} … {limit(row['high'])}"),
    Column("pairs", lambda row: str(row["pairs"])),
    Column("", lambda row: row["verdict"], False),
]
VS_COLUMNS = [
    Column("test", lambda row: row["test"], False),
    Column("gemma4q t/s", lambda row: number(row["ts"], 2)),
    Column("other t/s", lambda row: number(row["other_ts"], 2)),
    Column("ratio", lambda row: number(row["ratio"], 3)),
    Column("least … most", lambda row: f"{number(row['least'], 3)} … {number(row['most'], 3)}"),
    Column("pairs", lambda row: str(row["pairs"])),
]
COMPARE_COLUMNS = [
    Column("row", lambda row: row["name"], False),
    Column("change", lambda row: f"{100 * row['change']:+.1f} %"),
    Column("doubt", lambda row: f"± {100 * row['doubt']:.1f} %"),
    Column("probe", lambda row: row["probe"], False),
    Column("machine", lambda row: f"{100 * row['machine']:+.1f} %"),
    Column("", lambda row: row["verdict"], False),
]


def limit(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.2f} %"


def number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def row_of(row: Row) -> dict:
    """A row of a comparison, its limits None where there are none."""
    low, high = (value if -1 < value < float("inf") else None for value in (row.low, row.high))
    return {
        "name": row.name,
        "test": row.test,
        "kernel": row.kernel,
        "seconds": row.seconds[0],
        "other_seconds": row.seconds[1],
        "share": row.share,
        "change": row.change,
        "low": low,
        "high": high,
        "pairs": row.pairs,
        "verdict": row.verdict,
    }
