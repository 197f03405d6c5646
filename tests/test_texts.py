"""What is scored is what the model would write: turn by turn, behind the prompt it would get, to the turn's end."""

import functools
import json

import numpy as np
import pytest
from vocab import gemma_vocabulary

from gemma4q.errors import Gemma4qError
from gemma4q.measure import texts
from gemma4q.shipped import EVALUATION
from gemma4q.text import chat
from gemma4q.text.segments import encode
from gemma4q.text.tokenizer import Tokenizer

FLAVOURS = ("small", "large")
KINDS = {"chat", "code", "maths", "json", "tools", "multilingual", "long"}
CALL = {"id": "1", "type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 5}'}}
TIMER = [
    {"role": "user", "content": "Set a timer."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": '{"ok": true}'},
    {"role": "assistant", "content": "It runs."},
]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(gemma_vocabulary())


def spelled(ids) -> str:
    return tokenizer().decode(ids, special=True)


def parts(lines: list[dict], tmp_path, flavour="small", everything=False) -> list[tuple[str, str]]:
    """What is read before and what is scored, of each passage."""
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = texts.passages(texts.conversations(path), tokenizer(), flavour, everything)
    return [(spelled(p.ids[: p.first]), spelled(p.ids[p.first :])) for p in found]


@pytest.mark.parametrize("flavour, thought", [("small", ""), ("large", "<|channel>thought\n<channel|>")])
def test_each_turn_is_scored_behind_the_prompt_it_was_asked_with(tmp_path, flavour, thought):
    messages = [("user", "Hi"), ("assistant", "Hello <turn|>!"), ("user", "Bye"), ("assistant", " See you. ")]
    line = {"messages": [{"role": role, "content": text} for role, text in messages]}
    first, second = parts([line], tmp_path, flavour)
    start, said = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n", "Hello <turn|>!<turn|>"
    assert first == (start + thought, said)
    assert second == (f"{start}{said}\n<|turn>user\nBye<turn|>\n<|turn>model\n{thought}", "See you.<turn|>")


def test_text_that_spells_a_control_token_stays_text(tmp_path):
    line = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<turn|>"}]}
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(line))
    (found,) = texts.passages(texts.conversations(path), tokenizer(), "small")
    end = tokenizer().id("<turn|>")
    assert found.ids[-1] == end and end not in found.ids[found.first : -1] and found.scored > 3


def test_thoughts_are_part_of_the_turn_that_has_them_and_of_no_later_prompt(tmp_path):
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2", "reasoning_content": "Add."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    first, second = parts([{"messages": messages}], tmp_path)
    assert first[0].startswith("<bos><|turn>system\n<|think|>\n<turn|>") and first[0].endswith("<|turn>model\n")
    assert first[1] == "<|channel>thought\nAdd.\n<channel|>2<turn|>"
    assert "think" not in second[0] and "Add." not in second[0] and second[1] == "Yes.<turn|>"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_call_is_scored_to_its_hand_over_and_its_result_is_only_read(tmp_path, flavour):
    call, said = parts([{"messages": TIMER}], tmp_path, flavour)
    assert call[1] == "<|tool_call>call:set_timer{minutes:5}<tool_call|><|tool_response>"
    assert said[0].endswith('<|tool_response>response:set_timer{value:<|"|>{"ok": true}<|"|>}<tool_response|>')
    assert said[1] == "It runs.<turn|>"


def test_with_every_token_a_conversation_is_one_passage(tmp_path):
    (found,) = parts([{"messages": TIMER}], tmp_path, everything=True)
    assert found[0] == "<bos>" and found[1].endswith("It runs.<turn|>") and "set_timer{minutes:5}" in found[1]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_prompt_and_turn_together_are_the_conversation_as_the_template_writes_it(flavour):
    for talk in texts.conversations(EVALUATION):
        for passage in texts.passages([talk], tokenizer(), flavour)[-1:]:
            thinking = bool(chat.reasoning_of(talk.messages[-1]))
            whole = chat.render(talk.messages, talk.tools, flavour=flavour, thinking=thinking, generation_prompt=False)
            wanted = spelled(encode(whole, tokenizer())).removesuffix("\n")
            prompt, turn = spelled(passage.ids[: passage.first]), spelled(passage.ids[passage.first :])
            assert prompt.removesuffix(texts.NO_THOUGHT) + turn == wanted, talk.where


def test_what_ships_is_of_every_kind_and_is_read_by_models_of_both_flavours():
    talks = texts.conversations(EVALUATION)
    assert {talk.kind for talk in talks} == KINDS and len(talks) == 66
    assert 60_000 < EVALUATION.stat().st_size < 100_000
    for flavour in FLAVOURS:
        found = texts.passages(talks, tokenizer(), flavour)
        scored = {kind: sum(p.scored for p in found if p.kind == kind) for kind in KINDS}
        assert min(scored.values()) > 1000 and sum(scored.values()) > 15_000
        assert 2048 < max(len(p.ids) for p in found) < 4096


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "is no JSON"),
        ("plain text", "plain text is for --raw of `eval` and `imatrix`"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "must be an object"),
        ('{"messages": []}', "must end with a message of the assistant"),
        ('{"messages": "x"}', "messages must be a list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "must end with a message of the assistant"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages[0].role"),
        ('{"kind": 3, "messages": []}', "no short name"),
        ('{"kind": "\\u001b[31m", "messages": []}', "no short name"),
        ('{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "images and sounds"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "tools": [3]}', "tools[0]"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}, '
            '{"role": "assistant", "content": "x"}]}',
            "only the first message may be the system's",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x", "tool_responses": [{"name": "f", "response": 1}]}]}',
            "tool_responses",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, said):
    path = tmp_path / "talks.jsonl"
    path.write_text('\n{"messages": [{"role": "assistant", "content": "fine"}]}\n' + line + "\n")
    with pytest.raises(Gemma4qError) as caught:
        texts.conversations(path)
    assert caught.value.kind == "bad_text" and said in caught.value.message and "line 3" in caught.value.message


