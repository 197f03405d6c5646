"""bench/: what its scripts write is what was asked for and adds up, what they draw can be read, faults are one line."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from peer import PYTHON, needs_llama_cpp

from gemma4q import abi
from gemma4q.gguf.reader import open_gguf

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import depth
import ggml_matmul
import harness
import kernels
import roofline
import rows

pytestmark = pytest.mark.skipif(abi.lib is None, reason=str(abi.missing))
TINY = str(Path(__file__).parents[1] / "gemma4q/shipped/tiny.gguf")


def run(script, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keys_and_values(end: int) -> int:
    """Bytes that a token sees as the last of `end`, counted from the file's metadata; kept as F16."""
    of = {key.split(".", 1)[1]: value for key, value in open_gguf(TINY).metadata.items() if key.startswith("gemma4.")}
    count = 0
    for sliding in of["attention.sliding_window_pattern"]:
        which = "_swa" if sliding else ""
        width = of[f"attention.key_length{which}"] + of[f"attention.value_length{which}"]
        seen = min(end, of["attention.sliding_window"]) if sliding else end
        count += 2 * seen * of["attention.head_count_kv"] * width
    return int(count)


# -- depth.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> list[dict]:
    """A prompt of 200 in steps of 64, four tokens generated at 0, 64 and 200.

    By one thread: of two, the one that is timed may find an op done already, beside other work.
    """
    path = tmp_path_factory.mktemp("depth") / "new/depth.csv"
    with pytest.MonkeyPatch.context() as patch:
        run(depth, patch, TINY, "-t", 1, "-d", "64,200", "-b", 64, "-n", 4, "-r", 2, "--csv", path)
    return table(path)


def test_one_prompt_grows_and_stops_at_each_depth(deep):
    assert tuple(deep[0]) == depth.COLUMNS
    stops = [(row["kind"], int(row["depth"]), int(row["rows"])) for row in deep]
    prompt = [("prompt", 64, 64), ("prompt", 128, 64), ("prompt", 192, 8)]
    assert stops == [("decode", 0, 1), ("prompt", 0, 64), ("decode", 64, 1), *prompt, ("decode", 200, 1)]


def test_a_tokens_keys_and_values_are_those_its_layers_see(deep):
    found = {int(row["depth"]): int(row["kv_bytes"]) for row in deep if row["kind"] == "decode"}
    assert found == {d: sum(keys_and_values(d + 1 + i) for i in range(4)) / 4 for d in (0, 64, 200)}
    assert found[0] < found[64] < found[200]


def test_the_parts_of_a_step_are_its_time_and_a_roof_is_bytes_by_speed(deep):
    for row in deep:
        parts = [float(row[part]) for part in depth.PARTS]
        assert sum(parts) == pytest.approx(float(row["milliseconds"]), abs=0.003) and min(parts) >= 0
        assert bool(row["roof_ms"]) == (row["kind"] == "decode")
    assert all(float(row[part]) > 0 for row in deep if int(row["rows"]) == 64 for part in depth.PARTS)
    for row in (row for row in deep if row["kind"] == "decode"):
        bytes = int(row["weight_bytes"]) + int(row["kv_bytes"])
        between = [bytes / (float(row["read_gb_s"]) + off) / 1e6 for off in (0.001, -0.001)]
        assert between[0] - 0.03 <= float(row["roof_ms"]) <= between[1] + 0.03


@pytest.mark.parametrize("busy, milliseconds", [([1, 0.5, 0.6, 1, 1, 0.2], 20), ([0.5], 10)])
def test_runs_that_had_company_are_made_again_but_not_for_ever(busy, milliseconds, monkeypatch):
    growing = depth.Growing(TINY, 1, [0, 64], 4, 2, 64)
    timed, made = growing.timed, []

    def disturbed(history, rows: int, generated: bool) -> dict:
        if history is growing.empty:
            return timed(history, rows, generated) | {"busy": 1, "milliseconds": 10}
        made.append(busy[len(made) % len(busy)])
        return timed(history, rows, generated) | {"busy": made[-1], "milliseconds": 20 if made[-1] == 1 else 10}

    monkeypatch.setattr(growing, "timed", disturbed)
    assert growing.decode()["milliseconds"] == milliseconds and growing.history.length == 0
    assert len(made) == (5 if 1 in busy else 1 + depth.PATIENCE * 2)
    growing.driver.model.close()


