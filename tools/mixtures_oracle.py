"""What types llama.cpp gives every tensor, in its own words: the known answers that tests hold `mixtures` to.

    python tools/mixtures_oracle.py ~/peers/bin/python tests/data/mixtures.json

The argument is an interpreter that has llama-cpp-python; llama_types.py runs there. Files have headers of the published
shapes and holes for data, so that no disk is needed. An answer says which kinds of matrices have a type, or types that
change from layer to layer, as `Q6_K 4, Q4_K 2`; one with importance stands there only where it differs.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import shapes
from shapes import Kind, Shape

from gemma4q.abi import TensorType
from gemma4q.gguf.types import type_name
from gemma4q.gguf.writer import TensorData, header
from gemma4q.quantize.mixtures import MIXTURES

# The published models; and what they leave out: dead keys and values, eight experts, a head that is no table.
SMALL = replace(shapes.SHAPES["26b"], layers=20, hidden=512, ffn=96, expert_ffn=96, vocab=1024)
MODELS = {
    **shapes.SHAPES,
    "e2b, dead keys": shapes.with_dead_kv(shapes.SHAPES["e2b"]),
    "eight experts": replace(SMALL, experts=8),
    "sixteen experts": replace(SMALL, experts=16, kv_heads=(4, 4)),
    "narrow": replace(shapes.SHAPES["e4b"], layers=17, shared=5, hidden=96, ffn=80, per_layer=32, vocab=1024),
    "untied": replace(shapes.SHAPES["e4b"], layers=11, shared=4, hidden=512, ffn=512, vocab=1024),
}


@dataclass(frozen=True)
class Asked:
    """Options beyond a mixture, as llama_model_quantize_params has them."""

    model: str
    mixture: str
    options: Mapping[str, int] = field(default_factory=dict)
    patterns: tuple[tuple[str, str], ...] = ()


T = TensorType
OVERRIDES = {
    "pure": Asked("26b", "Q4_K_M", {"pure": True}),
    "pure, with experts": Asked("26b", "MXFP4_MOE", {"pure": True}),
    "embedding": Asked("e2b", "Q4_K_M", {"token_embedding_type": T.Q8_0}),
    "embedding, the second table named": Asked(
        "e2b", "Q4_K_M", {"token_embedding_type": T.Q8_0}, (("per_layer_token", "Q5_K"), ("token_embd", "F16"))
    ),
    "output of a tied head": Asked("e2b", "Q4_K_M", {"output_tensor_type": T.Q8_0}),
    "output and embedding of a tied head": Asked(
        "e2b", "Q4_K_M", {"output_tensor_type": T.Q8_0, "token_embedding_type": T.Q5_0}
    ),
    "output": Asked("untied", "Q4_K_M", {"output_tensor_type": T.Q8_0}, (("output", "Q5_K"),)),
    "output left": Asked("untied", "Q4_K_M", {"quantize_output_tensor": False}),
    "embedding in F16": Asked("untied", "F16", {"token_embedding_type": T.Q8_0, "output_tensor_type": T.Q6_K}),
    "patterns": Asked("12b", "Q4_K_M", {}, (("attn_v", "Q8_0"), (r"blk\.[0-5]\.ffn_down", "F16"), ("ffn_d", "Q5_K"))),
    "patterns count no further": Asked("e2b", "Q3_K_M", {}, ((r"blk\.0\.(attn_v|ffn_down)", "Q8_0"),)),
    "patterns that do not fit": Asked("26b", "Q4_K_M", {}, (("ffn_down", "IQ4_XS"), ("attn_norm", "Q8_0"))),
    "patterns before rules for a head": Asked("e2b", "Q4_0", {"output_tensor_type": T.Q8_0}, (("^token", "Q5_0"),)),
    "pure, but for a pattern": Asked("e2b", "Q4_K_M", {"pure": True}, (("attn_k", "Q6_K"),)),
}


def source(model: str) -> dict[str, Kind]:
    """A model's tensors as they come from a checkpoint."""
    shape = MODELS[model]
    extra = {"output.weight": Kind((shape.vocab, shape.hidden), T.BF16)} if model == "untied" else {}
    return shapes.checkpoint(shape) | extra


