"""A prompt's matmul, ours and that of llama.cpp's ggml in turns: one process, the same blocks, the same rows.

    python bench/ggml_matmul.py ~/peers/lib/python3.11/site-packages/llama_cpp/lib
    python bench/ggml_matmul.py LIBRARIES --formats q8_0 --plain --cols 1536 --out 6144

LIBRARIES is the folder of libggml-base.so and libggml-cpu.so. Theirs has its weights repacked, as llama.cpp loads them
where it can, or (--plain) as the file has them; ours reads the file's. Ours quantises its rows on one thread, theirs on
all, and both times have that in them. A pair of which either had company (CPU time below 0.97 of threads x wall) is
made again.
"""

import argparse
import ctypes
import time
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from statistics import median

import numpy as np
from kernels import FORMATS, Bench, compiled

from gemma4q.abi import TensorType
from gemma4q.backends.native import isas
from gemma4q.measure.worker import Timed
from gemma4q.quantize.encode import Encoder

BUSY, PATIENCE, PAUSE = 0.97, 4, 0.02  # the pause: ggml's threads look for work for a while after theirs is done
WRONG = 0.5  # that a value may be off, of the values' spread: another matrix would be off by more than all of it
P, F32 = c_void_p, 0
BASE = {
    "ggml_init": (P, [P, c_size_t]), "ggml_new_tensor_2d": (P, [P, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (P, [P, P, P]), "ggml_new_graph": (P, [P]), "ggml_build_forward_expand": (None, [P, P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]), "ggml_backend_cpu_buffer_type": (P, []),
    "ggml_backend_tensor_set": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [P, P, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [P, P]), "ggml_backend_reg_dev_get": (P, [P, c_size_t]),
    "ggml_backend_reg_get_proc_address": (P, [P, c_char_p]), "ggml_backend_dev_supports_op": (c_bool, [P, P]),
    "ggml_backend_buft_name": (c_char_p, [P]),
}  # fmt: skip
CPU = {
    "ggml_backend_cpu_reg": (P, []), "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, c_int]),
}  # fmt: skip


class Room(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("bytes", c_size_t), ("memory", P), ("no_alloc", c_bool))


class Ggml:
    """ggml's CPU backend."""

    def __init__(self, folder: Path, threads: int):
        for name, functions in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
            try:
                library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise SystemExit(f"error: not_found: {error}") from None
            for function, (gives, takes) in functions.items():
                found = getattr(library, function)
                found.restype, found.argtypes = gives, takes
                setattr(self, function.removeprefix("ggml_"), found)
        self.init.argtypes = [Room]
        self.backend, self.plain = self.backend_cpu_init(), self.backend_cpu_buffer_type()
        self.device = self.backend_reg_dev_get(self.backend_cpu_reg(), 0)
        self.backend_cpu_set_n_threads(self.backend, threads)

    def repacked(self) -> int:
        """The type of buffers in which weights are laid out for products."""
        others = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        for buffer in ctypes.CFUNCTYPE(POINTER(P), P)(others)(self.device):
            if not buffer:
                break
            if self.backend_buft_name(buffer) == b"CPU_REPACK":
                return buffer
        raise SystemExit("error: unavailable: this ggml repacks nothing")


class Product:
    """Rows x [rows, cols] by a matrix of blocks uint8 [out, row_bytes], which lies in a buffer of that type."""

    def __init__(self, ggml: Ggml, blocks: np.ndarray, type: TensorType, x: np.ndarray, buffer: int):
        (rows, cols), out = x.shape, len(blocks)
        self.ggml, self.shape = ggml, (rows, out)
        weights, step = (ggml.init(Room(1 << 20, None, True)) for _ in range(2))
        matrix = ggml.new_tensor_2d(weights, int(type), cols, out)
        ggml.backend_alloc_ctx_tensors_from_buft(weights, buffer)
        given, self.graph = ggml.new_tensor_2d(step, F32, cols, rows), ggml.new_graph(step)
        self.found = ggml.mul_mat(step, matrix, given)
        if not ggml.backend_dev_supports_op(ggml.device, self.found):
            raise SystemExit(f"error: unavailable: this ggml does not repack {type.name}; --plain times it as it is")
        ggml.backend_tensor_set(matrix, blocks.ctypes.data, 0, blocks.nbytes)
        ggml.build_forward_expand(self.graph, self.found)
        ggml.backend_alloc_ctx_tensors_from_buft(step, ggml.plain)
        ggml.backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)

    def run(self) -> Timed:
        with Timed() as timed:
            self.ggml.backend_graph_compute(self.ggml.backend, self.graph)
        return timed

    def values(self) -> np.ndarray:
        """float32 [rows, out] of the last run."""
        y = np.zeros(self.shape, np.float32)
        self.ggml.backend_tensor_get(self.found, y.ctypes.data, 0, y.nbytes)
        return y


def measure(ggml: Ggml, type: TensorType, isa: str, given: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of ours and of theirs, in pairs that begin with either in turn."""
    random = np.random.default_rng(1)
    exact = random.normal(0, 0.02, (given.out, given.cols)).astype(np.float32)
    blocks = Encoder(given.threads).encode(exact, type)
    bench = Bench(given.threads, given.cols, given.out, blocks.nbytes)
    bench.data[:] = blocks.reshape(-1)
    _, weights, ours = compiled(bench, isa, type, given.rows)
    x = random.normal(0, 1, (given.rows, given.cols)).astype(np.float32)
    theirs = Product(ggml, blocks, type, x, ggml.plain if given.plain else ggml.repacked())
    sides, found = (lambda: ours(weights[:1]), theirs.run), []
    for side in sides:
        side()
    if np.abs(theirs.values()[:4] - x[:4] @ exact.T).max() > WRONG * (x[:4] @ exact.T).std():
        raise SystemExit(f"error: bad_numeric: ggml's product of {type.name} is another one")
    for number in range(PATIENCE * given.runs):
        pair = [None, None]
        for side in (1, 0) if number % 2 else (0, 1):
            time.sleep(PAUSE)
            pair[side] = sides[side]()
        if min(timed.cpu_seconds / (given.threads * timed.seconds) for timed in pair) >= BUSY:
            found.append((pair[0].seconds, pair[1].seconds))
        if len(found) == given.runs:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path)
    parser.add_argument("--formats", nargs="*", default=["q4_0", "q4_k"], choices=FORMATS)
    parser.add_argument("--isa", default=next(iter(isas())), help="ours; default: the best here")
    parser.add_argument("--plain", action="store_true", help="theirs without repacking")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=3840)
    parser.add_argument("--out", type=int, default=15360)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--runs", type=int, default=9)
    given = parser.parse_args()
    ggml, work = Ggml(given.libraries, given.threads), 2e-9 * given.rows * given.cols * given.out
    for name in given.formats:
        found = measure(ggml, TensorType[name.upper()], given.isa, given)
        if not found:
            raise SystemExit(f"error: busy: {name}: others had the cores in every pair")
        ours, theirs = (work / median(side) for side in zip(*found, strict=True))
        ratios = [b / a for a, b in found]
        what = f"{name:6} {given.rows} rows, {given.cols} x {given.out}, {given.isa}"
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), {len(found)} pairs"
        print(f"{what}: {ours:.0f} GOP/s, ggml {theirs:.0f}, ratio {spread}", flush=True)


if __name__ == "__main__":
    main()
