"""Chooses the next token: a chain of small functions on candidates, and one reproducible draw (spec: chat 7.2).

Candidates are (ids, logits), best first, the lower id first among equals. Two ways in choose the same token: from the
best few that a backend kept (biases and mask applied), or from all logits. Biases come from `penalties.py`.
"""

import secrets
from collections.abc import Iterable

import numpy as np

from gemma4q.errors import Gemma4qError
from gemma4q.text.options import SamplingOptions

TOP = 64  # best candidates a backend keeps
LOWEST = float(np.finfo(np.float32).min)  # stands for minus infinity where JSON has none

Candidates = tuple[np.ndarray, np.ndarray]  # ids, logits (float64), best first


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of candidates, best first."""
    weights = np.exp(logits - logits[0])
    return weights / weights.sum()


def first(candidates: Candidates, count: int) -> Candidates:
    return candidates[0][:count], candidates[1][:count]


def top_k(candidates: Candidates, k: int) -> Candidates:
    """The k best."""
    return first(candidates, k)


def typical(candidates: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Those whose surprise is nearest the expected one, until their probabilities exceed p (arXiv:2202.00666)."""
    ids, logits = candidates
    chances = probabilities(logits)
    surprise = -np.log(np.maximum(chances, np.finfo(float).tiny))
    order = np.argsort(np.abs(surprise - (chances * surprise).sum()), kind="stable")
    count = np.searchsorted(np.cumsum(chances[order]), p, side="right") + 1
    kept = np.sort(order[: max(count, min_keep)])
    return ids[kept], logits[kept]


