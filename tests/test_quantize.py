"""Quantising a model file: the right bytes in the right types, what is refused, and whole files or none."""

import os
import sys
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from quantized import contents, copied, measured, refused, written
from tiny import tiny

from gemma4q import Gemma4qError
from gemma4q.abi import TensorType as T
from gemma4q.convert.convert import planned as converted
from gemma4q.convert.split import split
from gemma4q.gguf.quants import dequantize, quantize
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.writer import write_gguf
from gemma4q.model import open_model
from gemma4q.quantize.encode import Encoder
from gemma4q.quantize.importance import Entry, Importance
from gemma4q.quantize.mixtures import MIXTURES, mixture
from gemma4q.quantize.overrides import importance_keys, selected
from gemma4q.quantize.quantize import planned, rewritten
from gemma4q.shipped import shipped

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import tiny_hf

GOLDEN = Path(__file__).parent / "data/golden"
SPREAD = {"Q2_K": 0.12, "Q3_K": 0.035, "MXFP4": 0.02, "IQ4_XS": 0.015, "IQ4_NL": 0.015}  # of squares that are lost
PLAIN = [name for name in MIXTURES if name not in ("COPY",)]


pytestmark = pytest.mark.usefixtures("quick_disk")


# -- The bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_f16_becomes_the_bytes_of_gguf_py(halves, tmp_path, name):
    before, after = open_gguf(halves / "tiny-F16.gguf"), written(halves / "tiny-F16.gguf", tmp_path / "q.gguf", name)
    compared = 0
    for tensor in after.tensors.values():
        source = before.tensors[tensor.name]
        if tensor.type == source.type:
            assert (tensor.data == source.data).all()
        elif tensor.type == T[name]:
            values = source.data.view("<f2").astype("<f4").reshape(source.shape)
            kind = gguf_py.GGMLQuantizationType[name]
            assert (gguf_py.quants.quantize(values, kind).reshape(-1) == tensor.data).all(), tensor.name
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_every_mixture_is_a_model_that_loads_and_holds_what_was_there(halves, tmp_path, model, name):
    source = open_gguf(halves / f"{model}-F16.gguf")
    after = written(halves / f"{model}-F16.gguf", tmp_path / "q.gguf", name)
    open_model(tmp_path / "q.gguf")
    assert after.metadata["general.file_type"] == MIXTURES[name].file_type
    for tensor in after.tensors.values():
        was, now = (dequantize(t.data, t.type).astype("f8") for t in (source.tensors[tensor.name], tensor))
        spread = SPREAD.get(tensor.type.name, 0.015 if tensor.type.name.startswith("Q4") else 0.007)
        assert ((was - now) ** 2).sum() <= spread * (was**2).sum(), tensor.name


def test_neither_threads_nor_the_cut_into_pieces_change_a_bit(halves, tmp_path, monkeypatch):
    files = []
    for threads, piece in ((1, 1 << 19), (3, 1 << 19), (2, 700), (2, 1)):
        monkeypatch.setattr("gemma4q.quantize.stream.PIECE", piece)
        monkeypatch.setattr("gemma4q.quantize.stream.COPIED", max(piece, 1000))
        written(halves / "tiny-moe-F16.gguf", tmp_path / "q.gguf", "Q4_0", threads)
        files.append((tmp_path / "q.gguf").read_bytes())
    assert files[0] == files[1] == files[2] == files[3]


def test_metadata_are_kept_but_for_what_the_file_is_made_of(halves, tmp_path):
    source = copied(halves / "tiny-F16.gguf", tmp_path / "a.gguf", **{"quantize.imatrix.file": "old.dat"})
    before, after = open_gguf(source), written(source, tmp_path / "q.gguf", "Q4_K_M")
    changed = {key for key in before.metadata if str(before.metadata[key]) != str(after.metadata.get(key))}
    assert changed == {"general.file_type", "quantize.imatrix.file"}
    assert "quantize.imatrix.file" not in after.metadata, "no importance was used"
    assert list(after.tensors) == list(before.tensors) and after.types == {k: before.types[k] for k in after.types}
    assert (after.metadata["general.file_type"], after.metadata["general.quantization_version"]) == (15, 2)


