"""A conversation at a terminal, driven by a person who types and reads."""

import json
import re
import time

import pytest
from terminal import SURE, Person, chatty


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(chatty())
    return str(path)


@pytest.fixture
def person(model):
    someone = Person(model, *SURE, "-n", "6")
    someone.reads(">>> ")
    yield someone
    if someone.program.poll() is None:
        someone.program.kill()
        someone.leaves()


class TestChat:
    def test_answers_and_reuses_what_it_has_read(self, person):
        assert "tokens/s" in person.says("hi")
        assert "of them reused" in person.says("hi again")
        assert re.search("messages +4\r\ncontext +[1-9][0-9]* of 8,192 tokens", person.says("/show"))
        person.types("/bye\n")
        assert person.leaves() == 0

    def test_help_names_every_command(self, person):
        text = person.says("/help")
        for name in ("/help", "/clear", "/set", "/show", "/regen", "/save", "/load", "/bye", '"""'):
            assert name in text

    def test_settings_change_and_wrong_ones_are_refused(self, person):
        person.says("/set temperature 0")
        person.says("/set system be kind")
        text = person.says("/show")
        assert re.search("temperature +0.0", text) and "be kind" in text
        assert "error: bad_option: temperature: " in person.says("/set temperature hot")
        assert "error: bad_option: " in person.says("/set nonsense 1")
        person.says("/set temperature -5")
        assert "error: bad_option: temperature: -5.0" in person.says("hi")
        assert "error: bad_command: /nonsense" in person.says("/nonsense")

    def test_a_conversation_is_kept_and_taken_up_again(self, person, tmp_path):
        answer = person.says("hi")
        person.says(f"/save {tmp_path / 'talk.json'}")
        assert re.search("messages +0", person.says("/clear") + person.says("/show"))
        assert "loaded 2 messages" in person.says(f"/load {tmp_path / 'talk.json'}")
        saved = json.loads((tmp_path / "talk.json").read_text())
        assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
        assert saved["sampling"]["seed"] == 7
        assert printed(answer) == printed(person.says("/regen"))
        (tmp_path / "bad.json").write_text('{"messages": [1]}')
        assert "error: bad_file" in person.says(f"/load {tmp_path / 'bad.json'}")
        assert "error: io: " in person.says(f"/load {tmp_path / 'none.json'}")
        assert "error: io: " in person.says("/save /proc/none/talk.json")

    def test_several_lines_are_one_message(self, person, tmp_path):
        person.types('"""a\nb\n')
        person.types('c"""\n')
        person.reads(">>> ")
        person.says(f"/save {tmp_path / 'talk.json'}")
        assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "a\nb\nc"

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, person):
        person.says("/set max_tokens -1")
        person.says("/set logit_bias 1-inf")
        person.says("/set logit_bias 6-inf")
        person.types("hi\n")
        person.reads("hi\r\n")
        time.sleep(0.5)
        person.types("\x03")
        assert "stopped" in person.reads(">>> ", seconds=5)
        assert re.search("messages +2", person.says("/show"))
        person.presses_ctrl_c()
        person.reads("press Ctrl-C again")
        person.reads(">>> ")
        person.presses_ctrl_c()
        assert person.leaves() == 130

    def test_ctrl_d_leaves(self, person):
        person.types("\x04")
        assert person.leaves() == 0


def printed(answer: str) -> str:
    """An answer without the figures behind it and the line that was typed."""
    return answer.split("\r\n", 1)[1].split("[prompt")[0]
