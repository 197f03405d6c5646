"""How far logits lie from those of a quantised file's exact weights: ours on each instruction set, beside llama.cpp's.

    python tools/accuracy.py --peer-python ~/peers/bin/python                  every file of FILES: a table
    python tools/accuracy.py --peer-python ... --file tiny-moe-q4_0 --ties     one; rows that chose other experts
    python tools/emulate_amx.py -m peers tests/test_accuracy_peers.py          the table with emulated tiles, and limits

The truth is the reference backend: weights dequantised to float32, float32 activations, keys and values. Each text is
computed as prompt rows, in one batch, and as generated rows, token by token, with keys and values as F32 and as F16 on
both sides (llama.cpp's attention is flash attention for F16, as it runs by itself, and plain for F32). Texts are the
tasks that the tiny models learned, none of them drawn in training; for the random models of tests/data/golden random
tokens. The error is the root of the mean square over all rows and tokens of the vocabulary; its ratio is ours by
llama.cpp's, and its spread the middle 95 % of as many texts drawn with return, 1,000 times.

Where a router is near a tie, rounding turns it, and that is no measure of accuracy: a row so turned is as wrong as one
may be, and so is, a little, whatever sees it. So of models with experts the ratio is told without the rows in which a
layer chose other experts than the truth, here or there, and over the rows before the first of them in each text, which
have seen none: that is judged.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from llama_quantize import theirs
from tiny_tasks import TASKS, draw

from gemma4q import backends
from gemma4q.abi import PAGE, OpCode, RowFlag, Status, TensorType
from gemma4q.backends.native import isas
from gemma4q.convert.convert import planned
from gemma4q.model import open_model
from gemma4q.model.forward import build
from gemma4q.plan.batch import Batch, Limits, Step
from gemma4q.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PEER = Path(__file__).with_name("llama_logits.py")
TRAINED = ("tiny", "tiny-moe")
RANDOM = ("e2b-like", "e4b-like", "moe-like", "dense-like", "unified-like")
# Rows of 256 fit super-blocks; the random models' rows of 64 and 96 do not.
FILES = {f"{name}-{kind}": (name, kind) for name in TRAINED for kind in ("q8_0", "q4_0", "q4_k_m")}
FILES |= {f"{name}-{kind}": (name, kind) for name in RANDOM for kind in ("q8_0", "q4_0")}
CLASSES, KV = ("prompt", "generated"), ("f32", "f16")
EACH = 8  # texts of each task
RANDOM_TEXTS, RANDOM_TOKENS = 160, 48
DRAWS = 1000


def make(file: str, folder: Path, peer_python: str) -> Path:
    """A model of FILES, written by llama.cpp's quantiser from the checkpoint's bf16 or the golden's F32."""
    name, kind = FILES[file]
    source, out = ROOT / "tests/data/golden" / f"{name}.gguf", folder / f"{file}.gguf"
    if name in TRAINED:
        source = folder / f"{name}-bf16.gguf"
        with planned(ROOT / "tests/data/trained" / name, source, "bf16") as conversion:
            conversion.write()
    return theirs(peer_python, source, out, kind.upper())