def test_copy_changes_no_tensor_and_no_key_but_those_that_are_set(tmp_path):
    for source in (shipped("tiny"), GOLDEN / "moe-like.gguf"):
        after = written(source, tmp_path / "c.gguf", "COPY", settings=[("general.name", "Mine")])
        before = open_gguf(source)
        assert contents(after) == contents(before)
        assert str(after.metadata) == str(before.metadata | {"general.name": "Mine"})


def test_copy_takes_encoders_whose_ranges_are_infinite(tmp_path):
    with converted(tiny_hf.make("e2b", tmp_path / "hf"), tmp_path / "m.gguf", "auto", mmproj=True) as conversion:
        conversion.write()
    source = open_gguf(tmp_path / "m.gguf")
    assert any(np.isinf(t.data.view("<f4")).any() for t in source.tensors.values() if t.type == T.F32)
    assert contents(written(tmp_path / "m.gguf", tmp_path / "c.gguf", "COPY")) == contents(source)


def test_any_type_may_be_given_to_any_tensor_vectors_too(halves, tmp_path):
    source = open_gguf(halves / "tiny-F16.gguf")
    types = {name: tensor.type for name, tensor in source.tensors.items()} | {"output_norm.weight": T.BF16}
    rewritten(source, tmp_path / "q.gguf", types).write()
    after = open_gguf(tmp_path / "q.gguf").tensors["output_norm.weight"]
    assert (after.data == quantize(dequantize(source.tensors[after.name].data, T.F32), T.BF16)).all()


