"""llama.cpp's logits of the same tokens, and plain numpy, say the same of two models as `eval` does.

    GEMMA4Q_PEER_PYTHON=.../bin/python pytest -m peers -s tests/test_evaluate_peers.py

GEMMA4Q_PEER_PYTHON is an interpreter with llama-cpp-python, if it is not the one that runs the tests.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from cases import quantized
from peer import PYTHON, needs_llama_cpp

from gemma4q.abi import TensorType
from gemma4q.convert.convert import planned
from gemma4q.engine.model import Prepared
from gemma4q.measure import evaluate, texts
from gemma4q.measure.divergence import score, summary

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from accuracy import ask
from tiny_tasks import TASKS, draw
from tiny_texts import conversation

pytestmark = pytest.mark.peers
TRAINED = Path(__file__).parent / "data/trained"
EACH = 12  # texts of a task


def logits_of(path: Path, passages: list[texts.Passage], folder: Path) -> np.ndarray:
    """llama.cpp's, of the scored rows of all passages, one behind the other."""
    given, out = folder / "texts.json", folder / "out.npz"
    given.write_text(json.dumps([passage.ids.tolist() for passage in passages]))
    ask(PYTHON, path, given, out)
    ends = np.cumsum([len(passage.ids) for passage in passages])
    with np.load(out) as found:
        rows = found["prompt-f32"]
    return np.concatenate([rows[end - p.scored - 1 : end - 1] for p, end in zip(passages, ends, strict=True)])


def plainly(base: np.ndarray, model: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The obvious arithmetic, whole rows at once."""
    p, q = (x.astype("f8") - np.log(np.exp(x.astype("f8")).sum(1, keepdims=True)) for x in (base, model))
    at = np.arange(len(right))
    return {
        "divergence": float((np.exp(p) * (p - q)).sum(1).mean()),
        "perplexity": float(np.exp(-q[at, right].mean())),
        "base_perplexity": float(np.exp(-p[at, right].mean())),
        "same_top": float((p.argmax(1) == q.argmax(1)).mean()),
        "delta_p": float((np.exp(q) - np.exp(p))[at, right].mean()),
    }


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_what_llama_cpp_says_of_two_models_comes_to_the_same(name, tmp_path):
    needs_llama_cpp()
    base, model, talks = tmp_path / "f32.gguf", tmp_path / "q4_0.gguf", tmp_path / "talks.jsonl"
    with planned(TRAINED / name, base, "f32") as conversion:
        conversion.write()
    quantized(base, model, TensorType.Q4_0)
    random = Random(3)
    lines = [conversation(draw(random, task, held=True)) for task in TASKS for _ in range(EACH)]
    talks.write_text("\n".join(map(json.dumps, lines)))
    opened = Prepared(str(model))
    passages = texts.passages(texts.conversations(talks), opened.tokenizer, opened.flavour)
    right = np.concatenate([passage.ids[passage.first :] for passage in passages])
    theirs = [logits_of(path, passages, tmp_path) for path in (base, model)]
    wanted = plainly(*theirs, right)

    with ThreadPoolExecutor(2) as threads:  # our arithmetic on their rows
        columns = score(theirs[1], right, threads, theirs[0])
    assert columns["divergence"].mean() == pytest.approx(wanted["divergence"], rel=1e-9)
    assert columns["same"].mean() == wanted["same_top"]
    assert np.exp(columns["surprise"].mean()) == pytest.approx(wanted["perplexity"], rel=1e-12)

    numbers = range(len(passages))
    found = summary(evaluate.run(str(model), passages, numbers, str(base), kv="f32", context=1024, threads=1))
    print(f"\n{name}: {len(right):,} tokens")
    for key, value in wanted.items():
        print(f"  {key:16} llama.cpp {value:.6f}  ours {found[key]['value']:.6f}")
    # both engines round activations to int8, each in its own way: what they say of Q4_0 differs a little
    assert found["divergence"]["value"] == pytest.approx(wanted["divergence"], rel=0.1)
    assert found["perplexity"]["value"] == pytest.approx(wanted["perplexity"], rel=2e-3)
    assert found["base_perplexity"]["value"] == pytest.approx(wanted["base_perplexity"], rel=1e-5)
    assert found["same_top"]["value"] == pytest.approx(wanted["same_top"], abs=3e-3)
