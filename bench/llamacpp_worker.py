"""llama.cpp's side of a comparison: a process that loads a model once and times steps when told to.

Run by vs_llamacpp.py with an interpreter that has llama-cpp-python; nothing of gemma4q is imported. Uses the C API that
llama-bench uses, the same way: a batch of random tokens, logits of the last one. The protocol is worker.py's.
"""

import ctypes
import sys

import llama_cpp as llama
import numpy as np
from worker import Timed, arguments, serve


class Log:
    """Keeps the lines of the loader that say where the weights went."""

    def __init__(self):
        self.lines: list[str] = []
        self.callback = llama.llama_log_callback(self.take)
        llama.llama_log_set(self.callback, ctypes.c_void_p(0))

    def take(self, level: int, text: bytes, user: object) -> None:
        line = text.decode(errors="replace").strip()
        if "buffer size" in line or "error" in line or "failed" in line:
            self.lines.append(line)


class LlamaCpp:
    """One context of `longest` positions; `reset` puts it at a depth, `step` feeds tokens."""

    def __init__(self, path: str, threads: int, longest: int, prompt: int):
        self.log = Log()
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit("\n".join(self.log.lines) or f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = longest, max(512, prompt), 512
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False  # as llama-server runs it: sliding layers keep their window only
        self.context = llama.llama_init_from_model(self.model, params)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)
        vocabulary = llama.llama_model_get_vocab(self.model)
        self.random, self.tokens = np.random.default_rng(1), llama.llama_vocab_n_tokens(vocabulary)
        self.saved: dict[int, ctypes.Array] = {}
        self.position = 0

    def describe(self) -> dict:
        text = ctypes.create_string_buffer(256)
        llama.llama_model_desc(self.model, text, 256)
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {llama.__version__}",
            "system": llama.llama_print_system_info().decode(),
            "model": text.value.decode(),
            "weights": [line for line in self.log.lines if "model buffer size" in line],
        }

    def step(self, count: int) -> None:
        """One llama_decode of `count` random tokens, logits of the last."""
        batch = self.batch
        batch.n_tokens = count
        for i, token in enumerate(self.random.integers(5, self.tokens, count).tolist()):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == count - 1
        status = llama.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode gave {status} for {count} tokens at {self.position}")
        self.position += count

    def reset(self, depth: int) -> None:
        """Exactly `depth` tokens in the cache, restored from a snapshot after the first time."""
        llama.llama_memory_clear(self.memory, True)
        self.position = 0
        if depth in self.saved:
            state = self.saved[depth]
            llama.llama_state_seq_set_data(self.context, state, len(state), 0)
            self.position = depth
        elif depth:
            while self.position < depth:
                self.step(min(512, depth - self.position))
            state = (ctypes.c_uint8 * llama.llama_state_seq_get_size(self.context, 0))()
            llama.llama_state_seq_get_data(self.context, state, len(state), 0)
            self.saved[depth] = state

    def prompt(self, count: int, depth: int) -> Timed:
        self.reset(depth)
        with Timed() as timed:
            self.step(count)
        return timed

    def decode(self, count: int, depth: int) -> Timed:
        self.reset(depth)
        with Timed() as timed:
            for _ in range(count):
                self.step(1)
        return timed


if __name__ == "__main__":
    given = arguments(sys.argv[1:])
    serve(LlamaCpp(given.model, given.threads, given.longest, given.prompt))