@pytest.mark.parametrize("time, said", [(20, "0 % below"), (24, "20 % above"), (26, "NOT within"), (14, "NOT within")])
def test_the_deepest_point_is_held_against_the_roofs_line(time, said):
    last = {"depth": 512, "milliseconds": time, "line_ms": 20}
    assert said in depth.verdict(last) and ("NOT" in depth.verdict(last)) == (time in (26, 14))


def test_the_line_grows_from_depth_0_as_the_bytes_do(monkeypatch):
    growing = depth.Growing(TINY, 1, [0, 64], 4, 1, 64)
    growing.prompt(64)
    timed = growing.timed
    monkeypatch.setattr(growing, "timed", lambda *given: timed(*given) | {"milliseconds": 10.0, "busy": 1})
    found = growing.decode()
    read = [found["weight_bytes"] + sum(keys_and_values(d + 1 + i) for i in range(4)) / 4 for d in (0, 64)]
    assert found["line_ms"] == pytest.approx(10 * read[1] / read[0])
    growing.driver.model.close()


# -- roofline.py -----------------------------------------------------------------------------------------------


def part(op: str, kind: str, intensity: float, speed: float, share: float) -> dict:
    about = {"model": "m.gguf", "threads": 2, "machine": "M", "read_gb_s": 40.0, "gemm_gop_s": 190.0, "busy": 1.0}
    work = {"bytes": 1e9, "operations": 1e9 * intensity, "milliseconds": 1e3 * intensity / speed}
    return about | work | {"op": op, "kind": kind, "share": share}


