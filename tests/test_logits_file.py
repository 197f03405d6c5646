"""Files of logits: what is kept comes back within its bound, no damage is believed, llama.cpp's are read as written."""

import json
import math
import os
import re
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from gemma4q.errors import Gemma4qError
from gemma4q.measure.divergence import compare
from gemma4q.measure.logits_file import MAGIC, NEVER, Header, decoded, encoded, open_base, writing
from gemma4q.measure.texts import Passage

VOCAB = 300
MODEL = {"name": "toy", "type": "F32", "sha256": "ab" * 32, "vocabulary": "cd" * 32, "vocab": VOCAB, "path": "/secret"}
START = len(MAGIC) + 12  # of the header's JSON


pytestmark = pytest.mark.usefixtures("quick_disk")


def passages() -> list[Passage]:
    return [
        Passage(np.arange(3, 12, dtype=np.int32), 4, "chat", 0),
        Passage(np.arange(40, 47, dtype=np.int32), 6, "code", 1),
        Passage(np.arange(100, 103, dtype=np.int32), 1, "chat", 2),
    ]


def rows(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (8, VOCAB)).astype("f4")


def kept(path: Path, logits: np.ndarray | None = None) -> Path:
    with writing(path, Header("the model's turns", MODEL, passages())) as keep:
        logits = rows() if logits is None else logits
        keep(logits[:5])
        keep(logits[5:6])
        keep(logits[6:])
    return path


# -- Codes ---------------------------------------------------------------------------------------------------


def test_every_distance_is_kept_within_its_bound():
    """sqrt(d) / 8192 for what lies d nats below the likeliest, and half a step where d is next to nothing."""
    distance = np.concatenate([[0.0], np.geomspace(1e-9, 63.9, 200_000)])
    error = np.abs(decoded(encoded(-distance[None, :]))[0] + distance)
    assert (error <= np.sqrt(distance) / 8192 + (0.5 / 8192) ** 2 + 1e-12).all()
    assert error[0] == 0 and error.max() < 0.001 and error[distance < 1].max() < 0.000123


def test_codes_worked_out_by_hand():
    """4 nats below: 8192 * 2. 1/4: 8192 / 2. 100 nats count as (65534 / 8192)² = 63.996; -inf is a code of its own."""
    logits = np.array([[1.0, -3.0, 0.75, -99.0, -np.inf]], "f4")
    assert encoded(logits).tolist() == [[0, 16384, 4096, 65534, NEVER]]
    assert decoded(encoded(logits)).tolist() == [[0, -4, -0.25, -((65534 / 8192) ** 2), -math.inf]]


def test_the_likeliest_token_is_the_same_and_equals_stay_equal():
    logits = np.zeros((1, VOCAB), "f4") - 5
    logits[0, 17], logits[0, 200] = 20, np.nextafter(np.float32(20), np.float32(0))
    codes = encoded(logits)[0]
    assert codes[17] == 0 < codes[200] and len(set(codes)) == 3


@pytest.mark.parametrize("spread", [1, 4, 10])
def test_a_divergence_from_a_file_is_that_from_the_model_but_for_what_the_bound_allows(spread):
    """Log-probabilities are off by at most sqrt(d) / 8192 each; so, by Cauchy and Schwarz, a divergence by no more than
    the root of the mean of d / 8192² times the standard deviation of log p - log q, and that mean itself."""
    random = np.random.default_rng(2)
    base = random.normal(0, spread, (20, 5000)).astype("f4")
    stored = decoded(encoded(base))
    for noise in (0.0, 0.01, 1.0):
        model = (base + random.normal(0, noise, base.shape)).astype("f4")
        for a, b, c in zip(base, stored, model, strict=True):
            p = np.exp(a.astype("f8") - a.max())
            p, ratio = p / p.sum(), a.astype("f8") - c
            error = math.sqrt(float((p * (a.max() - a)).sum())) / 8192
            deviation = math.sqrt(float((p * (ratio - (p * ratio).sum()) ** 2).sum()))
            exact, found = compare(a, c, 7), compare(b, c, 7)
            assert abs(found.divergence - exact.divergence) <= error * deviation + error**2
            assert found.same == exact.same and found.base_surprise == pytest.approx(exact.base_surprise, abs=1e-3)


