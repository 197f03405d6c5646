"""What is written is read back, by us and by gguf-py; what gguf-py writes we read; so are split files."""

import time
import tracemalloc

import gguf as peer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import STR, TOKENS, U8, tiny
from vocab import gemma_vocabulary, records, strings

from gemma4q.abi import TensorType
from gemma4q.errors import Gemma4qError
from gemma4q.gguf import strings as module
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.strings import StringArray, string_array
from gemma4q.gguf.types import TENSOR_TYPES, ValueType
from gemma4q.gguf.writer import TensorData, write_gguf

T = ValueType
ARRAYS = {T.U8: "u1", T.I8: "i1", T.U16: "<u2", T.I32: "<i4", T.U64: "<u8", T.F32: "<f4", T.F64: "<f8", T.BOOL: "?"}


def plain(value):
    """A metadata value as something that == compares."""
    if isinstance(value, StringArray):
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


@st.composite
def arrays(draw):
    kind = draw(st.sampled_from(sorted(ARRAYS)))
    dtype = np.dtype(ARRAYS[kind])
    raw = draw(st.binary(max_size=8 * 20))
    values = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    return np.nan_to_num(values) if dtype.kind == "f" else np.frombuffer(raw, "u1") > 9 if dtype.kind == "b" else values


VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=30).filter(lambda text: max(text, default="") < "\ud800" or max(text) > "\udfff"),
    st.lists(st.binary(max_size=300), max_size=30),
    arrays(),
)
KEYS = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=8), rows=st.lists(st.integers(1, 40), max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, metadata, rows):
    path = tmp_path_factory.getbasetemp() / "written.gguf"
    random = np.random.default_rng(1)
    data = [random.integers(0, 256, (n, 34), np.uint8) for n in rows]
    tensors = [TensorData.of(f"t.{i}", TensorType.Q8_0, (n, 32), data[i]) for i, n in enumerate(rows)]
    write_gguf(path, metadata, tensors)
    gguf = open_gguf(path)
    assert {key: plain(value) for key, value in gguf.metadata.items()} == {k: plain(v) for k, v in metadata.items()}
    assert [(t.name, t.type, t.shape) for t in gguf.tensors.values()] == [(t.name, t.type, t.shape) for t in tensors]
    assert all((t.data == raw.ravel()).all() for t, raw in zip(gguf.tensors.values(), data, strict=True))


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny().bytes())
    return path


def test_a_copy_is_the_same_file_but_for_padding_at_its_end(model, tmp_path):
    gguf, copy = open_gguf(model), tmp_path / "copy.gguf"
    write_gguf(copy, gguf.metadata, [TensorData.copy(t) for t in gguf.tensors.values()], gguf.types)
    whole = model.read_bytes()
    assert copy.read_bytes() == whole + bytes(-len(whole) % 32)


def test_gguf_py_reads_what_we_write(model, tmp_path):
    gguf, copy = open_gguf(model), tmp_path / "copy.gguf"
    write_gguf(
        copy, gguf.metadata | {"general.alignment": 128}, [*map(TensorData.copy, gguf.tensors.values())], gguf.types
    )
    reader = peer.GGUFReader(copy)
    for tensor in reader.tensors:
        ours = gguf.tensors[tensor.name]
        assert (int(tensor.tensor_type), [*tensor.shape]) == (ours.type, [*ours.shape[::-1]])
        assert tensor.data.tobytes() == ours.data.tobytes()
        assert tensor.data_offset % 128 == 0
    for key, value in gguf.metadata.items():
        theirs = reader.fields[key].contents()
        assert theirs == ([s.decode() for s in value] if isinstance(value, StringArray) else plain(value)), key


