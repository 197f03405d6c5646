"""One request: what it wants of the next step, the tokens it chose, what its reader may see, and how it ended.

When it runs, and with whom, is the engine's; how a token is chosen and what it means to a reader is `text`'s.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from ..abi import RowFlag
from ..backends import StepResult
from ..errors import Gemma4qError
from ..plan.batch import Step
from ..text.loops import LoopDetector
from ..text.options import SamplingOptions
from ..text.penalties import biases
from ..text.sampler import fresh_seed, logprobs, needs_full, pick_from_logits, pick_from_top
from ..text.stream import Event, OutputStream
from ..text.tokenizer import Tokenizer
from .kv_cache import History
from .prompt import Prompt, token_keys


@dataclass
class Stats:
    """What a request took. `reused_tokens` are those of the prompt whose keys and values were still cached."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float = 0.0  # since it was asked for
    prompt_seconds: float = 0.0  # since it began to run
    decode_seconds: float = 0.0  # from the first token to the last

    @property
    def prompt_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Sequence:
    """A request for rows of a prompt; `history` is set when it begins to run, `finish` or `error` when it is over.

    finish: "stop", "length", "context", "loop" or "cancelled". `cancelled` may be set at any time, from any thread.
    """

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.history: History | None = None
        self.finish: str | None = None
        self.error: Gemma4qError | None = None
        self.cancelled = False
        self.asked = self.begun = time.perf_counter()
        self.stats = Stats(prompt_tokens=len(prompt))

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def generating(self) -> bool:
        """Whether its next row is a token of its own."""
        return False

    def reusable(self) -> np.ndarray:
        """Keys of what need not be computed if it is cached, and of the row after that."""
        return self.prompt.keys

    def begin(self, history: History) -> None:
        self.history, self.begun = history, time.perf_counter()
        self.stats.reused_tokens = history.length

    def next_step(self, rows: int, most: int, wanted: int) -> Step | None:
        """Its next rows: about `rows`, at most `most`, results wanted of at most `wanted`. None: not in this step."""
        raise NotImplementedError

    def take(self, result: StepResult, row: int, position: int) -> None:
        """What came out of the row at `position`, as row `row` of the result."""
        raise NotImplementedError

    def stored(self, step: Step) -> None:
        """The keys and values of a step are in the cache."""
        first, count = step.start, len(step.tokens)
        keys = self.prompt.keys[first : first + count]
        if step.generated:
            keys = token_keys(step.tokens, generated=self.history.cache.classes_differ)
        self.history.commit(keys)
        if first + count == len(self.prompt):
            self.history.checkpoint()

    def end(self, finish: str | None, error: Gemma4qError | None = None) -> None:
        self.finish, self.error = finish, error


class Scoring(Sequence):
    """Wants logits [len(wanted), vocab]: those of a prompt's positions `wanted`, ascending."""

    def __init__(self, prompt: Prompt, wanted: np.ndarray, logits: np.ndarray):
        super().__init__(prompt)
        self.wanted, self.logits = wanted, logits

    def reusable(self) -> np.ndarray:
        return self.prompt.keys[: self.wanted[0] + 1]

    def next_step(self, rows: int, most: int, wanted: int) -> Step | None:
        start = self.history.length
        left = self.wanted[self.wanted >= start]
        fit = int(left[wanted] if len(left) > wanted else left[-1] + 1) - start
        end = self.prompt.chunk_end(start, min(rows, fit), min(most, fit))
        if end <= start:
            return None
        want = np.zeros(end - start, np.uint16)
        want[left[left < end] - start] = RowFlag.WANT_LOGITS
        self.history.extend(end - start)
        return self.prompt.step(start, end, self.history, want)

    def take(self, result: StepResult, row: int, position: int) -> None:
        self.logits[np.searchsorted(self.wanted, position)] = result.logits[row]
        if position == self.wanted[-1]:
            self.end("stop")


