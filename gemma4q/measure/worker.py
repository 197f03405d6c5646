"""One side of a measurement: a process that loads a model once, and times what it is asked for, in lines of JSON.

    python -P worker.py gemma4q MODEL.gguf '{"threads": 2, "context": 1024}'

It prints {"about": ...} when it is ready, then answers each line {"do": NAME, ...} with a line, or with {"error": ...}.
Between two lines it blocks on stdin: it burns nothing while another side is timed.

Any build's interpreter may run this file, so it stands alone: the standard library and numpy, and of gemma4q no more
than `Gemma4q` below touches. That must stay, or be asked for with `getattr`: `load` and its keywords; of the model
`generate(ids, max_tokens=, temperature=)` with `.stats`, `.session` with `run`, `limits`, `kernels` (and `profile` and
`packed.plan.ops`, where it has them), `.engine.cache.open`, `.plan.width` and `.vocab`, `.backend`, `.threads`, `.kv`;
of a history `extend`, `tables`, `commit`, `checkpoint`, `close` (and `rollback`); `plan.batch.Batch` and `Step`,
`engine.prompt.token_keys`, `abi.RowFlag` and `Status`.
"""

import ctypes
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GEMM = 768  # of a square float32 product
PROBE_BYTES = 1 << 28  # beyond the caches
FEW = 1024  # different tokens
ROLLBACK = 64  # positions that a history can always take back


class Fault(Exception):
    """What is wrong, by a stable word and in a line."""

    def __init__(self, kind: str, message: str):
        self.kind, self.message = kind, message


class Timed:
    """Wall and CPU seconds (all threads of this process) of a with block, added up over several."""

    def __init__(self):
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self.start
        self.cpu_seconds += time.process_time() - self.cpu_start

    def answer(self) -> dict:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


