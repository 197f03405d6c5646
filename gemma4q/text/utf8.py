"""Bytes that arrive in pieces, as text: nothing shown twice, nothing shown half. Knows nothing of tokens."""

import codecs


class Utf8Stream:
    """Decodes UTF-8 cut anywhere; what it gave in all equals `bytes.decode("utf-8", "replace")` of the whole.

    At most three bytes are held back, and only while they may still become a character.
    """

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """The text that is certain after `data`."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD; the stream starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