class Answer(Sequence):
    """Continues a prompt until something ends it; `events` are what its reader may see and has not taken yet.

    tokens: the answer's ids. logprobs: for each token its log probability and [(id, log probability)] of the best, when
    asked for. seed: what the answer can be had again with.
    """

    def __init__(
        self, prompt: Prompt, tokenizer: Tokenizer, stream: OutputStream, options: SamplingOptions,
        max_tokens: int, mask: np.ndarray | None,
    ):  # fmt: skip
        """`mask`: the tokens an answer may contain, as `sampler.allowed_mask` gives them; None: all."""
        super().__init__(prompt)
        self.tokenizer, self.stream, self.options = tokenizer, stream, options
        self.max_tokens, self.mask = max_tokens, mask
        self.seed = options.seed if options.seed >= 0 else fresh_seed()
        self.events: deque[Event] = deque()
        self.tokens: list[int] = []
        self.logprobs: list[tuple[float, list[tuple[int, float]]]] = []
        self._all = prompt.ids.tolist()
        self._loops = LoopDetector()
        self._biased = is_biased(options)
        self._biases: np.ndarray | None = None
        self._full = False  # whether the token will be chosen here from all logits

    @property
    def generating(self) -> bool:
        return bool(self.tokens)

    def next_step(self, rows: int, most: int, wanted: int) -> Step | None:
        start = self.history.length
        if self.tokens:
            self.history.extend(1)
            step = Step(self.tokens[-1:], start, *self.history.tables(start + 1), generated=True, want=0)
        else:
            end = self.prompt.chunk_end(start, rows, most)
            if end <= start:
                return None
            self.history.extend(end - start)
            step = self.prompt.step(start, end, self.history, want=0)
        if start + len(step.tokens) == len(self._all):
            self._want(step)
        return step

    def _want(self, step: Step) -> None:
        """Lets a token be chosen after the step's last row, by the backend's best few where they will do."""
        limits = self.history.cache.limits
        self._biases = biases(self.options, self._all, self.tokenizer) if self._biased else None
        crowded = self._biased and len(self._biases) > limits.biases // limits.sequences
        self._full = crowded or needs_full(self.options)
        step.want = int(RowFlag.WANT_LOGITS if self._full else RowFlag.WANT_TOP)
        if not self._full:
            step.bias, step.mask = self._biases, self.mask

    def take(self, result: StepResult, row: int, position: int) -> None:
        at = {"seed": self.seed, "position": position + 1}
        if self._full:
            logits = result.logits[row]
            token = pick_from_logits(logits, self.options, **at, biases=self._biases, mask=self.mask)
        else:
            token = pick_from_top(result.top_ids[row], result.top_values[row], self.options, **at)
        if self.options.logprobs is not None:
            self.logprobs.append(logprobs(result.logits[row], token, self.options.logprobs))
        self.tokens.append(token)
        self._all.append(token)
        self._clock()
        self.events.extend(self.stream.push(token))
        if self.stream.done:
            self.end("stop")
        elif self._loops.push(token):
            self.end("loop")
        elif len(self.tokens) >= self.max_tokens:
            self.end("length")
        elif len(self._all) > self.history.cache.limits.context:
            self.end("context")

    def _clock(self) -> None:
        now, stats = time.perf_counter(), self.stats
        stats.generated_tokens = len(self.tokens)
        if len(self.tokens) == 1:
            stats.first_token_seconds, stats.prompt_seconds = now - self.asked, now - self.begun
        stats.decode_seconds = now - self.asked - stats.first_token_seconds

    def end(self, finish: str | None, error: Gemma4qError | None = None) -> None:
        self.events.extend(self.stream.finish())
        super().end(finish, error)


def is_biased(options: SamplingOptions) -> bool:
    """Whether single tokens may be pushed up or down."""
    penalties = options.frequency_penalty, options.presence_penalty, options.dry_multiplier
    return options.ignore_eos or bool(options.logit_bias) or options.repeat_penalty != 1 or any(penalties)
