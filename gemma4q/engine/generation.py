"""An answer that is being made: its reader asks for the next piece, and by asking lets the engine step."""

from collections.abc import Iterator

from ..text.stream import Event
from .engine import Engine
from .sequence import Answer, Stats


class Generation:
    """Iterates over the pieces of an answer's text; `events()` gives thoughts and calls as well.

    finish: None while it goes on, then "stop", "length", "context", "loop" or "cancelled". Iterating raises the
    `Gemma4qError` that ended an answer, behind its last piece. One reader at a time; several answers may take turns.
    """

    def __init__(self, engine: Engine, answer: Answer):
        self._engine, self._answer = engine, answer
        self._seen: list[Event] = []

    def __iter__(self) -> Iterator[str]:
        return (event.text for event in self.events() if event.kind == "content")

    def events(self) -> Iterator[Event]:
        """Pieces as (kind, text, call): `content`, `thought`, `call`, and `unparsed` for a call that cannot be read."""
        answer = self._answer
        while answer.events or not answer.over:
            while answer.events:
                event = answer.events.popleft()
                self._seen.append(event)
                yield event
            if not answer.over:
                self._engine.advance(answer)
        if answer.error:
            raise answer.error

    def text(self) -> str:
        """The whole text, when it is over."""
        return self._whole("content")

    def thoughts(self) -> str:
        """All thoughts, when it is over."""
        return self._whole("thought")

    def _whole(self, kind: str) -> str:
        for _ in self.events():
            pass
        return "".join(event.text for event in self._seen if event.kind == kind)

    @property
    def finish(self) -> str | None:
        return self._answer.finish

    @property
    def stats(self) -> Stats:
        return self._answer.stats

    @property
    def tokens(self) -> list[int]:
        """The ids of the answer so far, an end token included."""
        return self._answer.tokens

    @property
    def logprobs(self) -> list[tuple[float, list[tuple[int, float]]]]:
        """For each token its log probability and, best first, the alternatives' (id, log probability)."""
        return self._answer.logprobs

    @property
    def seed(self) -> int:
        """What makes the same answer again."""
        return self._answer.seed

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return self._answer.stream.stop

    def cancel(self) -> None:
        """Ends it as soon as can be; from any thread. What was made stays readable, `finish` becomes "cancelled"."""
        self._engine.cancel(self._answer)

    def __del__(self) -> None:
        if not self._answer.over:
            self._answer.cancelled = True