def test_an_alignment_of_its_own_survives(tmp_path):
    file = tiny()
    file.alignment = 64
    file.set("general.alignment", 4, 64)
    (tmp_path / "m.gguf").write_bytes(file.bytes())
    after = written(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q8_0", allow_requantize=True)
    assert all(tensor.offset % 64 == 0 for tensor in after.tensors.values())


@pytest.mark.parametrize("moe", [False, True])
def test_tensors_of_any_type_are_read(tmp_path, moe):
    (tmp_path / "m.gguf").write_bytes(tiny(moe).bytes())
    after = written(tmp_path / "m.gguf", tmp_path / "q.gguf", "F32", allow_requantize=True)
    for name, tensor in open_gguf(tmp_path / "m.gguf").tensors.items():
        if after.tensors[name].type == T.F32:
            wanted = dequantize(tensor.data, tensor.type)
            assert (wanted.view("u4") == after.tensors[name].data.view("<u4")).all(), name


# -- Importance ------------------------------------------------------------------------------------------------


def test_each_expert_is_weighed_by_its_own_importance(halves, tmp_path):
    source = open_gguf(halves / "tiny-moe-F16.gguf")
    weights = measured(source)
    after = written(halves / "tiny-moe-F16.gguf", tmp_path / "q.gguf", "Q4_K_M", importance=weights)
    encoder = Encoder(1)
    for name in ("blk.0.ffn_gate_up_exps.weight", "blk.1.ffn_down_exps.weight", "blk.2.attn_q.weight"):
        tensor = after.tensors[name]
        values = dequantize(source.tensors[name].data, T.F16).reshape(-1, *tensor.shape[-2:])
        wanted = [encoder.encode(x, tensor.type, w) for x, w in zip(values, weights.of(name), strict=True)]
        assert (np.concatenate(wanted).reshape(-1) == tensor.data).all(), name


def test_a_file_says_which_importance_it_was_made_with_as_llama_cpp_says_it(halves, tmp_path):
    weights = selected(measured(open_gguf(halves / "tiny-F16.gguf")), (), ("attn_k",))
    keys = importance_keys(weights, "some/imatrix.gguf")
    after = written(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", importance=weights, importance_keys=keys)
    said = {key: (after.types[key][0].name, value) for key, value in after.metadata.items() if "imatrix" in key}
    assert said == {
        "quantize.imatrix.file": ("STRING", "some/imatrix.gguf"),
        "quantize.imatrix.dataset": ("STRING", "a.txt"),
        "quantize.imatrix.entries_count": ("U32", len(weights.entries)),
        "quantize.imatrix.chunks_count": ("U32", 7),
    }


def test_importance_of_another_model_is_refused_by_the_tensors_name(halves, tmp_path):
    weights = measured(open_gguf(halves / "tiny-F16.gguf"), ["blk.0.attn_q.weight"])
    entry = weights.entries["blk.0.attn_q.weight"]
    narrow = Importance({"blk.1.ffn_up.weight": Entry(entry.sums[:, :100], entry.counts)})
    said = refused(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", importance=narrow)
    assert said.startswith("shape_mismatch: blk.1.ffn_up.weight")
    twice = Importance({"blk.1.ffn_up.weight": Entry(np.ones((2, 256)), np.ones(2, "i8"))})
    said = refused(halves / "tiny-F16.gguf", tmp_path / "q.gguf", "Q4_0", importance=twice)
    wanted = "has importance of 2 x 256 columns; want 1 x 256: it is another model's"
    assert said == f"shape_mismatch: blk.1.ffn_up.weight {wanted}"


def test_entries_are_chosen_by_parts_of_names():
    weights = Importance(dict.fromkeys(("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.ffn_up.weight")))
    assert list(selected(weights, ("attn",), ()).entries) == ["blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert list(
        selected(
            weights,
            (),
            ("attn_q", "ffn"),
        ).entries
    ) == ["blk.0.attn_k.weight"]
    assert selected(weights, (), ()).entries == weights.entries
    with pytest.raises(Gemma4qError, match="bad_option: --include-weights and --exclude-weights leave nothing"):
        selected(weights, ("typo",), ())


# -- What cannot be --------------------------------------------------------------------------------------------


def test_what_is_quantised_already_is_rounded_again_only_when_asked(tmp_path):
    said = refused(shipped("tiny"), tmp_path / "q.gguf", "Q4_0")
    assert said.startswith("requantize: per_layer_token_embd.weight and 35 more are quantised already (Q8_0), and ")
    assert "with --allow-requantize" in said and not list(tmp_path.iterdir())
    same = written(shipped("tiny"), tmp_path / "same.gguf", "Q8_0")
    assert contents(same) == contents(open_gguf(shipped("tiny")))
    after = written(shipped("tiny"), tmp_path / "q.gguf", "Q4_0", allow_requantize=True)
    assert after.tensors["blk.0.attn_q.weight"].type == T.Q4_0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "BF16", "F16", "F32"])
def test_a_value_that_is_not_finite_is_named(tmp_path, name, value):
    def damage(tensors):
        tensors["blk.1.ffn_down_exps.weight"][2, 5, 7] = value
        tensors["blk.1.ffn_down_exps.weight"][3, 0, 0] = value

    source = copied(GOLDEN / "moe-like.gguf", tmp_path / "m.gguf", damage)
    said = refused(source, tmp_path / "q.gguf", name)
    if name == "F32":
        assert said == "numeric: blk.1.ffn_down_exps.weight[2, 5, 7]: NaN or infinity"
    else:
        assert said == f"numeric: blk.1.ffn_down_exps.weight[2, 5, 7] is {value}: the model is damaged"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_is_copied_is_looked_at_too(tmp_path):
    def damage(tensors):
        tensors["blk.0.attn_norm.weight"][3] = np.inf

    source = copied(GOLDEN / "moe-like.gguf", tmp_path / "m.gguf", damage)
    assert refused(source, tmp_path / "q.gguf", "Q8_0") == "numeric: blk.0.attn_norm.weight[3]: NaN or infinity"
    file = tiny()
    info = file.tensors["blk.0.attn_q.weight"]  # Q8_0, rows of 64 values, which are two blocks
    info.data = info.data[: 3 * 34] + b"\x00\x7e" + info.data[3 * 34 + 2 :]
    (tmp_path / "b.gguf").write_bytes(file.bytes())
    said = refused(tmp_path / "b.gguf", tmp_path / "q.gguf", "Q8_0", allow_requantize=True)
    assert said == "numeric: blk.0.attn_q.weight[1, 32]: a block with NaN or infinity as its scale"
    assert refused(tmp_path / "b.gguf", tmp_path / "q.gguf", "COPY").startswith("numeric: blk.0.attn_q.weight[1, 32]")


@pytest.mark.parametrize("name, value", [("F16", 7e4), ("Q8_0", 1e7), ("Q4_0", -3e6), ("Q6_K", 3e38)])
def test_a_value_that_no_scale_reaches_is_named(tmp_path, name, value):
    def damage(tensors):
        tensors["blk.0.ffn_up.weight"][4, 40] = value

    source = copied(GOLDEN / "dense-like.gguf", tmp_path / "m.gguf", damage)
    said = refused(source, tmp_path / "q.gguf", name)
    kind = "Q8_0" if name == "Q6_K" else name
    assert said == f"numeric: blk.0.ffn_up.weight[4, 40] is {value:g}, too large for {kind}: BF16 holds it"
    written(source, tmp_path / "q.gguf", "BF16")


def test_a_type_that_is_not_read_is_refused_unless_it_stays(tmp_path):
    file = tiny()
    info = file.tensors["blk.0.ffn_up.weight"]
    info.type, info.data = 22, bytes(82 * HIDDEN_BLOCKS)
    info.ne = [256, HIDDEN_BLOCKS]
    (tmp_path / "m.gguf").write_bytes(file.bytes())
    said = refused(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q8_0", allow_requantize=True)
    assert said.startswith("bad_quant_type: blk.0.ffn_up.weight is IQ2_S, which gemma4q does not read")
    after = written(tmp_path / "m.gguf", tmp_path / "q.gguf", "COPY")
    assert after.tensors["blk.0.ffn_up.weight"].data.tobytes() == info.data


HIDDEN_BLOCKS = 64


def test_files_that_are_no_gemma_4_are_said(tmp_path):
    assert refused(tmp_path / "none.gguf", None, "Q8_0").startswith("not_found: ")
    assert refused(GOLDEN / "moe-like.npz", None, "Q8_0").startswith("not_gguf: ")
    other = copied(GOLDEN / "dense-like.gguf", tmp_path / "llama.gguf", **{"general.architecture": "llama"})
    assert refused(other, None, "Q8_0").startswith("bad_arch: general.architecture is 'llama'")
    encoders = copied(GOLDEN / "dense-like.gguf", tmp_path / "mmproj.gguf", **{"general.architecture": "clip"})
    assert refused(encoders, None, "Q8_0").startswith(f"bad_arch: {encoders} holds encoders, which have no mixtures")
    written(encoders, tmp_path / "copy.gguf", "COPY")
    empty = tmp_path / "empty.gguf"
    write_gguf(empty, open_gguf(shipped("tiny")).metadata, [], open_gguf(shipped("tiny")).types)
    assert refused(empty, None, "Q8_0") == f"missing_tensor: {empty} holds no tensors"


def test_a_model_that_changes_meanwhile_is_said_and_nothing_is_left(halves, tmp_path):
    source = tmp_path / "m.gguf"
    source.write_bytes((halves / "tiny-F16.gguf").read_bytes())
    plan = planned(source, tmp_path / "q.gguf", mixture("Q8_0"))
    os.utime(source, (1, 1))
    with pytest.raises(Gemma4qError, match=r"model_changed: .*m\.gguf was written to while it was read"):
        plan.write()
    plan = planned(source, tmp_path / "q.gguf", mixture("Q8_0"))
    os.truncate(source, source.stat().st_size - 5000)
    with pytest.raises(Gemma4qError, match=r"model_changed: .*m\.gguf "):
        plan.write()
    with pytest.raises(Gemma4qError, match=r"model_changed: .*m\.gguf became shorter while it was read"):
        plan.gguf.files[0].read(source.stat().st_size - 10, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_output_that_cannot_be_is_said_and_what_was_there_stays(halves, tmp_path, monkeypatch):
    source = halves / "tiny-F16.gguf"
    assert refused(source, source, "Q8_0").startswith("same_file: ")
    (tmp_path / "link.gguf").symlink_to(source)
    assert refused(source, tmp_path / "link.gguf", "Q8_0").startswith("same_file: ")
    assert refused(source, tmp_path / "no/q.gguf", "Q8_0").startswith(f"not_found: {tmp_path / 'no'}: there is no")
    assert refused(source, Path("/dev/null"), "Q8_0").startswith("not_a_file: ")
    assert refused(source, Path("/sys/q.gguf"), "Q8_0").startswith("not_writable: ")
    (tmp_path / "text").write_text("mine")
    assert refused(source, tmp_path / "text", "Q8_0").startswith("not_gguf: ")
    out = tmp_path / "q.gguf"
    written(source, out, "Q8_0")
    before = out.read_bytes()
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: type("Status", (), {"f_bavail": 3, "f_frsize": full.f_frsize}))
    assert refused(source, out, "Q4_0").startswith(f"no_space: {tmp_path} has {3 * full.f_frsize:,} bytes free; ")
    monkeypatch.undo()

    def damage(tensors):
        tensors["output_norm.weight"][0] = np.nan

    assert refused(copied(source, tmp_path / "bad.gguf", damage), out, "Q4_0").startswith("numeric: output_norm")
    assert out.read_bytes() == before and not list(tmp_path.glob("*.part"))


# -- Names and parts -------------------------------------------------------------------------------------------


def test_without_a_name_the_file_is_called_after_its_type(tmp_path):
    for name, wanted in (
        ("gemma-4-E2B-it-BF16.gguf", "gemma-4-E2B-it-Q4_K_M.gguf"),
        ("gemma-4-q4_k.gguf", "gemma-4-Q4_K_M.gguf"),
        ("mine.gguf", "mine-Q4_K_M.gguf"),
        ("f16.gguf", "f16-Q4_K_M.gguf"),
    ):
        source = copied(GOLDEN / "dense-like.gguf", tmp_path / name)
        assert planned(source, None, mixture("q4_k")).files[0].path == tmp_path / wanted
        (tmp_path / "other").mkdir(exist_ok=True)
        assert planned(source, tmp_path / "other", mixture("q4_k")).files[0].path == tmp_path / "other" / wanted


def test_parts_become_one_file_or_the_same_parts(tmp_path):
    parts = split(GOLDEN / "moe-like.gguf", tmp_path / "m-F32.gguf", 400_000)
    whole = written(GOLDEN / "moe-like.gguf", tmp_path / "whole.gguf", "Q8_0")
    one = written(parts[1], tmp_path / "one.gguf", "Q8_0")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not any(key.startswith("split.") for key in one.metadata)
    plan = planned(parts[0], None, mixture("Q8_0"), keep_split=True)
    plan.write()
    count = len(parts)
    assert [file.path.name for file in plan.files] == [f"m-Q8_0-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    kept, source = open_gguf(plan.files[0].path), open_gguf(parts[0])
    assert {n: t.file for n, t in kept.tensors.items()} == {n: t.file for n, t in source.tensors.items()}
    assert contents(kept) == contents(whole)
    plan = planned(GOLDEN / "moe-like.gguf", tmp_path / "alone.gguf", mixture("Q8_0"), keep_split=True)
    assert [file.path.name for file in plan.files] == ["alone.gguf"]
