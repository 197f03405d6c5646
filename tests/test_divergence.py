"""Divergence and its statistics: against numbers worked out by hand, plain float64 arithmetic, and simulated texts."""

import math
from concurrent.futures import ThreadPoolExecutor
from math import inf, log

import numpy as np
import pytest

from gemma4q.errors import Gemma4qError
from gemma4q.measure.divergence import PIECE, STUDENT, Mean, Scores, compare, mean, score, summary, surprise

WIDE = PIECE + 321  # more than one piece, and not whole ones


def logs(*shares: float) -> np.ndarray:
    """Logits of these probabilities, moved by a constant as logits may be."""
    with np.errstate(divide="ignore"):
        return (np.log(shares) + 7.5).astype(np.float32)


def plain(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, the obvious way."""
    x = logits.astype("f8")
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


# -- Rows ----------------------------------------------------------------------------------------------------


def test_three_tokens_worked_out_by_hand():
    """KL((1/2, 1/4, 1/4) || (1/4, 1/4, 1/2)) = 1/2 ln 2 + 0 - 1/4 ln 2."""
    found = compare(logs(1 / 2, 1 / 4, 1 / 4), logs(1 / 4, 1 / 4, 1 / 2), 0)
    assert found.divergence == pytest.approx(log(2) / 4, rel=1e-6)
    assert found.base_surprise == pytest.approx(log(2), rel=1e-6) and found.surprise == pytest.approx(log(4), rel=1e-6)
    assert found.same is False
    assert surprise(logs(1 / 4, 1 / 4, 1 / 2), 2) == pytest.approx(log(2), rel=1e-6)


def test_divergence_is_not_symmetric():
    """KL((1/2, 1/2) || (3/4, 1/4)) = ln 2 - 1/2 ln 3, the other way round 3/4 ln 3 - ln 2."""
    one, other = logs(1 / 2, 1 / 2), logs(3 / 4, 1 / 4)
    assert compare(one, other, 0).divergence == pytest.approx(log(2) - log(3) / 2, rel=1e-6)
    assert compare(other, one, 0).divergence == pytest.approx(3 / 4 * log(3) - log(2), rel=1e-6)
    assert compare(other, one, 0).same is True  # of equals the first counts


@pytest.mark.parametrize("spread", [0.01, 1, 10, 200])
def test_a_row_is_what_plain_float64_arithmetic_makes_of_it(spread):
    random = np.random.default_rng(1)
    base = random.normal(0, spread, WIDE).astype("f4")
    other = (base + random.normal(0, 0.3, WIDE)).astype("f4")
    p, q = plain(base), plain(other)
    found = compare(base, other, 123)
    assert found.divergence == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-9, abs=1e-14)
    assert found.base_surprise == pytest.approx(-p[123], rel=1e-12) and found.surprise == pytest.approx(-q[123])
    assert found.same is bool(base.argmax() == other.argmax())
    assert surprise(other, 123) == found.surprise


def test_rows_that_differ_in_their_last_bits_are_told_apart_by_their_divergence():
    """Exact: fsum over fractions. What one rounding of float32 does to a logit is some 1e-13 nats."""
    random = np.random.default_rng(2)
    base = random.normal(0, 3, 1000).astype("f4")
    other = np.nextafter(base, np.where(random.random(1000) < 0.5, inf, -inf).astype("f4"))
    p, q = (np.longdouble(x) - np.log(np.sum(np.exp(np.longdouble(x)))) for x in (base, other))
    exact = math.fsum((np.exp(p) * (p - q)).tolist())
    assert 1e-15 < exact < 1e-12 and compare(base, other, 0).divergence == pytest.approx(exact, abs=1e-15)


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_a_row_beside_itself_is_exactly_0(shift):
    row = (np.random.default_rng(3).normal(0, 9, WIDE) + shift).astype("f4")
    found = compare(row, row, 5)
    assert found.divergence == 0.0 and found.same and found.surprise == found.base_surprise


def test_tokens_that_can_never_come_count_for_nothing():
    base = logs(1 / 2, 1 / 2, 0, 0)
    assert compare(base, logs(1 / 4, 1 / 4, 1 / 2, 0), 0).divergence == pytest.approx(log(2), rel=1e-6)
    assert compare(base, base, 0).divergence == 0.0
    assert compare(base, base, 3)[:2] == (inf, inf)


def test_a_model_that_rules_out_what_the_base_may_say_is_infinitely_far():
    assert compare(logs(1 / 2, 1 / 2), logs(1, 0), 0).divergence == inf


@pytest.mark.parametrize("bad", [math.nan, inf])
def test_a_row_that_is_no_distribution_is_refused(bad):
    good, row = logs(1 / 2, 1 / 2), np.array([1, bad], "f4")
    for wrong in (row, np.full(2, -inf, "f4")):
        for given in ((wrong, good), (good, wrong)):
            with pytest.raises(Gemma4qError, match="bad_numeric"):
                compare(*given, 0)
        with pytest.raises(Gemma4qError, match="bad_numeric"):
            surprise(wrong, 0)


def test_log_probabilities_cut_off_below_are_summed_as_llama_perplexity_does():
    """Terms up to the floor are left out, the others are not scaled, and the right token's stands as it is."""
    log_p = np.array([-0.3, -1.5, -4.0, -16.0, -16.5])
    model = np.array([2.0, 1.0, 0.5, -3.0, -9.0], "f4")
    log_q = plain(model)
    wanted = sum(math.exp(p) * (p - q) for p, q in zip(log_p[:3], log_q[:3], strict=True))
    found = compare(log_p, model, 4, known_above=-16.0)
    assert found.divergence == pytest.approx(wanted, rel=1e-12) and found.base_surprise == pytest.approx(16.5)
    assert compare(log_q, model, 0, known_above=-16.0).divergence == pytest.approx(0, abs=1e-9)


def test_rows_may_be_scored_side_by_side():
    random = np.random.default_rng(4)
    base, other = random.normal(0, 2, (2, 9, WIDE)).astype("f4")
    tokens = random.integers(0, WIDE, 9)
    with ThreadPoolExecutor(3) as threads:
        found = score(other, tokens, threads, base)
        alone = score(other, tokens, threads)
    rows = [compare(*row) for row in zip(base, other, tokens, strict=True)]
    assert found["divergence"].tolist() == [row.divergence for row in rows]
    assert found["same"].tolist() == [row.same for row in rows]
    assert found["surprise"].tolist() == alone["surprise"].tolist() == [row.surprise for row in rows]


# -- Intervals -----------------------------------------------------------------------------------------------


def test_an_interval_worked_out_by_hand():
    """Texts (1, 1) and (4): mean 2; sums less 2 a token are -2 and 2; sqrt(2/1 * 8) / 3 = 4/3; t of 1 is 12.71."""
    values, text, half = np.array([1.0, 1, 4]), np.array([7, 7, 9]), 12.71 * 4 / 3
    assert mean(values, text) == pytest.approx((2, 2 - half, 2 + half))
    assert mean(values, text, positive=True) == pytest.approx((2, 2 * math.exp(-half / 2), 2 * math.exp(half / 2)))
    assert mean(np.array([1.0, 3, 2]), np.array([0, 0, 1])) == Mean(2, 2, 2)  # both texts have the same mean
    assert mean(np.array([1.0, 3]), np.array([4, 4])) == Mean(2, None, None)  # one text
    assert mean(np.zeros(3), text, positive=True) == Mean(0, 0, 0)


def test_quantiles_of_student_are_never_too_narrow():
    """Between -t and t lies 95 % of Student's density, or a little more."""
    for degrees, t in STUDENT.items():
        x = np.linspace(-t, t, 200_001)
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        share = float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())
        assert 0.95 <= share < 0.9515, degrees


