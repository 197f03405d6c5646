"""Packs Gemma 4's vocabulary for the tests: python tools/pack_vocab.py VOCABULARY.gguf [tests/data/gemma-4-vocab.xz]

Any Gemma 4 GGUF file without tensors will do, such as llama.cpp's ggml-vocab-gemma-4.gguf. What is in the pack, and how
it is unpacked, is tests/vocab.py's; a pack that does not come out as it went in is not written.
"""

import hashlib
import lzma
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import vocab

from gemma4q.gguf.reader import open_gguf


def pack(path: Path) -> bytes:
    """The sha256 of the file, then its compressed sections."""
    file = open_gguf(path)
    tokens, merges = (file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
    data = path.read_bytes()
    start = [array.data.ctypes.data - file.files[0].bytes.ctypes.data for array in (tokens, merges)]
    end = [at + len(array.data) for at, array in zip(start, (tokens, merges), strict=True)]
    parts = (
        data[: start[0]],
        tokens.lengths.astype(np.uint8).tobytes(),
        b"".join(tokens),
        data[end[0] : start[1]],
        early_products(list(tokens), list(merges)).tobytes(),
        data[end[1] :],
    )
    packed = lzma.compress(vocab.records(parts), preset=9 | lzma.PRESET_EXTREME)
    if vocab.unpack(packed) != data:
        sys.exit(f"{path}: its merges do not follow from its tokens the way Gemma's do")
    return hashlib.sha256(data).digest() + packed


def early_products(tokens: list[bytes], merges: list[bytes]) -> np.ndarray:
    """uint32 ids of the tokens made before merges begin to make tokens in ascending order."""
    ids = {token: i for i, token in enumerate(tokens)}
    products = np.array([ids[b"".join(merge.split(b" "))] for merge in merges], np.uint32)
    unordered = np.flatnonzero(products[1:] < products[:-1])
    return np.unique(products[: unordered[-1] + 1 if len(unordered) else 0])


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else vocab.PACK
    target.write_bytes(pack(Path(sys.argv[1])))
    print(f"{target}: {target.stat().st_size:,} bytes")
