"""The recipe `gemma` beside llama.cpp's mixtures: KL divergence at no more bytes, on texts nobody calibrated with.

    python tools/recipe_trials.py ~/peers/bin/python                both trained models, four mixtures
    python tools/recipe_trials.py ~/peers/bin/python --models tiny --mixtures Q4_K_M --minutes 2

Their side is llama.cpp's own file of the mixture; the argument is an interpreter that has llama-cpp-python. Both sides
are weighed by one importance matrix. It and the recipe's trial models read texts that the tiny models were trained on;
scored are turns of tasks held back from training. `less` is how much smaller the recipe's divergence is, with a 95 %
interval over texts: pairs of the same tokens. A row "ours" has the mixture's types rounded by our encoders, and "noise"
what the recipe chooses without trial models: so the rows show what is the encoders', the sums' and the trials' part.
"size" is --target-size with the size of llama.cpp's file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from llama_quantize import theirs
from tiny_measures import JUDGED, MODELS, Remembered, chosen, importance, original, scores, talks, written

from gemma4q import load
from gemma4q.gguf.reader import open_gguf
from gemma4q.measure.divergence import Scores, mean
from gemma4q.measure.evaluate import Speaking
from gemma4q.measure.sensitivity import LONGEST
from gemma4q.measure.texts import conversations, passages
from gemma4q.quantize.allocate import Allocation
from gemma4q.quantize.mixtures import mixture
from gemma4q.quantize.quantize import planned

MIXTURES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")


def trials(name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    source, read = original(name, folder), talks(folder / "read.jsonl")
    held = conversations(talks(folder / "held.jsonl", options.texts, 2, True, JUDGED))
    weights = importance(source, read)
    with load(source, context=LONGEST, threads=1) as model:
        judged = passages(held, model.tokenizer, model.flavour)
        base = Remembered(Speaking(model, judged))
        for wanted in options.mixtures:
            peer = theirs(options.python, source, folder / "theirs.gguf", wanted, weights)
            other = scores(peer, judged, base)
            mixed = planned(source, folder / f"{name}.gguf", mixture(wanted), importance=weights)
            any_size = planned(source, folder / f"{name}.gguf", mixture("Q8_0"), importance=weights)
            sides = {
                "ours": (mixed, None),
                "noise": chosen(mixed, read, 0),
                "recipe": chosen(mixed, read, options.minutes),
                "size": chosen(any_size, read, options.minutes, target=peer.stat().st_size),
            }
            for side, (plan, found) in sides.items():
                path = written(plan)
                row = {"model": name, "mixture": wanted, "side": side}
                row |= {"bytes": tensor_bytes(peer), "our_bytes": tensor_bytes(path)}
                row |= compared(other, scores(path, judged, base))
                yield row | (measured(found) if found and found.points else {})


def compared(theirs: Scores, ours: Scores) -> dict:
    return {
        "texts": len(set(ours.text.tolist())),
        "tokens": len(ours),
        "divergence": mean(theirs.divergence, theirs.text)._asdict(),
        "our_divergence": mean(ours.divergence, ours.text)._asdict(),
        "less": mean(theirs.divergence - ours.divergence, ours.text)._asdict(),
        "same_top": float(theirs.same.mean()),
        "our_same_top": float(ours.same.mean()),
    }


def measured(found: Allocation) -> dict:
    points = [(p.name, len(p.types), p.noise, p.foretold, p.divergence) for p in found.points]
    types = {name: int(type) for name, type in found.types.items()}
    return {"of_noise": found.of_noise, "of_foretold": found.of_foretold, "points": points, "types": types}


def tensor_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in open_gguf(path).tensors.values())


def line(row: dict) -> str:
    less, sides = row["less"], (row["divergence"]["value"], row["our_divergence"]["value"])
    sizes = f"{row['bytes']:>9,} {row['our_bytes']:>9,}"
    kl = f"{sides[0]:.2e} {sides[1]:.2e}  less {less['value']:+.1e} ({less['low']:+.1e} … {less['high']:+.1e})"
    tops = f"{row['same_top']:.2%} {row['our_same_top']:.2%}"
    known = ""
    if "points" in row:
        ranks = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("of_noise", "of_foretold"))
        known = f"  {len(row['points'])} trials, rank correlations {' '.join(ranks)}"
    return f"{row['model']:<9}{row['mixture']:<7} {row['side']:<7}{sizes}  {kl}  {tops}{known}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--mixtures", nargs="*", default=MIXTURES)
    parser.add_argument("--minutes", type=float, default=20, help="of trial models for each recipe")
    parser.add_argument("--texts", type=int, default=800, help="that are scored")
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