def test_we_read_what_gguf_py_writes(tmp_path):
    writer = peer.GGUFWriter(tmp_path / "peer.gguf", "gemma4")
    writer.add_uint8("a.u8", 255)
    writer.add_int16("a.i16", -5)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["", "ä", "x" * 1000])
    writer.add_array("a.ints", [1, -2, 3])
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("m", matrix)
    writer.add_tensor("odd", np.arange(5, dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf = open_gguf(tmp_path / "peer.gguf")
    expected = {
        "a.u8": 255, "a.i16": -5, "a.u64": 2**64 - 1, "a.f64": 0.1, "a.bool": True,
        "a.strings": [b"", "ä".encode(), b"x" * 1000], "a.ints": [1, -2, 3], "general.architecture": "gemma4",
    }  # fmt: skip
    assert {key: plain(value) for key, value in gguf.metadata.items()} == expected
    assert gguf.types["a.i16"] == (T.I16,) and gguf.types["a.ints"] == (T.ARRAY, T.I32)
    assert (gguf.tensors["m"].data.view("<f4").reshape(gguf.tensors["m"].shape) == matrix).all()
    assert not gguf.tensors["odd"].readable


def test_block_sizes_are_those_of_gguf_py():
    for kind, (values, size) in peer.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # never in a file; gguf-py still has the 40 bytes it once took
            assert TENSOR_TYPES[int(kind)] == (kind.name, values, size)


def test_tensors_lie_in_the_mapped_file_and_cannot_be_written_to(model):
    gguf = open_gguf(model)
    for tensor in gguf.tensors.values():
        assert tensor.data.ctypes.data == gguf.files[tensor.file].address + tensor.offset
        assert not tensor.data.flags.writeable
    whole = model.read_bytes()
    last = gguf.tensors["blk.3.post_norm.weight"]
    assert whole[last.offset : last.offset + last.nbytes] == last.data.tobytes()


def test_writing_needs_no_more_memory_than_a_chunk_and_leaves_nothing_behind_when_it_fails(tmp_path):
    chunk = bytes(1 << 20)
    tracemalloc.start()
    write_gguf(tmp_path / "large.gguf", {}, [TensorData("t", TensorType.F16, (64, 1 << 19), lambda: [chunk] * 64)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20 and (tmp_path / "large.gguf").stat().st_size > 64 << 20
    with pytest.raises(Gemma4qError, match="bad_tensor_data"):
        write_gguf(tmp_path / "short.gguf", {}, [TensorData("t", TensorType.F16, (2, 8), lambda: [b"1234"])])
    with pytest.raises(Gemma4qError, match="bad_block_size"):
        write_gguf(tmp_path / "odd.gguf", {}, [TensorData("t", TensorType.Q8_0, (2, 8), list)])
    assert [path.name for path in tmp_path.iterdir()] == ["large.gguf"]


# Short and long, empty, with NULs, with what looks like a length.
TEXTS = st.one_of(st.binary(max_size=4), st.binary(max_size=300), st.just(b""), st.just(b"\3" + bytes(9)))


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=60), window=st.integers(9, 500), stride=st.integers(1, 9))
def test_a_string_array_holds_its_strings_however_it_is_searched(texts, window, stride):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WINDOW", window)
        patch.setattr(module, "_STRIDE", stride)
        raw = np.frombuffer(b"before" + records(texts) + bytes(20), np.uint8)
        found = string_array(raw, 6, len(texts), "test")
    assert [*found] == [found[i] for i in range(len(found))] == texts
    cut = [found.data[a : a + n].tobytes() for a, n in zip(found.starts, found.lengths, strict=True)]
    assert cut == texts and len(found.data) == len(records(texts))


def test_a_string_array_is_indexed_like_a_list():
    found = strings(["a", "bc", "d"])
    assert found[-1] == b"d"
    with pytest.raises(IndexError):
        found[3]


def test_an_array_of_long_or_empty_strings_is_no_slower_than_a_walk():
    for text in (b"", b"x" * 300, b"\1" + bytes(7)):
        raw = np.frombuffer(records([text] * 200_000), np.uint8)
        start = time.perf_counter()
        assert len(string_array(raw, 0, 200_000, "test")) == 200_000
        assert time.perf_counter() - start < 1


def test_the_whole_vocabulary_is_there_in_a_quarter_of_a_second():
    path, seconds = gemma_vocabulary(), []
    for _ in range(3):
        start = time.perf_counter()
        gguf = open_gguf(path)
        seconds.append(time.perf_counter() - start)
    tokens, merges = (gguf.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    assert (len(tokens), len(merges)) == (262_144, 514_906)
    assert (tokens[2], tokens[106], merges[-1]) == (b"<bos>", b"<turn|>", "▁द िलाई".encode())
    assert min(seconds) < 0.25


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path):
        return self.split(tmp_path, 3)

    def split(self, folder, count, **lies):
        """A tiny model in `count` parts, as llama-gguf-split makes them; the first has no tensors."""
        path = folder / "whole.gguf"
        path.write_bytes(tiny().bytes())
        whole = open_gguf(path)
        names, paths = [*whole.tensors], []
        for number in range(count):
            own = names[(number - 1) :: count - 1] if number else []
            keys = {"split.no": number, "split.count": count, "split.tensors.count": len(names)} | lies
            types = {"split.no": (T.U16,), "split.count": (T.U16,), "split.tensors.count": (T.I32,)}
            paths.append(folder / f"model-{number + 1:05}-of-{count:05}.gguf")
            tensors = [TensorData.copy(whole.tensors[name]) for name in own]
            write_gguf(paths[-1], (keys if number else dict(whole.metadata) | keys), tensors, dict(whole.types) | types)
        return paths

    def test_any_part_opens_all(self, parts, tmp_path):
        whole = open_gguf(tmp_path / "whole.gguf")
        for part in parts:
            gguf = open_gguf(part)
            assert len(gguf.files) == 3 and gguf.path == parts[0]
            assert gguf.tensors.keys() == whole.tensors.keys()
            for name, tensor in gguf.tensors.items():
                assert tensor.data.tobytes() == whole.tensors[name].data.tobytes()
                assert tensor.data.ctypes.data == gguf.files[tensor.file].address + tensor.offset
            assert plain(gguf.metadata["tokenizer.ggml.tokens"]) == [token.encode() for token in TOKENS]

    def test_a_missing_part_is_named(self, parts):
        parts[2].unlink()
        with pytest.raises(Gemma4qError, match=r"bad_split: part 3 of 3 is missing: .*00003-of-00003"):
            open_gguf(parts[0])

    def test_parts_in_the_wrong_order_are_refused(self, parts):
        parts[1].rename(parts[1].with_name("x"))
        parts[2].rename(parts[1])
        parts[1].with_name("x").rename(parts[2])
        with pytest.raises(Gemma4qError, match="bad_split"):
            open_gguf(parts[0])

    def test_a_part_under_another_name_is_refused(self, parts):
        with pytest.raises(Gemma4qError, match="bad_split"):
            open_gguf(parts[0].rename(parts[0].with_name("model.gguf")))

    @pytest.mark.parametrize("lie", [{"split.tensors.count": 7}, {"split.no": 1}])
    def test_counts_that_lie_are_refused(self, tmp_path, lie):
        with pytest.raises(Gemma4qError, match="bad_split"):
            open_gguf(self.split(tmp_path, 3, **lie)[0])

    def test_a_tensor_in_two_parts_is_refused(self, parts, tmp_path):
        part = open_gguf(parts[2])
        other = [TensorData.copy(t) for t in part.tensors.values() if t.file == 1]
        keys = {"split.no": 2, "split.count": 3}
        write_gguf(tmp_path / "new", keys, other, {"split.no": (T.U16,), "split.count": (T.U16,)})
        (tmp_path / "new").rename(parts[2])
        with pytest.raises(Gemma4qError, match="duplicate_tensor"):
            open_gguf(parts[0])


def test_a_name_with_escapes_is_printed_escaped(tmp_path):
    file = tiny()
    file.set("general.\x7f", STR, "x")
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    with pytest.raises(Gemma4qError) as caught:
        open_gguf(tmp_path / "model.gguf")
    assert str(caught.value).isprintable()


def test_an_unreadable_type_is_listed_with_its_size(tmp_path):
    file = tiny()
    file.tensors["extra"] = type(file.tensors["output_norm.weight"])(b"extra", [256, 3], 16, bytes(66 * 3))
    file.set("x.u8", U8, 1)
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    extra = open_gguf(tmp_path / "model.gguf").tensors["extra"]
    assert (extra.type, extra.shape, extra.nbytes, extra.readable) == (16, (3, 256), 198, False)
