"""Streamed UTF-8: cut anywhere, it says what the whole would, and as early as it can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4q.text.utf8 import Utf8Stream

# Beginnings, middles and ends of characters, whole ones, and bytes that are never either.
WHOLE = [b"a", "é".encode(), "€".encode(), "😀".encode()]
FRAGMENTS = [*WHOLE, b"\xe2", b"\x82", b"\xf0", b"\x9f", b"\xc0", b"\xff", b"\xed\xa0"]
BYTES = st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=20).map(b"".join))


@given(BYTES, st.data())
def test_any_cutting_gives_what_the_whole_gives(data, draw):
    stream, shown, at = Utf8Stream(), "", 0
    while at < len(data):
        size = draw.draw(st.integers(1, 5))
        shown += stream.push(data[at : at + size])
        at += size
    assert shown + stream.flush() == data.decode("utf-8", "replace")


@given(BYTES)
def test_at_most_three_bytes_wait(data):
    stream = Utf8Stream()
    shown = stream.push(data)
    assert any(shown == data[: len(data) - held].decode("utf-8", "replace") for held in range(4))


@pytest.mark.parametrize(
    ("pushed", "shown"),
    [
        ([b"\xe2", b"\x82", b"\xac"], ["", "", "€"]),
        ([b"\xe2\x82", b"a"], ["", "\ufffda"]),
        ([b"\xf0\x9f", b"\xf0\x9f\x98\x80"], ["", "\ufffd😀"]),
        ([b"a\xff", b"b"], ["a\ufffd", "b"]),
        ([b"\x80", b""], ["\ufffd", ""]),
    ],
)
def test_what_can_be_known_is_shown_at_once(pushed, shown):
    stream = Utf8Stream()
    assert [stream.push(data) for data in pushed] == shown


def test_flush_shows_what_waited_and_starts_anew():
    stream = Utf8Stream()
    assert stream.push(b"\xf0\x9f\x98") == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert stream.push("é".encode()) == "é"
