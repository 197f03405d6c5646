"""What tools/type_trials.py and answer_trials.py say of files: made-up numbers come out as worked by hand, and a file
is no distance from itself.

    GEMMA4Q_PEER_PYTHON=.../bin/python pytest -m peers tests/test_type_trials.py

GEMMA4Q_PEER_PYTHON is an interpreter with llama-cpp-python, if it is not the one that runs the tests.
"""

import sys
from itertools import combinations
from math import inf, sqrt
from pathlib import Path

import numpy as np
import pytest
from peer import PYTHON, needs_llama_cpp
from quantized import measured

from gemma4q import load
from gemma4q.abi import BLOCKS
from gemma4q.abi import TensorType as T
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import open_gguf
from gemma4q.measure.divergence import Scores
from gemma4q.measure.plot import canvas
from gemma4q.measure.texts import conversations, passages
from gemma4q.quantize.mixtures import MIXTURES, is_rounded, mixture
from gemma4q.quantize.quantize import planned

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from answer_trials import counted
from llama_quantize import theirs
from plot_types import draw, fill, read
from tiny_measures import JUDGED, original, scores, talks, write_csv
from type_trials import IN_BLOCKS, PURE, Judge, Trial, all_trials, ratio, row, shaken, together, verdict

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return original("tiny", tmp_path_factory.mktemp("trials"))


def made_up(divergence, text) -> Scores:
    nothing = np.zeros(len(text))
    return Scores(np.array(text), nothing, nothing, nothing, nothing, np.array(divergence), nothing == 0)


# -- Arithmetic ------------------------------------------------------------------------------------------------


def test_what_a_file_costs_is_what_it_lost_less_what_it_gained_prompt_by_prompt():
    base, other = np.array([True, True, True, False]), np.array([True, False, False, True])
    found = counted(base, other)
    assert (found["prompts"], found["right"]) == (4, 2)
    assert (found["lost"], found["gained"], found["costs"]) == (2, 1, 1)
    spread = sqrt(sum((d - 1 / 4) ** 2 for d in (0, 1, 1, -1)) / 3)  # of one prompt
    assert found["high"] - 1 == pytest.approx(3.19 * spread * sqrt(4))  # Student's t of 3 degrees of freedom
    assert found["high"] - 1 == pytest.approx(1 - found["low"])
    assert counted(base, base) == {"prompts": 4, "right": 3, "lost": 0, "gained": 0, "costs": 0, "low": 0, "high": 0}


def test_a_difference_is_of_the_same_tokens_and_its_interval_over_texts(source):
    plan = planned(source, None, mixture("Q4_0"))
    text = [0, 0, 1, 1, 2, 2]
    ours, other = made_up([3, 1, 4, 2, 5, 3], text), made_up([1, 1, 2, 2, 3, 3], text)
    found = row("tiny", Trial("Q4_0", False, False), plan, ours, other, differ=7)
    assert (found["divergence"], found["theirs divergence"], found["more divergence"]) == (3, 2, 1)
    assert found["more low"] == found["more high"] == 1  # of each text alike, though not of each token
    assert (found["texts"], found["tokens"], found["bytes"]) == (3, 6, sum(c.data.nbytes for c in plan.changes))
    assert verdict(found) == "worse"
    assert verdict(row("tiny", Trial("Q4_0", False, False), plan, other, ours, differ=7)) == "better"
    assert verdict(row("tiny", Trial("Q4_0", False, False), plan, ours, ours, differ=0)) == "the same bytes"
    uneven = made_up([4, 2, 1, 1, 3, 3], text)
    assert verdict(row("tiny", Trial("Q4_0", False, False), plan, uneven, other, differ=7)) == "no difference shown"


def test_texts_of_several_draws_count_each_for_itself():
    found = together([made_up([1, 2], [0, 1]), made_up([3, 4, 5], [0, 1, 1])])
    assert found.divergence.tolist() == [1, 2, 3, 4, 5]
    assert len(np.unique(found.text)) == 4
    assert together([None, None]) is None


def test_the_ratio_of_files_is_their_median_and_files_of_the_same_bytes_count_for_nothing():
    rows = [{"divergence": n, "theirs divergence": 2, "differ": 3} for n in (7, 1, 5, 2, 900, 4)]
    same = {"divergence": 9, "theirs divergence": 9, "differ": 0}
    assert ratio([*rows, same]) == (2.25, 0.5, 450), "of six values all lie on one side one time in 32"
    assert ratio(rows[:5]) == (2.5, 0, inf), "of five one time in 16, which is too often"
    assert ratio(rows + rows + rows[:1]) == (2.5, 1, 3.5), "of thirteen two on a side lie outside"


def test_a_file_is_no_distance_from_itself_and_files_of_the_same_weights_are_read_once(source, tmp_path, monkeypatch):
    with load(source) as base:
        held = talks(tmp_path / "held.jsonl", 4, held_back=True, tasks=("json", "story"))
        judge = Judge(base, passages(conversations(held), base.tokenizer, base.flavour))
        found = judge(source)
        assert len(found) > 50
        assert not found.divergence.any() and found.same.all()
        (tmp_path / "same.gguf").write_bytes(source.read_bytes())
        monkeypatch.setattr("type_trials.scores", lambda *_: pytest.fail("read again"))
        assert judge(tmp_path / "same.gguf") is found
        monkeypatch.undo()
        plan = planned(source, tmp_path / "q2.gguf", mixture("Q2_K"))
        plan.write()
        assert judge(tmp_path / "q2.gguf").divergence.mean() > 0
        assert scores(source, judge.found, judge.said).divergence.max() == 0


