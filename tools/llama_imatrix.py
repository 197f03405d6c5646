"""llama.cpp's part of tests/test_calibration_peers.py, for an interpreter that has llama-cpp-python and no gemma4q.

    python llama_imatrix.py MODEL.gguf TEXTS.json OUT.npz        what its matrices meet in texts, lists of ids

OUT.npz holds of each tensor NAME `NAME.in_sum2` float64 [n, cols], the sums of squares of what its columns were
multiplied with, and `NAME.counts` int64 [n], the rows; n is 1, or experts.
"""

import sys

import numpy as np
from llama_ggml import Reader, Tensor, libggml, opened, texts_of, values

PRODUCT, CHOSEN_PRODUCT = b"MUL_MAT", b"MUL_MAT_ID"


class Sums:
    """What a callback that sees every op finds."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}

    def look(self, tensor: int, ask: bool) -> bool:
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
    found, texts = Sums(), texts_of(texts)
    reader = Reader(opened(path), max(map(len, texts)), found.look)
    for ids in texts:
        reader.forget()
        reader.read(ids)
    sums = {f"{name}.in_sum2": values for name, values in found.sums.items()}
    np.savez(out, **sums, **{f"{name}.counts": values for name, values in found.counts.items()})


if __name__ == "__main__":
    collect(*sys.argv[1:])
