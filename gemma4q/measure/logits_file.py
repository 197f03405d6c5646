"""What a model said of a text, kept in a file: 16 bits for each token of the vocabulary in each row.

Our form: `MAGIC`, which ends in the version; u64 length and u32 CRC-32 of a header; the header, JSON: what was scored,
of which model and vocabulary; then a row for each scored token: u16 [vocab], and its u32 CRC-32. All little-endian.

Code k says that a token lies (k / 8192)² nats below the row's likeliest, the nearest there is: the likeliest is exact,
and what lies d nats below it is off by sqrt(d) / 8192 at most (4e-9 where d is next to nothing), 0.001 for d = 64. What
lies farther below counts as 64 nats, and `NEVER` is a token that cannot come. A row so kept is taken for logits, so its
probabilities add up to 1. Files that llama-perplexity --kl-divergence-base wrote are read too, not written.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np

from ..convert.output import appearing, check_room, check_target
from ..errors import Gemma4qError, printable
from .texts import KIND, RAW, Passage, chunk

VERSION = b"1"
FAMILY = b"gemma4q logits "
MAGIC = FAMILY + VERSION
PREAMBLE = Struct("<QI")
STEPS = 8192  # a unit of the root of a distance in nats
DEEPEST, NEVER = 65534, 65535
WORDS = ("name", "type", "sha256", "vocabulary")  # of a model
LONGEST_HEADER = 256 << 20
MOST_VOCAB = 1 << 24

LLAMA_MAGIC = b"_logits_"
LLAMA_PREAMBLE = Struct("<8siii")  # magic, tokens of a chunk, vocabulary, chunks
LLAMA_FLOOR = -16.0  # log-probabilities up to here are not kept: llama-perplexity leaves them out of its sums


# -- Codes ---------------------------------------------------------------------------------------------------


def encoded(logits: np.ndarray) -> np.ndarray:
    """uint16 [rows, vocab] of logits or log-probabilities [rows, vocab]."""
    below = np.subtract(logits.max(axis=1, keepdims=True), logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of what is infinitely far below
        codes = np.minimum(np.rint(STEPS * np.sqrt(below)), DEEPEST).astype(np.uint16)
    codes[np.isneginf(logits)] = NEVER
    return codes


def decoded(codes: np.ndarray) -> np.ndarray:
    """float64 [rows, vocab]: nats above the row's likeliest token, none of them positive."""
    return DECODED[codes]


DECODED = -np.square(np.arange(NEVER + 1) / STEPS)
DECODED[NEVER] = -np.inf


def row_type(vocab: int) -> np.dtype:
    return np.dtype([("codes", "<u2", (vocab,)), ("crc", "<u4")])


# -- Ours ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """scored: which tokens, in words. model: name, type and sha256 of who said it, how large its vocabulary is (vocab),
    and a digest of that (vocabulary)."""

    scored: str
    model: Mapping[str, Any]
    passages: Sequence[Passage]

    @property
    def vocab(self) -> int:
        return self.model["vocab"]

    @property
    def rows(self) -> int:
        return sum(passage.scored for passage in self.passages)

    def packed(self) -> bytes:
        """All that stands before the rows."""
        texts = [{"text": p.text, "kind": p.kind, "first": p.first, "ids": p.ids.tolist()} for p in self.passages]
        model = {name: self.model[name] for name in (*WORDS, "vocab")}
        text = json.dumps({"scored": self.scored, "model": model, "passages": texts}).encode()
        return MAGIC + PREAMBLE.pack(len(text), zlib.crc32(text)) + text

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return len(self.packed()) + self.rows * row_type(self.vocab).itemsize


@contextmanager
def writing(path: Path, header: Header) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields what takes the rows, float [rows, vocab], block by block; the file appears when all have come.

    Raises what `check_target` and `check_room` of
    convert/output.py do, before anything is computed, and no_space, not_writable, busy and io.
    """
    count = 0
    check_target(path, (), FAMILY, "logits")
    with appearing(path) as out:
        check_room(path.parent, header.nbytes)
        out.write(header.packed())

        def take(logits: np.ndarray) -> None:
            nonlocal count
            rows = np.empty(len(logits), row_type(header.vocab))
            rows["codes"] = encoded(logits)
            rows["crc"] = [zlib.crc32(codes) for codes in rows["codes"]]
            out.write(rows)
            count += len(logits)

        yield take
        assert count == header.rows, f"{count} rows came of {header.rows}"