def write_sparse(path: Path, shape: Shape, tensors: Mapping[str, Kind]) -> None:
    """A GGUF file whose data are a hole but for the rope factors, since gemma4q looks at them."""
    data = [TensorData(name, kind.type, kind.shape, tuple) for name, kind in tensors.items()]
    path.write_bytes(head := header(shapes.metadata(shape), data, {}, shapes.ALIGNMENT))
    end = len(head)
    with path.open("r+b") as file:
        for tensor in data:
            if tensor.name == "rope_freqs.weight":
                file.seek(end)
                file.write(np.ones(tensor.shape, "<f4").data)
            end += -(-tensor.nbytes // shapes.ALIGNMENT) * shapes.ALIGNMENT
        file.truncate(end)


def in_short(tensors: Mapping[str, Kind], types: Mapping[str, str | int]) -> dict[str, str]:
    """Which kinds of matrices have a type, or runs of types from layer to layer; vectors are checked and left out."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")]):
        type = types[name] if isinstance(types[name], str) else type_name(types[name])
        if len(tensors[name].shape) > 1:
            kinds.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append(type)
        elif type != "F32":
            raise ValueError(f"{name} became {type}")
    out: dict[str, list[str]] = {}
    for kind, every in sorted(kinds.items()):
        runs = [f"{type} {len(list(run))}" for type, run in groupby(every)]
        out.setdefault(every[0] if len(runs) == 1 else ", ".join(runs), []).append(kind)
    return {types: " ".join(kinds) for types, kinds in sorted(out.items())}


def ask(python: str, jobs: Iterable[dict]) -> list[dict[str, str]]:
    program = Path(__file__).with_name("llama_types.py")
    done = subprocess.run([python, program], input=json.dumps(list(jobs)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout)


def answers(python: str) -> dict:
    """{"mixtures": {model: {mixture: ...}}, "with importance": ..., "overrides": {name: ...}}."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {model: str(Path(folder) / f"{model}.gguf") for model in MODELS}
        for model, path in paths.items():
            write_sparse(Path(path), MODELS[model], source(model))

        def job(model: str, mixture: str, importance: bool = False, options=(), patterns=()) -> dict:
            copies = MIXTURES[mixture].base is None
            number, more = MIXTURES[mixture].file_type or 0, {"only_copy": True} if copies else {}
            kinds = [(regex, TensorType[type]) for regex, type in patterns]
            return {"path": paths[model], "file_type": number, "importance": importance,
                    "options": dict(options) | more, "patterns": kinds}  # fmt: skip

        every = [(model, mixture) for model in MODELS for mixture in MIXTURES]
        jobs = [job(*pair, importance) for importance in (False, True) for pair in every]
        asked = [job(a.model, a.mixture, options=a.options, patterns=a.patterns) for a in OVERRIDES.values()]
        models = [model for model, _ in every] * 2 + [a.model for a in OVERRIDES.values()]
        found = [in_short(source(model), types) for model, types in zip(models, ask(python, jobs + asked), strict=True)]
    plain, measured, overridden = found[: len(every)], found[len(every) : len(jobs)], found[len(jobs) :]
    out = {"mixtures": {model: {} for model in MODELS}, "with importance": {model: {} for model in MODELS}}
    for (model, mixture), types, others in zip(every, plain, measured, strict=True):
        out["mixtures"][model][mixture] = types
        if others != types:
            out["with importance"][model][mixture] = others
    return out | {"overrides": dict(zip(OVERRIDES, overridden, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="an interpreter with llama-cpp-python")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.write_text(json.dumps(answers(given.python), indent=0) + "\n")


if __name__ == "__main__":
    main()
