"""Importance matrices in both of llama.cpp's forms: what is read, written, merged, and refused.

Files here are put together by hand, as llama.cpp's imatrix.cpp and imatrix-loader.cpp have them.
"""

import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGUFReader
from tiny import STR, U32, File, Info, tiny

from gemma4q.errors import Gemma4qError
from gemma4q.quantize.importance import Entry, Importance, merge, read, write

# Two experts of two columns, of which the second was never chosen, and a matrix of three columns that met four rows.
DENSE, MIXTURE = "blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"
SUMS = {DENSE: [[4.0, 8.0, 0.0]], MIXTURE: [[9.0, 3.0], [0.0, 0.0]]}
COUNTS = {DENSE: [[4.0]], MIXTURE: [[3.0], [0.0]]}


def floats(name: str, values) -> Info:
    """A tensor of float32 [rows, cols]."""
    array = np.array(values, "<f4")
    return Info(name.encode(), list(array.shape[::-1]), 0, array.tobytes())


def gguf() -> File:
    file = File({}, {})
    file.set("general.type", STR, "imatrix")
    file.set_array("imatrix.datasets", STR, ["talk.txt", "more.txt"])
    file.set("imatrix.chunk_count", U32, 5)
    file.set("imatrix.chunk_size", U32, 256)
    for name in SUMS:
        for end, values in ((".in_sum2", SUMS[name]), (".counts", COUNTS[name])):
            file.tensors[name + end] = floats(name + end, values)
    return file


def dat(
    calls: int = 2, name: bytes = b"blk.0.attn_q.weight", count: int = 3, entries: int = 1, values=(2, 4, 0)
) -> bytes:
    """One entry: values are means times `calls`; then chunks in all, and the data set's name."""
    body = struct.pack("<ii", entries, len(name)) + name + struct.pack("<ii", calls, count)
    return body + struct.pack(f"<{len(values)}f", *values) + struct.pack("<ii", 7, 8) + b"talk.txt"


