"""Hostile safetensors files and indices: every length, offset, type and name of them is checked before it is used."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hf_folders import INDEX, UP, WEIGHTS, edit_header, edit_json, header_of, refused, write_header
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma4q import Gemma4qError
from gemma4q.convert.convert import planned
from gemma4q.convert.safetensors import open_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import tiny_hf


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny_hf.make("31b", tmp_path / "hf")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return tiny_hf.make("26b", tmp_path / "hf")


SCALAR = "model.language_model.layers.0.layer_scalar"


def shift(header: dict, name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h[UP].update(dtype="F13"), "bad_safetensors: {}: " + UP + ": dtype 'F13' is not known"),
        (lambda h: h[UP].update(dtype=3), "bad_safetensors: {}: " + UP + ": dtype 3 is not known"),
        (lambda h: h[UP].update(dtype="I32"), "bad_dtype: " + UP + " holds I32; want F64, F32, F16, BF16"),
        (lambda h: h[UP].update(shape=[128, -64]), "bad_safetensors: {}: " + UP + ": shape [128, -64] is not"),
        (lambda h: h[UP].update(shape=[True, 64]), "bad_safetensors: {}: " + UP + ": shape [True, 64] is not"),
        (lambda h: h[UP].update(shape=[1 << 40] * 8), "bad_safetensors: {}: " + UP + ": data_offsets"),
        (lambda h: h[UP].update(shape=[1] * 99), "bad_safetensors: {}: " + UP + ": shape"),
        (lambda h: h[UP].update(shape=[128, 63]), "bad_safetensors: {}: " + UP + ": data_offsets"),
        (lambda h: h[UP].update(data_offsets=[5]), "bad_safetensors: {}: " + UP + ": data_offsets [5] are not"),
        (lambda h: h[UP].pop("dtype"), "bad_safetensors: {}: " + UP + ": its entry must have"),
        (lambda h: h.update({UP: 1}), "bad_safetensors: {}: " + UP + ": its entry must have"),
        (lambda h: shift(h, SCALAR, -4), "bad_safetensors: {}: "),
        (lambda h: shift(h, SCALAR, 1 << 40), "bad_safetensors: {}: "),
        (lambda h: h.pop(UP), "bad_safetensors: {}: "),
    ],
)
def test_a_hostile_entry_is_said(folder, change, said):
    path = folder / WEIGHTS
    edit_header(path, change)
    assert refused(folder).startswith(said.format(path))


@pytest.mark.parametrize("length", [0, 7, 1 << 20, (1 << 63) - 1, (1 << 64) - 1, 100_000_001])
def test_a_header_of_a_wrong_length_is_said_without_memory(folder, length):
    path = folder / WEIGHTS
    header, data = header_of(path)
    write_header(path, header, data, length)
    os.truncate(path, max(path.stat().st_size, min(length, 200_000_000) + 8 if length == 100_000_001 else 0))
    assert refused(folder).split(":")[0] in ("truncated", "bad_json", "bad_safetensors")


@pytest.mark.parametrize("size", [0, 5, 8, 200, 20_000, -1])
def test_a_file_cut_short_is_said(folder, size):
    path = folder / WEIGHTS
    os.truncate(path, path.stat().st_size + size if size < 0 else size)
    assert refused(folder).split(":")[0] in ("truncated", "bad_safetensors")


def test_bytes_behind_the_last_tensor_are_said(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    assert "4 bytes follow the last tensor" in refused(folder)


def test_a_name_that_appears_twice_in_a_header_is_said(folder):
    path = folder / WEIGHTS
    header, data = header_of(path)
    text = json.dumps(header)
    write_header(path, text[:-1] + f', "{UP}": {json.dumps(header[UP])}}}', data)
    assert refused(folder) == f"bad_json: {path}: '{UP}' appears twice"


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", 3, "x.bin", ""]
)
def test_an_index_names_files_of_its_directory_only(sharded, shard):
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({next(iter(i["weight_map"])): shard}))
    assert "which is no file name of this directory" in refused(sharded)


def test_shards_and_their_index_must_agree(sharded):
    first = sorted(json.loads((sharded / INDEX).read_text())["weight_map"])[0]
    edit_json(sharded / INDEX, lambda i: i["weight_map"].pop(first))
    assert refused(sharded).startswith(f"extra_tensor: {first} is in model-00001-of-00003.safetensors but not in")
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({first: "model-00002-of-00003.safetensors"}))
    assert refused(sharded).startswith(f"missing_tensor: {first} is not in model-00002-of-00003.safetensors, where")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "1 shards of the index are missing" in refused(sharded)
    (sharded / INDEX).write_text("{}")
    assert "has no weight_map" in refused(sharded)


def test_shards_without_their_index_are_read_when_none_is_missing(sharded, tmp_path):
    (sharded / INDEX).unlink()
    with planned(sharded, tmp_path / "out.gguf") as conversion:
        assert len(conversion.tensors) == 46
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert refused(sharded).startswith("bad_index: ")


def test_a_shard_that_is_a_pipe_is_refused_at_once(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    started = time.monotonic()
    assert refused(folder).startswith("not_a_file: ")
    assert time.monotonic() - started < 5


def test_a_git_lfs_pointer_is_known(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damaged_byte_of_a_header_makes_anything_but_an_error(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    header, rest = tiny_hf.header([("a", (4, 8), "F32"), ("b", (), "BF16"), ("c", (3,), "I64")]), bytes(154)
    raw = bytearray(header + rest)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(raw)
    try:
        for tensor in open_checkpoint(folder).values():
            assert len(tensor.read(0, tensor.size)) == tensor.size
    except Gemma4qError:
        pass


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder):
    with planned(folder, folder.parent / "out.gguf") as conversion:
        os.truncate(folder / WEIGHTS, 60_000)
        with pytest.raises(Gemma4qError, match="became shorter while it was read"):
            conversion.write()
    assert not list(folder.parent.glob("out*"))
