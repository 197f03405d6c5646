"""Merging, on small random vocabularies: the C code, its Python twin and the rule as one would say it agree."""

import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vocab import gemma_vocabulary, small_vocabulary

from gemma4q import abi
from gemma4q.errors import Gemma4qError
from gemma4q.gguf.reader import open_gguf
from gemma4q.text.tokenizer import Tokenizer

BOTH = [True] if abi.lib is None else [True, False]  # whether Python merges
ALPHABET = "ab▁>\né😀"
TEXTS = st.text(ALPHABET, min_size=1, max_size=4)
PAIRS = st.tuples(TEXTS, TEXTS).map(" ".join)
ODDITIES = st.sampled_from(["ab", "a ", " a", " ", "  ", "", "a  b", "a b a", "\n \n"])
VOCABULARIES = st.tuples(st.sets(TEXTS, max_size=30), st.lists(st.one_of(PAIRS, PAIRS, ODDITIES), max_size=40))
LINES = st.one_of(st.text(ALPHABET + " x", max_size=20), st.text("ab ", min_size=30, max_size=120))


def by_the_book(metadata: dict, text: str) -> list[int]:
    """The ids of `text`, with nothing done to be quick."""
    ids = {token.decode(): i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {}
    for rank, entry in enumerate(metadata["tokenizer.ggml.merges"]):
        left, _, right = entry.decode()[1:].partition(" ")
        ranks.setdefault((entry.decode()[:1] + left, right), rank)
    found = []
    for word in re.findall("\n+|[^\n]+", text.replace(" ", "▁")):
        symbols = [word] if word[0] == "\n" and word in ids else list(word)
        while len(symbols) > 1:
            best = min(range(len(symbols) - 1), key=lambda i: ranks.get(tuple(symbols[i : i + 2]), 10**9))
            if tuple(symbols[best : best + 2]) not in ranks:
                break
            symbols[best : best + 2] = ["".join(symbols[best : best + 2])]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@given(VOCABULARIES, st.lists(LINES, min_size=1, max_size=8))
@example((set(), []), ["a b\n"])
@example(({"a", "▁"}, ["a ▁", "a▁ a"]), ["a a a", "aa a"])  # products that are no tokens, across a space
@example(({"a", "aa", "aaa"}, ["a a", "aa a", "a aa"]), ["a" * n for n in range(1, 70)])
@example(({"a", "b", "ab"}, ["b a", "a b"]), ["ab" * 40])
@example(({"a", "b", "é", "ab", "bé"}, ["a b", "b é", "a b"]), ["abé", "abé" * 20])  # the first of equal merges counts
@example(({"\n", "\n\n\n"}, []), ["a\n\n\nb", "\n\n"])  # a run of newlines needs no merges
def test_c_and_python_merge_as_the_rule_says(vocabulary, texts):
    metadata = small_vocabulary(*vocabulary)
    expected = [by_the_book(metadata, text) for text in texts]
    for python in BOTH:
        tokenizer = Tokenizer(metadata, python)
        assert [tokenizer.encode(text) for text in texts] == expected


@given(VOCABULARIES, st.lists(LINES, min_size=1, max_size=8))
def test_what_was_encoded_decodes_to_the_text(vocabulary, texts):
    tokenizer = Tokenizer(small_vocabulary(*vocabulary))
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)).replace("▁", " ") == text.replace("▁", " ")


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.one_of(PAIRS, st.binary(max_size=4)), max_size=4))
def test_c_and_python_complain_of_the_same_string(tokens, merges):
    complaints = set()
    for python in BOTH:
        try:
            Tokenizer(small_vocabulary(tokens, merges), python)
            complaints.add(None)
        except Gemma4qError as error:
            complaints.add(str(error))
    assert len(complaints) == 1


@pytest.mark.parametrize("python", BOTH)
def test_a_merge_across_a_space_is_found_where_the_vocabulary_has_one(python):
    """No place before a space is taken for a border unless this vocabulary's merges allow it."""
    tokens, text = ["a", "b", "▁", "▁b", "a▁", "a▁b"], "a b"
    plain = Tokenizer(small_vocabulary(tokens, ["▁ b"]), python)
    across = Tokenizer(small_vocabulary(tokens, ["▁ b", "a ▁b"]), python)
    assert [plain.piece(token) for token in plain.encode(text)] == [b"a", b" b"]
    assert [across.piece(token) for token in across.encode(text)] == [b"a b"]


def test_gemma_has_two_characters_that_join_a_following_space():
    """What makes its words short: within a line, no merge crosses the place before a space but after these two."""
    merges = open_gguf(gemma_vocabulary()).metadata["tokenizer.ggml.merges"]
    pairs = [entry.decode().split(" ") for entry in merges]
    assert {left[-1] for left, right in pairs if right[0] == "▁"} == {"▁", ">"}


@pytest.mark.parametrize("python", BOTH)
@pytest.mark.parametrize("depth", [1, 6, 12])
def test_long_products_merge(python, depth):
    """Tokens of 2, 4, 8, ... letters: 4096 letters become one token, one more letter two."""
    tokens = ["a" * 2**power for power in range(depth + 1)]
    merges = [f"{token} {token}" for token in tokens[:-1]]
    tokenizer = Tokenizer(small_vocabulary(tokens, merges), python)
    whole = tokenizer.token_id("a" * 2**depth)
    assert tokenizer.encode("a" * 2**depth) == [whole]
    assert tokenizer.encode("a" * (2**depth + 1)) == [whole, tokenizer.token_id("a")]


@pytest.mark.parametrize("python", BOTH)
def test_vocabularies_of_many_unknown_products_are_read(python):
    """Ten thousand merges whose sides and products are no tokens: more symbols than tokens."""
    merges = [f"{chr(0x4E00 + i)} {chr(0x4E01 + i)}" for i in range(10_000)]
    tokenizer = Tokenizer(small_vocabulary([], merges), python)
    assert tokenizer.decode(tokenizer.encode("一丁七")) == "一丁七"
    assert len(tokenizer.encode("一丁七")) == 9


@pytest.mark.skipif(abi.lib is None, reason="there is no C code")
def test_invalid_bytes_reach_c_as_replacements():
    tokenizer = Tokenizer(small_vocabulary(["a", "\ufffd"], []))
    overlong = (b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80")
    for data in (*overlong, b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82", os.urandom(50)):
        as_text = data.decode("utf-8", "surrogateescape")
        clean = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in as_text)
        assert _c_ids(tokenizer, data) == tokenizer.encode(clean) == tokenizer.encode(data)


def _c_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = abi.ffi.new("int32_t[]", 400)
    count = abi.lib.tokenizer_encode(tokenizer._bpe._tokenizer, data, len(data), ids, 400)
    return list(ids[0:count])