class Gemma4q:
    """A loaded model, and one sequence of random tokens in its cache."""

    def __init__(self, path: str, given: dict):
        import numpy as np

        import gemma4q

        if given.pop("drop_file_cache", False):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.np, self.model = np, gemma4q.load(path, **given)
        self.session, self.cache = self.model.session, self.model.engine.cache
        self.random, self.before, self.batch = np.random.default_rng(1), None, None
        self.few = self.random.integers(5, self.model.plan.vocab, FEW)
        self.depth = -1  # what the history began with; -1: there is none
        profile = getattr(self.session, "profile", None)
        self.times = profile(True) if profile else None

    def about(self) -> dict:
        plan = getattr(getattr(self.session, "packed", None), "plan", None)
        names = self.session.kernels()  # as `matmul_q4_0_avx512`
        kernels = [names[op.name].rpartition("_") for op in plan.ops] if plan and self.times is not None else []
        return {
            "engine": "gemma4q",
            "backend": self.model.backend.name,
            "isa": kernels[0][2] if kernels else None,
            "threads": self.model.threads.count,
            "kv": self.model.kv.name.lower(),
            "kernels": [kernel for kernel, _, _ in kernels],
            "rows": self.session.limits.rows,
        }

    def _step(self, ids, generated: bool, timed: Timed) -> None:
        """Runs `ids` as the next rows, the best tokens of the last one wanted."""
        from gemma4q.abi import RowFlag, Status
        from gemma4q.engine.prompt import token_keys
        from gemma4q.plan.batch import Step

        start = self.history.length
        self.history.extend(len(ids))
        tables = self.history.tables(start + len(ids))
        self.batch.fill([Step(ids, start, *tables, generated=generated, want=int(RowFlag.WANT_TOP))])
        with timed:
            result = self.session.run(self.batch)
        if result.status != Status.OK:
            raise Fault("worker_failed", f"step of {len(ids)} rows at {start}: {result.status.name}")
        self.history.commit(token_keys(ids, generated))

    def _feed(self, ids, rows: int, timed: Timed) -> None:
        for first in range(0, len(ids), rows):
            self._step(ids[first : first + rows], False, timed)

    def _reset(self, depth: int) -> None:
        """Exactly `depth` tokens in the cache; those of the last time are still there."""
        from gemma4q.engine.prompt import token_keys
        from gemma4q.plan.batch import Batch

        if self.batch is None:
            limits = self.session.limits
            self.batch = Batch(limits, self.model.plan.width, self.model.plan.vocab)
            self.before = self._tokens(limits.context)
        else:
            more, rollback = self.history.length - depth, getattr(self.history, "rollback", None)
            if rollback and depth == self.depth and 0 <= more <= ROLLBACK:
                rollback(more)
                return
            self.history.close()
        self.depth, self.history = depth, self.cache.open(token_keys(self.before[:depth], False))
        self._feed(self.before[self.history.length : depth], self.session.limits.rows, Timed())
        self.history.checkpoint()

    def _tokens(self, count: int):
        """Random tokens of a fixed few, so that rows of a table on disk are read but once."""
        return self.random.choice(self.few, count)

    def _timed(self, depth: int, run) -> dict:
        """`run(timed)` at a depth; `ops`: nanoseconds of each op of the plan, where they are counted."""
        self._reset(depth)
        timed = Timed()
        if self.times is not None:
            self.times[:] = 0
        run(timed)
        return timed.answer() | {"ops": [] if self.times is None else self.times.tolist()}

    def prompt(self, count: int, depth: int, batch: int) -> dict:
        """`count` tokens, up to `batch` in a step."""
        ids, rows = self._tokens(count), min(batch, self.session.limits.rows)
        return self._timed(depth, lambda timed: self._feed(ids, rows, timed))

    def decode(self, count: int, depth: int, batch: int = 0) -> dict:
        """`count` steps of one token."""
        ids = self._tokens(count)
        return self._timed(depth, lambda timed: [self._step(ids[i : i + 1], True, timed) for i in range(count)])

    def both(self, prompt: int, count: int, batch: int, depth: int) -> dict:
        """A prompt and the tokens after it."""
        ids, rows = self._tokens(prompt + count), min(batch, self.session.limits.rows)

        def run(timed: Timed) -> None:
            self._feed(ids[:prompt], rows, timed)
            for i in range(prompt, prompt + count):
                self._step(ids[i : i + 1], True, timed)

        return self._timed(depth, run)

    def first_token(self, prompt: int) -> dict:
        """Seconds from a new prompt to its first token, through the public API."""
        self.talk = self._tokens(prompt).tolist()
        return self._answer(self.talk)

    def next_turn(self, answer: int, turn: int) -> dict:
        """Seconds to the first token of a turn after an answer, when all but the turn is cached."""
        spoken = self.model.generate(self.talk, max_tokens=answer, temperature=0)
        for _ in spoken:
            pass
        return self._answer([*self.talk, *spoken.tokens, *self._tokens(turn).tolist()])

    def between(self, count: int) -> dict:
        """Of the time of `count` tokens of an answer, the share in which no op ran; and barriers of their steps."""
        if self.times is None:
            return {"host": None, "barriers": None}
        spoken, barriers = self.model.generate(self.talk, max_tokens=1 + count), []
        next(iter(spoken), None)
        self.times[:] = 0
        with Timed() as timed:
            for _ in spoken:
                barriers.append(int(self.session.result[0]["barriers"]))
        host = 1 - float(self.times.sum()) / 1e9 / timed.seconds if barriers else None
        return {"host": host, "barriers": max(barriers, default=None)}

    def _answer(self, ids: list[int]) -> dict:
        spoken = self.model.generate(ids, max_tokens=1, temperature=0)
        for _ in spoken:
            pass
        return {"seconds": spoken.stats.first_token_seconds, "reused": spoken.stats.reused_tokens}

    def memory(self) -> dict:
        """RssAnon, RssFile and what was read from the disk, in bytes, as far as the system tells."""
        return {
            name: int(line.split()[1]) * (1024 if line.endswith("kB") else 1)
            for path, names in (("status", ("RssAnon", "RssFile")), ("io", ("read_bytes",)))
            for line in _lines(Path("/proc/self") / path)
            for name in names
            if line.startswith(name + ":")
        }


