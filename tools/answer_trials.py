"""Right answers that rounding costs the tiny models: each file is asked the same prompts as the original in BF16.

    python tools/answer_trials.py                                   both models, 500 prompts of each task: a table
    python tools/answer_trials.py --count 50 --csv answers.csv      what is tried, quickly; numbers to keep

Prompts and what is right are tools/score_tiny.py's. The recipe `gemma` has the bytes of Q4_K_M; it and all others are
weighed by importance from texts that training drew from, of which there are none among the prompts. `costs` is right
answers of the original less those of the file, prompt by prompt, with a 95 % interval over prompts (which is nothing
where no prompt is answered otherwise: of 500, as many as four may then be lost unseen).
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from score_tiny import TASKS, Measure, answer, examples, wanted
from tiny_measures import MODELS, chosen, importance, original, talks, write_csv, written
from tiny_tasks import Example

from gemma4q import Model, load
from gemma4q.measure.divergence import mean
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.quantize import planned

TYPES, RECIPE_FOR = ("Q8_0", "Q4_0", "Q4_K_M"), "Q4_K_M"
CONTEXT, TOGETHER = 1024, 8


def files(name: str, folder: Path, minutes: float, threads: int) -> dict[str, tuple[Path, int]]:
    """Paths and bytes of tensors by what is asked of them, the original first."""
    source, read = original(name, folder), talks(folder / "talks.jsonl")
    weights, found = importance(source, read), {}
    for wanted_type in ("BF16", *TYPES):
        plan = planned(source, folder / f"{name}-{wanted_type}.new.gguf", mixture(wanted_type), importance=weights)
        found[wanted_type] = written(plan), sum(change.data.nbytes for change in plan.changes)
    plan = planned(source, folder / f"{name}-gemma.gguf", mixture(RECIPE_FOR), importance=weights)
    plan, allocation = chosen(plan, read, minutes, threads)
    return found | {f"gemma for {RECIPE_FOR}": (written(plan), allocation.nbytes)}


def right(model: Model, asked: Sequence[Example]) -> np.ndarray:
    """Which prompts a model answers as is wanted, bool [prompts]; several at once, which changes no answer."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        said = pool.map(partial(answer, model), asked)
    return np.array([text == wanted(example) for text, example in zip(said, asked, strict=True)])


def counted(base: np.ndarray, other: np.ndarray) -> dict:
    """Of the same prompts, bool [prompts]: right answers of `other`, and what they are fewer than those of `base`."""
    costs = mean(base.astype(float) - other, np.arange(len(base))).map(lambda share: len(base) * share)
    numbers = {"prompts": len(base), "right": int(other.sum())}
    numbers |= {"lost": int((base & ~other).sum()), "gained": int((other & ~base).sum())}
    return numbers | {"costs": round(costs.value), "low": costs.low, "high": costs.high}


def trials(name: str, count: int, minutes: float, threads: int, folder: Path) -> Iterator[dict]:
    """A row for each file and task, and for all tasks of a file."""
    asked: dict[str, list[Example]] = {}
    base: dict[str, np.ndarray] = {}
    for file, (path, nbytes) in files(name, folder, minutes, threads).items():
        facts = {"model": name, "file": file, "bytes": nbytes}
        with load(path, context=CONTEXT, threads=threads, sequences=TOGETHER) as model:
            window = max(layer.window for layer in model.config.layers)
            measure = Measure(model.tokenizer, window)
            asked = asked or {task: list(examples(task, measure, count)) for task in TASKS}
            found = {task: right(model, prompts) for task, prompts in asked.items()}
        base = base or found
        for task in TASKS:
            yield facts | {"task": task} | counted(base[task], found[task])
        yield facts | {"task": "all"} | counted(*(np.concatenate(list(side.values())) for side in (base, found)))


def line(row: dict) -> str:
    """Of the table, `HEAD` above."""
    found = f"{row['right']:>6,} of {row['prompts']:<6,}{row['lost']:>6}{row['gained']:>8}{row['costs']:>7}"
    return f"{row['model']:<9}{row['file']:<18}{row['task']:<13}{found}  ({row['low']:+.1f} … {row['high']:+.1f})"


HEAD = f"{'model':<9}{'file':<18}{'task':<13}{'right':>6}{'lost':>16}{'gained':>8}{'costs':>7}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--count", type=int, default=500, help="Prompts of each task.")
    parser.add_argument("--minutes", type=float, default=0.5, help="For the recipe's trial models.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="Keep the numbers.")
    options, rows = parser.parse_args(), []
    print(HEAD)
    for name in options.models:
        with TemporaryDirectory() as folder:
            for row in trials(name, options.count, options.minutes, options.threads, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    if options.csv:
        write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