def test_a_shaken_copy_is_off_by_its_share_of_each_row_in_matrices_alone(source, tmp_path):
    before, after = open_gguf(source).tensors, open_gguf(shaken(source, tmp_path / "shaken.gguf", 0.02, 1)).tensors
    for name, tensor in before.items():
        if not is_rounded(name, tensor.shape):
            assert np.array_equal(tensor.data, after[name].data)
            continue
        x, y = (dequantize(t.data, t.type).reshape(-1, t.shape[-1]) for t in (tensor, after[name]))
        held = x.any(-1)
        assert not y[~held].any()
        share = np.sqrt(((y - x)[held] ** 2).sum(-1) / (x[held] ** 2).sum(-1))
        assert share.mean() == pytest.approx(0.02, rel=0.05) and share.max() < 0.04


def test_no_text_is_both_calibrated_on_and_scored(tmp_path):
    read, held = talks(tmp_path / "a.jsonl"), talks(tmp_path / "b.jsonl", 160, 2, True, JUDGED)
    lines = [set(path.read_text().splitlines()) for path in (read, held)]
    assert len(lines[1]) > 155 and not lines[0] & lines[1]


def test_every_type_is_looked_at_with_importance_and_without_and_each_block_format_pure():
    found = all_trials(["Q4_K_S", "Q4_K_M", "IQ4_NL"])
    assert [(t.type, t.pure) for t in found if t.weighed] == [(t.type, t.pure) for t in found if not t.weighed]
    assert {t.type for t in found if t.pure} == {"Q4_K_S", "IQ4_NL"}
    assert {t.type for t in found if not t.pure} == {"Q4_K_S", "Q4_K_M", "IQ4_NL"}


# -- The picture -----------------------------------------------------------------------------------------------


def rows_of(types, plan) -> list[dict]:
    """Made up: each type's divergence falls with its size, ours and llama.cpp's alike."""
    random, rows = np.random.default_rng(1), []
    for trial in all_trials(types):
        bits = 8 * BLOCKS[MIXTURES[trial.type].base][1] / BLOCKS[MIXTURES[trial.type].base][0] + 0.5 * (not trial.pure)
        one, other = (np.exp(-bits + 0.1 * random.standard_normal(4)) for _ in range(2))
        both = (made_up(side, [0, 0, 1, 1]) for side in (one, other))
        rows.append(row("tiny", trial, plan, *both, differ=9) | {"bits": bits})
    recipes = [(f"gemma for {name}", bits) for name, bits in (("Q3_K_M", 4.4), ("Q4_K_S", 4.9), ("Q4_K_M", 5))]
    alone = made_up([0.01, 0.02], [0, 1])
    return rows + [row("tiny", Trial(name, False, True), plan, alone) | {"bits": bits} for name, bits in recipes]


def test_names_in_the_picture_lie_apart_and_inside(source, tmp_path):
    extent = pytest.importorskip("matplotlib.text").Text.get_window_extent  # an annotation's own has its arrow in it
    figure = canvas(tmp_path / "t.png", 12, 10)
    fill(figure, rows_of(IN_BLOCKS, planned(source, None, mixture("Q4_0"))))
    figure.draw_without_rendering()
    for panel in figure.axes:
        boxes, inside = [extent(text) for text in panel.texts], panel.get_window_extent()
        assert len(boxes) >= len(PURE)
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(inside.contains(*corner) for box in boxes for corner in box.corners())


def test_a_picture_is_drawn_from_the_numbers_that_are_kept(source, tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_of(["Q4_0", "Q4_1"], planned(source, None, mixture("Q4_0")))
    write_csv(tmp_path / "types.csv", rows)
    kept = read(tmp_path / "types.csv")
    for one, other in zip(kept, rows, strict=True):
        assert one == {key: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for key, v in other.items()}
    draw(kept, tmp_path / "of-NAME.svg")
    assert (tmp_path / "of-tiny.svg").read_bytes().startswith(b"<?xml")


# -- Beside llama.cpp ------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_llama_cpps_files_are_those_that_were_asked_for(source, tmp_path):
    """--pure and types by tensor; Q4_0 without importance is ours, byte for byte, and with importance is another."""
    needs_llama_cpp()
    exact = open_gguf(source)
    matrices = [t.name for t in exact.tensors.values() if is_rounded(t.name, t.shape)]
    pure = open_gguf(theirs(PYTHON, source, tmp_path / "pure.gguf", "Q4_0", pure=True))
    assert {pure.tensors[name].type for name in matrices} == {T.Q4_0}
    planned(source, tmp_path / "ours.gguf", mixture("Q4_0")).write()
    plain = open_gguf(theirs(PYTHON, source, tmp_path / "plain.gguf", "Q4_0"))
    weighed = open_gguf(theirs(PYTHON, source, tmp_path / "weighed.gguf", "Q4_0", measured(exact)))
    ours = open_gguf(tmp_path / "ours.gguf")
    for name in (name for name in matrices if plain.tensors[name].type == T.Q4_0):
        np.testing.assert_array_equal(plain.tensors[name].data, ours.tensors[name].data, err_msg=name)
        assert (weighed.tensors[name].data != plain.tensors[name].data).any(), name
    types = {"blk.0.attn_q.weight": T.Q6_K, "token_embd.weight": T.Q5_0}
    mixed = open_gguf(theirs(PYTHON, source, tmp_path / "mixed.gguf", "Q4_0", types=types))
    changed = {n: t.type for n, t in mixed.tensors.items() if t.type != plain.tensors[n].type}
    assert changed == types
    with pytest.raises(SystemExit, match=r"no\.gguf"):
        theirs(PYTHON, tmp_path / "no.gguf", tmp_path / "out.gguf", "Q4_0")