def test_over_many_rows_the_errors_of_a_file_cancel():
    random = np.random.default_rng(3)
    base = random.normal(0, 4, (200, 3000)).astype("f4")
    model = (base + random.normal(0, 0.03, base.shape)).astype("f4")
    pairs = [
        (compare(a, c, 0).divergence, compare(b, c, 0).divergence)
        for a, b, c in zip(base, decoded(encoded(base)), model, strict=True)
    ]
    exact, found = np.mean(pairs, axis=0)
    assert 1e-4 < exact < 1e-3 and found == pytest.approx(exact, rel=1e-3)


# -- Ours ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path):
    path, logits = kept(tmp_path / "toy.logits"), rows()
    with open_base(path, bos=2) as base:
        assert base.header.scored == "the model's turns" and base.known_above is None
        assert base.header.model == {name: MODEL[name] for name in ("name", "type", "sha256", "vocabulary", "vocab")}
        for found, wanted in zip(base.passages, passages(), strict=True):
            assert found.ids.tolist() == wanted.ids.tolist() and found.ids.dtype == np.int32
            assert (found.first, found.kind, found.text) == (wanted.first, wanted.kind, wanted.text)
        whole = decoded(encoded(logits))
        assert np.array_equal(base.rows(0, 3, 8), whole[:5]) and np.array_equal(base.rows(0, 5, 7), whole[2:4])
        assert np.array_equal(base.rows(1, 5, 6), whole[5:6]) and np.array_equal(base.rows(2, 0, 2), whole[6:])
    assert path.stat().st_size == Header("the model's turns", MODEL, passages()).nbytes
    assert b"/secret" not in path.read_bytes() and [p.name for p in tmp_path.iterdir()] == ["toy.logits"]


def read_all(path: Path) -> None:
    with open_base(path, bos=2) as base:
        for number, passage in enumerate(base.passages):
            base.rows(number, passage.first - 1, len(passage.ids) - 1)


def refused(path: Path) -> str:
    """What reading all of it says, in one line that names the file."""
    with pytest.raises(Gemma4qError) as caught:
        read_all(path)
    assert caught.value.kind == "bad_base" and str(path) in caught.value.message and "\n" not in str(caught.value)
    return caught.value.message


