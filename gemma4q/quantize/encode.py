"""Floats to rows of blocks, by the compiled quantisers of csrc/quants/encode*.h on every core.

Owns checks of what is given and the threads' pool. Without importance the formats of one scale that llama.cpp has
plain quantisers for come out with its bytes; all others, and those with importance, are searched for the least sum of
importance * (x - decoded)^2. The bytes depend neither on the CPU nor on the number of threads.
"""

import os

import numpy as np

from ..abi import BLOCKS, Status, TensorType, address, ffi, lib, missing, row_bytes
from ..errors import Gemma4qError
from ..gguf.quants import dequantize, quantize

FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)


def cpus() -> int:
    """On how many CPUs we may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoder:
    """A pool of threads that quantises; calls from several threads of Python take turns.

    threads: None for one on each CPU we may run on; isa: an instruction set by name, None for the best here. Raises
    `no_native` where the compiled part of gemma4q is missing, `bad_option`, `unavailable`.
    """

    def __init__(self, threads: int | None = None, isa: str | None = None):
        if missing:
            raise Gemma4qError("no_native", f"{missing}: quantising needs them, install gemma4q where a C compiler is")
        if threads is None:
            threads = cpus()
        pool = lib.pool_new(threads)
        if not pool:
            raise Gemma4qError("bad_option", f"{threads} threads could not be started")
        self._pool = ffi.gc(pool, lib.pool_free)
        here = {ffi.string(lib.isa_name(i)).decode(): i for i in range(lib.isa_count()) if lib.isa_available(i)}
        if isa is not None and isa not in here:
            raise Gemma4qError("unavailable", f"instruction set {isa} is not here: choose {', '.join(here)}")
        self._isa = next(iter(here.values())) if isa is None else here[isa]

    def encode(self, x: np.ndarray, type: int, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 [rows, cols] -> uint8 [rows, row_bytes]; importance: float32 [cols], at least 0, of each column.

        Raises `numeric` with the index of the first NaN or infinity (block formats), `bad_block_size` where cols are no
        whole blocks, `bad_quant_type`, `bad_importance`.
        """
        return self._run(x, type, importance, None)

    def errors(self, x: np.ndarray, type: int, importance: np.ndarray | None = None) -> np.ndarray:
        """float64 [rows]: each the sum of importance * (x - decoded)^2 that `encode` leaves. Raises as it does."""
        errors = np.zeros(len(x))
        self._run(x, type, importance, errors)
        return errors

    def decode(self, data: np.ndarray, type: int) -> np.ndarray:
        """uint8 [bytes] of whole blocks -> float32 [values], on the calling thread alone. Raises `bad_quant_type`."""
        values, size = BLOCKS[type]
        out = np.empty(len(data) // size * values, "f4")
        if lib.dequantize_row(self._isa, type, address(data), ffi.cast("float *", address(out)), len(out)):
            raise Gemma4qError("bad_quant_type", f"there is no decoder for {TensorType(type).name}")
        return out

    def _run(self, x, type, importance, errors) -> np.ndarray:
        x = np.ascontiguousarray(x, "f4")
        kind = _check(x, type)
        if importance is not None:
            importance = _checked_importance(importance, x.shape[1])
        if kind in FLOATS:
            out = quantize(x, kind)
            if errors is not None:
                off = x.astype("f8") - dequantize(out, kind)
                errors[:] = (off * off * (1 if importance is None else importance)).sum(axis=1)
            return out
        out = np.empty((len(x), row_bytes(kind, x.shape[1])), np.uint8)
        given = ffi.NULL if importance is None else ffi.cast("float *", address(importance))
        wanted = ffi.NULL if errors is None else ffi.cast("double *", address(errors))
        source = ffi.cast("float *", address(x))
        status = lib.encode_rows(self._pool, self._isa, kind, source, *x.shape, given, address(out), wanted)
        if status == Status.NON_FINITE:
            row, col = np.argwhere(~np.isfinite(x))[0]
            raise Gemma4qError("numeric", f"{x[row, col]} at [{row}, {col}] cannot be stored as {kind.name}")
        if status != Status.OK:
            raise Gemma4qError("bad_quant_type", f"there is no encoder for {kind.name}")
        return out


def _check(x: np.ndarray, type: int) -> TensorType:
    if type not in BLOCKS:
        known = ", ".join(t.name for t in BLOCKS)
        raise Gemma4qError("bad_quant_type", f"tensor type {int(type)} is not known: types are {known}")
    kind = TensorType(type)
    values = BLOCKS[kind][0]
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % values:
        shape = " x ".join(map(str, x.shape))
        raise Gemma4qError("bad_block_size", f"{shape} values are not rows of whole blocks of {values} ({kind.name})")
    return kind


def _checked_importance(importance: np.ndarray, cols: int) -> np.ndarray:
    importance = np.ascontiguousarray(importance, "f4")
    if importance.shape != (cols,):
        shape = " x ".join(map(str, importance.shape))
        raise Gemma4qError("bad_importance", f"{shape} numbers are given for {cols} columns")
    bad = ~(np.isfinite(importance) & (importance >= 0))
    if bad.any():
        col = int(bad.argmax())
        raise Gemma4qError("bad_importance", f"{importance[col]} of column {col} is not a number from 0 up")
    return importance
