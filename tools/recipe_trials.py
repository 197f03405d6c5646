"""The recipe `gemma` beside llama.cpp's mixtures: KL divergence at no more bytes, on texts nobody calibrated with.

    python tools/recipe_trials.py --peer-python ~/peers/bin/python                both trained models, four mixtures
    python tools/recipe_trials.py --peer-python ~/peers/bin/python --models tiny --mixtures Q4_K_M --minutes 2

Their side is llama.cpp's own file of the mixture; the argument is an interpreter that has llama-cpp-python. Both sides
are weighed by one importance matrix. It and the recipe's trial models read texts that the tiny models were trained on;
scored are turns of tasks held back from training. `less` is how much smaller the recipe's divergence is, with a 95 %
interval over texts: pairs of the same tokens. A row "ours" has the mixture's types rounded by our encoders, and "noise"
what the recipe chooses without trial models: so the rows show what is the encoders', the sums' and the trials' part.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
from llama_quantize import theirs
from tiny_tasks import TASKS, Example, draw
from tiny_texts import conversation

from gemma4q import load
from gemma4q.convert.convert import planned as converted
from gemma4q.gguf.reader import open_gguf
from gemma4q.measure.calibration import Calibration
from gemma4q.measure.divergence import Scores, mean
from gemma4q.measure.evaluate import Speaking, evaluate
from gemma4q.measure.sensitivity import LONGEST, Divergence, Remembered
from gemma4q.measure.texts import Passage, conversations, passages
from gemma4q.quantize.importance import Importance
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.overrides import Overrides
from gemma4q.quantize.quantize import planned
from gemma4q.quantize.recipe import recipe

TRAINED = Path(__file__).parents[1] / "tests/data/trained"
MODELS = ("tiny", "tiny-moe")
MIXTURES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
CALIBRATED = 400  # conversations
JUDGED = sorted(TASKS.keys() - {"talk", "no_tool"})  # of which there are too few texts


def calibrating() -> list[Example]:
    """Of texts that training drew from."""
    random, tasks = Random("recipe trials, calibration"), list(TASKS)
    return [draw(random, tasks[number % len(tasks)]) for number in range(CALIBRATED)]


def importance(path: Path, texts: Path) -> Importance:
    with Calibration(path) as calibration:
        talks = passages(conversations(texts), calibration.tokenizer, calibration.flavour, everything=True)
        *_, found = calibration.run(calibration.chunks([talk.ids for talk in talks]), Importance({}))
    return found


def turns(model, count: int) -> list[Passage]:
    """What is scored: so many turns of each task, and none of a text that was calibrated with."""
    random, known, found = Random("recipe trials"), {example.essence for example in calibrating()}, []
    for number in range(count * len(JUDGED)):
        task = JUDGED[number % len(JUDGED)]
        while (example := draw(random, task, held=True)).essence in known:
            pass
        prompt, turn = (model.tokenize(text, special=True) for text in (example.prompt(), example.turn()))
        found.append(Passage(np.array(prompt + turn, np.int32), len(prompt), task, number))
    return found


def scores(path: Path, base: Remembered, judged: list[Passage]) -> Scores:
    with load(path, context=LONGEST) as model:
        return evaluate(judged, range(len(judged)), Speaking(model, judged), base)


def trials(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    source, texts = folder / f"{name}-BF16.gguf", folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(conversation(example)) + "\n" for example in calibrating()))
    with converted(TRAINED / name, source, "bf16") as conversion:
        conversion.write()
    weights, original = importance(source, texts), load(source, context=LONGEST)
    judged = turns(original, options.turns)
    base = Remembered(Speaking(original, judged))
    for wanted in options.mixtures:
        peer = theirs(options.peer_python, source, folder / "theirs.gguf", wanted, weights)
        their_scores, their_bytes = scores(peer, base, judged), tensor_bytes(peer)
        mixed = planned(source, folder / f"{name}.gguf", mixture(wanted), importance=weights)
        wish = recipe(mixed, Overrides(), None, False)
        noise = wish.errors(2)
        with Divergence(mixed, texts, 60 * options.minutes) as measure:
            plan, found = wish.choose(noise, measure)
        for side, each in (("ours", mixed), ("noise", wish.choose(noise)[0]), ("recipe", plan)):
            each.write()
            our_scores = scores(each.files[0].path, base, judged)
            yield {
                "model": name,
                "mixture": wanted,
                "side": side,
                "tokens": len(our_scores),
                "passages": len(judged),
                "bytes": their_bytes,
                "our_bytes": tensor_bytes(each.files[0].path),
                "divergence": mean(their_scores.divergence, their_scores.text)._asdict(),
                "our_divergence": mean(our_scores.divergence, our_scores.text)._asdict(),
                "less": mean(their_scores.divergence - our_scores.divergence, our_scores.text)._asdict(),
                "same_top": float(their_scores.same.mean()),
                "our_same_top": float(our_scores.same.mean()),
            } | (
                {
                    "measured": len(found.points),
                    "of_noise": found.of_noise,
                    "of_foretold": found.of_foretold,
                    "points": [(p.name, len(p.types), p.noise, p.foretold, p.divergence) for p in found.points],
                    "types": {change.tensor.name: int(change.type) for change in plan.changes},
                }
                if side == "recipe"
                else {}
            )
    original.close()


def tensor_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in open_gguf(path).tensors.values())


def line(row: dict) -> str:
    less, sides = row["less"], (row["divergence"]["value"], row["our_divergence"]["value"])
    sizes = f"{row['bytes']:>9,} {row['our_bytes']:>9,}"
    kl = f"{sides[0]:.2e} {sides[1]:.2e}  less {less['value']:+.1e} ({less['low']:+.1e} … {less['high']:+.1e})"
    tops = f"{row['same_top']:.2%} {row['our_same_top']:.2%}"
    ranks = [row.get(name) for name in ("of_noise", "of_foretold")]
    ranks = " ".join("-" if rank is None else f"{rank:.2f}" for rank in ranks)
    known = f"  {row['measured']} {ranks}" if "measured" in row else ""
    return f"{row['model']:<9}{row['mixture']:<7} {row['side']:<7}{sizes}  {kl}  {tops}{known}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--mixtures", nargs="*", default=MIXTURES)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--turns", type=int, default=500, help="of each task")
    parser.add_argument("--json", type=Path, help="keep the numbers")
    options, rows = parser.parse_args(), []
    for name in options.models:
        with TemporaryDirectory() as folder:
            for row in trials(name, options, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
