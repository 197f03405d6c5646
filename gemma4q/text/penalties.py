"""What pushes single tokens up or down: logit bias, repetition penalties, DRY (spec: chat 7.2, 7.3).

All become records (token, scale, add) that the backend applies before it picks its best:
l = (l <= 0 ? l * scale : l / scale) + add, record after record, so that a token may have several.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gemma4q import abi
from gemma4q.errors import Gemma4qError
from gemma4q.text.options import SamplingOptions

RECORD = abi.dtype("logit_bias")
LARGEST = float(np.finfo(np.float32).max)
LARGEST_EXPONENT = 88.72  # e to this is as large


class Pieces(Protocol):
    """What penalties need of a tokenizer."""

    stops: frozenset[int]
    size: int

    def encode(self, text: str, bos: bool = False, special: bool | None = None) -> list[int]: ...
    def piece(self, token: int, special: bool = False) -> bytes: ...


def biases(options: SamplingOptions, history: Sequence[int] | np.ndarray, tokenizer: Pieces) -> np.ndarray:
    """Records for the token after `history` (prompt and answer): abi `logit_bias` [n], in the order to apply them."""
    added = list(options.logit_bias)
    if options.ignore_eos:
        added += [(token, -math.inf) for token in sorted(tokenizer.stops)]
    parts = [repetition(options, history), dry(options, history, tokenizer)]
    records = np.zeros(len(added) + sum(map(len, parts)), RECORD)
    records["scale"] = 1
    for row, (token, bias) in zip(records, added, strict=False):
        row["token"], row["add"] = token, bias
    records[len(added) :] = np.concatenate(parts)
    return records


def latest(history: Sequence[int] | np.ndarray, last_n: int) -> np.ndarray:
    """The last tokens as an array; -1: all."""
    return np.asarray(history if last_n < 0 else history[len(history) - min(last_n, len(history)) :], np.int32)


def repetition(options: SamplingOptions, history: Sequence[int] | np.ndarray) -> np.ndarray:
    """Repeat, frequency and presence penalty of each token seen lately."""
    off = options.repeat_penalty == 1 and options.frequency_penalty == 0 == options.presence_penalty
    tokens, counts = np.unique(latest(history, 0 if off else options.repeat_last_n), return_counts=True)
    records = np.empty(len(tokens), RECORD)
    records["token"] = tokens
    records["scale"] = options.repeat_penalty
    records["add"] = -(counts * options.frequency_penalty + options.presence_penalty)
    return records


def dry(options: SamplingOptions, history: Sequence[int] | np.ndarray, tokenizer: Pieces) -> np.ndarray:
    """Penalises tokens that would go on repeating what came before, by the length of the repetition.

    A token is a breaker when its text holds one of `dry_breakers`; no repetition reaches over a breaker.
    """
    records = np.empty(0, RECORD)
    if options.dry_multiplier == 0 or options.dry_base < 1:
        return records
    window = latest(history, options.dry_last_n)
    limit = unbroken(window, options.dry_breakers, tokenizer)
    if limit < options.dry_allowed_length:
        return records
    most = LARGEST_EXPONENT / math.log(options.dry_base) if options.dry_base > 1 else math.inf
    limit = min(limit, options.dry_allowed_length + most)
    longest: dict[int, int] = {}
    at = np.flatnonzero(window[:-1] == window[-1])
    length = 1
    while len(at) and length <= limit:
        if length >= options.dry_allowed_length:
            longest.update(dict.fromkeys(np.unique(window[at + 1]).tolist(), length))
        at = at[at >= length]
        at = at[window[at - length] == window[len(window) - 1 - length]]
        length += 1
    found = [(t, n) for t, n in longest.items() if not is_breaker(t, options.dry_breakers, tokenizer)]
    records = np.empty(len(found), RECORD)
    records["scale"] = 1
    for row, (token, n) in zip(records, found, strict=True):
        penalty = options.dry_multiplier * options.dry_base ** math.floor(min(n - options.dry_allowed_length, most))
        row["token"], row["add"] = token, -min(penalty, LARGEST)
    return records


def is_breaker(token: int, breakers: Sequence[str], tokenizer: Pieces) -> bool:
    piece = tokenizer.piece(token)
    return any(breaker.encode() in piece for breaker in breakers)


def unbroken(window: np.ndarray, breakers: Sequence[str], tokenizer: Pieces) -> int:
    """How many tokens at the end come after the last breaker."""
    for length, token in enumerate(reversed(window.tolist())):
        if is_breaker(token, breakers, tokenizer):
            return length
    return len(window)


def parse_logit_bias(given: Any, tokenizer: Pieces) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as clients write it: {"id": bias} or [[id or text, bias or false], ...]; false forbids.

    Text stands for each token of its encoding. Raises `bad_option`.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    result: list[tuple[int, float]] = []
    try:
        for token, bias in pairs:
            amount = -math.inf if bias is False else bias
            if isinstance(bias, str) or bias is True or bias is None or math.isnan(amount):
                raise ValueError
            if isinstance(token, str) and not (isinstance(given, Mapping) and token.isdecimal()):
                result += [(part, amount) for part in tokenizer.encode(token)]
            else:
                result.append((int(token), amount))
    except (TypeError, ValueError):
        raise Gemma4qError("bad_option", 'logit_bias: must be {"token id": bias} or [[token, bias], ...]') from None
    for token, _ in result:
        if not 0 <= token < tokenizer.size:
            raise Gemma4qError("bad_option", f"logit_bias: {token} is not one of {tokenizer.size} tokens")
    return tuple(result)
