"""Speed is not bought with accuracy: how far logits lie from the exact weights', against how far llama.cpp's do.

    GEMMA4Q_PEER_PYTHON=.../bin/python pytest -m peers -s tests/test_accuracy_peers.py
    GEMMA4Q_PEER_PYTHON=.../bin/python python tools/emulate_amx.py -m peers tests/test_accuracy_peers.py

GEMMA4Q_PEER_PYTHON is an interpreter with llama-cpp-python, if it is not the one that runs the tests; the second line
is for prompts on tiles where there are none. What is measured, and how, says tools/accuracy.py.
"""

import sys
from pathlib import Path

import pytest
from cases import ISAS, same
from peer import PYTHON, needs_llama_cpp

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from accuracy import FILES, HEAD, KV, Compared, Measured, compare, levels, line, make

pytestmark = pytest.mark.peers
# Both engines round activations to int8, llama.cpp its scales to F16 too; on tiles a prompt's become bfloat16.
MOST, MOST_ON_TILES = 1.05, 0.7
FEWEST_ROWS = 1000

each_level = pytest.mark.parametrize("isa", levels())
each_kv = pytest.mark.parametrize("kv", KV)


@pytest.fixture(scope="module", params=FILES)
def measured(request, tmp_path_factory):
    needs_llama_cpp()
    print(f"\n{HEAD}")
    found = Measured(make(request.param, tmp_path_factory.mktemp("accuracy"), PYTHON), PYTHON)
    found.file = request.param
    return found


def compared(measured: Measured, isa: str, name: str, kv: str) -> Compared:
    found = compare(measured, measured.run("native", isa, kv, name == "generated"), measured.peer[name, kv])
    print(f"\n{line(measured.file, isa, name, kv, found)}", end="")
    assert found.before >= FEWEST_ROWS
    return found


@each_kv
@each_level
def test_prompt_rows_lie_no_farther_from_the_exact_weights_than_llama_cpps(measured, isa, kv):
    assert compared(measured, isa, "prompt", kv).judged[0] <= (MOST_ON_TILES if isa == "amx" else MOST)


@each_kv
@each_level
def test_generated_rows_lie_no_farther_from_the_exact_weights_than_llama_cpps(measured, isa, kv):
    assert compared(measured, isa, "generated", kv).judged[0] <= MOST


@each_kv
def test_the_other_instruction_sets_have_those_very_numbers(measured, kv):
    """Bit for bit on the first texts, whichever class the rows are; with tiles the generated ones."""
    best, few = levels()[0], 3
    wanted = measured.run("native", best, kv, False, few).logits
    for isa in ISAS:
        for generated in (False, True):
            if generated or isa != "amx":
                same(measured.run("native", isa, kv, generated, few).logits, wanted)