def ask(peer_python: str, *arguments: object) -> None:
    done = subprocess.run([peer_python, PEER, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PEER.name}: {done.stderr[-2000:]}")


@dataclass(frozen=True)
class Rows:
    """What an engine made of all texts' rows: logits [rows, vocab], experts [rows, layers * used] (of none: [rows, 0]).

    leads: [rows, layers], by how much the router's logit of the last expert chosen exceeds the best one that was not.
    """

    logits: np.ndarray
    experts: np.ndarray
    leads: np.ndarray | None = None

    def error(self, truth: "Rows") -> np.ndarray:
        """Mean square of each row's error."""
        return ((self.logits.astype("f8") - truth.logits) ** 2).mean(1)


class Measured:
    """A file, its texts, and what each engine makes of them."""

    def __init__(self, path: Path, peer_python: str):
        self.path, self.peer_python = path, peer_python
        self.gguf, self.config, self.weights = open_model(path)
        self.plan = build(self.config, self.weights.shapes)
        self.texts = list(self._texts())
        self.lengths = [len(ids) for ids in self.texts]

    def _texts(self) -> Iterator[list[int]]:
        if "tokenizer.chat_template" in self.gguf.metadata:
            tokenizer, random = Tokenizer.from_gguf(self.gguf), Random(1)
            for task in TASKS:
                for _ in range(EACH):
                    example = draw(random, task, held=True)
                    yield [int(i) for i in tokenizer.encode(example.prompt() + example.turn(), special=True)]
        else:
            random = np.random.default_rng(1)
            for _ in range(RANDOM_TEXTS):
                yield [2, *random.integers(5, self.config.vocab, RANDOM_TOKENS - 1).tolist()]

    def run(self, backend: str, isa: str | None, kv: str, generated: bool, texts: int | None = None) -> Rows:
        """Of the first texts, or of all."""
        most = max(self.lengths)
        pages = np.arange(-(-most // PAGE), dtype=np.int32)
        limits = Limits(most, most, 1, len(pages) * PAGE, len(pages), len(pages))
        kind, batch = TensorType[kv.upper()], Batch(limits, self.config.width, self.config.vocab)
        session, parts = backends.get(backend).load(self.plan, self.weights.tensors, limits, kind, 1, isa), []
        for ids in self.texts[:texts]:
            size = 1 if generated else len(ids)
            for at in range(0, len(ids), size):
                want = np.full(size, RowFlag.WANT_LOGITS | RowFlag.WANT_TOP)
                batch.fill([Step(ids[at : at + size], at, pages, pages, generated=generated, want=want)])
                parts.append(stepped(session, batch, size))
        session.close()
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))

    @cached_property
    def truth(self) -> Rows:
        return self.run("reference", None, "f32", False)

    @cached_property
    def peer(self) -> dict[tuple[str, str], Rows]:
        """llama.cpp's rows by class and type of keys and values."""
        with tempfile.TemporaryDirectory() as folder:
            texts, out = Path(folder, "texts.json"), Path(folder, "out.npz")
            texts.write_text(json.dumps(self.texts))
            ask(self.peer_python, self.path, texts, out)
            with np.load(out) as found:
                self.about = str(found["about"])
                keys = {(name, kv): f"{name}-{kv}" for name, kv in product(CLASSES, KV)}
                return {where: Rows(found[key], found[f"{key}.experts"]) for where, key in keys.items()}


def stepped(session: backends.Session, batch: Batch, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A step's logits, experts and leads; what routers see and say is read before anything takes its place."""
    at, experts, leads = 0, [np.zeros((rows, 0), np.int32)], [np.zeros((rows, 0), np.float32)]
    for number, op in enumerate(session.plan.ops):
        if op.code == OpCode.ROUTE:
            used = op.args["used"]
            session.run(batch, at, number)
            scores = -np.sort(-session.read(op.inputs[0].name)[:rows], axis=1)
            leads.append(scores[:, used - 1 : used] - scores[:, used : used + 1])
            session.run(batch, number, number + 1)
            experts.append(np.sort(session.read(op.out.name)[:rows, :used], axis=1))
            at = number + 1
    result = session.run(batch, at)
    if result.status != Status.OK:
        raise SystemExit(f"step failed: {result.status.name}")
    return result.logits[:rows].copy(), np.concatenate(experts, axis=1), np.concatenate(leads, axis=1)


Ratio = tuple[float, float, float]  # and the ends of its spread


@dataclass(frozen=True)
class Compared:
    """Two engines' errors over `rows` rows of one file, class and cache.

    turned: [ours, theirs], numbers of rows whose experts are not the truth's. without: the ratio without these rows.
    before: rows before the first of them in their text. judged: the ratio over those.
    """

    rows: int
    rms: float
    peer_rms: float
    ratio: Ratio
    turned: tuple[np.ndarray, np.ndarray]
    without: Ratio
    before: int
    judged: Ratio


def compare(measured: Measured, ours: Rows, theirs: Rows) -> Compared:
    truth, lengths = measured.truth, measured.lengths
    errors = np.stack([ours.error(truth), theirs.error(truth)])
    turned = [(rows.experts != truth.experts).any(1) for rows in (ours, theirs)]
    either = turned[0] | turned[1]
    before = np.concatenate([np.cumsum(part) == 0 for part in np.split(either, np.cumsum(lengths)[:-1])])
    return Compared(
        len(before), *np.sqrt(errors.mean(1)).tolist(), ratio_of(errors, lengths),
        (np.flatnonzero(turned[0]), np.flatnonzero(turned[1])), ratio_of(errors * ~either, lengths),
        int(before.sum()), ratio_of(errors * before, lengths),
    )  # fmt: skip


def ratio_of(errors: np.ndarray, lengths: list[int]) -> Ratio:
    """Of the root mean squares, from rows' mean squares [2, rows]; and where 95 % of draws of texts have it."""
    texts = np.add.reduceat(errors, np.cumsum([0, *lengths[:-1]]), axis=1)
    drawn = np.random.default_rng(1).integers(0, len(lengths), (DRAWS, len(lengths)))
    low, high = np.quantile(np.sqrt(np.divide(*texts[:, drawn].sum(2))), (0.025, 0.975))
    return float(np.sqrt(np.divide(*texts.sum(1)))), float(low), float(high)


def levels() -> list[str]:
    """One instruction set for each arithmetic there is: all but amx compute the bits of the best of them."""
    best = next(isa for isa in isas() if isa != "amx")
    return [best, *(isa for isa in isas() if isa == "amx")]


HEAD = (f"{'file':18} {'isa':7} {'rows':16} {'kv':3} {'rms':>8} {'llama.cpp':>9} {'ratio':>6} {'spread':>11}   "
        f"{'turned':>6} {'theirs':>6} {'without':>7} {'spread':>11} {'before':>6} {'ratio':>6} {'spread':>11}"
        )  # fmt: skip


def line(file: str, isa: str, name: str, kv: str, found: Compared) -> str:
    text = (f"{file:18} {isa:7} {found.rows:5} {name:10} {kv:3} {found.rms:8.5f} {found.peer_rms:9.5f} "
            f"{shown(found.ratio)}")  # fmt: skip
    ours, theirs = map(len, found.turned)
    if ours or theirs:
        text += f"   {ours:6} {theirs:6}  {shown(found.without)} {found.before:6} {shown(found.judged)}"
    return text


def shown(ratio: Ratio) -> str:
    return "{:6.3f} {:5.3f}-{:5.3f}".format(*ratio)


def ties(measured: Measured, ours: Rows, theirs: Rows) -> Iterator[str]:
    """Each turned row: its text and place there, whose, the first layer turned, and the lead in the truth's router."""
    truth, ends = measured.truth, np.cumsum(measured.lengths)
    for who, rows in (("gemma4q", ours), ("llama.cpp", theirs)):
        other = (rows.experts != truth.experts).reshape(*truth.leads.shape, -1).any(2)
        for row in np.flatnonzero(other.any(1)):
            text = int(np.searchsorted(ends, row, side="right"))
            position, layer = row - ends[text] + measured.lengths[text], other[row].argmax()
            yield f"    text {text}, {position}: {who}, layer {layer}, lead {truth.leads[row, layer]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with llama-cpp-python")
    parser.add_argument("--file", action="append", choices=FILES, help="only these")
    parser.add_argument("--isa", action="append", choices=isas(), help="these instruction sets")
    parser.add_argument("--ties", action="store_true", help="list the rows that chose other experts")
    given = parser.parse_args()
    print(HEAD)
    for file in given.file or FILES:
        with tempfile.TemporaryDirectory() as folder:
            measured = Measured(make(file, Path(folder), given.peer_python), given.peer_python)
            for isa, name, kv in product(given.isa or levels(), CLASSES, KV):
                ours, theirs = measured.run("native", isa, kv, name == "generated"), measured.peer[name, kv]
                print(line(file, isa, name, kv, compare(measured, ours, theirs)), flush=True)
                if given.ties and measured.truth.experts.size:
                    print("\n".join(ties(measured, ours, theirs)))
    print(measured.about)


if __name__ == "__main__":
    main()
