"""Notices an answer that repeats itself for ever: up to 64 tokens, 8 times or more, over 256 (spec: chat 10.7.4)."""

import numpy as np

LONGEST, TIMES, COVERED = 64, 8, 256


class LoopDetector:
    """`push` each sampled token; True from the token on that completes a loop, as long as it goes on.

    For every period up to LONGEST it counts how long each token has equalled the one a period before: one numpy step a
    token, whatever the answer's length.
    """

    def __init__(self) -> None:
        periods = np.arange(1, LONGEST + 1)
        repeats = np.maximum(TIMES, -(-COVERED // periods))
        self._needed = (repeats - 1) * periods
        self._last = np.full(LONGEST, -1, np.int64)
        self._run = np.zeros(LONGEST, np.int64)

    def push(self, token: int) -> bool:
        self._run = (self._run + 1) * (self._last == token)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._run >= self._needed).any())
