"""llama.cpp's part of tests/test_calibration_peers.py, for an interpreter that has llama-cpp-python and no gemma4q.

    python llama_imatrix.py MODEL.gguf TEXTS.json OUT.npz        what its matrices meet in texts, lists of ids

OUT.npz holds of each tensor NAME `NAME.in_sum2` float64 [n, cols], the sums of squares of what its columns were
multiplied with, and `NAME.counts` int64 [n], the rows; n is 1, or experts.
"""

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np
from llama_cpp._ggml import libggml

PRODUCT, CHOSEN_PRODUCT = b"MUL_MAT", b"MUL_MAT_ID"


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
    """Of four-byte numbers, [ne2, ne1, ne0], wherever they lie."""
    shape, raw = Tensor.from_address(tensor), np.zeros(libggml.ggml_nbytes(tensor), np.uint8)
    libggml.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.size)
    (cols, rows, matrices, _), (_, row, matrix, _) = shape.ne, shape.nb
    return np.lib.stride_tricks.as_strided(raw.view(kind), (matrices, rows, cols), (matrix, row, 4)).copy()


class Sums:
    """What a callback that sees every op finds."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def look(self, tensor: int, ask: bool, _) -> bool:
        op = libggml.ggml_op_desc(tensor)
        wanted = op in (PRODUCT, CHOSEN_PRODUCT)
        if ask or not wanted:
            return wanted or not ask
        matrix, rows, chosen, *_ = Tensor.from_address(tensor).src
        name = libggml.ggml_get_name(matrix).decode()
        if name.endswith(".weight"):
            squares = values(rows, np.float32).astype(np.float64) ** 2
            if op == PRODUCT:
                self.add(name, 1, 0, squares.reshape(-1, squares.shape[-1]))
            else:
                self.add_chosen(name, Tensor.from_address(matrix).ne[2], squares, values(chosen, np.int32)[0])
        return True

    def add_chosen(self, name: str, experts: int, squares: np.ndarray, chosen: np.ndarray) -> None:
        """squares [tokens, used or 1, cols], chosen [tokens, used]."""
        each = np.broadcast_to(squares, (*chosen.shape, squares.shape[-1]))
        for expert in range(experts):
            self.add(name, experts, expert, each[chosen == expert])

    def add(self, name: str, experts: int, expert: int, squares: np.ndarray) -> None:
        sums = self.sums.setdefault(name, np.zeros((experts, squares.shape[-1])))
        counts = self.counts.setdefault(name, np.zeros(experts, np.int64))
        sums[expert] += squares.sum(0)
        counts[expert] += len(squares)


def collect(path: str, texts: str, out: str) -> None:
    with open(texts) as file:
        texts = json.load(file)
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    found, params = Sums(), llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, *map(len, texts))
    params.n_threads = params.n_threads_batch = 1
    params.type_k, params.type_v, params.flash_attn_type = 0, 0, 0  # F32
    params.cb_eval = callback = llama.ggml_backend_sched_eval_callback(found.look)
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(params.n_batch, 0, 1)
    for ids in texts:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if status := llama.llama_decode(context, batch):
            raise SystemExit(f"llama_decode gave {status}")
    del callback
    sums = {f"{name}.in_sum2": values for name, values in found.sums.items()}
    np.savez(out, **sums, **{f"{name}.counts": values for name, values in found.counts.items()})


if __name__ == "__main__":
    llama.llama_backend_init()
    collect(*sys.argv[1:])
