"""Every type beside llama.cpp's own file of it: how far both lie from the tiny models in BF16, on the same tokens.

    python tools/type_trials.py ~/peers/bin/python                                          both models: a table
    python tools/type_trials.py ~/peers/bin/python --csv types.csv --plot types-NAME.svg    and kept, and drawn
    python tools/type_trials.py ~/peers/bin/python --types Q4_0 Q4_K_M --recipes            a few types, no recipe

The argument is an interpreter that has llama-cpp-python. Types are all mixtures of blocks, and --pure of each block
format; without importance and with one matrix for both sides, of texts that training drew from. Read are texts of the
models' tasks that training never drew. How values are rounded is luck too, so all is done some times over, each time
with other texts for importance and to read, and from the second time on with a little noise in the original: only then
are values rounded anew. `more` is our KL divergence less llama.cpp's with a 95 % interval over texts, pairs of the same
tokens; `differ` counts tensors that are not byte for byte the same. The recipe `gemma` has no counterpart, nor has
Q2_K_S without importance, which llama.cpp refuses: they stand there for their size.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb, inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from llama_quantize import theirs
from plot_types import draw
from tiny_measures import JUDGED, MODELS, Remembered, chosen, importance, original, scores, talks, write_csv, written

from gemma4q import Model, load
from gemma4q.abi import BLOCKS
from gemma4q.gguf.quants import dequantize, quantize
from gemma4q.gguf.reader import GGUF, open_gguf
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.measure.divergence import Mean, Scores, mean
from gemma4q.measure.evaluate import Speaking
from gemma4q.measure.sensitivity import LONGEST
from gemma4q.measure.texts import Passage, conversations, passages
from gemma4q.quantize.mixtures import MIXTURES, is_rounded, mixture
from gemma4q.quantize.overrides import Overrides
from gemma4q.quantize.quantize import Quantization, planned

IN_BLOCKS = {name: m for name, m in MIXTURES.items() if m.base is not None and BLOCKS[m.base][0] > 1}
PURE = {m.base: name for name, m in reversed(IN_BLOCKS.items())}  # the first name of each block format
REFUSED = ("Q2_K_S",)  # by llama.cpp, where there is no importance
RECIPES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")  # whose bytes the recipe gets
DRAWS, TEXTS = 4, 400  # texts of a draw: as many are calibrated on
SHAKE = 0.02  # of each row's rms; four bits lose some 0.08


@dataclass(frozen=True)
class Trial:
    """A type to look at, by its name. weighed: with importance."""

    type: str
    pure: bool
    weighed: bool


def all_trials(types: Sequence[str]) -> list[Trial]:
    mixtures = [(name, False) for name in IN_BLOCKS if name in types]
    pure = [(name, True) for name in IN_BLOCKS if name in types and name in PURE.values()]
    return [Trial(*one, weighed) for weighed in (False, True) for one in mixtures + pure]


def shaken(source: Path, to: Path, share: float, seed: int) -> Path:
    """A copy with noise in the matrices that are rounded, of a share of each row's rms."""
    random, gguf, tensors = np.random.default_rng(seed), open_gguf(source), []
    for tensor in gguf.tensors.values():
        data = tensor.data
        if is_rounded(tensor.name, tensor.shape):
            x = dequantize(data, tensor.type).reshape(tensor.shape)
            size = share * np.sqrt((x * x).mean(-1, keepdims=True))
            data = quantize((x + size * random.standard_normal(x.shape)).astype(np.float32), tensor.type)
        tensors.append(TensorData.of(tensor.name, tensor.type, tensor.shape, data))
    write_gguf(to, gguf.metadata, tensors, gguf.types)
    return to


