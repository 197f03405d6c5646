"""What a user sees does not depend on how the answer was cut into tokens, and holds no tag of the format."""

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocab import gemma_vocabulary

from gemma4q.text import calls, segments, tools
from gemma4q.text.calls import QUOTE, Call, parse_call
from gemma4q.text.stops import StopMatcher, check_stops
from gemma4q.text.stream import OutputStream
from gemma4q.text.tokenizer import Tokenizer

CASES = json.loads((Path(__file__).parent / "data" / "parse_output.json").read_text())["cases"]
IN_THOUGHT = (105, 4368, 107, 100, 45518, 107)  # <|turn>model\n<|channel>thought\n
BYTE = 1_000_000


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(gemma_vocabulary())


def shown(ids, vocabulary=None, **options):
    """The whole message of an answer, as the vectors write it."""
    stream = OutputStream(vocabulary or tokenizer(), **options)
    events = [event for token in ids for event in stream.push(token)] + stream.finish()
    return {
        "reasoning": "".join(event.text for event in events if event.kind == "thought"),
        "content": "".join(event.text for event in events if event.kind == "content"),
        "tool_calls": [vars(event.call) for event in events if event.kind == "call"],
        "unparsed_calls": [event.text for event in events if event.kind == "unparsed"],
    }


class Bytes:
    """A vocabulary whose text tokens are single bytes: BYTE + byte. The special ones are Gemma's."""

    special_ids = property(lambda self: tokenizer().special_ids)
    stops = property(lambda self: tokenizer().stops)

    def piece(self, token, special=False):
        return bytes([token - BYTE]) if token >= BYTE else tokenizer().piece(token)

    def cut(self, ids):
        special = set(self.special_ids.values())
        return [i for t in ids for i in ([t] if t in special else [BYTE + b for b in tokenizer().piece(t)])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_message_is_as_expected_token_by_token_and_byte_by_byte(case):
    options = {"prompt": IN_THOUGHT if case["starts_in_thought"] else (), "schemas": case["schemas"]}
    assert shown(case["ids"], **options) == case["expect"]
    assert shown(Bytes().cut(case["ids"]), Bytes(), **options) == case["expect"]


TEXT = [" ", "\n", "thought", "thought\n", "a", "é", "<|turn>", "call:f{", "}", ":", "1", ","]
MARKS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<tool_response|>"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(TEXT + MARKS), max_size=12), st.booleans())
def test_no_tag_is_shown_and_cutting_changes_nothing(parts, in_thought):
    ids = [i for p in parts for i in ([tokenizer().special_ids[p]] if p in MARKS else tokenizer().encode(p))]
    prompt = IN_THOUGHT if in_thought else ()
    message = shown(ids, prompt=prompt)
    assert shown(Bytes().cut(ids), Bytes(), prompt=prompt) == message
    for mark in MARKS:
        assert mark not in message["content"] and mark not in message["reasoning"]


@pytest.mark.parametrize(
    ("prompt", "ids_of", "content", "reasoning"),
    [
        ("", "Hi", "Hi", ""),
        ("<|turn>model\n", "\nHi", "\nHi", ""),
        ("<|turn>model\n<|channel>thought\n<channel|>", "\nHi", "Hi", ""),
        ("<|turn>model\n<|channel>thought\n<channel|>So", "\nHi", "\nHi", ""),
        ("<|turn>model\n<|channel>thought\n", "Hi", "", "Hi"),
        ("<|turn>model\n<|channel>thought\nI th", "ink", "", "ink"),
        ("<|turn>model\n<|channel>", "thought\nHi", "", "Hi"),
        ("<|channel>thought\nx<channel|>y<turn|>\n<|turn>model\n", "Hi", "Hi", ""),
    ],
)
def test_the_prompts_tail_decides_where_an_answer_starts(prompt, ids_of, content, reasoning):
    message = shown(tokenizer().encode(ids_of), prompt=tokenizer().encode(prompt, special=True))
    assert (message["content"], message["reasoning"]) == (content, reasoning)


def test_space_is_held_back_until_it_is_known_not_to_be_trailing():
    stream = OutputStream(tokenizer())
    pushed = [stream.push(token) for token in tokenizer().encode("a \n b <|channel>", special=True)]
    assert "".join(event.text for events in pushed for event in events) == "a \n b"
    stream = OutputStream(tokenizer())
    assert [event.text for token in tokenizer().encode("a\n") for event in stream.push(token)] == ["a"]
    assert [event.text for event in stream.finish()] == ["\n"]


def test_tokens_of_thoughts_are_counted_with_their_marks():
    stream = OutputStream(tokenizer())
    for token in tokenizer().encode("<|channel>thought\nab<channel|>x y", special=True):
        stream.push(token)
    assert stream.thought_tokens == 5  # <|channel> thought \n ab <channel|>


def test_an_end_token_ends_the_answer():
    stream = OutputStream(tokenizer())
    assert stream.push(9259)[0].text == "Hello" and not stream.done
    assert stream.push(106) == [] and stream.done
    assert stream.push(9259) == [] == stream.finish()


def test_a_character_cut_by_the_end_is_shown_as_replaced():
    assert shown([238 + 0xE6, 238 + 0x9D])["content"] == "\ufffd"


def test_plain_text_and_vocabularies_without_marks_show_every_token():
    ids = tokenizer().encode("<|channel>thought\nx<channel|> a ", special=True)
    assert shown(ids, plain=True)["content"] == "<|channel>thought\nx<channel|> a "

    class Small(Bytes):
        special_ids, stops = {}, frozenset({1})

    assert shown([BYTE + byte for byte in b" thought\n{} "], Small())["content"] == " thought\n{} "


# -- stop strings


def naive_stop(text, stops):
    """The text before the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


PIECES = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=8)


@settings(max_examples=500)
@given(PIECES, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stops_match_as_on_the_whole_text_and_pass_all_that_cannot_match(pieces, stops):
    matcher, passed, whole = StopMatcher(stops), "", ""
    for piece in pieces:
        passed, whole = passed + matcher.push(piece), whole + piece
        before, found = naive_stop(whole, stops)
        assert matcher.found == found
        if found:
            break
        ends = [whole[-n:] for n in range(1, len(whole) + 1)]
        held = max((len(end) for end in ends if any(stop.startswith(end) for stop in stops)), default=0)
        assert passed == whole[: len(whole) - held]
    assert passed + matcher.flush() == before if pieces else True


def test_a_stop_string_counts_in_the_answer_only():
    ids = tokenizer().encode("<|channel>thought\nEND <channel|>one END two", special=True)
    assert shown(ids, stops=["END"]) == {
        "reasoning": "END", "content": "one ", "tool_calls": [], "unparsed_calls": [],
    }  # fmt: skip
    stream = OutputStream(tokenizer(), stops=["END"])
    for token in ids:
        stream.push(token)
    assert stream.stop == "END" and stream.done and stream.finish() == []


@pytest.mark.parametrize("stops", [[""], ["x" * 1025], ["a"] * 17, [7], [None]])
def test_senseless_stop_strings_are_refused(stops):
    with pytest.raises(Exception, match="bad_option: stop"):
        check_stops(stops)


def test_one_stop_string_need_not_be_a_list():
    assert check_stops("END") == ("END",)


# -- calls


def written(call):
    """A call as the prompt writes it, as text with QUOTE for the quote token."""
    out = segments.Writer()
    tools.write_call(out, {"function": call})
    return "".join(QUOTE if s == (segments.QUOTE, True) else s.text for s in out.segments[1:-1])


KEYS = st.text(alphabet="abcXYZé_-. 0", min_size=1, max_size=6).map(str.strip).filter(bool)
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS, ARGUMENTS, max_size=4))
def test_what_is_rendered_parses_back(arguments):
    assert parse_call(written({"name": "f", "arguments": arguments})) == Call("f", arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("{a:Qx", {"a": "x"}),
        ("{a:QxQ,b:[1,{c:Qy", {"a": "x", "b": [1, {"c": "y"}]}),
        ("{a:[Qx]}", {"a": ["x"]}),
        ("{ a : 1 , b : [ 1 , 2 ] }\n", {"a": 1, "b": [1, 2]}),
        ("{a:1,a:2}", {"a": 2}),
        ('{"a":"b\\n","c d":-1.5e3}', {"a": "b\n", "c d": -1500.0}),
    ],
)
def test_what_was_left_open_is_closed(text, arguments):
    assert calls.strict("call:f" + text.replace("Q", QUOTE), {}).arguments == arguments


SCHEMA = {
    "f": {
        "type": "object",
        "properties": {
            "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"},
            "t": {"type": ["string", "null"]},
            "o": {"type": "object", "properties": {"s": {"type": "string"}}},
            "l": {"type": "array", "items": {"type": "string"}},
        },
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("{s:12,i:3.0,n:3.0,t:4}", {"s": "12", "i": 3, "n": 3.0, "t": 4}),
        ("{s:true,x:9}", {"s": "true", "x": 9}),
        ("{o:{s:1},l:[1,2]}", {"o": {"s": "1"}, "l": ["1", "2"]}),
        ("{s:a, b and c: d,i:1}", {"s": "a, b and c: d", "i": 1}),
        ("{s:if (a) { b[0] },i:1}", {"s": "if (a) { b[0] }", "i": 1}),
        ("{s:print('}')}", {"s": "print('}')"}),
        ("{s={x},i=2}", {"s": "{x}", "i": 2}),
        ("(s='it's ok', i=2,)", {"s": "it's ok", "i": 2}),
        ('{s:"a"Q,i:1}', {"s": "a", "i": 1}),
        ("{s:QaQQ,i:1}", {"s": "a", "i": 1}),
        ("{s:abcQ}", {"s": "abc"}),
        ("{l:[a b, 'c']}", {"l": ["a b", "c"]}),
        ('{s:"say \\"hi\\"" }', {"s": 'say "hi"'}),
        ("{'s':'a','i':2}", {"s": "a", "i": 2}),
        ("{i:None,n:True,}", {"i": None, "n": True}),
    ],
)
def test_drift_is_read_as_it_was_meant(text, arguments):
    assert parse_call("call:f" + text.replace("Q", QUOTE), SCHEMA) == Call("f", arguments)


@pytest.mark.parametrize(
    "text",
    ["", "call:", "call:{}", "f{}", "call:f", "call:f{a}", "call:f{a:}", "call:f{a:1}b", "call:f{:1}",
     "call:f{a:" + "[" * 5000, "call:f{" + "a:{" * 5000, "call:f{a:" + "9" * 5000 + "}",
     "call:f{a:1e999}", 'call:f{a:"\\ud800"}', 'call:f{a:"x' + QUOTE + '"}', "call:f\udc00{}"],
    ids=lambda text: ascii(text[:14]),
)  # fmt: skip
def test_what_cannot_be_read_is_reported_not_guessed(text):
    assert parse_call(text) is None


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab1e9{}[]():=,'\" \\\n" + QUOTE, max_size=40))
def test_any_text_parses_to_json_or_not_at_all(text):
    call = parse_call("call:f{" + text, SCHEMA)
    written = call and json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
    assert call is None or json.loads(written) == call.arguments


@pytest.mark.parametrize("start", ["", "s:", 's:"', "s:'", "s:x"])
@pytest.mark.parametrize("unit", ["a", '"', "'", ",a", "{", QUOTE, ",s:", "\\", ' "', 's:"x" ', ", ", " ", "}", "1"])
def test_long_calls_are_read_in_time_linear_in_their_length(start, unit):
    """Where reading is quadratic, one of these takes minutes."""
    parse_call("call:f{" + start + unit * 50_000, SCHEMA)
