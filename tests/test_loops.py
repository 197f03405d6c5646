"""A loop is noticed at the token that completes it, and nothing less is taken for one."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4q.text.loops import COVERED, LONGEST, TIMES, LoopDetector


def first_alarm(tokens):
    detector = LoopDetector()
    return next((count for count, token in enumerate(tokens, 1) if detector.push(token)), None)


def is_loop(tokens):
    """By definition: an end of the tokens that is one n-gram TIMES times or more, COVERED tokens or more."""
    for n in range(1, LONGEST + 1):
        times = max(TIMES, -(-COVERED // n))
        if len(tokens) >= times * n and tokens[-n:] * times == tokens[-times * n :]:
            return True
    return False


@pytest.mark.parametrize(
    ("period", "tokens"), [(1, 256), (2, 256), (10, 260), (31, 279), (32, 256), (33, 264), (64, 512)]
)
def test_a_loop_is_noticed_at_the_token_that_completes_it(period, tokens):
    ramble = [-i for i in range(2, 100)]
    assert first_alarm(ramble + [i % period for i in range(2000)]) == len(ramble) + tokens


def test_300_times_the_same_newline_is_a_loop_255_times_is_none():
    assert first_alarm([107] * 300) == 256
    assert first_alarm([107] * 255 + [5] + [107] * 255) is None


def test_longer_periods_and_almost_loops_are_none():
    assert first_alarm([i % 65 for i in range(3000)]) is None
    assert first_alarm([token for i in range(100) for token in [*range(20), 1000 + i]]) is None
    assert first_alarm(random.Random(1).choices(range(4), k=20_000)) is None


def test_the_alarm_ends_with_the_loop():
    detector = LoopDetector()
    assert [detector.push(7) for _ in range(257)][-2:] == [True, True]
    assert not detector.push(8)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=70), st.integers(1, 12), st.lists(st.integers(0, 2), max_size=9)
)
def test_every_token_is_judged_as_by_definition(unit, times, rest):
    tokens = (rest + unit * times * max(1, 256 // len(unit) // 8) + rest)[:900]
    detector = LoopDetector()
    for count, token in enumerate(tokens, 1):
        assert detector.push(token) == is_loop(tokens[:count])
