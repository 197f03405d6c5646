"""A small vocabulary of Gemma 4's make for tiny models: its special tokens by text, 256 byte tokens, trained pieces.

Owns which token has which id and the merges; how text becomes ids is gemma4q.text's. Special ids below 500 and the byte
tokens have Gemma's own ids; the image and sound tokens, far up in Gemma's, fill gaps.
"""

from collections import Counter
from itertools import pairwise

import numpy as np

FIXED = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 98: "<|think|>"}
FIXED |= {48: "<|tool_call>", 49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: '<|"|>'}
FIXED |= {100: "<|channel>", 101: "<channel|>", 105: "<|turn>", 106: "<turn|>"}
MEDIA = ("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>")
FIRST_BYTE = 238
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
USER_DEFINED_IDS = {48, 49, 50, 51, 52, 100, 101}


def train(text: str, pieces: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The letters of `text` and its most frequent merges, `pieces` in all: byte pair encoding, word by word."""
    words = Counter(text.replace(" ", "\n▁").split("\n"))
    split = {word: list(word) for word in words if word}
    letters = sorted({letter for word in split for letter in word} | {"\n"})
    merges: list[tuple[str, str]] = []
    known = set(letters)
    while len(known) < pieces:
        pairs = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        known.add("".join(best))
        split = {word: join(parts, best) for word, parts in split.items()}
    return letters, merges


def join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def vocabulary(size: int, text: str) -> dict[str, object]:
    """The tokenizer.* metadata of a vocabulary of `size` tokens, its pieces learned from `text`."""
    tokens = dict(FIXED) | {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    gaps = [id for id in range(size) if id not in tokens]
    letters, merges = train(text, len(gaps) - len(MEDIA))
    tokens |= dict(zip(gaps, [*MEDIA, *dict.fromkeys([*letters, *map("".join, merges)])], strict=True))
    types = np.full(size, NORMAL, np.int32)
    types[[id for id, token in tokens.items() if token in MEDIA or id in FIXED]] = CONTROL
    types[sorted(USER_DEFINED_IDS)] = USER_DEFINED
    types[FIRST_BYTE : FIRST_BYTE + 256] = BYTE
    special = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3, "mask": 4}
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [tokens[id] for id in range(size)],
        "tokenizer.ggml.scores": np.full(size, -1000, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        **{f"tokenizer.ggml.{name}_token_id": id for name, id in special.items()},
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
