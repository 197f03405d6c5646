"""Gemma 4's tokenizer against llama.cpp's answers and the `tokenizers` library; and what a bad vocabulary meets."""

import json
import random
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vocab import gemma_vocabulary, small_vocabulary, strings

from gemma4q import abi
from gemma4q.errors import Gemma4qError
from gemma4q.gguf.reader import open_gguf
from gemma4q.text.tokenizer import CONTROL, HANDOVER, MARKUP, NativeBpe, Tokenizer

CASES = json.loads((Path(__file__).parent / "data" / "tokenize.json").read_text())["cases"]
BOTH = [True] if abi.lib is None else [True, False]  # whether Python merges
SPECIALS = (*CONTROL, *MARKUP, HANDOVER)
needs_c = pytest.mark.skipif(abi.lib is None, reason="there is no C code")


@pytest.fixture(scope="module")
def gemma():
    return {python: Tokenizer.from_gguf(gemma_vocabulary(), python) for python in BOTH}


@pytest.fixture(scope="module")
def library():
    """The same vocabulary in the `tokenizers` library, with special tokens and without."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    metadata = open_gguf(gemma_vocabulary()).metadata
    vocab = {token.decode(): i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.decode().split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    found = {}
    for special in (None, True):
        model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
        found[special] = Tokenizer(model)
        found[special].normalizer = normalizers.Replace(" ", "▁")
    found[True].add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    return lambda text, special=None: found[special].encode(text, add_special_tokens=False).ids


# -- Equal to the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("python", BOTH)
def test_every_vector_has_the_reference_ids(gemma, python):
    for case in CASES:
        ids = gemma[python].encode(case["text"], bos=case["add_bos"], special=case["parse_special"])
        assert ids == case["ids"], case["text"]


@pytest.mark.parametrize("python", BOTH)
def test_vectors_decode_to_their_text(gemma, python):
    for case in CASES:
        ids = case["ids"][1:] if case["add_bos"] else case["ids"]
        assert (gemma[python].decode(ids, special=True) == case["text"]) == case["roundtrip"], case["text"]


def test_twenty_thousand_random_texts_are_cut_as_the_tokenizers_library_cuts_them(gemma, library):
    for text in random_texts(20_000):
        expected = library(text)
        for python in BOTH:
            assert gemma[python].encode(text) == expected, text


def test_random_texts_with_special_tokens_are_cut_as_the_tokenizers_library_cuts_them(gemma, library):
    for text in random_texts(1_000, ODD + SPECIALS):
        expected = library(text, True)
        for python in BOTH:
            assert gemma[python].encode(text, special=True) == expected, text


SCRIPTS = (
    (0x00, 0x1F), (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF),
    (0xE00, 0xE7F), (0x2000, 0x206F), (0x2190, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x10000, 0x10FFFF),
)  # fmt: skip
ODD = (
    "\n", "\r\n", "\t", "\x00", "▁", "> </", "👩\u200d💻", "🇩🇪", "e\u0301",
    "<table>", "<0x41>", "<unused7>", "[multimodal]", "<|turn>", "<bos>",
)  # fmt: skip


def random_texts(count: int, odd: tuple[str, ...] = ODD) -> list[str]:
    """Characters of all planes, runs of blanks, emoji sequences, markup and pieces of real text, in disorder."""
    rng = random.Random(count)
    texts = [case["text"] for case in CASES]

    def part() -> str:
        kind = rng.random()
        if kind < 0.35:
            low, high = rng.choice(SCRIPTS)
            return "".join(map(chr, rng.choices(range(low, high + 1), k=rng.randint(1, 12))))
        if kind < 0.5:
            return rng.choice(" \n\t") * rng.randint(1, 40)
        if kind < 0.7:
            return rng.choice(odd) * rng.randint(1, 3)
        text = rng.choice(texts)
        start = rng.randrange(len(text) + 1)
        return text[start : start + rng.randint(1, 20)]

    return ["".join(part() for _ in range(rng.randint(2, 9))) for _ in range(count)]


# -- Special tokens ------------------------------------------------------------------------------------


def test_no_special_token_overlaps_another():
    """So that it does not matter which of them is looked for first."""
    for text in SPECIALS:
        assert text.startswith("<") and text.endswith(">") and not set("<>") & set(text[1:-1])


def test_special_modes_differ_in_what_they_recognise(gemma):
    tokenizer = gemma[BOTH[-1]]
    for text in SPECIALS:
        token = tokenizer.special_ids[text]
        assert tokenizer.encode(text, special=True) == [token]
        assert (tokenizer.encode(text, special=False) == [token]) == (text in MARKUP)
        assert token not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([token]) == ("" if text in CONTROL else text)
        assert tokenizer.decode([token], special=True) == text


def test_roles_of_gemmas_tokens(gemma):
    for tokenizer in gemma.values():
        assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (2, 1, 262_144)
        assert tokenizer.stops == {1, 106, 50}
        masked = {0, 2, 3, 4, 5, 46, 47, 51, 98, 105, 255_999, 256_000, *range(258_880, 258_885)}
        unused = {
            *range(6, 46),
            *range(53, 98),
            99,
            *range(102, 105),
            *range(256_001, 258_880),
            *range(258_885, 262_144),
        }
        assert tokenizer.never == masked | unused
        assert tokenizer.special_ids.keys() == set(SPECIALS)
        assert tokenizer.id("<|turn>") == tokenizer.token_id("<|turn>") == 105
        assert tokenizer.token_id("no such token") is None
        assert tokenizer.piece(238 + 0xE2) == b"\xe2" and tokenizer.piece(236_743) == b" "


def test_bos_comes_once_and_only_when_asked(gemma):
    tokenizer = gemma[BOTH[-1]]
    assert tokenizer.encode("") == [] and tokenizer.encode("", bos=True) == [2]
    assert tokenizer.encode("hi", bos=True) == [2, *tokenizer.encode("hi")]


def test_what_is_no_character_becomes_a_replacement(gemma):
    for tokenizer in gemma.values():
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff\x00")) == "a\ufffdb\ufffd\x00"
        assert tokenizer.decode(tokenizer.encode(b"a\xe2\x82b\xff")) == "a\ufffd\ufffdb\ufffd"
        assert tokenizer.token_id("\ud800") == tokenizer.token_id("\ufffd")


def test_ids_outside_the_vocabulary_are_refused(gemma):
    for tokenizer in gemma.values():
        for token in (-1, 262_144, 2**40):
            with pytest.raises(Gemma4qError, match="bad_token: token"):
                tokenizer.decode([token])


@needs_c
def test_threads_share_one_tokenizer(gemma):
    texts = [case["text"] * 20 for case in CASES]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(gemma[False].encode, texts)) == [gemma[False].encode(text) for text in texts]


# -- Time ----------------------------------------------------------------------------------------------


def seconds(action, times: int = 3) -> float:
    """Of this thread alone, so that a busy machine fails no test."""
    best = float("inf")
    for _ in range(times):
        start = time.thread_time()
        action()
        best = min(best, time.thread_time() - start)
    return best


@needs_c
def test_tables_are_built_in_a_moment():
    metadata = open_gguf(gemma_vocabulary()).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert seconds(lambda: NativeBpe(tokens, merges)) < 0.7  # 0.1 on one quiet core of an EPYC, 0.3 on a busy one


@needs_c
def test_a_megabyte_of_text_takes_an_eighth_of_a_second(gemma):
    text = " ".join(case["text"] for case in CASES if case["category"].startswith(("script", "prompt", "code", "misc")))
    text *= -(-1_000_000 // len(text.encode()))
    assert seconds(lambda: gemma[False].encode(text)) < len(text.encode()) / 8e6


@needs_c
@pytest.mark.parametrize(
    "unit", ["A", "\n", " ", "> ", "ab", "0", "人", "\u200d👩", "e\u0301", "\x00", "<", "\U000e0001"]
)
def test_a_megabyte_of_one_thing_takes_under_a_second(gemma, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    assert seconds(lambda: gemma[False].encode(text), 1) < 1
    assert gemma[False].decode(gemma[False].encode(text[:5000])) == text[:5000]


@needs_c
def test_a_megabyte_without_a_space_takes_under_a_second_and_is_what_python_makes_of_it(gemma):
    text = "".join(random.Random(1).choices(string.ascii_letters + string.digits + "+/", k=1_000_000))
    assert seconds(lambda: gemma[False].encode(text), 1) < 1
    assert gemma[False].encode(text[:200_000]) == gemma[True].encode(text[:200_000])


# -- Bad and unusual vocabularies ----------------------------------------------------------------------

OUTSIDE = SimpleNamespace(data=np.zeros(9, np.uint8), starts=np.array([0, 8]), lengths=np.array([1, 2]))
NEGATIVE = SimpleNamespace(data=np.zeros(9, np.uint8), starts=np.array([0]), lengths=np.array([-1]))
FAULTS = {
    "no_tokens_key": ({"tokens": None}, "bad_tokenizer"),
    "no_tokens": ({"tokens": strings([])}, "bad_tokenizer"),
    "tokens_are_ints": ({"tokens": np.arange(300, dtype=np.int32)}, "bad_type"),
    "tokens_are_a_string": ({"tokens": "abc"}, "bad_type"),
    "no_merges_key": ({"merges": None}, "missing_key"),
    "merges_are_ints": ({"merges": np.arange(300, dtype=np.int32)}, "bad_type"),
    "merges_not_utf8": ({"merges": strings([b"a \xff"])}, "bad_tokenizer"),
    "merge_too_long": ({"merges": strings(["a " + "b" * 500_000])}, "bad_tokenizer"),
    "no_model": ({"model": None}, "bad_tokenizer"),
    "other_model": ({"model": "gpt2"}, "bad_tokenizer"),
    "llama_without_the_dialect": ({"model": "llama"}, "bad_tokenizer"),
    "model_is_an_array": ({"model": np.arange(300)}, "bad_tokenizer"),
    "bos_outside": ({"bos_token_id": 10**6}, "bad_tokenizer"),
    "eos_2_to_32": ({"eos_token_id": 2**32 - 1}, "bad_tokenizer"),
    "eos_is_a_string": ({"eos_token_id": "1"}, "bad_tokenizer"),
    "bos_is_true": ({"bos_token_id": True}, "bad_tokenizer"),
    "bos_is_an_array": ({"bos_token_id": np.arange(3)}, "bad_tokenizer"),
    "scores_as_bytes": ({"scores": np.zeros(259, np.uint8)}, "bad_type"),
    "scores_short": ({"scores": np.zeros(7, np.float32)}, "bad_array"),
    "types_as_bytes": ({"token_type": np.zeros(259, np.uint8)}, "bad_type"),
    "types_short": ({"token_type": np.zeros(7, np.int32)}, "bad_array"),
    "types_are_strings": ({"token_type": strings(["a"] * 259)}, "bad_type"),
    "suppressed_outside": ({"suppress_tokens": np.array([5, 10**6], np.int32)}, "bad_tokenizer"),
    "suppressed_negative": ({"suppress_tokens": np.array([-1], np.int32)}, "bad_tokenizer"),
    "suppressed_are_floats": ({"suppress_tokens": np.zeros(2, np.float32)}, "bad_type"),
}
BAD_TOKENS = {
    "duplicate": (["a", "b", "a"], "token 260"),
    "empty": (["a", ""], "token 259"),
    "not_utf8": ([b"\xff"], "token 258"),
    "half_a_character": ([b"\xe2\x82"], "token 258"),
    "surrogate": ([b"\xed\xa0\x80"], "token 258"),
    "overlong": ([b"\xc0\x80"], "token 258"),
    "too_long": (["a" * 500_000], "token 258"),
}


@pytest.mark.parametrize("python", BOTH)
@pytest.mark.parametrize(("change", "kind"), FAULTS.values(), ids=FAULTS)
def test_bad_metadata_is_refused(python, change, kind):
    with pytest.raises(Gemma4qError) as caught:
        Tokenizer(small_vocabulary(["a"], [], **change), python)
    assert caught.value.kind == kind


@pytest.mark.parametrize("python", BOTH)
def test_strings_outside_the_file_are_not_read(python):
    for change, where in (({"tokens": OUTSIDE}, "token 1"), ({"merges": NEGATIVE}, "merge 0")):
        with pytest.raises(Gemma4qError, match=f"bad_tokenizer: .*{where} lies outside the file"):
            Tokenizer(small_vocabulary([], [], **change), python)


@pytest.mark.parametrize("python", BOTH)
@pytest.mark.parametrize(("tokens", "where"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_a_bad_token_is_named(python, tokens, where):
    with pytest.raises(Gemma4qError, match=f"bad_tokenizer: .*{where} "):
        Tokenizer(small_vocabulary(tokens, []), python)


@pytest.mark.parametrize("python", BOTH)
@pytest.mark.parametrize("spelling", ["<0x-1>", "<0xZZ>", "<0x1>", "<0x0a>"])
def test_a_byte_token_spelled_wrongly_is_missed(python, spelling):
    metadata = small_vocabulary([], [])
    tokens = [spelling.encode() if token == b"<0x0A>" else token for token in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(Gemma4qError, match=r"bad_tokenizer: .*<0x0A>"):
        Tokenizer({**metadata, "tokenizer.ggml.tokens": strings(tokens)}, python)


@pytest.mark.parametrize("python", BOTH)
def test_both_dialects_are_one(python):
    for more in ({"model": "gemma4"}, {"model": "llama", "pre": "gemma4"}):
        assert Tokenizer(small_vocabulary(["a"], [], **more), python).encode("a") == [258]
    metadata = small_vocabulary(["a"], [], model="llama") | {"general.architecture": "gemma4"}
    assert Tokenizer(metadata, python).encode("a") == [258]


@pytest.mark.parametrize("python", BOTH)
def test_repeated_merges_count_once(python):
    tokenizer = Tokenizer(small_vocabulary(["a", "b", "ab"], ["a b"] * 40_000), python)
    assert tokenizer.encode("abab") == [260, 260]


@pytest.mark.parametrize("python", BOTH)
def test_a_small_vocabulary_has_the_features_whose_tokens_it_has(python):
    tokenizer = Tokenizer(small_vocabulary(["<turn|>", "<unused0>", "<unusedx>", "<pad>"], []), python)
    assert tokenizer.special_ids == {"<eos>": 0, "<bos>": 1, "<turn|>": 258, "<pad>": 261}
    assert tokenizer.stops == {0, 258} and tokenizer.never == {1, 259, 261}
    assert tokenizer.encode("<|turn><turn|>", special=True)[-1] == 258
    assert tokenizer.encode("<turn|>", special=False) == tokenizer.encode("<turn|>")
    with pytest.raises(Gemma4qError, match=r"bad_tokenizer: .*<\|turn>"):
        tokenizer.id("<|turn>")


@pytest.mark.parametrize("python", BOTH)
def test_roles_come_from_the_text_first_and_then_from_the_number(python):
    numbers = {"bos_token_id": 0, "eos_token_id": 1}
    swapped = Tokenizer(small_vocabulary([], [], **numbers), python)
    assert (swapped.bos, swapped.eos) == (1, 0)
    plain = small_vocabulary([], [], **numbers)
    plain["tokenizer.ggml.tokens"] = strings([b"<s>", b"</s>", *list(plain["tokenizer.ggml.tokens"])[2:]])
    named = Tokenizer(plain, python)
    assert (named.bos, named.eos, named.stops) == (0, 1, {1})
    del plain["tokenizer.ggml.bos_token_id"]
    with pytest.raises(Gemma4qError, match=r"bad_tokenizer: .*<bos>"):
        Tokenizer(plain, python)


@pytest.mark.parametrize("python", BOTH)
def test_suppressed_tokens_are_never_answers(python):
    suppressed = np.array([258], np.int32)
    assert Tokenizer(small_vocabulary(["a"], [], suppress_tokens=suppressed), python).never == {1, 258}