def test_a_turn_that_no_model_could_have_written_is_refused(tmp_path):
    """The template joins two messages of the model to one turn, of which the second is no answer to any prompt."""
    line = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]}
    with pytest.raises(Gemma4qError, match=r"bad_text: .*line 1: messages\[2\]"):
        parts([line], tmp_path)


@pytest.mark.parametrize("content, said", [(b"\n \n", "holds no conversation"), (b"\xff", "is not UTF-8")])
def test_a_file_that_holds_none_is_said(tmp_path, content, said):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Gemma4qError, match=f"bad_text: .*{said}"):
        texts.conversations(tmp_path / "x")
    with pytest.raises(Gemma4qError, match=r"bad_text: .*not a regular file"):
        texts.conversations(tmp_path)


def test_plain_text_is_cut_and_scored_as_llama_perplexity_does(tmp_path):
    """Chunks of n tokens, the first of each replaced by <bos>; rows n/2 ... n - 2, each for the token behind it."""
    path = tmp_path / "wiki.test.raw"
    path.write_text("One, two, three, <turn|> four. " * 20)
    ids = tokenizer().encode(path.read_text(), bos=True, special=False)
    found = texts.plain([path, path], tokenizer(), 33)
    assert len(found) == 2 * (len(ids) // 33) and [p.text for p in found] == list(range(len(found)))
    for number, passage in enumerate(found[: len(ids) // 33]):
        assert passage.ids.tolist() == [2, *ids[33 * number + 1 : 33 * (number + 1)]]
        assert (passage.first, passage.scored, passage.kind) == (17, 16, "wiki.test")
    with pytest.raises(Gemma4qError, match=r"bad_text: .* tokens, less than a chunk of 9,999"):
        texts.plain([path], tokenizer(), 9999)


def passage(kind: str, text: int, tokens: int) -> texts.Passage:
    return texts.Passage(np.zeros(tokens, np.int32), 1, kind, text)


def test_passages_are_selected_by_kind_number_and_length():
    found = [passage("a", 0, 5), passage("a", 0, 9), passage("b", 1, 7), passage("a", 2, 4), passage("b", 3, 7)]
    assert texts.selected(found, (), None, 9) == ([0, 1, 2, 3, 4], 0)
    assert texts.selected(found, (), 1, 9) == ([0, 1, 2], 0)
    assert texts.selected(found, ("a",), None, 8) == ([0, 3], 1)
    assert texts.selected(found, ("b", "a"), 1, 7) == ([0, 2], 1)
    with pytest.raises(Gemma4qError, match=r"bad_option: kinds: there is no 'c'; there are a, b"):
        texts.selected(found, ("c",), None, 9)
    with pytest.raises(Gemma4qError, match="bad_option: no text has as few as 3 tokens"):
        texts.selected(found, (), None, 3)
