"""Stop strings on text that arrives in pieces (spec: chat 10.7): nothing behind a match is shown, nor half of one."""

from collections.abc import Sequence

from gemma4q.errors import Gemma4qError

STRINGS, BYTES = 16, 1024


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings a client may ask for; raises `bad_option`."""
    if isinstance(stops, str):
        stops = [stops]
    if len(stops) > STRINGS:
        raise Gemma4qError("bad_option", f"stop: {len(stops):,} strings, at most {STRINGS} are allowed")
    for stop in stops:
        if not isinstance(stop, str) or not stop or len(stop.encode(errors="replace")) > BYTES:
            raise Gemma4qError("bad_option", f"stop: each must be text of 1 to {BYTES:,} bytes")
    return tuple(stops)


class StopMatcher:
    """Passes text on until the match that ends first; what it gives does not depend on how the text was cut."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that cannot be part of a match; empty once one was found."""
        if not self.stops or self.found:
            return "" if self.found else text
        self._held += text
        matches = [(at + len(stop), -len(stop), stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if matches:
            end, length, self.found = min(matches)
            before, self._held = self._held[: end + length], ""
            return before
        keep = max(map(self._begun, self.stops))
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """What was held back and is now known to be no match."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """The longest end of the held text that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
