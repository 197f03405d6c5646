"""The chain does what its definitions say, both ways into it agree, and a seed fixes every token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4q.errors import Gemma4qError
from gemma4q.text import penalties, sampler
from gemma4q.text.options import SamplingOptions

VOCABULARY = 262_144
HALVES = (np.arange(4), np.log([0.5, 0.25, 0.15, 0.1]))  # four tokens with these probabilities


class Letters:
    """Token i is the letter i; 10 ends answers, as in ASCII 10 is a line's end."""

    stops, size = frozenset({1, 106}), 256

    def piece(self, token, special=False):
        return bytes([token])

    def encode(self, text, bos=False, special=None):
        return list(text.encode())


def kept(candidates):
    return candidates[0].tolist()


# -- samplers, on four tokens


def test_top_k_keeps_the_best():
    assert kept(sampler.top_k(HALVES, 2)) == [0, 1]


@pytest.mark.parametrize(("p", "ids"), [(0, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2])])
def test_top_p_keeps_the_fewest_that_reach_p(p, ids):
    assert kept(sampler.top_p(HALVES, p - 1e-12 if p in (0.5, 0.75) else p)) == ids


@pytest.mark.parametrize(("p", "ids"), [(0.51, [0]), (0.49, [0, 1]), (0.3, [0, 1, 2]), (0.19, [0, 1, 2, 3]), (1, [0])])
def test_min_p_keeps_those_near_the_best(p, ids):
    assert kept(sampler.min_p(HALVES, p)) == ids


def test_typical_keeps_those_of_expected_surprise():
    """Entropy is 1.208; surprises 0.693, 1.386, 1.897, 2.303 are 0.515, 0.178, 0.689 and 1.095 away."""
    assert kept(sampler.typical(HALVES, 0.2)) == [1]
    assert kept(sampler.typical(HALVES, 0.3)) == [0, 1]
    assert kept(sampler.typical(HALVES, 0.76)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("probability", "threshold", "chance", "ids"),
    [(1, 0.2, 0.5, [1, 2, 3]), (1, 0.12, 0.5, [2, 3]), (1, 0.3, 0.5, [0, 1, 2, 3]), (0.5, 0.2, 0.5, [0, 1, 2, 3]),
     (1, 0.51, 0.5, [0, 1, 2, 3])],
)  # fmt: skip
def test_xtc_keeps_the_least_likely_of_the_likely(probability, threshold, chance, ids):
    assert kept(sampler.xtc(HALVES, probability, threshold, chance)) == ids


def test_min_keep_holds_against_every_truncation():
    for candidates in (
        sampler.top_p(HALVES, 0.1, 3), sampler.min_p(HALVES, 1, 3), sampler.typical(HALVES, 0.1, 3),
        sampler.xtc(HALVES, 1, 0.12, 0, 3),
    ):  # fmt: skip
        assert len(candidates[0]) >= 3


def test_temperature_divides_and_zero_keeps_the_best():
    assert sampler.probabilities(sampler.temperature(HALVES, 0.5)[1])[:2] == pytest.approx(
        [0.25 / 0.345, 0.0625 / 0.345]
    )
    assert kept(sampler.temperature(HALVES, 0)) == [0]


def test_dynamic_temperature_follows_entropy():
    assert sampler.dynamic_temperature(np.zeros(4), 1.0, 0.5, 1.0) == pytest.approx(1.5)
    assert sampler.dynamic_temperature(np.array([0.0, -99, -99, -99]), 1.0, 0.5, 1.0) == pytest.approx(0.5)
    assert sampler.dynamic_temperature(HALVES[1], 1.0, 0.5, 1.0) == pytest.approx(
        0.5 + 1.207974 / math.log(4), abs=1e-6
    )
    assert sampler.dynamic_temperature(HALVES[1], 0.7, 0, 1.0) == 0.7


