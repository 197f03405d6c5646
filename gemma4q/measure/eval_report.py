"""An evaluation as tables: a row for each kind of text or range of positions, and what its figures mean."""

from collections.abc import Mapping

from .report import Column, number


def distance(first: str) -> list[Column]:
    """How far the model lies from the base: of rows {name, texts, tokens, ...}; `first` titles their names."""
    return [
        *counts(first),
        Column("KL divergence", lambda row: spread(row["divergence"], 6)),
        Column("median", lambda row: number(row["divergence"]["median"], 6)),
        Column("99 %", lambda row: number(row["divergence"]["p99"], 5)),
        Column("99.9 %", lambda row: number(row["divergence"]["p999"], 5)),
        Column("most", lambda row: number(row["divergence"]["most"], 4)),
    ]


def choice(first: str) -> list[Column]:
    """What that does to the likeliest token, to the right one, and to perplexity."""
    return [
        Column(first, lambda row: row["name"], False),
        Column("same top-1, %", lambda row: spread(row["same_top"], 2, 100)),
        Column("Δp, %", lambda row: spread(row["delta_p"], 3, 100)),
        Column("its rms, %", lambda row: spread(row["delta_p"]["rms"], 2, 100)),
        Column("perplexity", lambda row: spread(row["perplexity"], 3)),
        Column("ratio to base's", lambda row: spread(row["perplexity_ratio"], 4)),
    ]


def brief(first: str) -> list[Column]:
    """A little of both."""
    return [*distance(first)[:4], *distance(first)[6:7], choice(first)[1], choice(first)[5]]


def alone(first: str) -> list[Column]:
    """Where nothing was compared."""
    return [*counts(first), Column("perplexity", lambda row: spread(row["perplexity"], 3))]


def counts(first: str) -> list[Column]:
    return [
        Column(first, lambda row: row["name"], False),
        Column("texts", lambda row: f"{row['texts']:,}"),
        Column("tokens", lambda row: f"{row['tokens']:,}"),
    ]


def spread(mean: Mapping[str, float | None], digits: int, factor: float = 1) -> str:
    """`0.0123 ± 0.0004`: half of the interval behind the value; `?` for what is not known."""
    if mean["value"] is None:
        return "?"
    low, high = mean["low"], mean["high"]
    half = "?" if low is None or high is None else f"{factor * (high - low) / 2:.{digits}f}"
    return f"{factor * mean['value']:.{digits}f} ± {half}"


def kind_rows(report: Mapping) -> list[dict]:
    """The kinds, and all of them where there are several."""
    rows = [{"name": name} | found for name, found in report["kinds"].items()]
    return rows + ([{"name": "all"} | report["all"]] if len(rows) > 1 else [])


def depth_rows(report: Mapping) -> list[dict]:
    return [{"name": f"{found['from']:,} … {found['to']:,}"} | found for found in report["depths"]]
