"""Byte-pair encoding in plain Python, over strings: the oracle of csrc/tokenizer.c, and what serves without a compiler.

Owns the merging of text between special tokens, and the words for what can be wrong with a vocabulary. Special tokens,
control tokens and everything else that a token means are the tokenizer's. Source: SentencePiece BPE as GGUF stores it,
"left right" entries whose index is their rank; lowest rank first, then leftmost.
"""

import heapq
import re

import numpy as np

from gemma4q import abi
from gemma4q.errors import Gemma4qError

SPACE_MARK = "\u2581"
LONGEST_TEXT = 65535
MOST_TOKENS = 1 << 20
MOST_MERGES = 1 << 22

Problem = abi.enum("vocabulary_status", "VOCABULARY_")

SENTENCES = {
    Problem.NO_MEMORY: "no memory left for its tables",
    Problem.TOO_BIG: f"more than {MOST_TOKENS} tokens or {MOST_MERGES} merges",
    Problem.OUT_OF_FILE: "{} lies outside the file",
    Problem.TOO_LONG: f"{{}} is longer than {LONGEST_TEXT} bytes",
    Problem.EMPTY: "{} is empty",
    Problem.NOT_UTF8: "{} is not UTF-8",
    Problem.DUPLICATE: "{} repeats an earlier token",
    Problem.NO_BYTE: "no token <0x{:02X}>, so not every text could be encoded",
}


def refusal(problem: int, where: int) -> Gemma4qError:
    """The error for a vocabulary; `where`: a token's index, -1 - a merge's, or a byte."""
    name = where if problem == Problem.NO_BYTE else f"token {where}" if where >= 0 else f"merge {-1 - where}"
    return Gemma4qError("bad_tokenizer", "the vocabulary: " + SENTENCES[Problem(problem)].format(name))


class PythonBpe:
    """Encodes text that holds no special tokens. `tokens`, `merges`: string arrays (data, starts, lengths).

    Raises Gemma4qError `bad_tokenizer` naming the token or merge at fault.
    """

    def __init__(self, tokens, merges):
        if len(tokens.starts) > MOST_TOKENS or len(merges.starts) > MOST_MERGES:
            raise refusal(Problem.TOO_BIG, 0)
        self._texts = _texts(tokens, lambda i: i)
        self._ids = {}
        for i, text in enumerate(self._texts):
            if not text:
                raise refusal(Problem.EMPTY, i)
            if self._ids.setdefault(_decoded(text, i), i) != i:
                raise refusal(Problem.DUPLICATE, i)
        for byte in range(256):
            if f"<0x{byte:02X}>" not in self._ids:
                raise refusal(Problem.NO_BYTE, byte)
        self._bytes = [self._ids[f"<0x{byte:02X}>"] for byte in range(256)]
        self._ranks = {}
        for rank, entry in enumerate(_texts(merges, lambda i: -1 - i)):
            if 0 < entry.find(b" ", 1) < len(entry) - 1:  # others name no pair and can never apply
                self._ranks.setdefault(_decoded(entry, -1 - rank), rank)

    def find(self, text: str) -> int | None:
        """The token with exactly this text, as stored in the file."""
        return self._ids.get(text)

    def text(self, token: int) -> bytes:
        """A token's UTF-8 text, as stored in the file; 0 <= token < the number of tokens."""
        return self._texts[token]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which holds no surrogates; in time n log n of its longest line."""
        ids = []
        for word in re.findall("\n+|[^\n]+", text.replace(" ", SPACE_MARK)):
            if word[0] == "\n" and word in self._ids:
                ids.append(self._ids[word])
                continue
            for symbol in self._merge(word):
                token = self._ids.get(symbol)
                ids += [token] if token is not None else [self._bytes[byte] for byte in symbol.encode()]
        return ids

    def _merge(self, word: str) -> list[str]:
        """A word's symbols once no pair of neighbours merges any more."""
        symbols: list[str | None] = list(word)
        following = [*range(1, len(symbols)), None]
        previous = [None, *range(len(symbols) - 1)]
        heap = []

        def offer(left: int | None, right: int | None):
            if left is not None and right is not None:
                pair = f"{symbols[left]} {symbols[right]}"
                if (rank := self._ranks.get(pair)) is not None:
                    heapq.heappush(heap, (rank, left, pair))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while heap:
            _, left, pair = heapq.heappop(heap)
            right = following[left]
            if right is None or symbols[left] is None or pair != f"{symbols[left]} {symbols[right]}":
                continue
            symbols[left] += symbols[right]
            symbols[right] = None
            following[left] = following[right]
            if following[right] is not None:
                previous[following[right]] = left
            offer(previous[left], left)
            offer(left, following[left])
        return [symbol for symbol in symbols if symbol is not None]


def _texts(array, where) -> list[bytes]:
    starts, lengths = np.asarray(array.starts, np.int64), np.asarray(array.lengths, np.int64)
    room = len(array.data) - starts
    for problem, bad in (
        (Problem.OUT_OF_FILE, (starts < 0) | (lengths < 0) | (lengths > room)),
        (Problem.TOO_LONG, lengths > LONGEST_TEXT),
    ):
        if bad.any():
            raise refusal(problem, where(int(bad.argmax())))
    if not len(starts):
        return []
    first = int(starts.min())
    data = np.asarray(array.data[first : int((starts + lengths).max())]).tobytes()
    return [data[s : s + n] for s, n in zip((starts - first).tolist(), lengths.tolist(), strict=True)]


def _decoded(text: bytes, where: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise refusal(Problem.NOT_UTF8, where) from None
