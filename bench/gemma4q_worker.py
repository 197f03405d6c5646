"""gemma4q's side of a comparison: a process that loads a model once and times steps when told to.

Run by vs_llamacpp.py. Steps are what the engine gives the session when one person chats: a prompt's rows with the
best tokens of the last one wanted, then one generated row at a time. The protocol is worker.py's.
"""

import sys
from importlib.metadata import version

import numpy as np
from worker import Timed, arguments, serve

import gemma4q
from gemma4q.abi import RowFlag, Status
from gemma4q.engine.prompt import token_keys
from gemma4q.plan.batch import Batch, Step


class Gemma4q:
    """One sequence of random tokens in a loaded model's cache."""

    def __init__(self, path: str, threads: int, longest: int):
        self.model = gemma4q.load(path, threads=threads, context=longest)
        self.session, self.cache = self.model.session, self.model.engine.cache
        self.batch = Batch(self.session.limits, self.model.plan.width, self.model.plan.vocab)
        self.rows = self.session.limits.rows
        self.random, self.tokens = np.random.default_rng(1), self.model.plan.vocab
        self.before = self.random.integers(5, self.tokens, longest)  # what fills the cache to a depth
        self.history = self.cache.open(token_keys([], False))

    def describe(self) -> dict:
        return {
            "engine": "gemma4q",
            "version": f"gemma4q {version('gemma4q')}",
            "system": f"{self.model.backend.name}, {self.model.threads}",
            "model": self.model.gguf.metadata.get("general.name", ""),
            "kernels": sorted(set(self.session.kernels().values())),
            "keys_and_values": self.model.kv.name,
            "weight_bytes_per_generated_token": self.weight_bytes(),
        }

    def weight_bytes(self) -> int:
        self.reset(0)
        return self.step(self.before[:1], generated=True)

    def step(self, ids: np.ndarray, generated: bool) -> int:
        """Runs `ids` as the next rows; the bytes of weights that were read."""
        start = self.history.length
        self.history.extend(len(ids))
        tables = self.history.tables(start + len(ids))
        self.batch.fill([Step(ids, start, *tables, generated=generated, want=int(RowFlag.WANT_TOP))])
        result = self.session.run(self.batch)
        if result.status != Status.OK:
            raise SystemExit(f"gemma4q: step of {len(ids)} rows at {start}: {result.status.name}")
        self.history.commit(token_keys(ids, generated))
        return result.weight_bytes

    def feed(self, ids: np.ndarray) -> None:
        for first in range(0, len(ids), self.rows):
            self.step(ids[first : first + self.rows], generated=False)

    def reset(self, depth: int) -> None:
        """Exactly `depth` tokens in the cache; those of the last time are still there."""
        self.history.close()
        self.history = self.cache.open(token_keys(self.before[:depth], False))
        self.feed(self.before[self.history.length : depth])
        self.history.checkpoint()

    def prompt(self, count: int, depth: int) -> Timed:
        self.reset(depth)
        ids = self.random.integers(5, self.tokens, count)
        with Timed() as timed:
            self.feed(ids)
        return timed

    def decode(self, count: int, depth: int) -> Timed:
        self.reset(depth)
        ids = self.random.integers(5, self.tokens, (count, 1))
        with Timed() as timed:
            for token in ids:
                self.step(token, generated=True)
        return timed


if __name__ == "__main__":
    given = arguments(sys.argv[1:])
    serve(Gemma4q(given.model, given.threads, given.longest))
