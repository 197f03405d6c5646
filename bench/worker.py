"""What both sides of a comparison share: the clock, and the protocol between a worker process and vs_llamacpp.py.

A worker loads its model, prints one line of JSON about itself, then answers each line {"metric", "count", "depth"} with
one line {"seconds", "cpu_seconds"}. Between two lines it blocks on stdin: it burns nothing while the other is timed.
"""

import argparse
import json
import os
import sys
import time
from typing import Protocol


class Timed:
    """Wall and CPU seconds (all threads of this process) of a with block."""

    def __enter__(self):
        self.seconds, self.cpu_seconds = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.seconds
        self.cpu_seconds = time.process_time() - self.cpu_seconds


class Side(Protocol):
    """An engine under measurement. Both calls put it at `depth` tokens first, outside the timing."""

    def describe(self) -> dict: ...
    def prompt(self, count: int, depth: int) -> Timed: ...  # `count` tokens in one call, logits of the last
    def decode(self, count: int, depth: int) -> Timed: ...  # `count` steps of one token, logits of each


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    return parser.parse_args(argv)


def serve(side: Side) -> None:
    """Answers requests until stdin ends. Whatever a library prints on stdout goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps(side.describe()), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        timed = getattr(side, asked["metric"])(asked["count"], asked["depth"])
        print(json.dumps({"seconds": timed.seconds, "cpu_seconds": timed.cpu_seconds}), file=answers)
