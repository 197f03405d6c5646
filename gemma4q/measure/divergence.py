"""How far one model's choice of the next token lies from another's, row by row, and what many rows come to.

A row is what a model says after one token of a text: logits [vocab]. Arithmetic is float64 throughout, and a logit of
-inf (a token that can never come) is one like any other. Which rows there are, and of which models, is not known here.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from math import exp, inf, isfinite, log, sqrt
from typing import NamedTuple

import numpy as np

from ..errors import Gemma4qError

LARGEST = 700  # the exponential of more is no float
PIECE = 1 << 14  # tokens of a row at a time: what is made of them stays in a core's cache
# Student's t of 95 %, two-sided, for so many degrees of freedom; between them the one before, which is wider.
STUDENT = {
    1: 12.71, 2: 4.31, 3: 3.19, 4: 2.78, 5: 2.58, 6: 2.45, 7: 2.37, 8: 2.31, 9: 2.27, 10: 2.23, 12: 2.18, 15: 2.14,
    20: 2.09, 30: 2.05, 60: 2.01, 120: 1.98, 1000: 1.97,
}  # fmt: skip
INTERVAL = (
    "95 %, with the texts as clusters, since the tokens of one text depend on each other: Student's t on the ratio of "
    "two sums over texts (Cochran, Sampling Techniques, chapter 9A); of what is never negative, on its logarithm"
)


# -- Rows ----------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """One row. surprise, base_surprise: -log of what a model gave the token that came, in nats. divergence: the
    Kullback-Leibler divergence KL(base || model), in nats. same: whether both have the same likeliest token."""

    surprise: float
    base_surprise: float
    divergence: float
    same: bool


def surprise(logits: np.ndarray, token: int) -> float:
    """-log of the probability of `token`, nats. Raises `bad_numeric` for a row that is no distribution."""
    most = top(logits)
    total = sum(float(np.exp(np.subtract(piece, most, dtype="f8")).sum()) for piece in pieces(logits))
    return log(total) - (float(logits[token]) - most)


def compare(base: np.ndarray, logits: np.ndarray, token: int, known_above: float | None = None) -> Compared:
    """A row of the base, and the same row of the model; `token` is the one that came.

    base: logits, or log-probabilities of all tokens. With `known_above` log-probabilities of which those up to it are
    unknown: their terms are left out of the sum and the others are taken as they stand, as llama-perplexity does.
    Raises `bad_numeric` for a row that is no distribution.
    """
    base_most, most = top(base), top(logits)
    base_total = total = terms = mass = 0.0
    with np.errstate(invalid="ignore"):  # -inf - -inf, of tokens that neither side can say
        for base_piece, piece in zip(pieces(base), pieces(logits), strict=True):
            log_p, log_q = np.subtract(base_piece, base_most, dtype="f8"), np.subtract(piece, most, dtype="f8")
            p = np.exp(log_p)
            total += float(np.exp(log_q).sum())
            base_total += float(p.sum())
            if known_above is not None:
                p[base_piece <= known_above] = 0
            log_p -= log_q
            log_p[p == 0] = 0  # the limit of p log p
            mass += float(p.sum())
            terms += float((p * log_p).sum())
    if known_above is not None:
        base_total = exp(-base_most)  # log-probabilities: their normaliser is known
    divergence = terms / base_total + mass / base_total * (log(total) - log(base_total))
    return Compared(
        log(total) - (float(logits[token]) - most),
        log(base_total) - (float(base[token]) - base_most),
        divergence if known_above is not None else max(0.0, divergence),  # rounding alone is below 0
        int(base.argmax()) == int(logits.argmax()),
    )


def top(row: np.ndarray) -> float:
    most = float(row.max())
    if not isfinite(most):
        raise Gemma4qError("bad_numeric", f"a row of logits is no distribution: the largest of them is {most}")
    return most


def pieces(row: np.ndarray) -> Iterable[np.ndarray]:
    return (row[at : at + PIECE] for at in range(0, len(row), PIECE))


# -- Many rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scored tokens, one element each: text, which one it is of; kind, of which sort that is; position, the token's in
    its text; the rest as in `Compared`, None where nothing was compared."""

    text: np.ndarray
    kind: np.ndarray
    position: np.ndarray
    surprise: np.ndarray
    base_surprise: np.ndarray | None = None
    divergence: np.ndarray | None = None
    same: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.text)

    @property
    def gained(self) -> np.ndarray:
        """By how much the right token's probability changed."""
        return np.exp(-self.surprise) - np.exp(-self.base_surprise)

    def where(self, chosen: np.ndarray) -> "Scores":
        """The tokens that the mask `chosen` [tokens] has."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Scores(**{name: None if column is None else column[chosen] for name, column in columns.items()})

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        columns = {name: [getattr(part, name) for part in parts] for name in (field.name for field in fields(cls))}
        return cls(**{n: None if column[0] is None else np.concatenate(column) for n, column in columns.items()})


def score(
    logits: np.ndarray, tokens: np.ndarray, threads: Executor, base: np.ndarray | None = None,
    known_above: float | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The columns of `Scores` that rows [rows, vocab] give when `tokens` [rows] came after them."""
    if base is None:
        return {"surprise": np.array(list(threads.map(surprise, logits, tokens)))}
    rows = list(threads.map(compare, base, logits, tokens, [known_above] * len(tokens)))
    return {name: np.array(column) for name, column in zip(Compared._fields, zip(*rows, strict=True), strict=True)}