def test_top_n_sigma_keeps_what_is_within_deviations_of_the_best():
    logits = np.array([4, 3, 1, 0, -np.inf], np.float32)  # deviation of the finite ones: 1.58
    assert np.isfinite(sampler.top_n_sigma(logits, 1)).tolist() == [True, True, False, False, False]
    assert np.isfinite(sampler.top_n_sigma(logits, 2)).tolist() == [True, True, True, False, False]


def test_draw_walks_the_summed_probabilities():
    assert [sampler.draw(HALVES, u) for u in (0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 1 - 2**-53)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_draws_follow_the_probabilities():
    options = SamplingOptions(top_p=1)
    values = HALVES[1].astype(np.float32)
    picks = [sampler.pick_from_top(HALVES[0], values, options, seed=3, position=i) for i in range(4000)]
    assert np.bincount(picks) / 4000 == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)  # 3.8 deviations


# -- both ways in, against a slow and obvious one


def naive(logits, options, seed, position, biases=()):
    """The chain by its definitions: every step sorts, sums and compares all that is left."""
    logits = logits.astype(np.float64)
    for token, scale, add in biases:
        x = np.float32(logits[token])
        logits[token] = np.float32((x * np.float32(scale) if x <= 0 else x / np.float32(scale)) + np.float32(add))
    o = options
    if o.top_n_sigma > 0:
        finite = logits[logits > -np.inf]
        deviation = math.sqrt(np.mean((finite - finite.mean()) ** 2))
        logits[logits < finite.max() - o.top_n_sigma * deviation] = -np.inf
    order = np.lexsort((np.arange(len(logits)), -logits))
    ids = order[logits[order] > -np.inf]

    def chances():
        return np.exp(logits[ids]) / np.exp(logits[ids]).sum()

    if o.top_k > 0:
        ids = ids[: o.top_k]
    if o.typical_p < 1:
        surprise = -np.log(np.maximum(chances(), 1e-300))
        nearest = np.argsort(np.abs(surprise - np.sum(chances() * surprise)), kind="stable")
        count = 1 + int(np.sum(np.cumsum(chances()[nearest]) <= o.typical_p))
        ids = ids[np.sort(nearest[:count])]
    if o.top_p < 1:
        ids = ids[: 1 + int(np.sum(np.cumsum(chances()) < o.top_p))]
    if o.min_p > 0:
        ids = ids[logits[ids] >= logits[ids[0]] + math.log(o.min_p)]
    uniform, chance = sampler.uniforms(seed, position)
    if chance < o.xtc_probability and o.xtc_threshold <= 0.5:
        ids = ids[max(0, int(np.sum(chances() >= o.xtc_threshold)) - 1) :]
    if o.temperature == 0:
        return ids[0]
    logits /= o.temperature
    return ids[min(int(np.sum(np.cumsum(chances()) <= uniform)), len(ids) - 1)]


OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=1.7, top_k=40, top_p=0.9, min_p=0.02),
    SamplingOptions(top_k=20, typical_p=0.6, top_p=1),
    SamplingOptions(top_k=64, top_p=1, xtc_probability=0.7, xtc_threshold=0.01, temperature=0.8),
    SamplingOptions(top_k=1),
    SamplingOptions(
        repeat_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, logit_bias=((9, 30.0), (5, -math.inf))
    ),
    SamplingOptions(top_k=0, top_p=0.99),
    SamplingOptions(top_k=0, top_p=1, min_p=0.3),
    SamplingOptions(top_k=5, top_n_sigma=4.0),
    SamplingOptions(top_k=0, top_p=1, typical_p=0.5),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_all_ways_to_choose_agree_on_a_whole_vocabulary(options):
    for seed in range(3):
        random = np.random.default_rng(seed)
        logits = (random.standard_normal(VOCABULARY) * 3).astype(np.float32)
        history = random.integers(0, VOCABULARY, 40)
        logits[history] += 9
        biases = penalties.biases(options, history, Letters())
        token = sampler.pick_from_logits(logits, options, seed=seed, position=7, biases=biases)
        assert token == naive(logits, options, seed, 7, biases.tolist())
        if not sampler.needs_full(options):
            biased = logits.copy()
            sampler.apply_biases(biased, biases)
            order = np.lexsort((np.arange(VOCABULARY), -biased))[: sampler.TOP]
            assert token == sampler.pick_from_top(order.astype(np.int32), biased[order], options, seed=seed, position=7)


