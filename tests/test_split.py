"""`gemma4q split` and `merge`: parts that llama.cpp's reader joins, and the same bytes when they are one again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from terminal import GEMMA4Q
from tiny import tiny

from gemma4q import Gemma4qError
from gemma4q.convert.split import merge, part_size, split
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.types import ValueType
from gemma4q.gguf.writer import TensorData, write_gguf
from gemma4q.model import open_model

GOLDEN = Path(__file__).parent / "data/golden"


pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def model(tmp_path) -> Path:
    """A golden file as our writer writes it."""
    gguf = open_gguf(GOLDEN / "moe-like.gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf.metadata, [TensorData.copy(tensor) for tensor in gguf.tensors.values()], gguf.types)
    return path


def refused(function, *arguments) -> str:
    with pytest.raises(Gemma4qError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("size", [200_000, 1_000_000])
def test_split_and_merged_it_is_the_same_file(model, tmp_path, size):
    parts = split(model, tmp_path / "parts.gguf", size)
    assert [part.name for part in parts] == [f"parts-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    joined = merge(parts[-1], tmp_path / "joined.gguf")
    assert joined.read_bytes() == model.read_bytes()


def test_parts_hold_at_most_what_was_asked_but_for_single_tensors(model, tmp_path):
    whole = open_gguf(model)
    parts = split(model, tmp_path / "p.gguf", 150_000)
    joined = open_gguf(parts[0])
    for number in range(len(parts)):
        held = [tensor.nbytes for tensor in joined.tensors.values() if tensor.file == number]
        assert sum(held) <= 150_000 or len(held) == 1
    assert joined.tensors.keys() == whole.tensors.keys()


def test_parts_carry_the_keys_that_llama_cpp_wants(model, tmp_path):
    parts = split(model, tmp_path / "p.gguf", 300_000)
    first = open_gguf(parts[0])
    assert first.metadata["split.count"] == len(parts) and first.metadata["split.no"] == 0
    assert first.metadata["split.tensors.count"] == len(open_gguf(model).tensors)
    types = {key: first.types[key] for key in first.types if key.startswith("split.")}
    assert types == {
        "split.no": (ValueType.U16,),
        "split.count": (ValueType.U16,),
        "split.tensors.count": (ValueType.I32,),
    }
    assert set(first.metadata) - set(types) == set(open_gguf(model).metadata)
    open_model(parts[1])


def test_an_alignment_of_its_own_survives(tmp_path):
    file = tiny()
    file.alignment = 64
    file.set("general.alignment", 4, 64)
    (tmp_path / "m.gguf").write_bytes(file.bytes())
    parts = split(tmp_path / "m.gguf", None, 50_000)
    assert parts[0].name.startswith("m-00001-of-")
    joined = open_gguf(merge(parts[0], tmp_path / "j.gguf"))
    source = open_gguf(tmp_path / "m.gguf")
    for name, tensor in source.tensors.items():
        assert joined.tensors[name].data.tobytes() == tensor.data.tobytes()
        assert joined.tensors[name].offset % 64 == 0


def test_parts_can_be_split_again(model, tmp_path):
    parts = split(model, tmp_path / "a.gguf", 500_000)
    finer = split(parts[0], tmp_path / "b.gguf", 250_000)
    assert len(finer) > len(parts)
    assert merge(finer[2], tmp_path / "c.gguf").read_bytes() == model.read_bytes()


def test_names_follow_the_model_when_none_is_given(model):
    parts = split(model, None, 500_000)
    model.unlink()
    assert merge(parts[0], None) == model


def test_what_cannot_be_split_or_merged_is_said(model, tmp_path, monkeypatch):
    assert refused(split, model, None, 10**9).startswith(f"fits: {model} holds")
    monkeypatch.setattr("gemma4q.convert.split.MOST_PARTS", 3)
    assert refused(split, model, None, 100_000).startswith("too_many_parts: ")
    monkeypatch.undo()
    assert refused(merge, model, None) == f"not_split: {model} is a whole model"
    assert refused(split, tmp_path / "none.gguf", None, 9).startswith("not_found: ")
    parts = split(model, tmp_path / "p.gguf", 300_000)
    assert refused(merge, parts[0], parts[0]).startswith("same_file: ")
    parts[1].unlink()
    assert refused(merge, parts[0], None).startswith("bad_split: part 2 of")
    assert refused(split, GOLDEN / "moe-like.npz", None, 9).startswith("not_gguf: ")


def test_sizes_are_spelt_as_llama_cpp_spells_them():
    assert [part_size(text) for text in ("2G", "500M", "7K", "123")] == [2 * 10**9, 500 * 10**6, 7000, 123]
    for text in ("", "0", "-1", "2T", "1.5G", "G", "9" * 20):
        with pytest.raises(ValueError, match="is no size"):
            part_size(text)


def test_a_failure_leaves_no_part(model, tmp_path, monkeypatch):
    calls = []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", failing)
    assert refused(split, model, tmp_path / "p.gguf", 300_000).startswith("io: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_commands_split_and_merge(model, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run([*GEMMA4Q, *map(str, arguments)], capture_output=True, text=True)

    done = run("split", model, tmp_path / "p", "--max-part-size", "300K", "--json")
    parts = [Path(file["path"]) for file in json.loads(done.stdout)["files"]]
    assert done.returncode == 0 and len(parts) > 3
    done = run("merge", parts[0], tmp_path / "one.gguf")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(str(tmp_path / "one.gguf"))
    assert (tmp_path / "one.gguf").read_bytes() == model.read_bytes()
    done = run("split", model, "--max-part-size", "9G")
    assert done.returncode == 1 and done.stderr.startswith("error: fits: ")
    assert run("split", model).returncode == 2
