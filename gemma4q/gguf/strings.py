"""A GGUF string array where it lies in the file: found, checked and indexed without copying a string.

Gemma's vocabulary is 777,050 strings in two arrays. Each string is an 8-byte length and its bytes, so where one begins
is known only from the one before it. Nearly all are shorter than 256 bytes and hold no NUL, so nearly all begin where
one byte is followed by seven zeros: numpy finds those places at once, and each is then proved by the length before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import Gemma4qError

LONGEST_STRING = 64 << 20
_WINDOW = 1 << 20  # bytes searched at once
_STRIDE = 4096  # strings walked one by one where the search failed, so that no file makes the search the slow part


@dataclass(frozen=True)
class StringArray:
    """Strings of a mapped file: `strings[i]` is bytes; for C and numpy there is `data`, and where strings lie in it.

    `data` is uint8 [bytes]; string i is `data[starts[i] : starts[i] + lengths[i]]`. `offsets`, int64 [strings + 1], is
    where each record (8 bytes of length, then the string) begins, and where the last one ends.
    """

    data: np.ndarray
    offsets: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """int64 [strings]: the first byte of each string in `data`."""
        return self.offsets[:-1] + 8

    @property
    def lengths(self) -> np.ndarray:
        """int64 [strings]: bytes of each string."""
        return np.diff(self.offsets) - 8

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        return self.data[self.offsets[index] + 8 : self.offsets[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        whole, edges = self.data.tobytes(), self.offsets.tolist()
        return (whole[a + 8 : b] for a, b in pairwise(edges))


def string_array(data: np.ndarray, start: int, count: int, where: str) -> StringArray:
    """The `count` strings whose first record begins at `start` of `data`, each inside `data`.

    The caller has checked that 8 * count bytes are there. Raises truncated or bad_string, naming `where`.
    """
    offsets = np.empty(count + 1, np.int64)
    offsets[0], done = start, 0
    while done < count:
        position = int(offsets[done])
        found = position + _proved(data[position : position + _WINDOW])[: count - done + 1]
        if len(found) < 2:
            found = _walked(data, position, min(_STRIDE, count - done), where)
        offsets[done : done + len(found)] = found
        done += len(found) - 1
    return StringArray(data[start : int(offsets[-1])], offsets - start)


def _proved(window: np.ndarray) -> np.ndarray:
    """Where short strings' records begin, from the window's first byte on, while each ends where the next begins."""
    zeros = window == 0
    for step in (1, 2, 3):  # runs of 2, 4, then 7 zeros
        zeros = zeros[:-step] & zeros[step:]
    starts = np.flatnonzero(zeros[1:])
    if len(starts) == 0 or starts[0] != 0:
        return starts[:0]
    linked = starts[:-1] + 8 + window[starts[:-1]] == starts[1:]
    proved = len(linked) if linked.all() else int(np.argmin(linked))
    return starts[: proved + 1]


def _walked(data: np.ndarray, position: int, count: int, where: str) -> list[int]:
    """Where the next `count` records begin, and where the last of them ends, one length at a time."""
    view, size, found = memoryview(data), len(data), [position]
    for _ in range(count):
        if size - position < 8:
            raise Gemma4qError("truncated", f"{where}: the file ends inside the array (at byte {size})")
        length = int.from_bytes(view[position : position + 8], "little")
        if length > LONGEST_STRING or length > size - position - 8:
            raise Gemma4qError("bad_string", f"{where}: a string at byte {position} claims {length} bytes")
        position += 8 + length
        found.append(position)
    return found
