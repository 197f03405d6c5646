"""Gemma 4's vocabulary for tests: tests/data/gemma-4-vocab.xz, unpacked once into a GGUF file without tensors.

The pack holds the tokens and what surrounds both string arrays. Merges are not in it: Gemma's are all pairs of tokens
whose texts make a third token, in an order that follows from the tokens, so they are derived. tools/pack_vocab.py
makes the pack; the file is byte for byte the one that was packed.
"""

import hashlib
import lzma
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gemma4q.gguf.strings import StringArray, string_array

PACK = Path(__file__).parent / "data" / "gemma-4-vocab.xz"
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "gemma-4-vocab.gguf"


def gemma_vocabulary() -> Path:
    """The path of the vocabulary as GGUF; about three seconds the first time, then from the cache."""
    digest, pack = PACK.read_bytes()[:32], PACK.read_bytes()[32:]
    if not CACHE.exists() or hashlib.sha256(CACHE.read_bytes()).digest() != digest:
        data = unpack(pack)
        assert hashlib.sha256(data).digest() == digest, f"{PACK} does not unpack to what was packed"
        CACHE.parent.mkdir(exist_ok=True)
        part = CACHE.with_suffix(f".{os.getpid()}")
        part.write_bytes(data)
        os.replace(part, CACHE)
    return CACHE


def unpack(pack: bytes) -> bytes:
    """The whole file, of six sections: before the tokens, their lengths, text, between, early products, after."""
    before, lengths, text, between, early, after = sections(lzma.decompress(pack))
    ends = np.cumsum(np.frombuffer(lengths, np.uint8), dtype=np.int64).tolist()
    tokens = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    pairs = merges([token.decode() for token in tokens], np.frombuffer(early, np.uint32).tolist())
    return before + records(tokens) + between + records(f"{left} {right}".encode() for left, right in pairs) + after


def sections(data: bytes) -> list[bytes]:
    """Parts of `data`, each behind its length in eight bytes."""
    parts, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return parts


def records(texts: Iterable[bytes]) -> bytes:
    """Strings as GGUF and `sections` have them."""
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def merges(tokens: list[str], early: list[int]) -> list[tuple[str, str]]:
    """Every way to make a token of two: those of the `early` tokens longest first, then token by token."""
    known, early_ids = set(tokens), set(early)

    def halves(text: str) -> list[tuple[str, str]]:
        cuts = range(len(text) - 1, 0, -1)
        return [(text[:cut], text[cut:]) for cut in cuts if text[:cut] in known and text[cut:] in known]

    first = [pair for token in sorted(early_ids) for pair in halves(tokens[token])]
    first.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
    return first + [pair for token, text in enumerate(tokens) if token not in early_ids for pair in halves(text)]


def small_vocabulary(tokens: Iterable[str | bytes], merges: Iterable[str | bytes], /, **more) -> dict:
    """Metadata of a vocabulary: `<eos>`, `<bos>`, the 256 byte tokens and these; `more` replaces or adds keys."""
    named = ["<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    keys = {"model": "gemma4", "tokens": strings(named), "merges": strings(merges), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def strings(texts: Iterable[str | bytes]) -> StringArray:
    """A string array as the reader finds it in a file."""
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    return string_array(np.frombuffer(records(raw), np.uint8), 0, len(raw), "a test")