def test_labels_lie_apart_and_inside_and_name_the_largest_parts(tmp_path):
    extent = pytest.importorskip("matplotlib.text").Text.get_window_extent  # an annotation's own has its arrow in it
    names = [f"matmul blk.*.part_{i}.weight" for i in range(8)]
    dots = [part(name, "decode", 3.55, 120 - 2 * i, 0.08) for i, name in enumerate(names)]
    dots += [part("attend", "decode", 8, 30, 0.05), part("matmul token_embd.weight", "decode", 2.4, 60, 0.2)]
    dots += [part(name, "prompt", 1800, 700 - 90 * i, 0.1) for i, name in enumerate(names[:6])]
    figure = roofline.canvas(tmp_path / "r.png", 9, 6.5)
    roofline.draw(figure, dots)
    harness.save(figure, tmp_path / "r.png")
    panel = figure.axes[0]
    boxes = [extent(text) for text in panel.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = panel.get_window_extent()
    assert all(inside.contains(*corner) for box in boxes for corner in box.corners())
    text = " ".join(label.get_text() for label in panel.texts)
    text = " ".join(text.split())
    assert "part_0, part_1, part_2, 5 more 64 %" in text and "attend 5 %" in text and "token_embd 20 %" in text
    assert all(roofline.name(row["op"]) in text for row in dots if row["kind"] == "prompt")


def test_heights_of_labels_keep_their_order_and_their_distance():
    random = np.random.default_rng(1)
    for _ in range(50):
        wanted, lines = sorted(random.uniform(0, 1, 6), reverse=True), random.integers(1, 3, 6).tolist()
        heights = np.array(roofline.apart(wanted, lines))
        needed = roofline.LINE * (np.array(lines[1:]) + lines[:-1]) / 2
        assert (heights[:-1] - heights[1:] >= needed).all() and heights[0] <= 1
    assert roofline.apart([0.9, 0.5], [1, 1]) == [0.9, 0.5] and roofline.apart([], []) == []


@pytest.mark.parametrize("script, more", [(depth, ["-d", "96"]), (roofline, ["-p", 64])])
def test_a_picture_is_drawn_of_each_model(script, more, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, written = tmp_path / "new/of-NAME.svg", tmp_path / "t.csv"
    run(script, monkeypatch, TINY, *more, "-n", 4, "-r", 1, "--csv", written, "--plot", drawn)
    assert drawn.with_name("of-tiny.svg").read_bytes().startswith(b"<?xml")
    found = table(written)
    assert tuple(found[0]) == script.COLUMNS and {row["kind"] for row in found} == {"decode", "prompt"}


def test_shares_of_the_parts_of_a_model_add_up(tmp_path, monkeypatch):
    run(roofline, monkeypatch, TINY, "-p", 64, "-n", 4, "-r", 1, "--csv", tmp_path / "t.csv")
    for kind in roofline.KINDS:
        found = [row for row in table(tmp_path / "t.csv") if row["kind"] == kind]
        assert sum(float(row["share"]) for row in found) == pytest.approx(1, abs=0.02)
        assert {"attend", "matmul token_embd.weight"} <= {row["op"] for row in found if float(row["bytes"])}


# -- What all of them share ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [depth, roofline, rows])
def test_a_missing_file_is_one_line(script, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: [a-z_]+: .*nowhere\.gguf") as caught:
        run(script, monkeypatch, "nowhere.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "script, more",
    [
        (depth, ["-d", "1,x"]),
        (depth, ["-d", "-5,3"]),
        (depth, ["-d", "0"]),
        (depth, ["-n", "65"]),
        (roofline, [TINY, "--plot", "one.svg"]),
        (roofline, ["-n", "0"]),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(script, more, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run(script, monkeypatch, TINY, *more)
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_measured(monkeypatch, capsys):
    for script in (depth, roofline):
        with pytest.raises(SystemExit, match=r"error: bad_option: .*svg"):
            run(script, monkeypatch, TINY, "--plot", "x.bmp")
    assert not capsys.readouterr().out


def test_rows_and_kernels_write_what_they_print(tmp_path, monkeypatch):
    run(rows, monkeypatch, TINY, "--sizes", 2, "-d", 70, "-r", 1, "--csv", tmp_path / "rows.csv")
    found = table(tmp_path / "rows.csv")
    kinds = [(row["kind"], row["rows"]) for row in found]
    assert kinds == [("verify", "1"), ("verify", "2"), ("sequences", "1"), ("sequences", "2")]
    assert tuple(found[0]) == rows.COLUMNS and all(float(row["milliseconds"]) > 0 for row in found)
    small = ["--formats", "q4_0", "--isas", "scalar", "--cols", 64, "--out", 64, "--gb", 0.001, "-r", 1]
    for count in (1, 2):  # a machine's file grows
        run(kernels, monkeypatch, *small, "--rows", 1, "--csv", tmp_path / "kernels.csv")
        assert len(table(tmp_path / "kernels.csv")) == count
    assert tuple(table(tmp_path / "kernels.csv")[0]) == kernels.COLUMNS


def test_a_read_covers_what_rows_are_multiplied_with_and_no_far_away_rest():
    memory = np.zeros(4 << 20, np.uint8)
    at = memory.ctypes.data
    near = [memory[100:200], memory[0:100], memory[300:1000]]
    assert list(harness.spans([*near, memory[3 << 20 :]])) == [(at, 1000), (at + (3 << 20), 1 << 20)]
    assert list(harness.spans([])) == []
    driver = harness.Driver(TINY, 1, 128)
    tensors = {w.tensor for op in driver.model.plan.ops if op.code in harness.MATRICES for w in op.weights}
    for tensor in tensors:
        data = driver.model.weights.tensors[tensor].data
        first = data.ctypes.data
        assert any(start <= first and first + data.nbytes <= start + size for start, size in driver.spans)
    assert driver.read() > 1e8
    driver.model.close()


# -- ggml_matmul.py ------------------------------------------------------------------------------------------


def test_a_folder_without_ggml_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=rf"^error: not_found: {tmp_path}/libggml-base.so: .*$"):
        run(ggml_matmul, monkeypatch, tmp_path)


@pytest.mark.peers
def test_ggmls_product_is_the_same_and_is_timed_beside_ours(monkeypatch, capsys):
    needs_llama_cpp()
    (folder,) = Path(PYTHON).parents[1].glob("lib/python*/site-packages/llama_cpp/lib")
    monkeypatch.setattr(ggml_matmul, "BUSY", 0)
    shape = ("--rows", 32, "--cols", 512, "--out", 256, "-r", 2)
    run(ggml_matmul, monkeypatch, folder, "--formats", "q4_0", "q8_0", "--plain", *shape)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["q4_0", "q8_0"] and all(line.endswith("2 pairs") for line in lines)
    monkeypatch.setattr(ggml_matmul, "WRONG", 0)
    with pytest.raises(SystemExit, match=r"^error: bad_numeric: ggml's product of Q4_0 is another one"):
        run(ggml_matmul, monkeypatch, folder, "--formats", "q4_0", "--plain", *shape)