class Stored:
    """A file of ours, open: `header`, `passages`, and rows of them. Raises `bad_base` for what it cannot be."""

    known_above = None

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "rb")  # noqa: SIM115 (closed by close)
        try:
            self.header = self._header()
            self.passages = self.header.passages
            self.starts = list(accumulate((p.scored for p in self.passages), initial=0))
            self.data = self.file.tell()
            self._check_length()
        except BaseException:
            self.close()
            raise

    @property
    def row(self) -> np.dtype:
        return row_type(self.header.vocab)

    def _check_length(self) -> None:
        there, wanted = self.path.stat().st_size, self.data + self.starts[-1] * self.row.itemsize
        if there != wanted:
            raise bad_base(self.path, f"has {there:,} bytes, and {wanted:,} by what it says of itself")

    def _header(self) -> Header:
        magic = self.file.read(len(MAGIC))
        if magic != MAGIC:
            version = printable(magic[len(FAMILY) :].decode("latin-1"))
            raise bad_base(self.path, f"is of version {version}; this gemma4q reads version {VERSION.decode()}")
        preamble = self.file.read(PREAMBLE.size)
        length, crc = PREAMBLE.unpack(preamble) if len(preamble) == PREAMBLE.size else (0, 0)
        if not 0 < length <= min(LONGEST_HEADER, self.path.stat().st_size):
            raise bad_base(self.path, "ends inside its header")
        text = self.file.read(length)
        if len(text) != length or zlib.crc32(text) != crc:
            raise bad_base(self.path, "has a damaged header: its checksum differs")
        try:
            return header_of(json.loads(text))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise bad_base(self.path, f"has a header that makes no sense: {type(error).__name__} {error}") from None

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """float64 [rows, vocab] after positions start ... end of passage `number`. Raises `bad_base` naming the row."""
        first, rows = self._read(number, start, end)
        for i, (codes, crc) in enumerate(zip(rows["codes"], rows["crc"], strict=True)):
            if zlib.crc32(codes) != crc:
                raise bad_base(self.path, f"is damaged: the checksum of row {first + i:,} differs")
        return decoded(rows["codes"])

    def _read(self, number: int, start: int, end: int) -> tuple[int, np.ndarray]:
        """The rows as they lie in the file, and the number of the first."""
        first = self.starts[number] + start - self.passages[number].first + 1
        self.file.seek(self.data + first * self.row.itemsize)
        data = self.file.read((end - start) * self.row.itemsize)
        if len(data) != (end - start) * self.row.itemsize:
            raise bad_base(self.path, "became shorter while it was read")
        return first, np.frombuffer(data, self.row)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_of(fields: Mapping) -> Header:
    """Raises ValueError, KeyError, TypeError or OverflowError for what no file of ours says."""
    model = {name: fields["model"][name] for name in (*WORDS, "vocab")}
    if type(model["vocab"]) is not int or not 0 < model["vocab"] <= MOST_VOCAB:
        raise ValueError(f"vocab {model['vocab']!r}")
    if any(not isinstance(word, str) for word in (fields["scored"], *(model[name] for name in WORDS))):
        raise ValueError("a name that is no text")
    model |= {name: printable(model[name], 100) for name in WORDS}
    found = [passage_of(each, model["vocab"]) for each in fields["passages"]]
    if not found:
        raise ValueError("no passages")
    return Header(printable(fields["scored"], 100), model, found)


