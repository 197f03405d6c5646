"""Runs a model on two backends, op by op, and shows where their numbers part.

    python tools/diff.py model.gguf reference native:scalar --prompt "The capital of France is"

A backend is reference, rounded (the reference, activations rounded as integer kernels round them), native, portable;
after a colon the instruction set. Errors are the largest difference of an op's output over its largest value: they grow
along the plan, so the first op beyond the bound is where to look. Exit status 1 when there is one.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma4q import backends
from gemma4q.abi import PAGE, BufferType, OpCode, RowFlag, TensorType
from gemma4q.backends.reference import Reference
from gemma4q.model import open_model
from gemma4q.model.forward import build
from gemma4q.plan.batch import Batch, Limits, Step
from gemma4q.plan.plan import Op
from gemma4q.text.tokenizer import Tokenizer

PRIVATE = (OpCode.GROUP, OpCode.TOP_PART, OpCode.TOP)  # each backend lays these out as it likes


def load(spec: str, plan, tensors: Mapping, limits: Limits, kv: TensorType) -> backends.Session:
    name, _, isa = spec.partition(":")
    backend = Reference(quantize_activations=True) if name == "rounded" else backends.get(name)
    return backend.load(plan, tensors, limits, kv, 2, isa or None)


def outputs(session: backends.Session, batch: Batch) -> dict[str, tuple[Op, np.ndarray]]:
    """What each op put out, by the buffer's name, read before anything takes its place."""
    count = {0: int(batch.header["rows"]), 1: int(batch.header["wanted"]), 2: 1}
    found = {}
    for number, op in enumerate(session.plan.ops):
        session.run(batch, number, number + 1)
        if op.out is not None and op.code not in PRIVATE:
            found[op.out.name] = op, session.read(op.out.name)[: count[op.out.space]].copy()
    return found


def error(op: Op, a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over largest value; for a choice of experts the share of rows that chose others."""
    if op.out.type == BufferType.I32:
        used = op.args["used"]
        return float((a[:, :used] != b[:, :used]).any(-1).mean())
    top = float(np.abs(a).max(initial=0))
    apart = np.abs(a.astype(np.float64) - b).max(initial=0)
    return float(apart / top) if top else float(apart)


def compare(given: argparse.Namespace) -> int:
    gguf, config, weights = open_model(given.model)
    ids = np.random.default_rng(given.seed).integers(5, config.vocab, given.tokens)
    if given.prompt is not None:
        ids = np.array(Tokenizer.from_gguf(gguf).encode(given.prompt, bos=True))
    pages = np.arange(-(-len(ids) // PAGE), dtype=np.int32)
    limits = Limits(len(ids), len(ids), 1, len(pages) * PAGE, len(pages), len(pages))
    plan, kv = build(config, weights.shapes), TensorType[given.kv.upper()]
    batch = Batch(limits, config.width, config.vocab)
    want = np.full(len(ids), RowFlag.WANT_LOGITS)
    batch.fill([Step(ids, 0, pages, pages, generated=given.generated, want=want)])
    sessions = [load(spec, plan, weights.tensors, limits, kv) for spec in (given.a, given.b)]
    one, two = (outputs(session, batch) for session in sessions)
    first = None
    print(f"{'op':>4} {'layer':>5} {'error':>9}  what")
    for number, name in enumerate(name for name in one if name in two):
        (op, a), (_, b) = one[name], two[name]
        apart = error(op, a, b)
        beyond = not apart <= given.bound
        if beyond and first is None:
            first = f"{number} {op.name}"
        if given.all or beyond or op.out is plan.logits:
            print(f"{number:4} {op.layer:5} {apart:9.1e}  {op.name}{'  <- beyond the bound' if beyond else ''}")
    print(f"first op beyond {given.bound:g}: {first or 'none'}")
    return int(first is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--prompt", help="text to run; otherwise random tokens")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bound", type=float, default=1e-3)
    parser.add_argument("--kv", choices=["f32", "f16", "bf16", "q8_0", "q4_0"], default="f32")
    parser.add_argument("--generated", action="store_true", help="compute the rows as generated ones")
    parser.add_argument("--all", action="store_true", help="every op, not only those beyond the bound")
    sys.exit(compare(parser.parse_args()))


if __name__ == "__main__":
    main()
