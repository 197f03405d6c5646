"""The recipe `gemma` beside llama.cpp's mixtures: KL divergence at no more bytes, on texts nobody calibrated with.

    python tools/recipe_trials.py                                  both trained models, four mixtures: a table
    python tools/recipe_trials.py --minutes 0 --json trials.json   by the sums of errors alone

Both sides are rounded by gemma4q's quantisers and weighed by one importance matrix, from the shipped calibration
conversations, which the recipe's trial models read too; scored are the shipped evaluation conversations and turns of
the tiny models' own tasks, held back from their training. `less` is how much smaller the recipe's divergence is, with a
95 % interval over texts: pairs of the same tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from tiny_measures import MODELS, chosen, importance, original, scores, written
from tiny_tasks import TASKS, draw

from gemma4q import load
from gemma4q.measure.divergence import mean
from gemma4q.measure.evaluate import Speaking
from gemma4q.measure.sensitivity import LONGEST
from gemma4q.measure.texts import Passage, conversations, passages
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.quantize import planned
from gemma4q.shipped import CALIBRATION, EVALUATION

MIXTURES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
TURNS = 100  # of the tiny models' tasks


def texts(model) -> dict[str, list[Passage]]:
    """What is scored: by the name of where it is from."""
    talks = passages(conversations(EVALUATION), model.tokenizer, model.flavour)
    random, turns = Random("recipe trials"), []
    for number in range(TURNS):
        task = sorted(TASKS)[number % len(TASKS)]
        example = draw(random, task, held=True)
        prompt, turn = (model.tokenize(text, special=True) for text in (example.prompt(), example.turn()))
        turns.append(Passage(np.array(prompt + turn, np.int32), len(prompt), task, number))
    return {"conversations": [p for p in talks if len(p.ids) <= LONGEST], "tasks": turns}


def trials(name: str, mixtures: list[str], minutes: float, folder: Path) -> Iterator[dict]:
    source = original(name, folder)
    weights, base = importance(source, CALIBRATION), load(source, context=LONGEST)
    sets = texts(base)
    for wanted in mixtures:
        theirs = planned(source, folder / "theirs.gguf", mixture(wanted), importance=weights)
        plan = planned(source, folder / f"{name}.gguf", mixture(wanted), importance=weights)
        ours, found = chosen(plan, CALIBRATION, minutes)
        paths = [written(each) for each in (theirs, ours)]
        for of, passages_of in sets.items():
            one, other = (scores(path, passages_of, Speaking(base, passages_of)) for path in paths)
            yield {
                "model": name,
                "mixture": wanted,
                "texts": of,
                "tokens": len(one),
                "passages": len(passages_of),
                "bytes": sum(change.data.nbytes for change in theirs.changes),
                "recipe_bytes": found.nbytes,
                "divergence": mean(one.divergence, one.text)._asdict(),
                "recipe_divergence": mean(other.divergence, other.text)._asdict(),
                "less": mean(one.divergence - other.divergence, one.text)._asdict(),
                "same_top": float(one.same.mean()),
                "recipe_same_top": float(other.same.mean()),
                "measured": len(found.points),
                "rank_correlation": found.correlation,
                "types": {c.tensor.name: int(c.type) for c in ours.changes},
            }
    base.close()


def line(row: dict) -> str:
    less, sides = row["less"], (row["divergence"]["value"], row["recipe_divergence"]["value"])
    sizes = f"{row['bytes']:>9,} {row['recipe_bytes']:>9,}"
    kl = f"{sides[0]:.5f} {sides[1]:.5f}  less {less['value']:+.5f} ({less['low']:+.5f} … {less['high']:+.5f})"
    rank = "-" if row["rank_correlation"] is None else f"{row['rank_correlation']:.2f}"
    tops = f"{row['same_top']:.2%} {row['recipe_same_top']:.2%}"
    return f"{row['model']:<9}{row['mixture']:<7} {row['texts']:<14}{sizes}  {kl}  {tops}  {row['measured']} {rank}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--mixtures", nargs="*", default=MIXTURES)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path, help="Keep the numbers.")
    options, rows = parser.parse_args(), []
    for name in options.models:
        with TemporaryDirectory() as folder:
            for row in trials(name, options.mixtures, options.minutes, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
