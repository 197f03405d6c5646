"""Conversations for the tiny models to read, one a line, as `gemma4q imatrix -f` takes them.

    python tools/tiny_texts.py 400 > texts.jsonl
    python tools/tiny_texts.py 400 --held-back --seed 2 > others.jsonl

Drawn from the tasks that the models were trained on: of the texts that training drew from, or (--held-back) of those it
never saw, so that what is calibrated on the first can be judged on the second.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from random import Random

from tiny_tasks import TASKS, Example, draw


def conversation(example: Example) -> dict:
    """The example's messages and its answer, as OpenAI's API has them."""
    answer: dict = {"role": "assistant", "content": example.answer}
    if example.call:
        name, values = example.call
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    if example.thinking and example.thought:
        answer["reasoning_content"] = example.thought
    line = {"kind": example.task, "messages": [*example.messages, answer]}
    return line | ({"tools": list(example.tools)} if example.tools else {})


def texts(count: int, seed: int = 1, held_back: bool = False, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[str]:
    """So many lines, of each task in turn."""
    random = Random(seed)
    for number in range(count):
        task = tasks[number % len(tasks)]
        yield json.dumps(conversation(draw(random, task, held_back)), ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-back", action="store_true", help="texts that no training drew")
    given = parser.parse_args()
    for line in texts(given.count, given.seed, given.held_back):
        print(line)


if __name__ == "__main__":
    main()
