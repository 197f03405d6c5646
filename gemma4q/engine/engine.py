"""The loop: several requests at once through one session, step by step.

A step takes the next token of every answer under way and, with the room that is left, stretches of prompts in the order
they came. Owns who runs when and what becomes of a step that failed; pages are the cache's, rows and tokens the
sequence's. Threads may submit, cancel and step at any time: a lock lets one of them step for all.
"""

import os
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from ..abi import Status
from ..backends import Session, StepResult
from ..errors import Gemma4qError
from ..plan.batch import Batch, Step
from .kv_cache import KVCache
from .sequence import Sequence

BUSY_ROWS = 256  # prompt rows in a step that others wait for a token of


class Engine:
    """Runs sequences on `session`. `changed` says whether the model's file is no longer what was loaded."""

    def __init__(self, session: Session, batch: Batch, window: int, changed: Callable[[], bool] = lambda: False):
        self.session, self.batch, self.limits = session, batch, session.limits
        self.cache = KVCache(session, window)
        self.changed = changed
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.under_way: list[tuple[Sequence, Step]] = []
        self.lock = threading.Lock()
        self.broken: Gemma4qError | None = None  # why nothing runs any more
        self.process = os.getpid()

    def submit(self, sequence: Sequence) -> None:
        """Takes a request on; `step` does the work. Raises `context_length_exceeded`, `too_big` or `model_changed`."""
        tokens, context = len(sequence.prompt), self.limits.context
        if not tokens:
            raise Gemma4qError("bad_option", "the prompt is empty: there is nothing to continue")
        if tokens > context:
            raise Gemma4qError("context_length_exceeded", f"the prompt has {tokens} tokens, the context {context}")
        most = self.limits.rows - self.limits.sequences + 1
        if sequence.prompt.widest > most:
            raise Gemma4qError("too_big", f"an image of {sequence.prompt.widest} tokens; a step has room for {most}")
        if not self.broken and self.changed():
            self.broken = model_changed()
        if self.broken:
            raise self.broken
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a request as soon as can be: between two steps, or between two layers while its prompt is read."""
        sequence.cancelled = True
        if any(s is sequence and not step.generated for s, step in self.under_way):
            self.session.cancel()

    def finish(self, sequence: Sequence) -> None:
        """Steps until `sequence` is over. Raises its error."""
        while not sequence.over:
            self.advance(sequence)
        if sequence.error:
            raise sequence.error

    def advance(self, sequence: Sequence) -> None:
        """One step for all, unless another thread's step has just ended `sequence`."""
        with self.lock:
            if not sequence.over:
                self.step()

    def close(self) -> None:
        """Cancels everything and frees the session."""
        self.broken = Gemma4qError("closed", "this model was closed")
        self.session.cancel()
        with self.lock:
            for sequence in [*self.running, *self.waiting]:
                self._close(sequence, "cancelled")
            self.session.close()

    def step(self) -> bool:
        """Runs one step; False when there is nothing to do. The caller holds the lock where there are threads."""
        if os.getpid() != self.process:
            raise Gemma4qError("unavailable", "the model was loaded before this process was forked: load it again here")
        self._dismiss()
        self._admit()
        parts = self.under_way = self._compose()
        if not parts:
            return False
        try:
            rows = self.batch.fill([step for _, step in parts])
            result = self.session.run(self.batch)
            self._settle(parts, rows, result)
        except BaseException:  # also an interrupt: what the step did is unknown
            for sequence, _ in parts:
                self._close(sequence, "cancelled", failed=True)
            raise
        finally:
            self.under_way = []
        return True

    def _settle(self, parts: list[tuple[Sequence, Step]], rows: list[tuple[int, int]], result: StepResult) -> None:
        """Whose step it was gets what came out. A step that failed changed nothing but for the one at fault."""
        match result.status:
            case Status.OK:
                for sequence, step in parts:
                    sequence.stored(step)
                for i, (part, row) in enumerate(rows):
                    sequence, step = parts[part]
                    self._give(sequence, result, i, step.start + row)
            case Status.NON_FINITE:
                self._fail_row(parts, result.bad_row)
            case Status.MODEL_CHANGED:
                self.broken = model_changed()
                for sequence in [*self.running, *self.waiting]:
                    self._close(sequence, None, self.broken, failed=True)
                self.waiting.clear()

    def _give(self, sequence: Sequence, result: StepResult, row: int, position: int) -> None:
        try:
            sequence.take(result, row, position)
        except Gemma4qError as error:
            self._close(sequence, None, error)
        if sequence.over and sequence in self.running:
            self._release(sequence, failed=False)

    def _fail_row(self, parts: list[tuple[Sequence, Step]], bad_row: int) -> None:
        """Ends the sequence whose row it was; the others' rows are computed again in the next step."""
        row = self.batch.rows[bad_row]
        order = sorted(range(len(parts)), key=lambda i: parts[i][1].generated)  # as Batch.fill has them
        fault = f"the model computed something that is not a finite number at token {row['position']}"
        self._close(parts[order[row["sequence"]]][0], None, Gemma4qError("bad_numeric", fault), failed=True)

    def _dismiss(self) -> None:
        """Lets go of who was cancelled."""
        for sequence in [s for s in (*self.running, *self.waiting) if s.cancelled]:
            self._close(sequence, "cancelled")

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.sequences:
            sequence = self.waiting.popleft()
            try:
                sequence.begin(self.cache.open(sequence.reusable(), sequence.prompt.reach))
                self.running.append(sequence)
            except Gemma4qError as error:
                sequence.end(None, error)

    def _compose(self) -> list[tuple[Sequence, Step]]:
        """Who takes part in the next step, with which rows."""
        parts: list[tuple[Sequence, Step]] = []
        answers = [s for s in self.running if s.generating]
        prompts = [s for s in self.running if not s.generating]
        most = self.limits.rows - len(answers)
        rows = min(most, BUSY_ROWS) if answers else most
        wanted = self.limits.wanted - len(self.running) + 1  # each of the others may want one
        for sequence in (*answers, *prompts):
            try:
                step = sequence.next_step(rows, most, wanted) if sequence.generating or rows > 0 else None
            except Gemma4qError as error:
                self._close(sequence, None, error)
                continue
            if step is not None:
                parts.append((sequence, step))
                if not sequence.generating:
                    rows, most = rows - len(step.tokens), most - len(step.tokens)
                    wanted -= int(np.count_nonzero(step.want)) - 1 if isinstance(step.want, np.ndarray) else 0
        return parts

    def _close(self, sequence: Sequence, finish: str | None, error: Gemma4qError | None = None, failed=False) -> None:
        if not sequence.over:
            sequence.end(finish, error)
        if sequence in self.running:
            self._release(sequence, failed)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence, failed: bool) -> None:
        self.running.remove(sequence)
        sequence.history.close(failed)


def model_changed() -> Gemma4qError:
    return Gemma4qError("model_changed", "the model's file was changed while it was in use: load it again")