class Judge:
    """How far files lie from the original on some passages; files of the same weights are read once."""

    def __init__(self, base: Model, found: Sequence[Passage]):
        self.found, self.said = found, Remembered(Speaking(base, found))
        self.threads = base.threads.count
        self.known: dict[str, Scores] = {}

    def __call__(self, path: Path) -> Scores:
        digest = hashlib.sha256()
        for tensor in sorted(open_gguf(path).tensors.values(), key=lambda tensor: tensor.name):
            digest.update(f"{tensor.name} {tensor.type}".encode() + tensor.data.tobytes())
        if digest.hexdigest() not in self.known:
            self.known[digest.hexdigest()] = scores(path, self.found, self.said, self.threads)
        return self.known[digest.hexdigest()]


def differing(ours: GGUF, others: GGUF) -> int:
    """Tensors whose bytes are not the same. Raises SystemExit where types are not, which says nothing of rounding."""
    count = 0
    for name, tensor in ours.tensors.items():
        other = others.tensors[name]
        if tensor.type != other.type:
            raise SystemExit(f"{name} has type {tensor.type} of ours and {other.type} of llama.cpp")
        count += not np.array_equal(tensor.data, other.data)
    return count


def row(
    model: str, trial: Trial, plan: Quantization, ours: Scores, other: Scores | None = None, differ: int | None = None
) -> dict:
    """What is kept of a file, beside llama.cpp's where there is one."""
    found = {"model": model, "type": trial.type, "pure": trial.pure, "importance": trial.weighed}
    found |= {"bytes": sum(change.data.nbytes for change in plan.changes), "bits": round(plan.bits_per_weight, 4)}
    found |= {"texts": len(np.unique(ours.text)), "tokens": len(ours), "differ": differ}
    sides = {"": ours.divergence, "theirs": None, "more": None}
    if other is not None:
        sides |= {"theirs": other.divergence, "more": ours.divergence - other.divergence}
    for side, values in sides.items():
        known = Mean(None, None, None) if values is None else mean(values, ours.text, positive=side != "more")
        value, *edges = (f"{side} {part}".strip() for part in ("divergence", "low", "high"))
        found |= dict(zip((value, *edges), known, strict=True))
    tops = (None if side is None else float(side.same.mean()) for side in (ours, other))
    return found | dict(zip(("same top", "theirs same top"), tops, strict=True))


Seen = tuple[Quantization, Scores, Scores | None, int | None]  # a file, and llama.cpp's: what `row` is given


def drawn(python: str, source: Path, number: int, options: argparse.Namespace) -> Iterator[tuple[Trial, Seen]]:
    """Every trial once, with the texts and the noise of one draw."""
    folder, seed = source.parent, options.seed + number
    if number:
        source = shaken(source, folder / "shaken.gguf", options.shake, seed)
    read = talks(folder / "talks.jsonl", options.texts, seed)
    held = talks(folder / "held.jsonl", options.texts, seed + 1, True, JUDGED)
    weights, to = importance(source, read), folder / "ours.gguf"
    with load(source, context=LONGEST, threads=options.threads) as base:
        judge = Judge(base, passages(conversations(held), base.tokenizer, base.flavour))
        for trial in all_trials(options.types):
            used = weights if trial.weighed else None
            plan = planned(source, to, mixture(trial.type), Overrides(pure=trial.pure), importance=used)
            ours = judge(written(plan))
            if trial.type in REFUSED and not trial.weighed:
                yield trial, (plan, ours, None, None)
                continue
            other = theirs(python, source, folder / "theirs.gguf", trial.type, used, trial.pure)
            yield trial, (plan, ours, judge(other), differing(open_gguf(to), open_gguf(other)))
        for wanted in options.recipes:
            plan = planned(source, to, mixture(wanted), importance=weights)
            plan, _ = chosen(plan, read, options.minutes, options.threads)
            yield Trial(f"gemma for {wanted}", False, True), (plan, judge(written(plan)), None, None)


def together(parts: Sequence[Scores | None]) -> Scores | None:
    """Scores of several draws, whose texts are not the same."""
    if parts[0] is None:
        return None
    return Scores.joined([replace(part, text=part.text + number * 2**20) for number, part in enumerate(parts)])