def top_p(candidates: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """The fewest best whose probabilities reach p."""
    count = np.searchsorted(np.cumsum(probabilities(candidates[1])), p, side="left") + 1
    return first(candidates, max(count, min_keep))


def min_p(candidates: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Those at least p times as likely as the best."""
    logits = candidates[1]
    return first(candidates, max(int((logits >= logits[0] + np.log(p)).sum()), min_keep))


def xtc(candidates: Candidates, probability: float, threshold: float, chance: float, min_keep: int = 0) -> Candidates:
    """Sometimes (where `chance` is below `probability`) drops all but the least likely of the likely ones."""
    ids, logits = candidates
    likely = int((probabilities(logits) >= threshold).sum())
    dropped = likely - 1
    if chance >= probability or threshold > 0.5 or dropped < 1 or len(ids) - dropped < max(1, min_keep):
        return candidates
    return ids[dropped:], logits[dropped:]


def temperature(candidates: Candidates, t: float) -> Candidates:
    """Logits divided by t; 0 leaves the best alone."""
    return first(candidates, 1) if t <= 0 else (candidates[0], candidates[1] / t)


def dynamic_temperature(logits: np.ndarray, t: float, spread: float, exponent: float) -> float:
    """A temperature in t - spread .. t + spread, the higher the less certain the model is."""
    if spread <= 0 or len(logits) < 2:
        return t
    chances = probabilities(logits)
    entropy = -(chances * np.log(np.maximum(chances, np.finfo(float).tiny))).sum() / np.log(len(logits))
    low, high = max(0.0, t - spread), t + spread
    return low + (high - low) * float(entropy) ** exponent


def top_n_sigma(logits: np.ndarray, n: float) -> np.ndarray:
    """All logits, those more than n standard deviations below the best at minus infinity (arXiv:2411.07641)."""
    finite = logits[np.isfinite(logits)].astype(np.float64)
    return np.where(logits >= finite.max() - n * finite.std(), logits, np.float32(-np.inf))


def uniforms(seed: int, position: int) -> tuple[float, float]:
    """Two numbers in 0 .. 1 that depend on seed and position only, not on what was drawn before."""
    raw = np.random.Philox(key=seed, counter=position).random_raw(2)
    return float(raw[0] >> 11) * 2.0**-53, float(raw[1] >> 11) * 2.0**-53


def draw(candidates: Candidates, uniform: float) -> int:
    """The candidate at `uniform` of the summed probabilities."""
    ids, logits = candidates
    sums = np.cumsum(np.exp(logits - logits[0]))
    return int(ids[min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(ids) - 1)])


def choose(candidates: Candidates, options: SamplingOptions, seed: int, position: int) -> int:
    """The chain behind penalties and top_n_sigma, in its fixed order, and the draw."""
    o = options
    if o.greedy:
        return int(candidates[0][0])
    uniform, chance = uniforms(seed, position)
    if o.top_k > 0:
        candidates = top_k(candidates, max(o.top_k, o.min_keep))
    if o.typical_p < 1:
        candidates = typical(candidates, o.typical_p, o.min_keep)
    if o.top_p < 1:
        candidates = top_p(candidates, o.top_p, o.min_keep)
    if o.min_p > 0:
        candidates = min_p(candidates, o.min_p, o.min_keep)
    if o.xtc_probability > 0:
        candidates = xtc(candidates, o.xtc_probability, o.xtc_threshold, chance, o.min_keep)
    t = dynamic_temperature(candidates[1], o.temperature, o.dynatemp_range, o.dynatemp_exponent)
    return draw(temperature(candidates, t), uniform)


def needs_full(options: SamplingOptions, top: int = TOP) -> bool:
    """Whether all logits are needed to choose, or the `top` best will do."""
    if options.logprobs is not None or (options.top_n_sigma > 0 and not options.greedy):
        return True
    return not options.greedy and (options.top_k <= 0 or max(options.top_k, options.min_keep) > top)


def pick_from_top(ids: np.ndarray, values: np.ndarray, options: SamplingOptions, *, seed: int, position: int) -> int:
    """The token at `position`, from a backend's best (i32 [top], f32 [top], best first, id -1: no more).

    Raises `bad_numeric` where a value is not finite or no token is allowed.
    """
    count = int(((ids >= 0) & (values != -np.inf)).sum())
    check_finite(values[:count])
    return choose((ids[:count], values[:count].astype(np.float64)), options, seed, position)


def pick_from_logits(
    logits: np.ndarray,
    options: SamplingOptions,
    *,
    seed: int,
    position: int,
    biases: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> int:
    """The token at `position`, from raw logits f32 [vocabulary]; `biases` as in penalties.py, `mask` as allowed_mask's.

    Raises `bad_numeric` where a logit is not a number or no token is allowed.
    """
    check_finite(logits)
    logits = logits.copy()
    if biases is not None:
        apply_biases(logits, biases)
    if mask is not None:
        logits[np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)] == 0] = -np.inf
    if options.top_n_sigma > 0 and np.isfinite(logits).any():
        logits = top_n_sigma(logits, options.top_n_sigma)
    count = 1 if options.greedy else options.top_k if options.top_k > 0 else len(logits)
    candidates = best(logits, max(count, options.min_keep))
    check_finite(candidates[1])
    return choose(candidates, options, seed, position)


def check_finite(logits: np.ndarray) -> None:
    if not len(logits):
        raise Gemma4qError("bad_numeric", "every token is forbidden: no answer can go on here")
    if not np.isfinite(logits).all():
        raise Gemma4qError("bad_numeric", "the model computed a logit that is not a finite number")


def apply_biases(logits: np.ndarray, biases: np.ndarray) -> None:
    """What a backend does with records, in place: one after the other, in float32."""
    for token, scale, add in zip(biases["token"], biases["scale"], biases["add"], strict=True):
        logit = logits[token]
        logits[token] = (logit * scale if logit <= 0 else logit / scale) + add


def best(logits: np.ndarray, count: int) -> Candidates:
    """The `count` best of f32 logits as candidates, without those at minus infinity."""
    if count < len(logits):
        worst = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.flatnonzero(logits >= worst)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    else:
        ids = descending(logits)
    ids = ids[: np.count_nonzero(logits[ids] > -np.inf)]
    return ids, logits[ids].astype(np.float64)


def descending(logits: np.ndarray) -> np.ndarray:
    """Ids of f32 logits, best first: one sort of integers that hold a logit's order above its id, ten times a stable
    sort of floats."""
    bits = (logits + np.float32(0)).view(np.int32)  # + 0: minus zero equals zero
    order = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits).astype(np.int64)  # ascending where logits descend
    return np.sort(order << 32 | np.arange(len(logits))) & 0xFFFFFFFF


def logprobs(logits: np.ndarray, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log probability of the chosen token, and of the `count` best, from raw logits f32 [vocabulary]."""
    ids, values = best(logits, max(count, 1))
    total = values[0] + np.log(np.exp(logits.astype(np.float64) - values[0]).sum())
    chosen = max(float(logits[token] - total), LOWEST)
    return chosen, [(int(i), float(value - total)) for i, value in zip(ids[:count], values[:count], strict=True)]


def allowed_mask(size: int, never: Iterable[int]) -> np.ndarray:
    """The tokens an answer may contain as bits, u32 [ceil(size / 32)]: bit t % 32 of word t // 32 is token t."""
    allowed = np.zeros(-(-size // 32) * 32, np.uint8)
    allowed[:size] = 1
    allowed[list(never)] = 0
    return np.packbits(allowed, bitorder="little").view(np.uint32)


def fresh_seed() -> int:
    """A seed for a request that names none; report it, so that its answer can be had again."""
    return secrets.randbits(63)
