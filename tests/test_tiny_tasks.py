"""What the tiny models are trained and scored on: nothing held back is trained, and every text is what a user meets."""

import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from gemma4q.text import normalise
from gemma4q.text.calls import QUOTE, Call, parse_call
from gemma4q.text.chat import render
from gemma4q.text.segments import CALL, CALL_END, text_of
from gemma4q.text.template import ChatTemplate

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import tiny_tasks
from tiny_tasks import NEVER_HELD_BACK, TASKS, carried, draw, held_back

each_task = pytest.mark.parametrize("task", TASKS)


@each_task
def test_the_trainer_draws_only_what_is_not_held_back_and_the_scores_only_what_is(task):
    if task in NEVER_HELD_BACK:
        pytest.skip("small talk and stories are not scored")
    random = Random(1)
    assert not any(held_back(draw(random, task).essence) for _ in range(200))
    assert all(held_back(draw(random, task, held=True).essence) for _ in range(50))


def test_a_sum_and_its_mirror_are_held_back_together_and_one_in_ten_is():
    sums = {(a, b): held_back(f"sum {a} {b}") for a in range(100) for b in range(a, 100)}
    assert 0.08 < sum(sums.values()) / len(sums) < 0.12
    random = Random(2)
    for _ in range(300):
        example = tiny_tasks.sums(random)
        a, b = map(int, example.essence.split()[1:])
        assert a <= b and held_back(example.essence) == sums[a, b] and example.answer == str(a + b)


@pytest.mark.parametrize("a, b, steps", [
    (27, 58, "7 + 8 = 15, carry 1. 2 + 5 + 1 = 8."),
    (4, 5, "4 + 5 = 9, carry 0. 0 + 0 + 0 = 0."),
    (99, 99, "9 + 9 = 18, carry 1. 9 + 9 + 1 = 19."),
])  # fmt: skip
def test_carries_are_written_out(a, b, steps):
    assert carried(a, b) == steps


@each_task
def test_a_prompt_is_what_the_engine_renders_and_what_the_shipped_template_renders(task):
    template = ChatTemplate((Path(tiny_tasks.__file__).with_name("tiny_template.jinja")).read_text())
    random = Random(3)
    for _ in range(40):
        example = draw(random, task)
        messages, declared = normalise.messages(example.messages), normalise.tools(example.tools or None)
        engine = render(messages, declared, flavour="small", thinking=example.thinking)
        assert text_of(engine) == example.prompt()
        assert text_of(template.render(messages, declared, thinking=example.thinking)) == example.prompt()


def test_calls_are_spelled_as_the_engine_reads_them():
    random, seen = Random(4), Counter()
    for _ in range(300):
        example = draw(random, "tools")
        if example.call:
            text = example.answer.removeprefix(CALL).removesuffix(CALL_END).replace('<|"|>', QUOTE)
            assert parse_call(text) == Call(*example.call)
            seen[example.call[0]] += 1
    assert len(seen) == len(tiny_tasks.TOOLS)


def test_the_answer_of_a_look_up_stands_in_its_fact_and_the_fact_in_the_prompt():
    random = Random(5)
    for task in ("lookup", "several_lookups"):
        for _ in range(100):
            example = draw(random, task)
            assert example.answer in example.fact and example.prompt().count(example.fact) >= 1
