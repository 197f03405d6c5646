"""A prompt as the engine reads it: tokens, the soft tokens of images and sounds among them, and which rows see which.

Owns what the cache knows each position by, and where a prompt may be cut. Making soft tokens is not its business.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..plan.batch import Step
from .kv_cache import History


@dataclass(frozen=True)
class Soft:
    """Soft tokens that replace the embeddings from position `start` on: f32 [count, width].

    `whole`: on sliding layers they all see each other, as image blocks of the larger models do.
    """

    start: int
    vectors: np.ndarray
    whole: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.vectors)

    def keys(self) -> np.ndarray:
        """What the cache knows them by: negative, made from their content and their place in the block."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.vectors, "<f4").tobytes(), digest_size=7).digest()
        return -1 - int.from_bytes(digest) - np.arange(len(self.vectors))


def token_keys(tokens: Sequence[int] | np.ndarray, generated: bool) -> np.ndarray:
    """The history [n] that tokens are: where the class of a row picks its arithmetic it is part of it."""
    return np.asarray(tokens, np.int64) * 2 + generated


class Prompt:
    """Tokens `ids` [n] with soft tokens among them; `keys` [n] are the history that the cache compares.

    `reach` [n]: the last position each one sees; None when that is always itself.
    """

    def __init__(self, ids: Sequence[int] | np.ndarray, soft: Sequence[Soft] = ()):
        self.ids, self.soft = np.array(ids, np.int32), tuple(soft)
        self.keys = token_keys(self.ids, generated=False)
        self.reach = np.arange(len(self.ids)) if any(block.whole for block in soft) else None
        for block in self.soft:
            self.keys[block.start : block.end] = block.keys()
            if block.whole:
                self.reach[block.start : block.end] = block.end - 1

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def widest(self) -> int:
        """Rows of the longest stretch that must not be cut."""
        return max((len(block.vectors) for block in self.soft if block.whole), default=1)

    def chunk_end(self, start: int, rows: int, most: int) -> int:
        """Where a chunk of about `rows` from `start` ends: never in an image block, which may take it to `most`."""
        end = min(start + rows, len(self.ids))
        for block in self.soft:
            if block.whole and block.start < end < block.end:
                end = block.end if block.end - start <= most else block.start
        return end

    def step(self, start: int, end: int, history: History, want: np.ndarray) -> Step:
        """The rows of positions start ... end; `want` [end - start] are their row flags."""
        step = Step(self.ids[start:end], start, *history.tables(end), want=want)
        if self.reach is not None:
            step.reach = self.reach[start:end]
        blocks = [block for block in self.soft if block.start < end and start < block.end]
        if blocks:
            spans = [(block, max(block.start, start), min(block.end, end)) for block in blocks]
            step.vectors = np.concatenate([b.vectors[first - b.start : last - b.start] for b, first, last in spans])
            step.vector = np.full(end - start, -1)
            places = np.concatenate([np.arange(first - start, last - start) for _, first, last in spans])
            step.vector[places] = np.arange(len(places))
        return step