def passage_of(fields: Mapping, vocab: int) -> Passage:
    ids, first, kind, text = np.array(fields["ids"]), fields["first"], fields["kind"], fields["text"]
    if ids.ndim != 1 or ids.dtype.kind != "i" or not len(ids) or ids.min() < 0 or ids.max() >= vocab:
        raise ValueError("ids that are no tokens")
    if any(type(number) is not int for number in (first, text)) or not 0 < first < len(ids) or not 0 <= text < 1 << 31:
        raise ValueError(f"first {first!r} and text {text!r} of {len(ids)} tokens")
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
        raise ValueError("a kind that is no short name")
    return Passage(ids.astype(np.int32), first, kind, text)


# -- llama.cpp's ---------------------------------------------------------------------------------------------


class LlamaStored(Stored):
    """A file of llama-perplexity's: chunks of tokens, and log-probabilities of their second halves.

    A row is f32 scale, f32 least, u16 [vocab, made even]: log-probabilities scale * code + least, of which those up to
    -16 nats were cut off. `bos`: what stood first in each chunk, whatever the file says (llama.cpp: tools/perplexity).
    """

    known_above = LLAMA_FLOOR

    def __init__(self, path: Path, bos: int):
        self.bos = bos
        super().__init__(path)

    def _header(self) -> Header:
        preamble = self.file.read(LLAMA_PREAMBLE.size)
        if len(preamble) < LLAMA_PREAMBLE.size:
            raise bad_base(self.path, "ends inside its header")
        _, size, vocab, count = LLAMA_PREAMBLE.unpack(preamble)
        if size < 4 or not 0 < vocab <= MOST_VOCAB or count < 1:
            raise bad_base(self.path, f"says {count} chunks of {size} tokens from a vocabulary of {vocab}")
        if self.path.stat().st_size < 4 * size * count:
            raise bad_base(self.path, f"is too short for {count} chunks of {size} tokens")
        data = self.file.read(4 * size * count)
        if len(data) < 4 * size * count:
            raise bad_base(self.path, "ends inside its tokens")
        ids = np.frombuffer(data, "<i4").reshape(count, size)
        if ids.min() < 0 or ids.max() >= vocab:
            raise bad_base(self.path, f"has a token that is not in its vocabulary of {vocab}")
        passages = [chunk(tokens, self.bos, "text", number) for number, tokens in enumerate(ids)]
        model = dict.fromkeys(WORDS, "") | {"name": printable(self.path.name, 100), "vocab": vocab}
        return Header(RAW, model, passages)

    @property
    def row(self) -> np.dtype:
        vocab = self.header.vocab
        return np.dtype([("scale", "<f4"), ("least", "<f4"), ("codes", "<u2", (vocab + vocab % 2,))])

    def rows(self, number: int, start: int, end: int) -> np.ndarray:
        """float64 [rows, vocab]: log-probabilities, of which `known_above` says which are known."""
        first, rows = self._read(number, start, end)
        scale, least = (rows[name].astype(np.float64)[:, None] for name in ("scale", "least"))
        sound = np.isfinite(scale) & np.isfinite(least) & (scale >= 0)
        if not sound.all():
            raise bad_base(self.path, f"is damaged: row {first + int(np.argmin(sound)):,} has no sound scale")
        return scale * rows["codes"][:, : self.header.vocab] + least


def open_base(path: Path, bos: int) -> Stored:
    """A file of either form. Raises `bad_base` and OSError."""
    with open(path, "rb") as file:
        magic = file.read(len(FAMILY))
    if magic.startswith(LLAMA_MAGIC):
        return LlamaStored(path, bos)
    if magic == FAMILY:
        return Stored(path)
    raise bad_base(path, "is no logits file: `gemma4q eval --save-logits` writes one, or llama-perplexity")


def bad_base(path: Path, what: str) -> Gemma4qError:
    return Gemma4qError("bad_base", f"{path} {what}")