def drawn(random: np.random.Generator, texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose values are skewed and, within a text, alike; longer texts have larger ones. The mean is 1.5."""
    lengths = random.integers(10, 100, texts)
    size = random.exponential(1, texts) + (lengths - 10) / 89 * 0.7
    text = np.repeat(np.arange(texts), lengths)
    return size[text] * random.exponential(1, len(text)), text


@pytest.mark.parametrize("texts, least", [(5, 0.89), (10, 0.89), (20, 0.91), (60, 0.93)])
def test_intervals_hold_the_truth_nearly_as_often_as_they_say_where_tokens_of_a_text_are_alike(texts, least):
    """Of few texts of such skewed values somewhat less often; with tokens as draws a third of the time."""
    random = np.random.default_rng(5)
    lengths = np.arange(10, 100)
    truth = float((lengths * (1 + (lengths - 10) / 89 * 0.7)).sum() / lengths.sum())
    plain = factor = naive = 0
    for _ in range(800):
        values, text = drawn(random, texts)
        around, times = mean(values, text), mean(values, text, positive=True)
        plain += around.low <= truth <= around.high
        factor += times.low <= truth <= times.high
        naive += abs(values.mean() - truth) < 1.96 * values.std() / math.sqrt(len(values))
    assert least < factor / 800 < 0.97 and least - 0.05 < plain / 800 <= factor / 800 and naive / 800 < 0.4


# -- Summaries -----------------------------------------------------------------------------------------------


def scores(**columns) -> Scores:
    rows = len(columns["surprise"])
    found = {"text": np.arange(rows), "kind": np.full(rows, "chat"), "position": np.arange(rows)} | columns
    return Scores(**{name: np.asarray(column) for name, column in found.items()})


def test_perplexity_is_the_inverse_of_the_geometric_mean_of_probabilities():
    """(1/2 * 1/4 * 1/8)^(-1/3) = 4."""
    found = summary(scores(surprise=[log(2), log(4), log(8)]))
    assert found["perplexity"]["value"] == pytest.approx(4) and found["texts"] == found["tokens"] == 3
    assert found["perplexity"]["low"] < 4 < found["perplexity"]["high"] and "divergence" not in found


def test_a_summary_of_four_tokens_worked_out_by_hand():
    found = summary(
        scores(
            text=[0, 0, 1, 1],
            surprise=[log(2), log(2), log(4), log(4)],
            base_surprise=[log(2), log(4), log(4), log(2)],
            divergence=[0.0, 0.1, 0.2, 0.5],
            same=[True, True, True, False],
        )
    )
    assert found["perplexity"]["value"] == pytest.approx(2**1.5)
    assert found["base_perplexity"]["value"] == pytest.approx(2**1.5)
    assert found["perplexity_ratio"]["value"] == pytest.approx(1)
    kl = found["divergence"]
    assert (kl["value"], kl["median"], kl["most"]) == pytest.approx((0.2, 0.15, 0.5)) and 0 < kl["low"] < 0.2
    assert kl["p99"] == pytest.approx(0.5 - 0.03 * 0.3) and kl["p999"] == pytest.approx(0.5 - 0.003 * 0.3)
    assert found["same_top"]["value"] == 0.75 and 0 <= found["same_top"]["low"] <= 1 == found["same_top"]["high"]
    delta = [0, 1 / 4, 0, -1 / 4]
    assert found["delta_p"]["value"] == pytest.approx(np.mean(delta), abs=1e-12)
    assert found["delta_p"]["rms"]["value"] == pytest.approx(math.sqrt(2 / 64))


def test_a_pair_is_known_better_than_either_of_it():
    """What is hard is hard for both: the ratio's interval is narrower than the perplexities'."""
    random = np.random.default_rng(6)
    hard = np.repeat(random.exponential(1, 30), 20)
    columns = {"surprise": hard + random.normal(0.1, 0.01, 600), "base_surprise": hard}
    more = {"divergence": np.zeros(600), "same": np.ones(600, bool), "text": np.repeat(np.arange(30), 20)}
    found = summary(scores(**columns, **more))
    width = {name: found[name]["high"] / found[name]["low"] for name in ("perplexity", "perplexity_ratio")}
    assert found["perplexity_ratio"]["value"] == pytest.approx(math.exp(0.1), rel=0.01)
    assert width["perplexity_ratio"] < 1.01 < 1.3 < width["perplexity"]


def test_scores_are_joined_and_chosen_from():
    one, two = scores(surprise=[1.0, 2.0]), scores(surprise=[3.0], kind=["code"])
    both = Scores.joined([one, two])
    assert len(both) == 3 and both.surprise.tolist() == [1, 2, 3] and both.kind.tolist() == ["chat", "chat", "code"]
    assert both.where(both.kind == "code").surprise.tolist() == [3] and both.divergence is None
