"""What is measured of the tiny trained models: files of theirs, importance, how far a file lies from the original."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tiny_tasks import TASKS
from tiny_texts import texts

from gemma4q import load
from gemma4q.convert.convert import planned as converted
from gemma4q.measure.calibration import Calibration
from gemma4q.measure.divergence import Scores
from gemma4q.measure.evaluate import Rows, Speaking, evaluate
from gemma4q.measure.sensitivity import LONGEST, Divergence
from gemma4q.measure.texts import Passage, conversations, passages
from gemma4q.quantize.allocate import Allocation
from gemma4q.quantize.importance import Importance
from gemma4q.quantize.overrides import Overrides
from gemma4q.quantize.quantize import Quantization
from gemma4q.quantize.recipe import recipe

TRAINED = Path(__file__).parents[1] / "tests/data/trained"
MODELS = ("tiny", "tiny-moe")
MOST_KEPT = 256 << 20  # bytes of what the original says
# No held-back text of small talk differs from what training drew; stories are new each time.
JUDGED = ("copy", "reverse", "sums", "lookup", "several_lookups", "tools", "json", "story")


def original(name: str, folder: Path) -> Path:
    """The checkpoint as it was trained, in BF16."""
    path = folder / f"{name}-BF16.gguf"
    with converted(TRAINED / name, path, "bf16") as conversion:
        conversion.write()
    return path


def talks(path: Path, count: int = 400, seed: int = 1, held_back: bool = False, tasks=tuple(TASKS)) -> Path:
    """Conversations that a tiny model can read, one a line: of those that its training drew from, or of the others."""
    path.write_text("\n".join(texts(count, seed, held_back, tasks)))
    return path


def importance(path: Path, talks: Path) -> Importance:
    """What every token of conversations, one a line of a file, says of a model's columns."""
    with Calibration(path) as calibration:
        found = passages(conversations(talks), calibration.tokenizer, calibration.flavour, everything=True)
        *_, weights = calibration.run(calibration.chunks([passage.ids for passage in found]), Importance({}))
    return weights


def written(plan: Quantization) -> Path:
    plan.write()
    return plan.files[0].path


class Remembered:
    """What a model said of some passages, kept as far as it is not too much: it need not read them for each answer."""

    known_above = None

    def __init__(self, model: Speaking):
        self.model, self.kept, self.room = model, {}, MOST_KEPT

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """As `Rows` of `evaluate` has it."""
        if (number, start, end) in self.kept:
            return self.kept[number, start, end]
        rows = self.model.rows(number, start, end)
        if rows.nbytes <= self.room:
            self.kept[number, start, end] = rows
            self.room -= rows.nbytes
        return rows


def scores(path: Path, found: Sequence[Passage], base: Rows, threads: int = 1) -> Scores:
    """What a model file makes of passages, beside what the original says of them."""
    with load(path, context=LONGEST, threads=threads) as model:
        return evaluate(found, range(len(found)), Speaking(model, found), base, model.threads.count)


def chosen(
    plan: Quantization, talks: Path, minutes: float, threads: int = 1, target: int | None = None
) -> tuple[Quantization, Allocation]:
    """The recipe `gemma` for the bytes of a plan, or for a file of `target` bytes, with trial models that read
    conversations for so many minutes."""
    choice = recipe(plan, Overrides(), target, False)
    with Divergence(plan, talks, 60 * minutes, threads) as measure:
        return choice.choose(choice.errors(threads), measure if minutes else None)


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
