"""Writes a file with the exact shapes and types of a published model, and random weights: for speed, not for talk.

    python tools/synth.py e2b q4_0 e2b-q4_0.gguf --vocab some-gemma-4.gguf

Speed and memory depend on shapes and types alone, so this stands in for a download. One chunk of random blocks a
type is drawn and streamed over and over, each tensor starting elsewhere in it: a file takes as long as the disk takes.
Any GGUF engine loads it. Shapes and recipes are shapes.py's.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from shapes import FILE_TYPE, SCHEMES, SHAPES, Shape, metadata, tensor_bytes, tensor_types, tensors, with_dead_kv

from gemma4q import abi
from gemma4q.abi import TensorType as T
from gemma4q.gguf.reader import open_gguf
from gemma4q.gguf.writer import TensorData, write_gguf

CHUNK = 48_611  # blocks; a prime, so that rows do not repeat at once


def blocks(type: T, random: np.random.Generator) -> np.ndarray:
    """CHUNK random valid blocks, as bytes. Values are centred and about 0.02 large, scales small normal halves."""
    if type in (T.F32, T.BF16):
        values = random.normal(0, 0.02, CHUNK * 256).astype("<f4")
        return (values if type == T.F32 else (values.view("<u4") >> 16).astype("<u2")).view(np.uint8)
    layout = abi.dtype(f"block_{type.name.lower()}")
    block = random.integers(0, 256, (CHUNK, layout.itemsize), np.uint8).view(layout)[:, 0]
    spread = random.uniform(0.5, 1.5, CHUNK)
    match type:
        case T.Q4_0:
            block["d"] = 0.004 * spread
        case T.Q5_0:
            block["d"] = 0.002 * spread
        case T.Q8_0:
            block["d"] = 0.00025 * spread
        case T.Q6_K:
            block["d"] = 0.0001 * spread
            block["scales"] = random.integers(5, 16, (CHUNK, 16))
        case T.Q4_K:  # equal scales and minima: 7.5 d = dmin centres the sixteen values
            block["d"] = 0.0001 * spread
            block["dmin"] = 7.5 * block["d"]
            block["scales"][:, 4:8] = block["scales"][:, 0:4]
            block["scales"][:, 8:12] = (block["scales"][:, 8:12] & 15) * 17
        case _:
            raise ValueError(f"no random blocks of type {type.name}")
    return block.view(np.uint8)


def vector(name: str, dims: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Norms, scales and the router: F32, such that attention is soft and a layer adds little, as in trained models.

    Otherwise sixty random layers are chaos, and two engines that round differently have nothing in common at the end.
    """
    count = prod(dims)
    if name == "rope_freqs.weight":
        return np.where(np.arange(count) < count // 4, 1.0, 1e30).astype("<f4")
    if "layer_output_scale" in name:
        return random.uniform(0.95, 1.05, count).astype("<f4")
    if "ffn_gate_inp.weight" in name:
        return random.normal(0, 1, count).astype("<f4")
    size = 2 / count**0.5 if "attn_k_norm" in name else 0.1 if ".post_" in name else 1
    return (size * random.normal(1, 0.1, count)).astype("<f4")


def tiled(chunk: np.ndarray, start: int, size: int) -> Iterator[np.ndarray]:
    """`size` bytes of `chunk` repeated without end, from byte `start`."""
    while size:
        piece = chunk[start : start + size]
        yield piece
        start, size = 0, size - len(piece)


def random_tensors(shape: Shape, scheme: str, seed: int) -> Iterator[TensorData]:
    random, chunks = np.random.default_rng(seed), {}
    types = tensor_types(shape, scheme)
    for name, dims in tensors(shape).items():
        type = types[name]
        if len(dims) == 1 or "ffn_gate_inp" in name:
            yield TensorData.of(name, type, dims, vector(name, dims, random))
            continue
        if type not in chunks:
            chunks[type] = blocks(type, random)
        start = int(random.integers(CHUNK)) * abi.BLOCKS[type][1]
        yield TensorData(name, type, dims, partial(tiled, chunks[type], start, tensor_bytes(dims, type)))


def synthesize(shape: Shape, scheme: str, path: Path, vocabulary: Path, seed: int = 1) -> None:
    """Writes the file. The tokenizer.* keys of `vocabulary`, of as many tokens as the model, are copied unchanged."""
    source = open_gguf(vocabulary)
    copied = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    if (count := len(copied["tokenizer.ggml.tokens"])) != shape.vocab:
        raise SystemExit(f"{vocabulary} has {count} tokens, the model {shape.vocab}")
    named = {"general.name": f"synthetic {path.stem}", "general.file_type": FILE_TYPE[scheme]}
    keys = metadata(shape) | named | {"general.quantization_version": 2} | copied
    write_gguf(path, keys, list(random_tensors(shape, scheme, seed)), {key: source.types[key] for key in copied})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=Path, required=True, help="GGUF file whose tokenizer is copied")
    parser.add_argument("--dead-kv", action="store_true", help="with the unused K/V tensors of Google's E2B and E4B")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    shape = SHAPES[given.model]
    synthesize(with_dead_kv(shape) if given.dead_kv else shape, given.scheme, given.out, given.vocab, given.seed)


if __name__ == "__main__":
    main()