LOGITS = st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, -3.0, 30.0, -math.inf]), min_size=1, max_size=12)
ANY_OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0, 0.3, 1, 2.5]), top_k=st.sampled_from([0, 1, 3, 64]),
    top_p=st.sampled_from([0, 0.4, 0.95, 1]), min_p=st.sampled_from([0, 0.3]), typical_p=st.sampled_from([0.3, 1]),
    xtc_probability=st.sampled_from([0, 0.5]), top_n_sigma=st.sampled_from([-1, 1.5]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(LOGITS, ANY_OPTIONS, st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1))
def test_any_few_logits_choose_an_allowed_token_the_same_way(logits, options, seed, position):
    logits = np.array(logits, np.float32)
    if np.isneginf(logits).all():
        with pytest.raises(Gemma4qError, match="bad_numeric"):
            sampler.pick_from_logits(logits, options, seed=seed, position=position)
        return
    if np.isneginf(logits).any():
        mask = sampler.allowed_mask(len(logits), np.flatnonzero(np.isneginf(logits)))
        logits = np.where(np.isneginf(logits), np.float32(31), logits)
    else:
        mask = None
    token = sampler.pick_from_logits(logits, options, seed=seed, position=position, mask=mask)
    shown = logits if mask is None else np.where(logits == 31, np.float32(-np.inf), logits)
    assert shown[token] > -np.inf
    ids, values = sampler.best(shown, 64)
    if options.top_n_sigma <= 0 or options.greedy:
        assert token == sampler.pick_from_top(ids, values.astype(np.float32), options, seed=seed, position=position)


@settings(max_examples=200)
@given(LOGITS, st.integers(1, 14))
def test_best_orders_by_logit_then_id(logits, count):
    ids, values = sampler.best(np.array(logits, np.float32), count)
    expected = sorted((i for i, x in enumerate(logits) if x > -math.inf), key=lambda i: (-logits[i], i))[:count]
    assert ids.tolist() == expected
    assert values.tolist() == [logits[i] for i in expected]


def test_a_seed_fixes_the_draw_of_each_position_and_another_changes_them():
    draws = [sampler.uniforms(5, position) for position in range(1000)]
    assert draws == [sampler.uniforms(5, position) for position in range(1000)]
    assert len({u for pair in draws for u in pair}) == 2000
    assert draws != [sampler.uniforms(6, position) for position in range(1000)]
    assert sampler.uniforms(2**64 - 1, 2**31) != sampler.uniforms(0, 2**31)
    assert 0 <= sampler.fresh_seed() < 2**63


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_stops_the_answer(bad):
    logits = np.array([1, bad, 0], np.float32)
    with pytest.raises(Gemma4qError, match="bad_numeric: the model"):
        sampler.pick_from_logits(logits, SamplingOptions(), seed=0, position=0)
    with pytest.raises(Gemma4qError, match="bad_numeric: the model"):
        sampler.pick_from_top(np.arange(3), logits, SamplingOptions(), seed=0, position=0)


def test_nothing_allowed_is_said_so():
    mask = sampler.allowed_mask(3, range(3))
    for options in (SamplingOptions(), SamplingOptions(temperature=0), SamplingOptions(top_k=0, top_n_sigma=1)):
        with pytest.raises(Gemma4qError, match="every token is forbidden"):
            sampler.pick_from_logits(np.zeros(3, np.float32), options, seed=0, position=0, mask=mask)
    with pytest.raises(Gemma4qError, match="every token is forbidden"):
        sampler.pick_from_top(np.full(64, -1), np.zeros(64, np.float32), SamplingOptions(), seed=0, position=0)