class LlamaCpp:
    """The same of llama.cpp, by the C API that llama-bench uses, the same way; needs llama-cpp-python."""

    def __init__(self, path: str, given: dict):
        try:
            import llama_cpp as llama
        except ImportError:
            raise Fault("unavailable", "this Python has no llama-cpp-python: say --peer-python where it is") from None
        import numpy as np

        self.llama, self.random, self.saved = llama, np.random.default_rng(1), {}
        self.log = llama.llama_log_callback(lambda level, text, user: None)
        llama.llama_log_set(self.log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise Fault("bad_model", f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = given["context"], max(512, given["context"]), 512
        params.n_threads = params.n_threads_batch = self.threads = given["threads"]
        params.swa_full = False  # as llama-server runs it: sliding layers keep their window only
        self.context = llama.llama_init_from_model(self.model, params)
        self.memory_of = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self.few = self.random.integers(5, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model)), FEW)
        self.position = 0

    def about(self) -> dict:
        system = self.llama.llama_print_system_info().decode()
        version = f"llama-cpp-python {self.llama.__version__}"
        return {"engine": "llama.cpp", "version": version, "system": system, "threads": self.threads, "kernels": []}

    def _step(self, count: int, timed: Timed) -> None:
        """One llama_decode of `count` random tokens, logits of the last."""
        batch = self.batch
        batch.n_tokens = count
        for i, token in enumerate(self.random.choice(self.few, count).tolist()):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == count - 1
        with timed:
            status = self.llama.llama_decode(self.context, batch)
        if status:
            raise Fault("worker_failed", f"llama_decode gave {status} for {count} tokens at {self.position}")
        self.position += count

    def _reset(self, depth: int) -> None:
        """Exactly `depth` tokens in the cache, restored from a snapshot after the first time."""
        llama = self.llama
        llama.llama_memory_clear(self.memory_of, True)
        self.position = 0
        if depth in self.saved:
            state = self.saved[depth]
            llama.llama_state_seq_set_data(self.context, state, len(state), 0)
            self.position = depth
        elif depth:
            while self.position < depth:
                self._step(min(512, depth - self.position), Timed())
            state = (ctypes.c_uint8 * llama.llama_state_seq_get_size(self.context, 0))()
            llama.llama_state_seq_get_data(self.context, state, len(state), 0)
            self.saved[depth] = state

    def _timed(self, depth: int, counts: list[int]) -> dict:
        self._reset(depth)
        timed = Timed()
        for count in counts:
            self._step(count, timed)
        return timed.answer() | {"ops": []}

    def prompt(self, count: int, depth: int, batch: int = 0) -> dict:
        return self._timed(depth, [count])

    def decode(self, count: int, depth: int, batch: int = 0) -> dict:
        return self._timed(depth, [1] * count)

    def both(self, prompt: int, count: int, depth: int, batch: int = 0) -> dict:
        return self._timed(depth, [prompt] + [1] * count)


class Probe:
    """What the machine gives at this moment, by means no kernel of ours is part of: a plain read, numpy's product."""

    def __init__(self, path: str, given: dict):
        os.putenv("OPENBLAS_NUM_THREADS", "1")  # each of our threads multiplies on its own
        os.putenv("MKL_NUM_THREADS", "1")
        import numpy as np

        self.threads = given["threads"]
        self.a = np.random.default_rng(1).normal(0, 1, (self.threads, GEMM, GEMM)).astype(np.float32)
        self.out = np.empty_like(self.a)
        self.pool, self.matmul = ThreadPoolExecutor(self.threads), np.matmul
        self.probe()

    def about(self) -> dict:
        return {"engine": "probe", "threads": self.threads}

    def _multiply(self, i: int) -> None:
        for _ in range(4):
            self.matmul(self.a[i], self.a[i], out=self.out[i])

    def probe(self) -> dict:
        """Bytes and float operations a second, of all threads."""
        from gemma4q.backends import native

        with Timed() as timed:
            list(self.pool.map(self._multiply, range(self.threads)))
        read = native.bandwidth(self.threads, PROBE_BYTES) if native.BACKEND.available() is None else None
        return {"read": read, "gemm": 8 * self.threads * GEMM**3 / timed.seconds}


ENGINES = {"gemma4q": Gemma4q, "llama.cpp": LlamaCpp, "probe": Probe}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fault(error: Exception) -> dict:
    said = f"{type(error).__name__}: {error}"
    return {"error": {"kind": getattr(error, "kind", "worker_failed"), "message": getattr(error, "message", said)}}


def main(engine: str, path: str, given: str) -> None:
    """Answers requests until stdin ends. Whatever a library prints on stdout goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        side = ENGINES[engine](path, json.loads(given))
        print(json.dumps({"about": side.about()}), file=answers)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(getattr(side, asked.pop("do"))(**asked)), file=answers)
    except Exception as error:
        print(json.dumps(_fault(error)), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
