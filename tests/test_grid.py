"""Weights that were trained on Q4_0's grid keep it: found whatever stores them, exact, and nothing else is touched."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import gguf as gguf_py
import numpy as np
import pytest

from gemma4q import load
from gemma4q.abi import TensorType as T
from gemma4q.cli import cli
from gemma4q.convert.convert import planned as converted
from gemma4q.gguf.quants import dequantize, planes, quantize
from gemma4q.gguf.reader import GGUF, open_gguf
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.quantize.encode import Encoder
from gemma4q.quantize.grid import fit, is_on_grid, laid
from gemma4q.quantize.importance import Entry, Importance
from gemma4q.quantize.mixtures import is_rounded, mixture
from gemma4q.quantize.overrides import Overrides
from gemma4q.quantize.quantize import planned

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from tiny_tasks import draw

TRAINED = Path(__file__).parent / "data/trained"
FLOATS = (T.F32, T.F16, T.BF16)


pytestmark = pytest.mark.usefixtures("quick_disk")


def on_grid(x: np.ndarray, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., cols] rounded to a grid with scales of its own, whose furthest codes are 5 to 8: values, scales."""
    blocks = x.reshape(-1, 32).astype("f4")
    furthest = np.abs(blocks).max(1) / np.random.default_rng(seed).uniform(4.6, 8.4, len(blocks))
    d = furthest.astype("f2").astype("f4")[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(d > 0, np.clip(np.rint(blocks / d), -8, 7), 0).astype("f4")
    return (d * codes).reshape(x.shape), d[:, 0]


def stored_as(x: np.ndarray, type: int) -> np.ndarray:
    return dequantize(quantize(x, type), type)


# -- Blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [3e-5, 0.02, 1.0, 300.0])
def test_blocks_of_a_grid_are_given_back_whatever_stored_them(stored, size):
    random = np.random.default_rng(1)
    x = random.normal(0, size, (4000, 32)).astype("f4") * random.lognormal(0, 1, (4000, 1)).astype("f4")
    exact, _ = on_grid(x)
    given = stored_as(exact, stored)
    scale, codes, found = fit(given, stored)
    assert (found == given.any(1)).all() and found.sum() > 3900
    values = scale.astype("f4")[:, None] * codes
    assert (stored_as(values, stored) == given).all()
    if stored == T.F32:
        assert (values == exact).all()
    data = Encoder(1).encode(given, T.Q4_0)
    laid(data, given, stored)
    assert (stored_as(dequantize(data.reshape(-1), T.Q4_0), stored) == given.reshape(-1)).all()
    plain = dequantize(Encoder(1).encode(given, T.Q4_0).reshape(-1), T.Q4_0)
    assert (stored_as(plain, stored) != given.reshape(-1)).mean() > 0.3, "plain rounding loses them"


def test_every_code_beside_every_furthest_one_is_found():
    for furthest in range(-8, 8):
        codes = np.resize(np.arange(-8, 8), 32)
        codes = np.where(np.abs(codes) > abs(furthest) - (furthest > 0), furthest, codes).astype("f4")
        for d in (np.float16(0.0123), np.float16(-0.0123)):
            x = (np.float32(d) * codes)[None]
            scale, q, found = fit(x, T.F32)
            assert found[0] == bool(x.any()), furthest
            assert (scale[0].astype("f4") * q == x).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38, 1e-44])
def test_what_no_scale_reaches_is_on_no_grid(bad):
    x = np.zeros((2, 32), "f4")
    x[1, 7] = bad
    assert not fit(x, T.F32)[2].any()


# -- Tensors ---------------------------------------------------------------------------------------------------


def file_of(tmp_path: Path, x: np.ndarray, type: int) -> GGUF:
    data = TensorData.of("a.weight", type, x.shape, quantize(x, type))
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "gemma4"}, [data])
    return open_gguf(tmp_path / "a.gguf")


