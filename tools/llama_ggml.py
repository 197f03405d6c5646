"""What llama.cpp computes of texts, op by op: for scripts that run where llama-cpp-python is and gemma4q need not be.

Owns ggml's structures, by ctypes, and a model that reads; what is looked for among its tensors is the scripts' own.
"""

import ctypes
import json
from collections.abc import Callable

import llama_cpp as llama
import numpy as np
from llama_cpp._ggml import libggml


class Tensor(ctypes.Structure):
    """How struct ggml_tensor of ggml.h begins."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


for name, gives, takes in (
    ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_op_desc", ctypes.c_char_p, [ctypes.c_void_p]),
    ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
    ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
):
    getattr(libggml, name).restype, getattr(libggml, name).argtypes = gives, takes


def values(tensor: int, kind: type) -> np.ndarray:
    """Of four-byte numbers, [ne2, ne1, ne0], wherever they lie; also of a view into a wider tensor."""
    shape, raw = Tensor.from_address(tensor), np.zeros(libggml.ggml_nbytes(tensor), np.uint8)
    libggml.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.size)
    (cols, rows, matrices, _), (_, row, matrix, _) = shape.ne, shape.nb
    return np.lib.stride_tricks.as_strided(raw.view(kind), (matrices, rows, cols), (matrix, row, 4)).copy()


def opened(path: str):
    """A model, on the CPU alone."""
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    return model


def texts_of(path: str) -> list[list[int]]:
    """Texts of a JSON file, lists of token ids."""
    with open(path) as file:
        return json.load(file)


class Reader:
    """A context for texts of up to `most` tokens, one after the other.

    look(tensor, ask): asked of each op whether its values are wanted, and then called when they are there.
    kv, flash_attention: a ggml_type and a llama_flash_attn_type.
    """

    def __init__(self, model, most: int, look: Callable[[int, bool], bool], kv: int = 0, flash_attention: int = 0):
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, most)
        params.n_threads = params.n_threads_batch = 1
        params.type_k, params.type_v, params.flash_attn_type = kv, kv, flash_attention
        self.callback = llama.ggml_backend_sched_eval_callback(lambda tensor, ask, _: look(tensor, ask))
        params.cb_eval = self.callback
        self.context = llama.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with keys and values of ggml_type {kv}")
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)

    def forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def read(self, ids: list[int], start: int = 0) -> None:
        """Tokens at positions from `start` on, all of whose logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if status := llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {status} for {len(ids)} tokens at {start}")