class Mean(NamedTuple):
    """A value and its 95 % interval; None where one text alone tells nothing of that."""

    value: float
    low: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> "Mean":
        """For a function that only grows."""
        return Mean(*(None if edge is None else function(edge) for edge in self))

    def within(self, least: float, most: float = inf) -> "Mean":
        """With an interval that goes no farther than values can lie."""
        return Mean(self.value, *(None if edge is None else min(max(edge, least), most) for edge in self[1:]))


def mean(values: np.ndarray, text: np.ndarray, positive: bool = False) -> Mean:
    """The mean of `values` [rows], rows of one text being one draw: `INTERVAL` says how.

    positive: none is negative, and few may be large: the interval is a factor, which then holds the truth more often.
    """
    _, of = np.unique(text, return_inverse=True)
    value, counts = float(values.mean()), np.bincount(of)
    if len(counts) < 2 or not isfinite(value):
        return Mean(value, None, None)
    apart = np.bincount(of, values) - value * counts
    error = sqrt(len(counts) / (len(counts) - 1) * float(apart @ apart)) / len(values)
    half = error * max((n, t) for n, t in STUDENT.items() if n < len(counts))[1]
    if positive and value > 0:
        factor = grown(half / value)
        return Mean(value, value / factor, value * factor)
    return Mean(value, value - half, value + half)


def grown(power: float) -> float:
    return exp(power) if power < LARGEST else inf


def summary(scores: Scores) -> dict:
    """What they come to, for JSON and tables: counts, perplexities and, beside a base, how far the model lies from it.

    Divergences are nats; `same_top` and `delta_p` (the right token's probability, model less base) are shares of 1.
    """
    text, found = scores.text, {"texts": len(np.unique(scores.text)), "tokens": len(scores)}
    found["perplexity"] = mean(scores.surprise, text).within(0).map(grown)._asdict()
    if scores.divergence is None:
        return found
    middle, p99, p999 = map(float, np.quantile(scores.divergence, (0.5, 0.99, 0.999)))
    square = mean(scores.gained**2, text, positive=True)
    least = float(scores.divergence.min())  # below 0 only where a base was cut off
    return found | {
        "base_perplexity": mean(scores.base_surprise, text).within(0).map(grown)._asdict(),
        "perplexity_ratio": mean(scores.surprise - scores.base_surprise, text).map(grown)._asdict(),
        "divergence": mean(scores.divergence, text, positive=least >= 0)._asdict()
        | {"median": middle, "p99": p99, "p999": p999, "most": float(scores.divergence.max())},
        "same_top": mean(scores.same, text).within(0, 1)._asdict(),
        "delta_p": mean(scores.gained, text)._asdict() | {"rms": square.map(sqrt)._asdict()},
    }