def tied(random, kind: str) -> np.ndarray:
    x = random.standard_t(3, (64, 512)) if kind == "heavy" else random.normal(0, 1, (64, 512))
    x = {
        "levels": np.rint(x * 3) / 8,
        "few": np.sign(x) * (np.abs(x) > 0.7),
        "clipped": np.clip(np.rint(2 * x), -7, 7),
    }.get(kind, x)
    if kind == "ternary":
        x = np.sign(x) * random.lognormal(0, 1, (64, 16)).repeat(32, 1).astype("f2")
    return x.astype("f4")


@pytest.mark.parametrize("stored", FLOATS, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ["random", "heavy", "levels", "few", "clipped", "ternary", "zeros"])
def test_random_and_tied_tensors_have_no_grid(tmp_path, kind, stored):
    x = np.zeros((64, 512), "f4") if kind == "zeros" else tied(np.random.default_rng(2), kind)
    file = file_of(tmp_path, x, stored)
    assert not is_on_grid(file, file.tensors["a.weight"])


@pytest.mark.parametrize("type", [t for t in T if t.name[0] in "IMQ" and t != T.Q4_0], ids=lambda t: t.name)
def test_what_other_formats_left_behind_is_no_grid_of_q4_0(tmp_path, type):
    x = np.random.default_rng(2).normal(0, 0.02, (64, 512)).astype("f4")
    file = file_of(tmp_path, stored_as(x, type), T.F32)
    assert not is_on_grid(file, file.tensors["a.weight"])


# -- Models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """The trained models in F32, whose matrices are rounded to a grid of 4 bits."""
    folder, found = tmp_path_factory.mktemp("qat"), {}
    for name in ("tiny", "tiny-moe"):
        with converted(TRAINED / name, folder / f"{name}-plain.gguf", "f32") as conversion:
            conversion.write()
        model, tensors = open_gguf(folder / f"{name}-plain.gguf"), []
        for tensor in model.tensors.values():
            x = dequantize(tensor.data, tensor.type).reshape(tensor.shape)
            x = on_grid(x, len(tensors))[0] if is_rounded(tensor.name, tensor.shape) else x
            tensors.append(TensorData.of(tensor.name, T.F32, x.shape, quantize(x, T.F32)))
        found[name] = folder / f"{name}.gguf"
        write_gguf(found[name], model.metadata, tensors, model.types)
    return found


def rewritten(source: Path, to: Path, name: str, **options) -> GGUF:
    planned(source, to, mixture(name), **options).write(threads=2)
    return open_gguf(to)


def matrices(model: GGUF) -> list[str]:
    return [t.name for t in model.tensors.values() if is_rounded(t.name, t.shape)]


def likeliest(model) -> Iterator[np.ndarray]:
    """The token that is likeliest, at each of the model's turn in conversations that it was not trained with."""
    random = Random("grid")
    for task in ("copy", "sums", "lookup", "tools", "json"):
        example = draw(random, task, held=True)
        prompt, turn = (model.tokenize(text, special=True) for text in (example.prompt(), example.turn()))
        yield model.logits(prompt + turn, range(len(prompt) - 1, len(prompt + turn) - 1)).argmax(1)


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("stored", FLOATS, ids=lambda t: t.name)
def test_a_qat_checkpoint_becomes_q4_0_exactly_and_says_the_same(trained, tmp_path, name, stored):
    source = trained[name]
    if stored != T.F32:
        source = tmp_path / "stored.gguf"
        rewritten(trained[name], source, stored.name)
    before, after = open_gguf(source), rewritten(source, tmp_path / "q.gguf", "Q4_0")
    for tensor in (after.tensors[name] for name in matrices(before)):
        assert tensor.type == T.Q4_0, "the tables and the head too: more bits hold no more"
        values, was = dequantize(tensor.data, T.Q4_0), before.tensors[tensor.name]
        assert (quantize(values, was.type) == was.data).all() or (
            stored_as(values, was.type) == dequantize(was.data, was.type)
        ).all(), tensor.name
    tops = []
    for path in (source, tmp_path / "q.gguf"):
        with load(path, backend="reference", kv="f32") as model:  # nothing else is rounded to fewer bits
            tops.append(np.concatenate(list(likeliest(model))))
    assert len(tops[0]) > 150 and (tops[0] == tops[1]).all()


