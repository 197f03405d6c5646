"""What llama.cpp's plain quantisers make of values of all sorts: the known answers that tests hold `encode` to.

    python tools/encode_oracle.py ~/peers/bin/python tests/data/encode.npz
    python tools/encode_oracle.py ~/peers/bin/python tests/data/encode.npz --file F32.gguf Q4_0.gguf --file ...

The first argument is an interpreter that has llama-cpp-python. Of each --file, a model in F32 and what llama-quantize
made of it, the first rows of each matrix of the first layer and of the tables are kept too. `NAME` in the npz file are
values, float32 [rows, cols]; `NAME as TYPE` their blocks, uint8 [rows, row_bytes].
"""

import argparse
import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma4q.abi import TensorType, row_bytes
from gemma4q.gguf.quants import dequantize
from gemma4q.gguf.reader import open_gguf

PLAIN = tuple(TensorType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"))
ROWS, COLS = 8, 96
KEPT = 2  # rows of a matrix of a model
FIRST = re.compile(r"blk\.0\..*\.weight|token_embd\.weight|per_layer_token_embd\.weight")


def quantiser(python: str) -> Callable[..., np.ndarray] | None:
    """(type, float32 x [rows, cols], importance or None) -> uint8 [rows, row_bytes], by the ggml of an interpreter."""
    program = "from importlib.util import find_spec as found; print(getattr(found('llama_cpp'), 'origin', ''))"
    package = subprocess.run([python, "-P", "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    libraries = sorted((Path(package).parent / "lib").glob("libggml-base.*")) if package else []
    if not libraries:
        return None
    function = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = ctypes.c_int, pointer, pointer, number, number, number, pointer
    function.restype = ctypes.c_size_t

    def quantize(kind: int, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        out = np.zeros((len(x), row_bytes(kind, x.shape[1])), "u1")
        given = None if importance is None else importance.ctypes.data
        if function(kind, x.ctypes.data, out.ctypes.data, 0, *x.shape, given) != out.nbytes:
            raise SystemExit(f"ggml wrote another size of {TensorType(kind).name}")
        return out

    return quantize


def values() -> dict[str, np.ndarray]:
    """float32 [ROWS, COLS] of every sort, the last three where scales are no ordinary half floats or none at all."""
    random = np.random.default_rng(11)
    normal = random.standard_normal((ROWS, COLS))
    zeros = np.where(normal < 0, -0.0, 0.0)
    zeros[:, :32] = -0.0
    every = {
        "normal": normal,
        "heavy-tailed": random.standard_t(1.5, (ROWS, COLS)),
        "tied": random.integers(-3, 4, (ROWS, COLS)),
        "of one sign": -np.abs(normal),
        "zeros": zeros,
        "subnormal": np.ldexp(normal, random.integers(-150, -120, (ROWS, 1))),
        "small": np.ldexp(normal, random.integers(-30, -8, (ROWS, 1))),
        "huge": np.clip(np.ldexp(normal, random.integers(14, 127, (ROWS, 1))), -3.4e38, 3.4e38),
    }
    return {name: np.ascontiguousarray(x, np.float32) for name, x in every.items()}


def of_files(exact: Path, quantised: Path) -> dict[str, np.ndarray]:
    source, found, out = open_gguf(exact), open_gguf(quantised), {}
    for tensor in found.tensors.values():
        if tensor.type in PLAIN and FIRST.fullmatch(tensor.name):
            cols, name = tensor.shape[-1], f"{exact.parent.name} {tensor.name}"
            size = KEPT * row_bytes(tensor.type, cols)
            out[name] = dequantize(source.tensors[tensor.name].data[: KEPT * cols * 4], TensorType.F32).reshape(
                KEPT, cols
            )
            out[f"{name} as {TensorType(tensor.type).name}"] = tensor.data[:size].reshape(KEPT, -1)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", help="an interpreter with llama-cpp-python")
    parser.add_argument("out", type=Path)
    parser.add_argument("--file", nargs=2, type=Path, action="append", default=[], metavar=("F32", "QUANTISED"))
    given = parser.parse_args()
    quantize = quantiser(given.python)
    if quantize is None:
        raise SystemExit(f"{given.python} has no llama-cpp-python")
    found = values()
    found |= {f"{name} as {kind.name}": quantize(kind, x) for name, x in values().items() for kind in PLAIN}
    for pair in given.file:
        found |= of_files(*pair)
    np.savez_compressed(given.out, **found)


if __name__ == "__main__":
    main()