@pytest.mark.parametrize(
    ("options", "full"),
    [({}, False), ({"top_k": 65}, True), ({"top_k": 0}, True), ({"top_k": -1, "temperature": 0}, False),
     ({"logprobs": 0}, True), ({"top_n_sigma": 1.0}, True), ({"min_keep": 100}, True),
     ({"temperature": 0, "typical_p": 0.5, "top_k": 0}, True)],
)  # fmt: skip
def test_all_logits_are_asked_for_only_where_the_best_do_not_do(options, full):
    assert sampler.needs_full(SamplingOptions(**options)) == full


@settings(max_examples=100)
@given(st.integers(1, 200), st.data())
def test_mask_has_a_bit_for_each_allowed_token(size, data):
    never = data.draw(st.sets(st.integers(0, size - 1)))
    mask = sampler.allowed_mask(size, never)
    assert mask.dtype == np.uint32 and len(mask) == (size + 31) // 32
    assert [t for t in range(len(mask) * 32) if mask[t // 32] >> np.uint32(t % 32) & 1] == sorted(
        {*range(size)} - never
    )


def test_logprobs_are_of_the_raw_logits():
    logits = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
    chosen, top = sampler.logprobs(logits, 2, 2)
    assert chosen == pytest.approx(math.log(0.25))
    assert [token for token, _ in top] == [1, 2] and top[0][1] == pytest.approx(math.log(0.5))
    assert sampler.logprobs(np.array([0, -np.inf], np.float32), 1, 0) == (sampler.LOWEST, [])


# -- penalties


def test_penalties_are_records_of_scale_and_add():
    options = SamplingOptions(repeat_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25, repeat_last_n=3)
    records = penalties.biases(options, [9, 7, 7, 8], Letters())
    assert [tuple(r) for r in records.tolist()] == [(7, 1.5, -1.25), (8, 1.5, -0.75)]
    logits = np.array([0.0] * 7 + [3.0, -3.0], np.float32)
    sampler.apply_biases(logits, records)
    assert logits[7:].tolist() == [3 / 1.5 - 1.25, -3 * 1.5 - 0.75]


def test_a_bias_is_added_before_penalties_scale():
    options = SamplingOptions(repeat_penalty=2.0, logit_bias=((7, 2.0),))
    logits = np.full(8, -1, np.float32)
    sampler.apply_biases(logits, penalties.biases(options, [7], Letters()))
    assert logits[7] == 0.5


@pytest.mark.parametrize(("last_n", "tokens"), [(0, []), (1, [3]), (2, [2, 3]), (9, [1, 2, 3]), (-1, [1, 2, 3])])
def test_penalties_look_back_as_far_as_asked(last_n, tokens):
    options = SamplingOptions(presence_penalty=1.0, repeat_last_n=last_n)
    assert penalties.biases(options, [1, 2, 3], Letters())["token"].tolist() == tokens


def test_by_default_nothing_is_biased_and_ends_can_be_forbidden():
    assert len(penalties.biases(SamplingOptions(), [1, 2, 1, 2], Letters())) == 0
    records = penalties.biases(SamplingOptions(ignore_eos=True), [], Letters())
    assert records.tolist() == [(1, 1.0, -math.inf), (106, 1.0, -math.inf)]


def dried(text, **options):
    options = {"dry_multiplier": 1.0, "dry_base": 2.0, "dry_breakers": ("\n",)} | options
    records = penalties.dry(SamplingOptions(**options), list(text.encode()), Letters())
    return {chr(token): -add for token, _, add in records.tolist()}


@pytest.mark.parametrize(
    ("text", "options", "penalty"),
    [
        ("abccbcyabc", {}, {"c": 2.0, "y": 1.0}),  # abc would go on with c, bc with y
        ("abcdxabc", {}, {"d": 2.0}),
        ("abcdxabc", {"dry_allowed_length": 3}, {"d": 1.0}),
        ("abcdxabc", {"dry_allowed_length": 4}, {}),
        ("abcdxabc", {"dry_last_n": 5}, {}),
        ("abcdxabc", {"dry_multiplier": 0.0}, {}),
        ("abcdxabc", {"dry_base": 0.5}, {}),
        ("abcdxa\nbc", {}, {"d": 1.0}),  # only bc counts: nothing reaches over a breaker
        ("ab\nxab", {}, {}),  # the breaker itself is never penalised
        ("aaaa", {}, {"a": 2.0}),
        ("", {}, {}),
        ("a", {}, {}),
        ("xa\n", {}, {}),
    ],
)
def test_dry_penalises_what_would_go_on_repeating(text, options, penalty):
    assert dried(text, **options) == penalty


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab\n", max_size=30), st.integers(1, 4))
def test_dry_equals_its_definition(text, allowed):
    after_breaker = text.rsplit("\n", 1)[-1]
    expected = {}
    for end in range(1, len(text)):
        lengths = [n for n in range(1, len(after_breaker) + 1) if text[:end].endswith(after_breaker[-n:])]
        if lengths and max(lengths) >= allowed and text[end] != "\n":
            expected[text[end]] = max(expected.get(text[end], 0), 2.0 ** (max(lengths) - allowed))
    assert dried(text, dry_allowed_length=allowed, dry_last_n=-1) == expected


def test_dry_stays_finite_on_endless_repetition():
    penalty = dried("a" * 5000, dry_last_n=-1, dry_base=1.75, dry_multiplier=5.0)
    assert penalty["a"] == np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ({"65": -100, "66": 2.5}, ((65, -100), (66, 2.5))),
        ([["AB", 1.5], [7, False]], ((65, 1.5), (66, 1.5), (7, -math.inf))),
        ([["65", 1]], ((54, 1), (53, 1))),
        ({}, ()),
    ],
)
def test_logit_bias_in_the_forms_of_clients(given, pairs):
    assert penalties.parse_logit_bias(given, Letters()) == pairs