def trials(python: str, name: str, options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """A row for each trial, as it comes in the last draw."""
    source, seen = original(name, folder), defaultdict[Trial, list[Seen]](list)
    for number in range(options.draws):
        for trial, found in drawn(python, source, number, options):
            seen[trial].append(found)
            if number == options.draws - 1:
                plans, ours, others, differ = zip(*seen[trial], strict=True)
                yield row(name, trial, plans[-1], together(ours), together(others), differ[-1])


def verdict(found: dict) -> str:
    if found["more divergence"] is None:
        return ""
    if not found["differ"]:
        return "the same bytes"
    return "worse" if found["more low"] > 0 else "better" if found["more high"] < 0 else "no difference shown"


def ratio(rows: Sequence[dict]) -> Mean:
    """Our divergence over llama.cpp's: the median of files that are not the same, and its 95 % interval by their ranks.

    No mean: one token, where a route turns, may be nearly all of a file's divergence.
    """
    found = sorted(r["divergence"] / r["theirs divergence"] for r in rows if r["differ"])
    count, outside = len(found), 0
    while sum(comb(count, k) for k in range(outside + 1)) <= 0.025 * 2**count:
        outside += 1
    edges = (found[outside - 1], found[-outside]) if outside else (0.0, inf)
    return Mean(median(found), *edges)


HEAD = f"{'model':<9}{'type':<17}{'':<5}{'imatrix':<8}{'bits':>6}  {'differ':>6}  {'ours':>9} {'theirs':>9}  more"


def line(found: dict) -> str:
    """Of the table, `HEAD` above."""
    what = f"{found['model']:<9}{found['type']:<17}{'pure' * found['pure']:<5}{'yes' * found['importance']:<8}"
    ours, other, more = (found[key] for key in ("divergence", "theirs divergence", "more divergence"))
    if other is None:
        return f"{what}{found['bits']:>6.2f}  {'':>6}  {ours:>9.6f}"
    apart = f"{more:+.6f} ({found['more low']:+.6f} … {found['more high']:+.6f})"
    return f"{what}{found['bits']:>6.2f}  {found['differ']:>6}  {ours:>9.6f} {other:>9.6f}  {apart} {verdict(found)}"


def in_all(rows: Sequence[dict]) -> Iterator[str]:
    """What the table comes to, with and without importance."""
    for weighed in (False, True):
        beside = [r for r in rows if r["importance"] == weighed and r["differ"] is not None]
        words = [verdict(found) for found in beside]
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        yield f"{'with' if weighed else 'without'} importance, {len(beside)} files: {counts}"
        if sum(bool(found["differ"]) for found in beside) > 1:
            found = ratio(beside)
            yield f"  ours over theirs where bytes differ: {found.value:.3f} ({found.low:.3f} … {found.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--types", nargs="*", default=list(IN_BLOCKS), choices=list(IN_BLOCKS))
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="mixtures whose bytes the recipe gets")
    parser.add_argument("--minutes", type=float, default=0.5, help="of trial models for each recipe")
    parser.add_argument("--draws", type=int, default=DRAWS, help="times that all is done with other texts")
    parser.add_argument("--texts", type=int, default=TEXTS, help="of a draw")
    parser.add_argument("--shake", type=float, default=SHAKE, help="noise, a share of each row's rms")
    parser.add_argument("--seed", type=int, default=1, help="of the first draw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="keep the numbers")
    parser.add_argument("--csv", type=Path, help="keep the numbers")
    parser.add_argument("--plot", type=Path, help="a picture of each model, which NAME in the file's name becomes")
    options, rows = parser.parse_args(), []
    print(HEAD)
    for name in options.models:
        with TemporaryDirectory() as folder:
            for found in trials(options.python, name, options, Path(folder)):
                rows.append(found)
                print(line(found), flush=True)
    print(*in_all(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
