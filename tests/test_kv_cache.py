"""Pages of keys and values: never in two hands, never lost, and always holding the history that they are taken for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gemma4q.abi import PAGE
from gemma4q.engine.kv_cache import ROLLBACK, KVCache, global_pages, local_pages
from gemma4q.errors import Gemma4qError
from gemma4q.plan.batch import Limits

JUNK = -7


class Store:
    """A session that keeps each position's key where an executor would keep its keys and values."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pages = {
            local: np.full((n, PAGE), JUNK) for local, n in ((False, limits.global_pages), (True, limits.local_pages))
        }
        self.copies = 0

    def clear_pages(self, local, pages):
        self.pages[local][pages] = 0

    def copy_page(self, local, source, target):
        assert source != target
        self.pages[local][target] = self.pages[local][source]
        self.copies += 1


def make(window=100, context=640, sequences=2, rows=200) -> KVCache:
    limits = Limits(rows, 8, sequences, context, global_pages(context, sequences), local_pages(window, sequences, rows))
    return KVCache(Store(limits), window)


def store(cache, history, keys) -> None:
    """What a step does: room, then every position written through the tables, then the word that it succeeded."""
    history.extend(len(keys))
    at = np.arange(history.length, history.length + len(keys))
    tables = history.tables(history.length + len(keys))
    for local, table in zip((False, True), tables, strict=True):
        if local and not cache.window:
            continue
        assert (table[at // PAGE] >= 0).all()
        cache.session.pages[local][table[at // PAGE], at % PAGE] = keys
    history.commit(np.array(keys, np.int64))


def feed(cache, history, keys, step=90) -> None:
    for at in range(history.length, len(keys), step):
        store(cache, history, keys[at : at + step])


def check(cache, history, keys) -> None:
    """Every position that a next row may see holds the key that the history has there."""
    assert history.length == len(keys)
    at = np.arange(len(keys))
    assert (cache.session.pages[False][history.global_table[at // PAGE], at % PAGE] == keys).all()
    if cache.window:
        at = at[max(0, len(keys) - cache.window + 1) :]
        assert (history.local_table[at // PAGE] >= 0).all()
        assert (cache.session.pages[True][history.local_table[at // PAGE], at % PAGE] == np.array(keys, int)[at]).all()


def blocks(cache) -> list:
    found = list(cache.root.children)
    for block in found:
        found += block.children
    return found


def check_pages(cache, histories=()) -> None:
    """Each page is blank or in one block; each count of holders is right; exactly what nobody holds can be evicted."""
    every = blocks(cache)
    for local in (False, True):
        pages = [b.local_page if local else b.global_page for b in every]
        pages = [p for p in pages if p >= 0] + cache.blank[local]
        assert sorted(pages) == list(range(cache.limits.local_pages if local else cache.limits.global_pages))
    for block in every:
        holders = [h for h in histories if block in h.blocks]
        assert block.users == len(holders)
        assert block.local_users == sum(h.local_table[h.blocks.index(block)] >= 0 for h in holders)
        assert (block in cache.idle) == (block.users == 0)
        assert (block in cache.idle_local) == (block.local_page >= 0 and block.local_users == 0)
        assert block.count == PAGE or block.users or not block.children
        assert block.count or block.users, "an empty page is kept"
    for history in histories:
        assert (history.local_table[: history.first_held] < 0).all()
        for block in history.blocks[history.length // PAGE :]:
            assert block.users == 1, "the page that is written to is shared"


def check_tree(cache) -> None:
    """Whatever is cached lies in its pages, and what is evicted first has nothing behind it."""
    for block in blocks(cache):
        kept = block.keys[: block.count]
        assert (cache.session.pages[False][block.global_page, : block.count] == kept).all()
        assert block.local_page < 0 or (cache.session.pages[True][block.local_page, : block.count] == kept).all()
        assert not block.users or block.parent is cache.root or block.parent.users
    order = {block: i for i, block in enumerate(cache.idle)}
    assert all(order[child] < i for block, i in order.items() for child in block.children)


def ids(seed, count) -> list[int]:
    return np.random.default_rng(seed).integers(2, 1000, count).tolist()


def test_a_prefix_is_resumed_up_to_the_last_token_which_must_be_computed():
    cache = make()
    first = cache.open(np.array([5]))
    feed(cache, first, ids(0, 150))
    first.close()
    again = cache.open(np.array(ids(0, 150)))
    assert again.length == 149
    check(cache, again, ids(0, 150)[:149])


def test_going_on_where_a_history_ended_copies_nothing():
    cache = make()
    first = cache.open(np.array([5]))
    feed(cache, first, ids(0, 150))
    first.close()
    again = cache.open(np.array([*ids(0, 150), 3, 4]))
    assert (again.length, cache.session.copies) == (150, 0)


def test_a_shared_page_is_copied_and_neither_sequence_sees_the_others_tokens():
    cache = make()
    a = cache.open(np.array([5]))
    feed(cache, a, ids(0, 100))
    b = cache.open(np.array([*ids(0, 80), 1, 1]))
    assert b.length == 80
    store(cache, b, [1, 1])
    store(cache, a, [9, 9])
    check(cache, a, [*ids(0, 100), 9, 9])
    check(cache, b, [*ids(0, 80), 1, 1])
    check_pages(cache, [a, b])
    assert a.global_table[0] == b.global_table[0] and a.global_table[1] != b.global_table[1]


def test_a_prefix_is_only_resumed_where_the_window_is_still_there():
    cache = make(window=100, context=1280, sequences=1, rows=128)
    keys = ids(1, 1000)
    first = cache.open(np.array([5]))
    feed(cache, first, keys)
    first.close()
    middle = cache.open(np.array([*keys[:700], 1]))
    assert middle.length <= 64 * cache.limits.local_pages < 700
    check(cache, middle, keys[: middle.length])
    middle.close()
    end = cache.open(np.array([*keys, 1]))
    assert end.length == 1000
    check(cache, end, keys)


def test_a_checkpoint_survives_a_long_answer_and_the_place_beside_it_does_not():
    keys, answer = ids(1, 800), ids(2, 400)
    for marked in (True, False):
        cache = make(window=100, context=1280, sequences=1, rows=256)
        first = cache.open(np.array([5]))
        feed(cache, first, keys)
        if marked:
            first.checkpoint()
        for token in answer:
            store(cache, first, [token])
        first.close()
        again = cache.open(np.array([*keys, 1, 2, 3]))
        assert (again.length == 800) == marked
        check(cache, again, keys[: again.length])


@pytest.mark.parametrize("common, expected", [(150, 100), (100, 100), (101, 100), (179, 100), (180, 180), (99, 99)])
def test_a_prefix_never_ends_inside_an_image_block(common, expected):
    """Positions 100 ... 179 are one image block, whose every row sees its end."""
    cache = make(window=0)
    keys = ids(3, 300)
    reach = np.arange(300)
    reach[100:180] = 179
    first = cache.open(np.array([5]))
    feed(cache, first, keys)
    first.close()
    assert cache.open(np.array([*keys[:common], 1]), reach).length == expected


@pytest.mark.parametrize("window", [0, 1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("start", [1, 63, 64, 65, 99, 100, 101, 128, 192, 203, 500])
def test_rollback_leaves_what_the_next_row_needs(window, start):
    for count in {0, 1, 5, 63, 64} & set(range(start + 1)):
        cache = make(window=window)
        history = cache.open(np.array([5]))
        feed(cache, history, ids(4, start), step=64)
        history.rollback(count)
        check(cache, history, ids(4, start)[: start - count])
        check_pages(cache, [history])
        store(cache, history, ids(5, 70))
        check(cache, history, [*ids(4, start)[: start - count], *ids(5, 70)])
        check_pages(cache, [history])


@given(st.sampled_from([1, 2, 63, 64, 65, 100]), st.integers(1, 300), st.integers(1, 300), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_a_resumed_history_has_all_that_its_next_row_sees(window, first, second, common):
    """Two histories, then a third that begins like the first or the second, while pages are scarce."""
    cache = make(window=window, context=640, sequences=1, rows=100)
    keys = [ids(0, first), ids(1, second)]
    for each in keys:
        history = cache.open(np.array(each))
        feed(cache, history, each)
        history.close()
    for each in keys:
        path, matched = cache._match(np.array([*each[:common], 1]))
        possible = [
            n
            for n in range(matched + 1)
            if all(b.local_page >= 0 for b in path[max(0, n - window + 1) // 64 : -(-n // 64)])
        ]
        history = cache.open(np.array([*each[:common], 1, 1]))
        assert history.length == possible[-1]
        check(cache, history, [*each[:common], 1][: history.length])
        check_pages(cache, [history])
        check_tree(cache)
        history.close()


def test_two_that_go_on_from_the_same_unfinished_page_do_not_share_it():
    cache = make()
    first = cache.open(np.array([5]))
    feed(cache, first, ids(0, 100))
    second = cache.open(np.array([*ids(0, 100), 1, 1]))
    assert (second.length, cache.session.copies) == (100, 2)
    store(cache, first, [7])
    store(cache, second, [8])
    check(cache, first, [*ids(0, 100), 7])
    check(cache, second, [*ids(0, 100), 8])


@pytest.mark.parametrize("other", ["in the same page", "behind it"])
def test_taking_back_does_not_change_what_another_holds(other):
    cache = make(window=100)
    first = cache.open(np.array([5]))
    feed(cache, first, ids(0, 128))
    second = cache.open(np.array([*ids(0, 128), 1]))
    if other == "behind it":
        store(cache, second, [3, 3])
    first.rollback(10)
    store(cache, first, [9] * 10)
    check(cache, first, [*ids(0, 118), *[9] * 10])
    check(cache, second, [*ids(0, 128), *([3, 3] if other == "behind it" else [])])
    check_pages(cache, [first, second])
    check_tree(cache)


def test_what_was_taken_back_in_a_page_is_not_found_again():
    cache = make(window=100)
    history = cache.open(np.array([5]))
    feed(cache, history, ids(0, 100))
    history.rollback(20)
    history.close()
    assert cache.open(np.array([*ids(0, 100), 1])).length == 80


def test_rollback_past_the_window_is_refused():
    cache = make(window=100, context=1280, sequences=1, rows=128)
    history = cache.open(np.array([5]))
    feed(cache, history, ids(0, 1200))
    with pytest.raises(Gemma4qError, match="bad_rollback"):
        history.rollback(800)


def test_a_failed_step_leaves_nothing_behind_that_a_later_history_could_find():
    cache = make()
    history = cache.open(np.array([5]))
    feed(cache, history, ids(0, 150))
    history.extend(100)
    history.close(failed=True)
    check_pages(cache)
    assert cache.open(np.array(ids(0, 150))).length == 128


def test_pages_are_zero_when_handed_out():
    cache = make(window=100)
    history = cache.open(np.array([5]))
    history.extend(130)
    for local, table in zip((False, True), history.tables(130), strict=True):
        assert not cache.session.pages[local][table].any()


def test_more_than_the_context_or_than_there_are_pages_is_an_error_and_loses_none():
    cache = make(context=640, sequences=1)
    history = cache.open(np.array([5]))
    with pytest.raises(Gemma4qError, match="context_length_exceeded"):
        history.extend(641)
    feed(cache, history, ids(0, 640))
    other = cache.open(np.array([5]))
    with pytest.raises(Gemma4qError, match="cache_full"):
        other.extend(100)
    check_pages(cache, [history, other])
    history.close()
    store(cache, other, ids(1, 100))
    check(cache, other, ids(1, 100))
    check_pages(cache, [other])


@given(st.integers(0, 300), st.integers(1, 4), st.integers(1, 500), st.data())
@settings(max_examples=100, deadline=None)
def test_the_planned_pages_suffice_for_the_largest_steps_of_all_sequences(window, sequences, rows, data):
    """Whatever `sequences` do within a step of `rows`, nobody runs out of pages."""
    cache = make(window=window, context=640, sequences=sequences, rows=rows)
    histories = [cache.open(np.array([5])) for _ in range(sequences)]
    furthest = [0] * sequences
    for _ in range(12):
        left = rows
        for i, history in enumerate(histories):
            count = data.draw(st.integers(0, min(left, 640 - history.length)))
            history.extend(count)
            left -= count
            history.commit(np.full(count, 3))
            furthest[i] = max(furthest[i], history.length)
            if data.draw(st.booleans()):
                history.rollback(data.draw(st.integers(0, history.length - max(0, furthest[i] - ROLLBACK))))
    check_pages(cache, histories)


COUNTS = st.sampled_from([1, 2, 5, 31, 63, 64, 65, 100, 128, 160])


def test_running_out_of_sliding_pages_loses_none():
    cache = make(window=100, context=640, sequences=1, rows=64)
    first, second = cache.open(np.array([5])), cache.open(np.array([5]))
    feed(cache, first, ids(0, 100), step=50)
    with pytest.raises(Gemma4qError, match=r"cache_full: .*sliding"):
        second.extend(500)
    check_pages(cache, [first, second])
    second.close()
    check_pages(cache, [first])


class Histories(RuleBasedStateMachine):
    """Sequences that come, share beginnings, grow, take back, fail and go, against plain lists of keys."""

    @initialize(window=st.sampled_from([0, 1, 2, 30, 65, 130]))
    def start(self, window):
        self.cache = make(window=window, context=448, sequences=3, rows=160)
        self.open: list = []  # [history, keys, most keys there ever were]
        self.past: list[list[int]] = [ids(0, 200)]

    @precondition(lambda self: len(self.open) < 3)
    @rule(data=st.data(), seed=st.integers(1, 2), count=COUNTS)
    def begin(self, data, seed, count):
        """With what somebody has, to a page's edge or near its end, and something new."""
        old = data.draw(st.sampled_from([*self.past, *(keys for _, keys, _ in self.open)]))
        common = data.draw(st.sampled_from([len(old), len(old), max(0, len(old) - count), len(old) // PAGE * PAGE]))
        keys = (old[:common] + ids(seed, count))[:448]
        history = self.cache.open(np.array(keys))
        assert history.length < len(keys)
        self.open.append([history, keys[: history.length], history.length])

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=COUNTS, seed=st.integers(1, 2))
    def grow(self, data, count, seed):
        entry = data.draw(st.sampled_from(self.open))
        new = ids(seed, count)[: 448 - len(entry[1])]
        store(self.cache, entry[0], new)
        entry[1] = entry[1] + new
        entry[2] = max(entry[2], len(entry[1]))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=st.sampled_from([1, 2, 33, 63, 64]))
    def take_back(self, data, count):
        entry = data.draw(st.sampled_from(self.open))
        count = min(count, len(entry[1]) - max(0, entry[2] - ROLLBACK))
        entry[0].rollback(count)
        entry[1] = entry[1][: len(entry[1]) - count]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def mark(self, data):
        data.draw(st.sampled_from(self.open))[0].checkpoint()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), failed=st.booleans(), room=COUNTS)
    def end(self, data, failed, room):
        entry = data.draw(st.sampled_from(self.open))
        entry[0].extend(min(room, 448 - len(entry[1])))
        entry[0].close(failed)
        self.open.remove(entry)
        self.past = [*self.past[-5:], entry[1]]

    @invariant()
    def pages_are_whole(self):
        if hasattr(self, "cache"):
            check_pages(self.cache, [history for history, *_ in self.open])
            check_tree(self.cache)
            for entry in self.open:
                check(self.cache, *entry[:2])

    def teardown(self):
        for history, *_ in getattr(self, "open", ()):
            history.close()
        if hasattr(self, "cache"):
            check_pages(self.cache)


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
