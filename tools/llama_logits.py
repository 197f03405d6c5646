"""llama.cpp's part of tools/accuracy.py, for an interpreter that has llama-cpp-python; of gemma4q it needs nothing.

    python llama_logits.py MODEL.gguf TEXTS.json OUT.npz     its logits of texts, lists of token ids, on the CPU

OUT.npz holds, over the rows of all texts, `prompt-f32` (each text one batch; keys, values and attention in F32),
`prompt-f16`, `generated-f32` (token by token), `generated-f16`: float32 [rows, vocab]; with `.experts` behind these
names what each row's layers chose: int32 [rows, layers * used], no columns where a model has no experts; and `about`.
"""

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np
from llama_cpp._ggml import libggml

# ggml_type, llama_flash_attn_type: flash attention reads keys and values as F16 whatever they are kept as, as
# build_attn_mha of llama-graph.cpp has it, so F32 is had without it; F16 is as llama.cpp runs unless told otherwise.
KV = {"f32": (0, 0), "f16": (1, -1)}
CHOICE = b"ffn_moe_topk"  # what llama-graph.cpp calls the experts chosen: [rows, used] of a wider matrix

libggml.ggml_get_name.restype = ctypes.c_char_p
libggml.ggml_get_name.argtypes = [ctypes.c_void_p]


class Tensor(ctypes.Structure):
    """How struct ggml_tensor of ggml.h begins."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]


def read_choice(tensor: int) -> np.ndarray:
    """int32 [rows, used], experts in ascending order."""
    shape = Tensor.from_address(tensor)
    (used, rows, *_), (_, stride, *_) = shape.ne, shape.nb
    wide = np.zeros((rows, stride // 4), np.int32)
    size = (rows - 1) * stride + 4 * used  # a view: behind its last row there is nothing of its own
    libggml.ggml_backend_tensor_get(tensor, wide.ctypes.data, 0, size)
    return np.sort(wide[:, :used], axis=1)


class Run:
    """A context for texts of up to `most` tokens, one after the other."""

    def __init__(self, model, kv: str, most: int):
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, most)
        params.n_threads = params.n_threads_batch = 1
        params.type_k, params.flash_attn_type = KV[kv]
        params.type_v = params.type_k
        params.cb_eval = self.callback = llama.ggml_backend_sched_eval_callback(self.look)
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with {kv} keys and values")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self.choices: list[np.ndarray] = []

    def look(self, tensor: int, ask: bool, _) -> bool:
        chosen = libggml.ggml_get_name(tensor).startswith(CHOICE)
        if chosen and not ask:
            self.choices.append(read_choice(tensor))
        return chosen or not ask

    def step(self, ids: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
        """Logits [rows, vocab] and experts chosen [rows, layers * used] of the next tokens."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        self.choices.clear()
        if status := llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {status} for {len(ids)} tokens at {start}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(ids), self.vocab)).copy()
        return logits, np.concatenate([np.zeros((len(ids), 0), np.int32), *self.choices], axis=1)

    def text(self, ids: list[int], together: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        if together:
            return [self.step(ids, 0)]
        return [self.step(ids[i : i + 1], i) for i in range(len(ids))]


def run(path: str, texts: str, out: str) -> None:
    with open(texts) as file:
        texts = json.load(file)
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    found = {"about": f"llama-cpp-python {llama.__version__}: {llama.llama_print_system_info().decode()}"}
    for kv in KV:
        context = Run(model, kv, max(map(len, texts)))
        for name, together in (("prompt", True), ("generated", False)):
            parts = [part for ids in texts for part in context.text(ids, together)]
            for key, values in zip((f"{name}-{kv}", f"{name}-{kv}.experts"), zip(*parts, strict=True), strict=True):
                found[key] = np.concatenate(values)
    np.savez(out, **found)


if __name__ == "__main__":
    llama.llama_backend_init()
    run(*sys.argv[1:])