def test_importance_does_not_move_what_is_exact(trained, tmp_path):
    before = open_gguf(trained["tiny"])
    shapes = {n: (int(np.prod(before.tensors[n].shape[:-2])), before.tensors[n].shape[-1]) for n in matrices(before)}
    random = np.random.default_rng(3)
    entries = {n: Entry(random.uniform(0, 9, s), np.full(s[0], 3, "i8")) for n, s in shapes.items()}
    after = rewritten(trained["tiny"], tmp_path / "q.gguf", "Q4_0", importance=Importance(entries))
    for name in matrices(before):
        tensor, was = after.tensors[name], before.tensors[name]
        assert tensor.type == T.Q4_0 and (dequantize(tensor.data, T.Q4_0) == dequantize(was.data, T.F32)).all()


def test_a_block_that_left_the_grid_is_rounded_as_ever(trained, tmp_path):
    model, name, moved = open_gguf(trained["tiny"]), "blk.1.ffn_up.weight", []
    for tensor in model.tensors.values():
        x = dequantize(tensor.data, tensor.type).reshape(tensor.shape).copy()
        if tensor.name == name:
            x[20, 33] += np.float32(0.37) * np.abs(x[20, 32:64]).max()
            values = x
        moved.append(TensorData.of(tensor.name, T.F32, x.shape, quantize(x, T.F32)))
    write_gguf(tmp_path / "m.gguf", model.metadata, moved, model.types)
    data = rewritten(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q4_0").tensors[name].data
    plain = gguf_py.quants.quantize(values, gguf_py.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    off = (dequantize(data, T.Q4_0) != values.reshape(-1)).reshape(-1, 32).any(1)
    assert np.flatnonzero(off).tolist() == [(20 * values.shape[1] + 33) // 32]
    assert (data.reshape(-1, 18)[off] == plain[off]).all()


def test_a_persons_word_beats_the_grid(trained, tmp_path):
    wishes = Overrides(embedding=T.Q8_0)
    after = rewritten(trained["tiny"], tmp_path / "q.gguf", "Q4_0", overrides=wishes)
    assert after.tensors["token_embd.weight"].type == T.Q8_0
    assert after.tensors["blk.0.attn_q.weight"].type == T.Q4_0


def test_what_is_kept_is_said_and_so_is_what_could_be(trained, tmp_path, capsys):
    count = len(matrices(open_gguf(trained["tiny"])))
    for words, wanted in (
        (("Q4_0",), f"{count} tensors were trained on Q4_0's grid: they keep their scales and codes, exactly"),
        (("IQ4_NL", "--pure"), f"{count} tensors were trained on Q4_0's grid: the type Q4_0 would keep them exactly"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli(["quantize", str(trained["tiny"]), str(tmp_path / "q.gguf"), *words, "--dry-run"])
        assert ended.value.code == 0 and wanted in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli(["quantize", str(trained["tiny"]), str(tmp_path / "q.gguf"), "Q4_0", "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["kept_exactly"]) == len(found["on_q4_0_grid"]) == count


def test_planes_agree_with_what_fit_says(trained):
    """The codes of the packed file are those that were found."""
    model = open_gguf(trained["tiny"])
    x = dequantize(model.tensors["blk.0.attn_q.weight"].data, T.F32).reshape(-1, 32)
    scale, codes, found = fit(x, T.F32)
    data = Encoder(1).encode(x, T.Q4_0)
    laid(data, x, T.F32)
    packed = planes(data.reshape(-1), T.Q4_0)
    assert (packed.q.reshape(-1, 32)[found] == codes[found]).all()
    assert (packed.scale.reshape(-1)[found] == scale[found].astype("f4")).all()
