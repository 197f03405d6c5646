"""How to choose tokens, checked: every number has its range, every refusal names the field (spec: chat 7.1).

Google's generation config is the default; a GGUF's `general.sampling.*` goes over it, what a user asks over both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from gemma4q.errors import Gemma4qError

MOST = 2**31 - 1
RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_k": (-1, MOST), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1),
    "top_n_sigma": (-1, 100), "min_keep": (0, MOST), "seed": (-1, 2**64 - 1), "logprobs": (0, 20),
    "repeat_penalty": (0.01, 100), "repeat_last_n": (-1, MOST), "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100), "xtc_probability": (0, 1), "xtc_threshold": (0, 1),
    "dry_multiplier": (0, 100), "dry_base": (0, 100), "dry_allowed_length": (1, MOST), "dry_last_n": (-1, MOST),
    "dynatemp_range": (0, 100), "dynatemp_exponent": (0, 100),
}  # fmt: skip
INTEGERS = ("top_k", "min_keep", "seed", "logprobs", "repeat_last_n", "dry_allowed_length", "dry_last_n")
FROM_FILE = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold", "penalty_last_n": "repeat_last_n", "penalty_repeat": "repeat_penalty",
}  # fmt: skip
BIASES, BREAKERS = 4096, 64


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens. Raises `bad_option` naming field and range.

    Temperature 0 is greedy. Off: top_k <= 0, top_p and typical_p 1, top_n_sigma <= 0, repeat_penalty 1, the others 0.
    `*_last_n`: tokens looked back at, prompt included; -1 all, 0 none. `seed` -1: a new one for each request.
    `logit_bias`: (token, bias) pairs, -inf forbids. `logprobs`: how many alternatives to report, None: no logprobs.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    min_keep: int = 0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = 64
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    seed: int = -1
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if name != "logprobs" or self.logprobs is not None:
                check_number(name, getattr(self, name), low, high)
        if len(self.logit_bias) > BIASES:
            raise Gemma4qError(
                "bad_option", f"logit_bias: {len(self.logit_bias):,} tokens, at most {BIASES:,} are allowed"
            )
        for token, bias in self.logit_bias:
            check_number("logit_bias: a token", token, 0, MOST, integer=True)
            if bias != -math.inf:
                check_number("logit_bias: a bias", bias, -1e4, 1e4)
        breakers = self.dry_breakers
        if isinstance(breakers, str) or len(breakers) > BREAKERS or not all(isinstance(b, str) and b for b in breakers):
            raise Gemma4qError("bad_option", f"dry_breakers: must be at most {BREAKERS} texts, none empty")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0 == self.dynatemp_range and self.typical_p == 1 and self.xtc_probability == 0

    def but(self, **asked: Any) -> "SamplingOptions":
        """The same but for what was asked; None means not asked. Raises `bad_option` for a name that is none."""
        known = {field.name for field in fields(self)}
        for name in asked:
            if name not in known:
                raise Gemma4qError("bad_option", f"{name}: no such option")
        return replace(self, **{name: value for name, value in asked.items() if value is not None})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "SamplingOptions":
        """The defaults of a GGUF file; raises `bad_hparam` naming the key."""
        found = {}
        for key, name in FROM_FILE.items():
            value = metadata.get(f"general.sampling.{key}")
            if value is None:
                continue
            try:
                check_number(name, value, *RANGES[name])
            except Gemma4qError as error:
                raise Gemma4qError("bad_hparam", f"general.sampling.{key}: {error.message}") from None
            found[name] = int(value) if name in INTEGERS else float(value)
        return cls(**found)


def check_number(name: str, value: Any, low: float, high: float, *, integer: bool | None = None) -> None:
    """Raises `bad_option` unless the value is a finite number of the field's kind, in its range."""
    integer = name in INTEGERS if integer is None else integer
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        raise Gemma4qError("bad_option", f"{name}: must be {'an integer' if integer else 'a number'}, not {value!r}")
    if not low <= value <= high:
        raise Gemma4qError("bad_option", f"{name}: {value} is not in {low} .. {high}")