def test_every_truncation_is_refused(tmp_path):
    whole, path = kept(tmp_path / "toy.logits").read_bytes(), tmp_path / "short.logits"
    row = 2 * VOCAB + 4
    for size in [*range(len(whole) - 8 * row + 1), *range(len(whole) - 8 * row, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"x")
    assert "bytes, and" in refused(path)


def test_every_flipped_byte_is_refused(tmp_path):
    whole, path = kept(tmp_path / "toy.logits").read_bytes(), tmp_path / "flipped.logits"
    for at in [*range(START + 40), *range(START + 40, len(whole), 61), len(whole) - 1]:
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            path.write_bytes(damaged)
            refused(path)
    assert "the checksum of row 7 differs" in refused(path)


def test_another_version_is_named(tmp_path):
    path = kept(tmp_path / "toy.logits")
    path.write_bytes(path.read_bytes().replace(MAGIC, MAGIC[:-1] + b"2", 1))
    assert refused(path).endswith("is of version 2; this gemma4q reads version 1")


def rewritten(path: Path, change) -> Path:
    """The file with another header whose checksum is right."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 8], "little")
    fields = json.loads(whole[START : START + length])
    changed = change(fields)
    text = json.dumps(fields if changed is None else changed).encode()
    path.write_bytes(MAGIC + struct.pack("<QI", len(text), zlib.crc32(text)) + text + whole[START + length :])
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda h: [],
        lambda h: h.pop("model"),
        lambda h: h["model"].update(vocab=0),
        lambda h: h["model"].update(vocab=1 << 40),
        lambda h: h["model"].update(vocab=True),
        lambda h: h["model"].update(vocab=99),  # ids beyond it
        lambda h: h["model"].update(vocab=VOCAB + 1),  # then the rows do not fill the file
        lambda h: h["model"].update(name=None),
        lambda h: h["model"].pop("vocabulary"),
        lambda h: h.update(scored=3),
        lambda h: h.update(passages=[]),
        lambda h: h.update(passages={}),
        lambda h: h["passages"].pop(),
        lambda h: h["passages"][0].update(first=0),
        lambda h: h["passages"][0].update(first=9),
        lambda h: h["passages"][0].update(first=4.5),
        lambda h: h["passages"][0].update(text=-1),
        lambda h: h["passages"][0].update(kind="\x1b[31m"),
        lambda h: h["passages"][0].update(ids=[]),
        lambda h: h["passages"][0].update(ids=[[1], [2]]),
        lambda h: h["passages"][0].update(ids=[1.5] * 9),
        lambda h: h["passages"][0].update(ids=[1, 2, "x"]),
        lambda h: h["passages"][0].update(ids=[1 << 70] * 9),
        lambda h: h["passages"][0]["ids"].__setitem__(0, -1),
        lambda h: h["passages"][0]["ids"].__setitem__(0, VOCAB),
        lambda h: h["passages"][0].pop("ids"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_is_right(tmp_path, change):
    refused(rewritten(kept(tmp_path / "toy.logits"), change))


def test_a_name_cannot_drive_a_terminal(tmp_path):
    path = rewritten(kept(tmp_path / "toy.logits"), lambda h: h["model"].update(name="\x1b[31m"))
    with open_base(path, bos=2) as base:
        assert base.header.model["name"] == r"\x1b[31m"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"_logits", b"gemma4q", os.urandom(100)])
def test_what_is_no_logits_file_is_said(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert "is no logits file" in refused(tmp_path / "x")


# -- Writing -------------------------------------------------------------------------------------------------


def unwritten(path: Path, during=None) -> str:
    """What writing says, having left everything as it was."""
    before = {p: p.read_bytes() for p in path.parent.glob("*") if p.is_file()}
    with pytest.raises(Gemma4qError) as caught, writing(path, Header("x", MODEL, passages())) as keep:
        if during is None:
            pytest.fail("it began")
        during(keep)
    assert {p: p.read_bytes() for p in path.parent.glob("*") if p.is_file()} == before
    return str(caught.value)


def test_a_target_that_cannot_be_is_said_before_anything_is_computed(tmp_path):
    assert unwritten(tmp_path / "no" / "x.logits").startswith("not_found: ")
    assert unwritten(tmp_path).startswith("not_a_file: ")
    assert unwritten(Path("/dev/full")).startswith("not_a_file: ")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and more")
    assert unwritten(tmp_path / "model.gguf").endswith("exists and is no logits file: choose another name")
    assert unwritten(Path("/sys/x.logits")).startswith("not_writable: ")


def test_room_is_asked_for_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: type("Status", (), {"f_bavail": 2, "f_frsize": 512}))
    size = Header("x", MODEL, passages()).nbytes
    assert unwritten(tmp_path / "x.logits") == f"no_space: {tmp_path} has 1,024 bytes free; {size:,} are needed"


def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_is_left_on_it(tmp_path):
    """No file may grow beyond 1,000 bytes meanwhile, so that neither writing nor closing succeeds."""

    def full(keep) -> None:
        for _ in range(2000):  # more than a buffer
            keep(rows()[:1])

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert unwritten(tmp_path / "x.logits", full) == f"no_space: {tmp_path / 'x.logits'}: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_file_comes_when_it_is_whole_and_an_older_one_stays_until_then(tmp_path):
    path = kept(tmp_path / "x.logits")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), writing(path, Header("x", MODEL, passages())) as keep:
        keep(rows()[:5])
        assert path.read_bytes() == before
        raise KeyboardInterrupt
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.logits"]
    assert kept(path, rows(9)).read_bytes() != before


# -- llama.cpp's ---------------------------------------------------------------------------------------------

SIZE, CHUNKS, ODD = 9, 2, 5  # tokens of a chunk, how many, an odd vocabulary
TOKENS = [*(1, 3, 0, 4, 2, 1, 1, 3, 0), *(2, 2, 4, 1, 0, 3, 3, 1, 4)]
SCALE, LEAST = 0.25, -2.5
CODES = (10, 4, 0, 7, 1)  # log-probabilities 0, -1.5, -2.5, -0.75, -2.25


def llama(magic=b"_logits_", size=SIZE, vocab=ODD, chunks=CHUNKS, tokens=TOKENS, scale=SCALE) -> bytes:
    """What llama-perplexity writes: SIZE - 1 - SIZE/2 rows a chunk, each of two floats and the vocabulary made even."""
    out = magic + struct.pack("<iii", size, vocab, chunks) + struct.pack(f"<{len(tokens)}i", *tokens)
    for row in range(CHUNKS * (SIZE - 1 - SIZE // 2)):
        out += struct.pack("<ff6H", scale, LEAST - row, *CODES, 0xFFFF)
    return out


def test_a_llama_file_is_read_byte_by_byte(tmp_path):
    """20 bytes, 18 tokens, 8 rows of 8 + 12 bytes: those of tokens 4 ... 7 of each chunk, which begins with <bos>."""
    path = tmp_path / "llama.kld"
    path.write_bytes(llama())
    assert path.stat().st_size == 20 + 72 + 8 * 20
    with open_base(path, bos=2) as base:
        assert base.known_above == -16 and base.header.model["vocab"] == ODD and base.header.scored == "plain text"
        assert [p.ids.tolist() for p in base.passages] == [[2, *TOKENS[1:9]], [2, *TOKENS[10:]]]
        assert all((p.first, p.scored) == (5, 4) for p in base.passages)
        assert base.rows(0, 4, 8)[0].tolist() == [0, -1.5, -2.5, -0.75, -2.25]
        assert base.rows(1, 6, 7).tolist() == [[-6.0, -7.5, -8.5, -6.75, -8.25]]  # the 7th row of the file


def test_every_truncation_of_a_llama_file_is_refused(tmp_path):
    path, whole = tmp_path / "llama.kld", llama()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


@pytest.mark.parametrize(
    "damage, said",
    [
        ({"size": 2}, "2 chunks of 2 tokens"),
        ({"size": -1}, "chunks of -1 tokens"),
        ({"size": 1 << 30}, "too short for 2 chunks of 1073741824"),
        ({"vocab": 0}, "from a vocabulary of 0"),
        ({"vocab": 1 << 25}, "from a vocabulary of 33554432"),
        ({"vocab": 7}, "bytes, and"),
        ({"chunks": 0}, "says 0 chunks"),
        ({"chunks": 3}, "has a token that is not in its vocabulary|bytes, and"),
        ({"tokens": [*TOKENS[:-1], ODD]}, "has a token that is not in its vocabulary of 5"),
        ({"tokens": [-1, *TOKENS[1:]]}, "has a token that is not in its vocabulary of 5"),
        ({"scale": math.nan}, "row 0 has no sound scale"),
        ({"scale": -0.5}, "row 0 has no sound scale"),
    ],
)
def test_a_damaged_llama_file_is_refused(tmp_path, damage, said):
    (tmp_path / "llama.kld").write_bytes(llama(**damage))
    assert re.search(said, refused(tmp_path / "llama.kld"))
