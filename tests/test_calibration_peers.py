"""Importance against llama.cpp: its matrices meet what ours meet, by the same names, and its quantiser takes the file.

    GEMMA4Q_PEER_PYTHON=.../bin/python pytest -m peers tests/test_calibration_peers.py

GEMMA4Q_PEER_PYTHON is an interpreter with llama-cpp-python, if it is not the one that runs the tests.
"""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from peer import PYTHON, needs_llama_cpp

from gemma4q.abi import TensorType
from gemma4q.convert.convert import planned
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import open_gguf
from gemma4q.measure.calibration import Calibration
from gemma4q.quantize.importance import Importance
from gemma4q.shipped import NAMES

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from llama_quantize import theirs
from tiny_tasks import TASKS, draw

pytestmark = pytest.mark.peers
TOOL = Path(__file__).parents[1] / "tools" / "llama_imatrix.py"
TRAINED = Path(__file__).parent / "data" / "trained"


@pytest.fixture(scope="module", params=NAMES)
def collected(request, tmp_path_factory):
    """(model in F32, our importance, llama.cpp's npz file) of the same forty texts."""
    needs_llama_cpp()
    room, random = tmp_path_factory.mktemp("imatrix"), Random(3)
    with planned(TRAINED / request.param, room / "model.gguf", "f32") as conversion:
        conversion.write()
    examples = [draw(random, task) for task in TASKS for _ in range(4)]
    with Calibration(room / "model.gguf") as calibration:
        texts = [calibration.tokenizer.encode(e.prompt() + e.turn(), special=True) for e in examples]
        *_, ours = calibration.run(calibration.chunks(texts), Importance({}))
    (room / "texts.json").write_text(json.dumps(texts))
    arguments = (room / "model.gguf", room / "texts.json", room / "theirs.npz")
    done = subprocess.run([PYTHON, TOOL, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return room / "model.gguf", ours, np.load(room / "theirs.npz")


def test_every_matrix_meets_what_it_meets_in_llama_cpp(collected):
    _, ours, theirs = collected
    names = {name.removesuffix(".in_sum2") for name in theirs.files if name.endswith(".in_sum2")}
    assert set(ours.entries) == names
    for name in names:
        entry = ours.entries[name]
        np.testing.assert_array_equal(entry.counts, theirs[f"{name}.counts"], err_msg=name)
        top = theirs[f"{name}.in_sum2"].max()
        np.testing.assert_allclose(entry.sums, theirs[f"{name}.in_sum2"], rtol=1e-3, atol=1e-6 * top, err_msg=name)


def test_llama_cpps_quantiser_takes_it_and_weighs_errors_by_it(collected, tmp_path):
    """The weighted error of every tensor in Q4_0 is smaller than without importance."""
    model, ours, _ = collected
    plain = theirs(PYTHON, model, tmp_path / "plain.gguf", "Q4_0")
    weighed = theirs(PYTHON, model, tmp_path / "weighed.gguf", "Q4_0", ours)
    exact, *others = (open_gguf(path) for path in (model, plain, weighed))
    smaller = 0
    for name in ours.entries:
        if others[0].tensors[name].type != TensorType.Q4_0:  # Q8_0, for one, weighs nothing
            continue
        values = [dequantize(g.tensors[name].data, g.tensors[name].type).astype("f8") for g in (exact, *others)]
        shape = exact.tensors[name].shape
        weight = ours.of(name, shape[-1])[:, None, :] if len(shape) == 3 else ours.of(name, shape[-1])
        plain, weighed = ((weight * (x - values[0]).reshape(shape) ** 2).sum() for x in values[1:])
        assert weighed < plain, name
        smaller += 1
    assert smaller > 20
