"""What the tiny models can do: right answers of 500 to prompts of each task that no training ever drew.

    python tools/score_tiny.py tiny.gguf                  a table
    python tools/score_tiny.py tiny-bf16.gguf tiny.gguf   the same prompts for both, and what the second loses

Greedy and free-running, through the engine as a user meets it; right is the whole final answer, letter by letter, or
the call with all its arguments. Sums are worked out in thoughts, of the others every second prompt. Near facts lie with
their question inside the sliding window; far ones 1.5 to 3 windows before the question.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from tiny_tasks import Example, copy, extraction, held_back, lookup, sums, tools

import gemma4q
from gemma4q.text.tokenizer import Tokenizer

SEED = 20261121
TASKS = ("sums", "copy", "lookup near", "lookup far", "tools", "json")
LONGEST = 160  # tokens of an answer


@dataclass
class Measure:
    """Where the fact of a look-up stands, in tokens."""

    tokenizer: Tokenizer
    window: int

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, special=True))

    def near(self, example: Example) -> bool:
        prompt = example.prompt()
        return self.count(prompt[prompt.index(example.fact) :]) <= self.window

    def far(self, example: Example) -> bool:
        prompt = example.prompt()
        after = prompt[prompt.index(example.fact) + len(example.fact) :]
        question = example.messages[-1]["content"].splitlines()[-1].split(". ")[-1]
        distance = self.count(after[: after.rindex(question)])
        return 1.5 * self.window <= distance <= 3 * self.window


def examples(task: str, measure: Measure, count: int) -> Iterator[Example]:
    """The same for every model with this vocabulary and window."""
    r = Random(f"{SEED} {task}")
    makers: dict[str, Callable[[Random], Example]] = {
        "sums": sums,
        "copy": copy,
        "lookup near": lambda r: lookup(r, facts=(1, 4), place=1),
        "lookup far": lambda r: lookup(r, facts=(6, 14), place=r.random()),
        "tools": tools,
        "json": extraction,
    }
    fits = {"lookup near": measure.near, "lookup far": measure.far}.get(task, lambda _: True)
    given = 0
    while given < count:
        example = makers[task](r)
        thinks = task == "sums" or given % 2 == 0
        example = replace(example, thinking=thinks)
        if held_back(example.essence) and example.task != "answers" and fits(example):
            given += 1
            yield example


def answer(model: gemma4q.Model, example: Example) -> str:
    """What the model finally says; a call as its name and arguments."""
    generation = model.chat(
        example.messages, tools=example.tools or None, thinking=example.thinking, temperature=0, max_tokens=LONGEST
    )
    events = list(generation.events())
    called = [spoken(e.call.name, e.call.arguments) for e in events if e.kind == "call"]
    return "\n".join(called) or "".join(e.text for e in events if e.kind == "content").strip()


def spoken(name: str, arguments: dict) -> str:
    return f"{name} {json.dumps(arguments, sort_keys=True)}"


def wanted(example: Example) -> str:
    return spoken(*example.call) if example.call else example.answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="GGUF files of one tiny model")
    parser.add_argument("--count", type=int, default=500, help="prompts a task")
    parser.add_argument("--task", action="append", choices=TASKS, help="only these")
    parser.add_argument("--show", type=int, default=0, help="wrong answers of each task to print")
    given = parser.parse_args()
    models = [gemma4q.load(path, context=1024) for path in given.models]
    window = max(layer.window for layer in models[0].config.layers)
    measure = Measure(models[0].tokenizer, window)
    print(f"{'task':14}" + "".join(f"{path.rsplit('/')[-1]:>24}" for path in given.models))
    for task in given.task or TASKS:
        right = [0] * len(models)
        shown = 0
        for example in examples(task, measure, given.count):
            for i, model in enumerate(models):
                said = answer(model, example)
                right[i] += said == wanted(example)
                if said != wanted(example) and shown < given.show:
                    shown += 1
                    print(f"  {example.messages[-1]['content']!r}\n    wanted {wanted(example)!r}\n    said   {said!r}")
        print(f"{task:14}" + "".join(f"{n:>24}" for n in right), flush=True)


if __name__ == "__main__":
    main()
