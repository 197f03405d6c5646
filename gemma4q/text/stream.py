"""From the model's tokens to what its user sees: answer, thoughts, function calls (spec: chat 4.2, 4.3, 10.7).

A state machine on token ids, so no tag can be mistaken for text or text for a tag. Owns what is held back: spaces that
may turn out to be trailing, bytes that are half a character, ends that may begin a stop string. Reading a call is
`calls.py`'s part, and when to stop is the engine's: `done` says that the text did.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from gemma4q.text import segments
from gemma4q.text.calls import QUOTE, Call, parse_call, spelled
from gemma4q.text.stops import StopMatcher
from gemma4q.text.utf8 import Utf8Stream

NAME = "thought"
ABSENT = -1


class Vocabulary(Protocol):
    """What a stream needs of a tokenizer."""

    special_ids: Mapping[str, int]
    stops: frozenset[int]

    def piece(self, token: int, special: bool = False) -> bytes: ...


class Event(NamedTuple):
    """`content` and `thought` come in pieces; `call` when it is complete, `unparsed` when it could not be read.

    `text` of the last two is the call as the model wrote it, without its two tokens.
    """

    kind: str
    text: str
    call: Call | None = None


class State(Enum):
    CONTENT, NAME, THOUGHT, CALL, AFTER = range(5)


THINKING = (State.NAME, State.THOUGHT)


@dataclass(frozen=True)
class Marks:
    """The ids that steer the machine, ABSENT where a vocabulary has no such token."""

    channel: int
    channel_end: int
    call: int
    call_end: int
    quote: int
    response_end: int
    turns: tuple[int, int]

    @property
    def closers(self) -> tuple[int, int, int]:
        """What is dropped where it closes nothing."""
        return self.call_end, self.channel_end, self.response_end

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Marks":
        def find(text: str) -> int:
            return vocabulary.special_ids.get(text, ABSENT)

        return cls(
            find(segments.CHANNEL),
            find(segments.CHANNEL_END),
            find(segments.CALL),
            find(segments.CALL_END),
            find(segments.QUOTE),
            find(segments.RESPONSE_END),
            (find(segments.TURN), find(segments.TURN_END)),
        )


class Trimmed:
    """Holds back trailing space until more text shows that it is none."""

    def __init__(self) -> None:
        self.space = ""

    def push(self, text: str) -> str:
        text = self.space + text
        kept = text.rstrip()
        self.space = text[len(kept) :]
        return kept

    def take(self) -> str:
        space, self.space = self.space, ""
        return space


class OutputStream:
    """One answer. `push` each sampled token, then `finish`; the events of all give the message.

    stops: stop strings, matched on the answer only, never in thoughts or calls. schemas: function name to JSON schema,
    to read calls by. prompt: the ids before the answer; a prompt that ends inside a thought makes it go on.
    plain: no thoughts and no calls, every token is text (raw completion). stop: the stop string that ended the text.
    thought_tokens: how many tokens went into thoughts, their marks included.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        plain: bool = False,
    ):
        self.vocabulary = vocabulary
        self.schemas = schemas
        self.marks = Marks.of(vocabulary)
        self.state = State.CONTENT
        self.ended = False
        self.thought_tokens = 0
        self._stops = StopMatcher(stops)
        self._content, self._thought = Trimmed(), Trimmed()
        self._strip_lead = False
        self._name = ""
        self._call: list[bytes | None] = []
        self._utf8 = Utf8Stream()
        self._events: list[Event] = []
        self._steps: dict[State, Callable[[int], None]] = {
            State.CONTENT: self._in_content,
            State.NAME: self._in_name,
            State.THOUGHT: self._in_thought,
            State.CALL: self._in_call,
            State.AFTER: self._after_call,
        }
        if plain:
            self._steps[State.CONTENT] = self._in_plain
        else:
            self._seed(prompt)

    @property
    def stop(self) -> str | None:
        return self._stops.found

    @property
    def done(self) -> bool:
        """Whether the answer is over: an end token came, or a stop string matched."""
        return self.ended or self.stop is not None

    def push(self, token: int) -> list[Event]:
        """The events that a token makes certain; none once the answer is over."""
        if self.done:
            return []
        if token in self.vocabulary.stops:
            self.ended = True
            return []
        before = self.state
        self._steps[before](token)
        self.thought_tokens += before in THINKING or self.state in THINKING
        return self._taken()

    def finish(self) -> list[Event]:
        """What was held back. A call left open is read as if it were closed, an open thought ends."""
        self.ended = True
        if self.state is State.CALL:
            self._close_call()
        elif self.state is State.NAME:
            self._close_name()
        elif self.state is State.THOUGHT:
            self._close_thought()
        elif self.state is State.CONTENT:
            self._flush_content()
            self._emit("content", self._content.take())
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = merged(self._events), []
        return events

    def _seed(self, prompt: Sequence[int]) -> None:
        """The state that the prompt leaves behind; what it says itself is not said again."""
        borders = {self.marks.channel, self.marks.channel_end, *self.marks.turns} - {ABSENT}
        at = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in borders), None)
        if at is None:
            return
        if prompt[at] == self.marks.channel:
            for token in prompt[at:]:
                self._steps[self.state](token)
            self._utf8.flush()
            self._thought.take()
            self._events.clear()
        else:
            self._strip_lead = prompt[at] == self.marks.channel_end and at == len(prompt) - 1

    def _text(self, token: int) -> str:
        """What a token shows: a quote token out of place is a quote, a closing one out of place is nothing."""
        if token == self.marks.quote:
            return self._utf8.flush() + '"'
        return "" if token in self.marks.closers else self._utf8.push(self.vocabulary.piece(token))

    def _emit(self, kind: str, text: str) -> None:
        if text:
            self._events.append(Event(kind, text))

    # -- content

    def _in_plain(self, token: int) -> None:
        self._add_content(self._utf8.push(self.vocabulary.piece(token)))

    def _in_content(self, token: int) -> None:
        marks = self.marks
        if token == marks.channel:
            self._end_content()
            self._open_channel()
        elif token == marks.call:
            self._end_content()
            self._open_call()
        elif token == marks.channel_end:
            self._end_content()
        else:
            self._add_content(self._text(token))

    def _add_content(self, text: str) -> None:
        if self._strip_lead:
            text = text.lstrip()
            self._strip_lead = not text
        self._emit("content", self._content.push(self._stops.push(text)))
        if self.stop is not None:
            self._emit("content", self._content.take())

    def _flush_content(self) -> None:
        self._add_content(self._utf8.flush())
        if self.stop is None:
            self._emit("content", self._content.push(self._stops.flush()))

    def _end_content(self) -> None:
        """Before a channel or a call: trailing space is dropped."""
        self._flush_content()
        self._content.take()

    # -- thoughts

    def _open_channel(self) -> None:
        self.state, self._name = State.NAME, ""

    def _in_name(self, token: int) -> None:
        if token == self.marks.channel:
            self._utf8.flush()
            self._name = ""
        elif token == self.marks.channel_end:
            self._close_name()
            self._back_to_content()
        elif token == self.marks.call:
            self._close_name()
            self._open_call()
        else:
            self._add_name(self._text(token))

    def _add_name(self, text: str) -> None:
        """A name is known by what follows it; anything that is not the name is thought already."""
        self._name += text
        if self._name.startswith(NAME) and len(self._name) > len(NAME):
            self._begin_thought(self._name[len(NAME) :].removeprefix("\n"))
        elif not NAME.startswith(self._name):
            self._begin_thought(self._name)

    def _begin_thought(self, text: str) -> None:
        self.state = State.THOUGHT
        self._emit("thought", self._thought.push(text))

    def _close_name(self) -> None:
        self._name += self._utf8.flush()
        if self._name != NAME:
            self._begin_thought(self._name)
        self._close_thought()

    def _in_thought(self, token: int) -> None:
        if token == self.marks.channel_end:
            self._close_thought()
            self._back_to_content()
        elif token == self.marks.call:
            self._close_thought()
            self._open_call()
        elif token != self.marks.channel:
            self._emit("thought", self._thought.push(self._text(token)))

    def _close_thought(self) -> None:
        self._emit("thought", self._thought.push(self._utf8.flush()))
        self._thought.take()

    def _back_to_content(self) -> None:
        self.state, self._strip_lead = State.CONTENT, True

    # -- calls

    def _open_call(self) -> None:
        self.state, self._call = State.CALL, []

    def _in_call(self, token: int) -> None:
        if token == self.marks.call_end:
            self._close_call()
            self.state = State.AFTER
        else:
            self._call.append(None if token == self.marks.quote else self.vocabulary.piece(token))

    def _close_call(self) -> None:
        text, run = "", b""
        for piece in self._call:
            if piece is None:
                text, run = text + run.decode("utf-8", "replace") + QUOTE, b""
            else:
                run += piece
        text += run.decode("utf-8", "replace")
        call = parse_call(text, self.schemas)
        self._events.append(Event("call" if call else "unparsed", spelled(text), call))

    def _after_call(self, token: int) -> None:
        if token == self.marks.call:
            self._open_call()
        elif token == self.marks.channel:
            self._open_channel()
        elif self.vocabulary.piece(token).strip() and token not in self.marks.closers:
            self._back_to_content()
            self._in_content(token)


def merged(events: Iterable[Event]) -> list[Event]:
    """Neighbouring pieces of text as one event."""
    result: list[Event] = []
    for event in events:
        if result and event.call is None and event.kind == result[-1].kind and event.kind in ("content", "thought"):
            result[-1] = Event(event.kind, result[-1].text + event.text)
        else:
            result.append(event)
    return result
