"""A worker process as its caller sees it: started, asked in lines of JSON, and gone when the caller is done.

What goes wrong in it (its own words, silence, death) is a `Gemma4qError`. What is asked, and why, is not known here.
"""

import contextlib
import json
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import Gemma4qError

WORKER = Path(__file__).with_name("worker.py")
PATIENCE_SECONDS = 900  # for one answer


class Worker:
    """`engine` of `python`, with a model loaded. about: what it said of itself. started: perf_counter before its start.

    Raises whatever the engine says of the file, and `worker_died`. Also a context manager.
    """

    def __init__(self, python: str, engine: str, path: str, given: Mapping[str, object]):
        self.engine, self.threads = engine, given["threads"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.started = time.perf_counter()
        try:
            self.process = subprocess.Popen(
                [python, "-P", str(WORKER), engine, path, json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            )  # fmt: skip
        except OSError as error:
            raise Gemma4qError("unknown_build", f"{python}: {error.strerror}") from None
        try:
            self.about = self._answer()["about"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments) -> dict:
        """What the worker answers to `do`; see worker.py for what there is."""
        try:
            print(json.dumps({"do": do} | arguments), file=self.process.stdin, flush=True)
        except OSError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> dict:
        if not select.select([self.process.stdout], [], [], PATIENCE_SECONDS)[0]:
            raise Gemma4qError("worker_died", f"the {self.engine} worker said nothing for {PATIENCE_SECONDS} seconds")
        line = self.process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._died() from None
        if fault := answer.get("error"):
            raise Gemma4qError(fault["kind"], fault["message"])
        return answer

    def _died(self) -> Gemma4qError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or [f"exit status {self.process.returncode}"])[-1]
        return Gemma4qError("worker_died", f"the {self.engine} worker ended: {last}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