@pytest.mark.parametrize(
    "given", [7, {"x": 1e400, "y": math.nan}, [1, 2], [[7, True]], [[7, "1"]], {"999": 1}, [[-1, 1]], [[7, None]]]
)
def test_senseless_logit_bias_is_refused(given):
    with pytest.raises(Gemma4qError, match="bad_option: logit_bias"):
        penalties.parse_logit_bias(given, Letters())


# -- options


def test_defaults_are_googles_and_a_files_then_a_users_go_over_them():
    assert (SamplingOptions().temperature, SamplingOptions().top_k, SamplingOptions().top_p) == (1.0, 64, 0.95)
    file = {"general.sampling.temp": np.float32(0.5), "general.sampling.top_k": np.int32(20), "general.name": "x"}
    options = SamplingOptions.from_metadata(file)
    assert (options.temperature, options.top_k, options.top_p) == (0.5, 20, 0.95)
    assert options.but(top_k=3, top_p=None) == SamplingOptions(temperature=0.5, top_k=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", 1e38), ("temperature", math.nan), ("temperature", "hot"), ("top_p", 2),
        ("top_k", 2**40), ("top_k", 1.5), ("top_k", True), ("seed", 2**70), ("seed", -2), ("logprobs", 21),
        ("repeat_penalty", 0), ("repeat_penalty", math.inf), ("min_keep", -1), ("logit_bias", ((1, math.inf),)),
        ("logit_bias", ((-1, 0.0),)), ("logit_bias", ((1, 1.0),) * 5000), ("dry_breakers", ("",)),
        ("dry_breakers", "x"),
    ],
)  # fmt: skip
def test_senseless_options_are_refused_by_name(name, value):
    with pytest.raises(Gemma4qError, match=f"bad_option: {name}"):
        SamplingOptions(**{name: value})


def test_an_unknown_option_and_a_bad_file_are_refused_by_name():
    with pytest.raises(Gemma4qError, match="bad_option: top_q: no such option"):
        SamplingOptions().but(top_q=1)
    with pytest.raises(Gemma4qError, match=r"bad_hparam: general.sampling.temp: .*not in 0 .. 100"):
        SamplingOptions.from_metadata({"general.sampling.temp": -1.0})