def saved(tmp_path, data: bytes, name: str = "it.gguf"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def refused(tmp_path, data: bytes | File) -> Gemma4qError:
    data = data.bytes() if isinstance(data, File) else data
    with pytest.raises(Gemma4qError) as caught:
        read(saved(tmp_path, data))
    return caught.value


def test_a_gguf_file_is_read_as_sums_and_counts(tmp_path):
    found = read(saved(tmp_path, gguf().bytes()))
    assert (found.datasets, found.chunks, found.chunk_size) == (("talk.txt", "more.txt"), 5, 256)
    for name, entry in found.entries.items():
        np.testing.assert_array_equal(entry.sums, SUMS[name])
        np.testing.assert_array_equal(entry.counts, np.ravel(COUNTS[name]))
    assert found.of(DENSE).tolist() == [[1.0, 2.0, 0.0]] and found.of(DENSE).dtype == np.float32


def test_an_expert_that_was_never_chosen_counts_as_the_others_do_on_the_average(tmp_path):
    found = read(saved(tmp_path, gguf().bytes()))
    assert found.of(MIXTURE).tolist() == [[3.0, 1.0], [3.0, 1.0]]
    assert found.never_chosen() == {MIXTURE: 1}


def test_what_met_nothing_has_no_importance():
    found = Importance({"a": Entry(np.zeros((2, 4)), np.zeros(2, np.int64))})
    assert found.of("a") is None and found.of("b") is None


def test_a_dat_file_is_read_as_its_means(tmp_path):
    found = read(saved(tmp_path, dat(), "old.dat"), chunk_size=100)
    assert (found.datasets, found.chunks, found.chunk_size) == (("talk.txt",), 7, 100)
    assert found.of(DENSE).tolist() == [[1.0, 2.0, 0.0]]
    assert found.entries[DENSE].counts.tolist() == [200]  # two chunks of a hundred tokens


def test_the_oldest_dat_files_end_behind_the_entries(tmp_path):
    found = read(saved(tmp_path, dat()[: -len("talk.txt") - 8]))
    assert found.of(DENSE).tolist() == [[1.0, 2.0, 0.0]] and found.datasets == ()


def test_a_dat_file_knows_a_mixture_as_one_long_row(tmp_path):
    found = read(saved(tmp_path, dat(name=MIXTURE.encode(), count=4, values=(2, 4, 6, 8))))
    assert found.of(MIXTURE).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert found.of(MIXTURE, cols=2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(Gemma4qError, match=r"shape_mismatch: .*has 4 columns, the tensor 3"):
        found.of(MIXTURE, cols=3)


def test_what_is_written_is_read_again_to_the_last_bit(tmp_path):
    random = np.random.default_rng(1)
    entries = {f"blk.{i}.x.weight": Entry(random.random((3, 8)) * 1e6, random.integers(0, 9, 3)) for i in range(4)}
    given = Importance(entries, ("a b.txt", "é"), 12, 2048, "f00d")
    write(tmp_path / "out.gguf", given)
    found = read(tmp_path / "out.gguf")
    assert (found.datasets, found.chunks, found.chunk_size, found.origin) == (("a b.txt", "é"), 12, 2048, "f00d")
    for name, entry in entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums.astype("f4"))
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
    write(tmp_path / "again.gguf", found)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_ggufs_own_reader_finds_the_names_keys_and_shapes_that_llama_cpp_looks_for(tmp_path):
    write(tmp_path / "out.gguf", read(saved(tmp_path, gguf().bytes())))
    found = GGUFReader(tmp_path / "out.gguf")
    assert found.fields["general.type"].contents() == "imatrix"
    assert found.fields["imatrix.datasets"].contents() == ["talk.txt", "more.txt"]
    assert [found.fields[f"imatrix.chunk_{what}"].contents() for what in ("count", "size")] == [5, 256]
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for name in SUMS:
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert sums.tensor_type.name == counts.tensor_type.name == "F32"
        assert sums.shape.tolist() == [len(SUMS[name][0]), len(SUMS[name])]  # fastest first
        assert counts.shape.tolist() == [1, len(SUMS[name])]
        assert sums.data.tolist() == SUMS[name] and counts.data.tolist() == COUNTS[name]


def test_merged_files_count_as_one_run_over_all_their_texts(tmp_path):
    one, other = read(saved(tmp_path, gguf().bytes())), read(saved(tmp_path, dat()), chunk_size=512)
    both = merge([one, other, one])
    assert both.of(DENSE) == pytest.approx((np.array([[8.0, 16.0, 0.0]]) + 1024 * np.array([[1, 2, 0]])) / (8 + 1024))
    assert both.entries[MIXTURE].counts.tolist() == [6, 0]
    assert both.datasets == ("talk.txt", "more.txt", "talk.txt", "talk.txt", "more.txt")
    assert (both.chunks, both.chunk_size) == (5 + 7 * 512 // 256 + 5, 256)


def test_a_mixture_of_a_dat_file_is_merged_expert_by_expert(tmp_path):
    old = read(saved(tmp_path, dat(name=MIXTURE.encode(), calls=1, count=4, values=(2, 4, 6, 8))), chunk_size=10)
    for parts in ([read(saved(tmp_path, gguf().bytes())), old], [old, read(saved(tmp_path, gguf().bytes()))]):
        assert merge(parts).entries[MIXTURE].sums.tolist() == [[29.0, 43.0], [60.0, 80.0]]
        assert merge(parts).entries[MIXTURE].counts.tolist() == [13, 10]


def test_sums_that_float32_does_not_hold_are_not_written(tmp_path):
    with pytest.raises(Gemma4qError, match="numeric: a: sum 1 is 1e\\+39"):
        write(tmp_path / "out.gguf", Importance({"a": Entry(np.array([[1, 1e39]]), np.array([1]))}))
    assert not list(tmp_path.iterdir())


def test_files_of_different_models_are_not_merged(tmp_path):
    one, other = gguf(), gguf()
    other.tensors[f"{DENSE}.in_sum2"] = floats(f"{DENSE}.in_sum2", [[1, 2, 3, 4]])
    with pytest.raises(Gemma4qError, match=r"shape_mismatch: blk.0.attn_q.weight: of shapes \[1, 3\] and \[1, 4\]"):
        merge([read(saved(tmp_path, file.bytes())) for file in (one, other)])


def test_the_summary_says_how_unevenly_columns_matter():
    even, one = np.ones((1, 200)), np.zeros((1, 200))
    one[0, 7] = 50
    counts = np.array([10])
    entries = {"blk.0.a.weight": Entry(even, counts), "blk.1.a.weight": Entry(even, counts), "b": Entry(one, counts)}
    a, b = Importance(entries).summary()
    assert (a["part"], a["tensors"], a["rows"]) == ("blk.*.a.weight", 2, 10)
    assert (a["mean"], a["evenness"], a["heaviest"]) == pytest.approx((0.1, 1, 0.01))
    assert (b["mean"], b["evenness"], b["heaviest"]) == pytest.approx((0.025, 0, 1))


def without(name: str, end: str) -> File:
    file = gguf()
    del file.tensors[name + end]
    return file


def changed(end: str, values, name: str = DENSE, **more) -> File:
    file = gguf()
    file.tensors[name + end] = floats(name + end, values)
    for key, value in more.items():
        setattr(file.tensors[name + end], key, value)
    return file


def keyed(key: str, kind: int | None, value=None) -> File:
    file = gguf()
    del file.keys[key.encode()]
    if kind is not None:
        file.set(key, kind, value)
    return file


HOSTILE_GGUF = {
    "a model": (tiny(), "not_imatrix"),
    "no tensors": (File(gguf().keys, {}), "not_imatrix"),
    "another type": (keyed("general.type", STR, "model"), "not_imatrix"),
    "sums alone": (without(MIXTURE, ".counts"), "missing_tensor"),
    "counts alone": (without(MIXTURE, ".in_sum2"), "missing_tensor"),
    "no chunk size": (keyed("imatrix.chunk_size", None), "missing_key"),
    "no datasets": (keyed("imatrix.datasets", None), "missing_key"),
    "datasets a text": (keyed("imatrix.datasets", STR, "talk.txt"), "bad_type"),
    "a count of chunks in words": (keyed("imatrix.chunk_count", STR, "five"), "bad_type"),
    "sums in F16": (changed(".in_sum2", [[1, 2]], type=1, ne=[4, 1]), "bad_tensor_type"),
    "NaN": (changed(".in_sum2", [[1, np.nan, 2]]), "numeric"),
    "infinity": (changed(".in_sum2", [[1, 2, np.inf]]), "numeric"),
    "a negative sum": (changed(".in_sum2", [[-1, 2, 3]]), "numeric"),
    "a negative count": (changed(".counts", [[-4]]), "numeric"),
    "a count that is no number": (changed(".counts", [[np.nan]]), "numeric"),
    "a count beyond belief": (changed(".counts", [[1e30]]), "numeric"),
    "two counts for one row": (changed(".counts", [[1], [2]]), "shape_mismatch"),
    "three counts for two rows": (changed(".counts", [[1], [2], [3]], MIXTURE), "shape_mismatch"),
}
HOSTILE_DAT = {
    "empty": (b"", "not_gguf"),
    "two bytes": (b"\x01\x00", "not_imatrix"),
    "a text": (b"The quick brown fox jumps over the lazy dog.", "not_imatrix"),
    "zeros": (bytes(100), "not_imatrix"),
    "no entries": (dat(entries=0), "not_imatrix"),
    "fewer than no entries": (dat(entries=-1), "not_imatrix"),
    "more entries than bytes": (dat(entries=60_000), "not_imatrix"),
    "one entry more than there are": (dat(entries=2), "bad_string"),
    "a name of two gigabytes": (struct.pack("<ii", 1, 2**31 - 1) + bytes(20), "truncated"),
    "a name shorter than nothing": (struct.pack("<ii", 1, -5) + bytes(20), "truncated"),
    "a name that is none": (dat(name=b"\x00\xff"), "bad_string"),
    "eight gigabytes of values": (dat(count=2**31 - 1), "bad_count"),
    "fewer values than none": (dat(count=-1), "bad_count"),
    "no values": (dat(count=0), "bad_count"),
    "fewer chunks than none": (dat(calls=-1), "bad_count"),
    "NaN": (dat(values=(1, np.nan, 2)), "numeric"),
    "a negative value": (dat(values=(1, -1, 2)), "numeric"),
    "a data set's name of two gigabytes": (dat()[:-12] + struct.pack("<i", 2**31 - 1) + b"talk.txt", "truncated"),
    "twice the same": (
        struct.pack("<i", 2) + 2 * dat()[4 : -len("talk.txt") - 8] + struct.pack("<ii", 7, 0),
        "duplicate_tensor",
    ),
}


@pytest.mark.parametrize("what", [*(f"gguf: {w}" for w in HOSTILE_GGUF), *(f"dat: {w}" for w in HOSTILE_DAT)])
def test_a_malformed_file_is_refused_in_one_line_and_takes_no_memory(tmp_path, what):
    form, _, name = what.partition(": ")
    data, kind = (HOSTILE_GGUF if form == "gguf" else HOSTILE_DAT)[name]
    tracemalloc.start()
    error = refused(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert error.kind == kind and "it.gguf" in error.message and "\n" not in str(error)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_no_cut_and_no_changed_byte_does_more_than_be_refused(tmp_path, form):
    sound, random = gguf().bytes() if form == "gguf" else dat(), np.random.default_rng(2)
    damaged = [sound[:end] for end in range(0, len(sound), 1 if form == "dat" else 7)]
    for _ in range(300):
        data = bytearray(sound)
        data[random.integers(len(data))] = random.integers(256)
        damaged.append(bytes(data))
    outcomes = set()
    for data in damaged:
        try:
            found = read(saved(tmp_path, data))
            for name in found.entries:
                found.of(name)
            write(tmp_path / "out.gguf", merge([found, found]))
            outcomes.add("read")
        except Gemma4qError as error:
            outcomes.add(error.kind)
    assert len(outcomes) > 3 and "read" in outcomes


def test_a_model_of_the_name_is_not_written_over(tmp_path):
    model = saved(tmp_path, tiny().bytes(), "model.gguf")
    before = model.read_bytes()
    with pytest.raises(Gemma4qError, match=r"not_imatrix: .*is no importance matrix: choose another name"):
        write(model, read(saved(tmp_path, gguf().bytes())))
    assert model.read_bytes() == before
    with pytest.raises(Gemma4qError, match=r"not_gguf: .*exists and is no GGUF file"):
        write(saved(tmp_path, dat(), "old.dat"), read(saved(tmp_path, gguf().bytes())))
